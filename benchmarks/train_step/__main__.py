"""The command line: ``python -m benchmarks.train_step --out FILE.json``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import check_out, describe_machine, say, write_json
from benchmarks.train_step.cases import PRECISIONS, Case
from benchmarks.train_step.measure import measure
from benchmarks.train_step.report import draw, page
from maskmatch_scale.device_peaks import peak_tflops
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import visible_count

SOURCES = ("maskmatch_scale", "benchmarks/harness.py", "benchmarks/train_step")

EXAMPLES = """examples:
  python -m benchmarks.train_step --out benchmarks/results/train_step.json
  python -m benchmarks.train_step --out /tmp/b5.json --backbone transformers/segformer-b5 --device cuda --images 8 \\
    --precision autocast-bf16
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.train_step",
        description="Times one whole MaskMatch step (teacher at scales 0.5, 1, 1.5; labelled, strong and masked view; "
        "backward; AdamW; EMA) of this package against the straightforward implementation: the libraries' models as "
        "they ship, masked pixels zeroed, three passes, full-resolution logits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    backbones = ["transformers/segformer-b2", "timm/vit_small_patch16_224"]
    add("--backbone", nargs="+", default=backbones, metavar="NAME", help=f"default: {' '.join(backbones)}")
    add("--image-size", type=int, default=512, metavar="PX", help="side of the square images; default 512")
    add("--images", type=int, default=1, metavar="N", help="labelled images, and as many unlabelled; default 1")
    add("--classes", type=int, default=21, metavar="N", help="default 21, as in Pascal VOC")
    add("--keep", type=float, default=0.3, metavar="SHARE", help="share of visible units; default 0.3")
    add("--repeats", type=int, default=5, metavar="N", help="timed rounds, of which the minimum counts; default 5")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="of products; weights are fp32; default fp32, in "
        "TF32 on a GPU")  # fmt: skip
    add("--device", default="cpu", help="cpu (one thread, process time) or cuda; default cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every backbone and write JSON, Markdown and PNG; 1 if a backbone did not fit into memory."""
    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        for name in ("image_size", "images", "repeats"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(options, name)}; it must be at least 1")
        if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device: {options.device!r} is not here; cpu or, with a GPU, cuda")
        check_out(options.out)
        device = torch.device(options.device)
        for backbone in options.backbone:  # mistakes are found now, not after the first one was measured
            with torch.device("meta"):
                segmenter = build_segmenter(backbone, options.classes)
            visible_count(segmenter.unit_grid(options.image_size, options.image_size), options.keep)
    except ValueError as error:
        say(f"train_step: {error}")
        return 2
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in a run
    machine = describe_machine(device, SOURCES)
    peak = peak_tflops(device, PRECISIONS[options.precision] or torch.float32)
    code = 0
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for backbone in options.backbone:
        sizes = (options.image_size, options.classes, options.images, options.keep)
        try:
            new_rows, new_parts = measure(Case(backbone, *sizes, device, options.precision), options.repeats, peak)
        except torch.OutOfMemoryError:  # the other backbones may fit
            say(f"train_step: {backbone}: out of GPU memory, left out; try fewer --images")
            code = 1
            torch.cuda.empty_cache()
            continue
        rows, parts = rows + new_rows, parts + new_parts
        write_json(options.out, machine, rows, parts=parts)
        options.out.with_suffix(".md").write_text(page(machine, rows, parts), encoding="utf-8")
    if rows:
        draw(rows, parts).savefig(options.out.with_suffix(".png"), dpi=110)
        say(f"wrote {options.out}, and .md and .png beside it")
    return code


if __name__ == "__main__":
    sys.exit(main())
