"""The command line: ``python -m benchmarks.masked_vs_full --out FILE.json``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.harness import check_out, describe_machine, say, write_json
from benchmarks.masked_vs_full.cases import CLASSES, DTYPES, Case
from benchmarks.masked_vs_full.measure import measure
from benchmarks.masked_vs_full.report import draw, page
from maskmatch_scale.device_peaks import peak_tflops
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import visible_count

SOURCES = ("maskmatch_scale/models", "benchmarks/harness.py", "benchmarks/masked_vs_full")
"""Files on which the figures depend."""


@dataclass(frozen=True)
class Preset:
    """Values of the options that are not given."""

    backbone: tuple[str, ...]
    image_size: tuple[int, ...]
    batch: tuple[int, ...]
    dtype: tuple[str, ...]
    device: str
    repeats: int
    keep: tuple[float, ...]
    zero_keep: tuple[float, ...]
    """One ratio is enough: zeroing computes everything, whatever the ratio."""


PRESETS = {
    "cpu": Preset(
        backbone=("transformers/segformer-b0", "transformers/segformer-b2", "timm/vit_small_patch16_224"),
        image_size=(512,), batch=(2,), dtype=("float32",), device="cpu", repeats=5,
        keep=(0.1, 0.3, 0.5, 0.75, 1.0), zero_keep=(0.3,),
    ),
    "gpu": Preset(
        backbone=(
            "timm/vit_base_patch16_224", "timm/vit_large_patch16_224", "timm/vit_giant_patch14_dinov2",
            "transformers/segformer-b5",
        ),
        image_size=(512, 768, 1024), batch=(4,), dtype=("bfloat16",), device="cuda", repeats=20,
        keep=(0.1, 0.3, 0.5, 0.75, 1.0), zero_keep=(0.3,),
    ),
}  # fmt: skip

EXAMPLES = """examples:
  python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
  python -m benchmarks.masked_vs_full --out /tmp/b2.json --backbone transformers/segformer-b2 --batch 1 --keep 0.3
  python -m benchmarks.masked_vs_full --out /tmp/gpu.json --preset gpu --image-size 512 --batch 16
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, as all commands of this project do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"masked_vs_full: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong.

    Options that were not given are None, until `fill_in`.
    """
    parser = _Parser(
        "python -m benchmarks.masked_vs_full",
        description="Times Segmenter.encode (the backbone alone) on whole images, on visible units only (drop), and on "
        "images with masked pixels zeroed (zero), and the libraries' own forward on whole images. Options that take "
        "several values are combined.",
        epilog=EXAMPLES + "\n" + "\n".join(_describe(name, preset) for name, preset in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    add("--preset", choices=list(PRESETS), default="cpu", help="values of the options not given; default cpu")
    add("--backbone", nargs="+", metavar="NAME", help="timm/<model> or transformers/segformer-b0 … -b5, or a folder")
    add("--image-size", nargs="+", type=int, metavar="PX", help="side of the square images, whole units; a preset's "
        "own sizes are rounded to whole units")  # fmt: skip
    add("--batch", nargs="+", type=int, metavar="N", help="images a pass")
    add(
        "--keep",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="keep ratios of drop; a preset's own that leave no unit visible are left out",
    )
    add("--zero-keep", nargs="+", type=float, metavar="SHARE", help="keep ratios of zero; default: those of --keep if "
        "it is given, else the preset's")  # fmt: skip
    add("--dtype", nargs="+", choices=list(DTYPES), help="of weights and images")
    add("--repeats", type=int, metavar="N", help="timed rounds, of which the minimum counts")
    add("--device", help="cpu (one thread, process time) or cuda")
    add("--peak-tflops", type=float, metavar="X", help="10¹² FLOP/s that the device can reach, for mfu; default: from "
        "a table of GPUs, by dtype")  # fmt: skip
    return parser.parse_args(arguments)


def _describe(name: str, preset: Preset) -> str:
    values = (f"{key} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in vars(preset).items())
    return f"preset {name}:\n  " + "\n  ".join(values)


def prepare(options: argparse.Namespace) -> tuple[list[Case], list[float], list[float], torch.device]:
    """Fill in the preset; everything that can be wrong with the options is found here, before the first measurement.

    Returns:
        Cases, keep ratios of drop, keep ratios of zero, device.

    Raises:
        ValueError: names the option, its value, and what would fit.
    """
    preset = PRESETS[options.preset]
    own_sizes, own_keeps = options.image_size is None, options.keep is None
    if options.zero_keep is None:
        options.zero_keep = options.keep
    for name, value in vars(preset).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = {"--batch": options.batch, "--image-size": options.image_size, "--repeats": [options.repeats]}
    for name, values in least.items():
        if min(values) < 1:
            raise ValueError(f"{name}: {min(values)}; it must be at least 1")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise ValueError(f"--peak-tflops: {options.peak_tflops}; it must be above 0")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: {options.device!r} is neither cpu nor cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this torch finds no CUDA GPU; --preset cpu or --device cpu measures the CPU")
    keeps, zero_keeps = sorted(set(options.keep)), sorted(set(options.zero_keep))
    sizes = {
        backbone: whole_units(backbone, options.image_size) if own_sizes else options.image_size
        for backbone in options.backbone
    }
    cases = [
        Case(backbone, size, batch, dtype)
        for backbone in sizes
        for size, batch, dtype in dict.fromkeys(product(sizes[backbone], options.batch, options.dtype))
    ]
    for case in cases:
        grid = case.build(torch.device("meta")).unit_grid(case.image_size, case.image_size)
        if own_keeps:  # ratios of a preset that leave no unit of a small image are left out
            keeps = [keep for keep in keeps if round(keep * grid[0] * grid[1])]
        for keep in (*keeps, *zero_keeps):
            visible_count(grid, keep)
    check_out(options.out)
    return cases, keeps, zero_keeps, torch.device(options.device)


def whole_units(backbone: str, sizes: Sequence[int]) -> list[int]:
    """The multiples of the backbone's unit that are nearest to `sizes`, pixels.

    Raises:
        ValueError: the backbone is unknown or unsupported.
    """
    with torch.device("meta"):
        unit = build_segmenter(backbone, CLASSES, context=False).unit_px
    return [max(unit, round(size / unit) * unit) for size in sizes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case and write JSON, Markdown and PNG; 0, 1 if a case did not fit into memory, 2 for a mistake."""
    options = parse(arguments)
    try:
        cases, keeps, zero_keeps, device = prepare(options)
    except ValueError as error:
        say(f"masked_vs_full: {' '.join(str(error).split())}")
        return 2
    torch.set_num_threads(1)
    out: Path = options.out
    machine = describe_machine(device, SOURCES)
    peaks = {name: options.peak_tflops or peak_tflops(device, DTYPES[name]) for name in options.dtype}
    for name, value in peaks.items():
        if value is not None:
            machine[f"peak_tflops_{name}"] = value
    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    code = 0
    for case in cases:
        try:
            measured = measure(case, keeps, zero_keeps, options.repeats, device, peaks[case.dtype])
        except torch.OutOfMemoryError:  # the other cases of a long run may fit
            say(f"masked_vs_full: {case}: out of GPU memory, left out; try a smaller --batch")
            code = 1
            torch.cuda.empty_cache()
            continue
        rows, peers = rows + measured[0], peers + measured[1]
        write_json(out, machine, rows, peers=peers)  # after every case: a long run that is stopped keeps what it has
        out.with_suffix(".md").write_text(page(machine, rows, peers), encoding="utf-8")
    if rows:
        draw(rows).savefig(out.with_suffix(".png"), dpi=110)
        say(f"wrote {out}, and .md and .png beside it")
    return code


if __name__ == "__main__":
    sys.exit(main())
