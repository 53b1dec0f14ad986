"""How many operations a step launches, and how many bytes they move: counted on meta tensors, nothing is computed.

On a GPU each operation is a kernel or a few, and a step of many small ones is bound by launching them. Counted are ATen
calls that are not views, with the sizes of bands and chunks that are used off the CPU; ours and the straightforward
implementation with the libraries' own modules, for the same views. Dropout is off.

    python -m benchmarks.launches --out benchmarks/results/launches.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import check_out, describe_machine, markdown, say, write_json
from benchmarks.train_step.cases import Case

COLUMNS = ("backbone", "part", "calls", "library_calls", "calls_ratio", "gb", "library_gb")
CLASSES, IMAGES, SIDE_PX, KEEP = 150, 16, 512, 0.3


class Calls(TorchDispatchMode):
    """Counts calls that are not views, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func not in _NO_LAUNCH:
            self.calls += 1
            moved = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in moved)
        return result


_NO_LAUNCH = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.promote_types.default,
}


def count(run: Callable[[], object]) -> tuple[int, float]:
    """Calls and 10⁹ bytes of one run."""
    with Calls() as calls:
        run()
    return calls.calls, calls.bytes / 1e9


@contextmanager
def no_autocast() -> Iterator[None]:
    """`torch.autocast` does not know the meta device; here it would only be switched off."""
    with (
        mock.patch.object(torch, "autocast", return_value=nullcontext()),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
    ):
        yield


def rows_of(backbone: str, images: int, side_px: int, classes: int) -> list[dict[str, Any]]:
    """One row a part of the step."""
    case = Case(backbone, side_px, classes, images, KEEP, torch.device("meta"))
    for module in (*case.maskmatch.modules(), *case.plain.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its generator asks for a real device
    pseudo, plain = case.pseudo_label(), case.plain_pseudo_label()
    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "teacher, three scales": (case.pseudo_label, case.plain_pseudo_label),
        "student, all views, with backward": (
            lambda: case.all_views(pseudo),
            lambda: (case.plain_labelled(), case.plain_strong(plain), case.plain_masked(plain)),
        ),
    }
    case.all_views(pseudo)  # makes what every later step finds: the weights of upsampling
    case.maskmatch.zero_grad(set_to_none=True)
    rows = []
    for part, (ours, theirs) in parts.items():
        (calls, gb), (library_calls, library_gb) = count(ours), count(theirs)
        rows.append(
            {
                "backbone": backbone,
                "part": part,
                "calls": calls,
                "library_calls": library_calls,
                "calls_ratio": calls / library_calls,
                "gb": gb,
                "library_gb": library_gb,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    backbones = ["transformers/segformer-b2", "timm/vit_small_patch16_224"]
    parser.add_argument("--backbone", nargs="+", default=backbones, metavar="NAME")
    parser.add_argument("--images", type=int, default=IMAGES, help="labelled images; as many unlabelled ones")
    parser.add_argument("--image-size", type=int, default=SIDE_PX, metavar="PX")
    parser.add_argument("--classes", type=int, default=CLASSES)
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        rows = []
        for backbone in options.backbone:
            say(backbone)
            with no_autocast():
                rows += rows_of(backbone, options.images, options.image_size, options.classes)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    machine = describe_machine(torch.device("cpu"), ["maskmatch_scale", "benchmarks"])
    machine |= {
        "counted": "ATen calls that are not views, on meta tensors",
        "images": f"{options.images} labelled and {options.images} unlabelled of {options.image_size} px",
        "classes": options.classes,
        "keep": KEEP,
    }
    write_json(options.out, machine, rows)
    title = "launches: operations of a step, ours against the libraries' own modules for the same views"
    options.out.with_suffix(".md").write_text(markdown(title, machine, rows, COLUMNS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
