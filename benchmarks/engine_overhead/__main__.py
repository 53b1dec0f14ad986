"""The command line: ``python -m benchmarks.engine_overhead --out FILE.json``; starts the workers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.engine_overhead.report import draw, judge, page
from benchmarks.harness import check_out, describe_machine, launch, say, write_json
from maskmatch_scale.models import build_segmenter

SOURCES = ("benchmarks/engine_overhead", "benchmarks/harness.py", "maskmatch_scale/engine", "maskmatch_scale/models")
EXAMPLES = """examples:
  python -m benchmarks.engine_overhead --out benchmarks/results/engine_overhead.json
  python -m benchmarks.engine_overhead --out /tmp/large.json --memory-backbone timm/vit_base_patch16_224 --rounds 3
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.engine_overhead",
        description="Starts the deepspeed launcher and times a supervised step under torch's DDP and under our engine "
        "at every ZeRO stage, interleaved in one process group; times and counts the teacher's average; compares "
        "the bytes of model states with ZeRO's formulas.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    add("--backbone", default="timm/vit_tiny_patch16_224", metavar="NAME", help="default timm/vit_tiny_patch16_224")
    larger = "timm/vit_small_patch16_224"
    add("--memory-backbone", default=larger, metavar="NAME", help="whose bytes are counted; default %(default)s")
    add("--backbone-options", type=json.loads, metavar="JSON", help="keyword arguments for timm.create_model")
    add("--image-size", type=int, default=224, metavar="PX", help="side of the square images; default 224")
    add("--batch", type=int, default=8, metavar="N", help="images a rank; default 8")
    add("--classes", type=int, default=21, metavar="N", help="default 21, as in Pascal VOC")
    add(
        "--rounds",
        type=int,
        default=12,
        metavar="N",
        help="timed rounds, of which the minimum counts; default %(default)s",
    )
    add("--ranks", type=int, metavar="N", help="default: the GPUs here, or 2 on a CPU, one thread each. With 1 nothing "
        "is sent, and what is left is the engine's own work")  # fmt: skip
    add("--variants", nargs="+", metavar="TEXT", help="variants of our engine whose name contains one of these, as "
        "'ZeRO-1 bf16'; DDP is always there. All variants are in memory at once")  # fmt: skip
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--fp32-only", action="store_true", help="leave out bf16 and autocast-bf16")
    only.add_argument("--bf16-only", action="store_true", help="leave out fp32")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch, collect, and write JSON, Markdown and PNG."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = options.ranks if options.ranks is not None else torch.cuda.device_count() or 2
    try:
        for name in ("image_size", "batch", "classes", "rounds"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(options, name)}; it must be at least 1")
        if ranks < 1 or (device.type == "cuda" and ranks > torch.cuda.device_count()):
            raise ValueError(f"--ranks: {ranks}; it must be at least 1, and on GPUs at most their number")
        check_out(options.out)
        for backbone in (options.backbone, options.memory_backbone):  # mistakes are found now, not under the launcher
            with torch.device("meta"):
                segmenter = build_segmenter(
                    backbone, options.classes, head="linear", backbone_options=options.backbone_options
                )
            segmenter.check_size(options.image_size, options.image_size)
    except ValueError as error:
        say(f"engine_overhead: {error}")
        return 2
    torch.set_num_threads(1)
    machine = describe_machine(device, SOURCES) | {"ranks": ranks, "deepspeed": version("deepspeed")}
    machine["clock"] = "wall time of the slowest rank between barriers; cpu_ratio: process time summed over ranks"
    names = ("backbone", "memory_backbone", "backbone_options", "image_size", "batch", "classes", "rounds")
    settings = {name: getattr(options, name) for name in names}
    kinds = {"fp32": not options.bf16_only, "bf16": not options.fp32_only, "variants": options.variants}
    try:
        found = launch("benchmarks.engine_overhead.worker", settings | kinds, ranks, device)
    except RuntimeError as error:
        say(f"engine_overhead: {error}")
        return 1
    machine |= settings
    judge(found)
    rows, teachers, memory = found["rows"], found["teachers"], found["memory"]
    write_json(options.out, machine, rows, teachers=teachers, memory=memory)
    options.out.with_suffix(".md").write_text(page(machine, found), encoding="utf-8")
    draw(rows, memory).savefig(options.out.with_suffix(".png"), dpi=110)
    print(f"wrote {options.out}, and .md and .png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
