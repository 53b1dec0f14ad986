"""What masking saves: the backbone on whole images against visible units only, and against zeroed pixels.

python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.harness import (
    Run,
    check_out,
    count_gmacs,
    describe_machine,
    markdown,
    peak_mb,
    time_interleaved,
    write_json,
)
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.segmenter import MaskMode
from maskmatch_scale.models.units import sample_visible, visible_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "train")
COLUMNS = (
    *("backbone", "image_size", "batch", "dtype", "pass", "mode", "keep"),
    *("img_per_s", "gmacs", "speedup", "ideal_speedup", "efficiency", "peak_mb"),
)
"""The contract's keys of a row; more keys follow them in the JSON."""

SOURCES = ("maskmatch_scale/models", "benchmarks/harness.py", "benchmarks/masked_vs_full.py")
"""What the figures depend on."""

EXAMPLES = """examples:
  python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
  python -m benchmarks.masked_vs_full --out /tmp/b2.json --backbone transformers/segformer-b2 --batch 1 --keep 0.3
  python -m benchmarks.masked_vs_full --out /tmp/gpu.json --device cuda --dtype bfloat16 --batch 16 --repeats 20
"""


@dataclass(frozen=True)
class Case:
    """One backbone at one size; its variants are timed against each other."""

    backbone: str
    image_size: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.backbone} {self.image_size} px, batch {self.batch}, {self.dtype}"

    def build(self, device: torch.device) -> Segmenter:
        """Random weights, the same in every run; ValueError if the backbone is unknown or the size does not fit."""
        torch.manual_seed(0)
        segmenter = build_segmenter(self.backbone, 2, image_size=self.image_size, context=False)
        segmenter.unit_grid(self.image_size, self.image_size)
        return segmenter.to(device, DTYPES[self.dtype])


@dataclass(frozen=True)
class Variant:
    """How the backbone sees the images."""

    mode: str  # full | drop | zero
    keep: float
    visible: Tensor | None
    """int64 (batch, k); None: whole images."""

    @property
    def name(self) -> str:
        """Tells the variants of a case apart."""
        return f"{self.mode} {self.keep:g}"

    def make_pass(self, segmenter: Segmenter, images: Tensor, kind: str) -> Run:
        """One forward pass without gradients, or one forward and backward pass, over images (B, 3, H, W)."""
        visible = None if self.visible is None else self.visible[: len(images)]
        mode: MaskMode = "zero" if self.mode == "zero" else "drop"

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return segmenter.encode(images, visible, mode)

        # Made once: what the head would hand back is no work of the backbone.
        gradients = [torch.randn_like(level) for level in forward()] if kind == "train" else []

        def train() -> None:
            torch.autograd.backward(segmenter.encode(images, visible, mode), gradients)
            segmenter.zero_grad(set_to_none=True)

        return train if kind == "train" else forward


def measure(case: Case, keeps: Sequence[float], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one case: both passes of full, and of drop and zero at every keep ratio."""
    segmenter = case.build(device)
    grid = segmenter.unit_grid(case.image_size, case.image_size)
    units = grid[0] * grid[1]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=draw)
    images = images.to(device, DTYPES[case.dtype])
    variants = [Variant("full", 1.0, None)]
    for keep in keeps:
        visible = sample_visible(case.batch, grid, visible_count(grid, keep), draw).to(device)
        variants += [Variant("drop", keep, visible), Variant("zero", keep, visible)]
    held = [*segmenter.parameters(), *segmenter.buffers(), images]

    rows: list[dict[str, Any]] = []
    for kind in PASSES:
        _say(f"{case}: {kind}, {len(variants)} variants × {repeats}")
        segmenter.train(kind == "train")
        runs = {variant.name: variant.make_pass(segmenter, images, kind) for variant in variants}
        # One image: multiply–adds of an image do not depend on the others, and the plain attention is large.
        gmacs = {v.name: count_gmacs(v.make_pass(segmenter, images[:1], kind)) for v in variants}
        peaks = {name: peak_mb(run, held, device) for name, run in runs.items()}
        timings = time_interleaved(runs, repeats, device)
        full = variants[0].name
        for variant in variants:
            name, timing = variant.name, timings[variant.name]
            speedup, ideal = timings[full].minimum / timing.minimum, gmacs[full] / gmacs[name]
            rows.append(
                {
                    **vars(case),
                    "pass": kind,
                    "mode": variant.mode,
                    "keep": variant.keep,
                    "img_per_s": _figures(case.batch / timing.minimum),
                    "gmacs": _figures(gmacs[name]),
                    "speedup": _figures(speedup),
                    "ideal_speedup": _figures(ideal),
                    "efficiency": _figures(speedup / ideal),
                    "peak_mb": _figures(peaks[name]),
                    "seconds_min": _figures(timing.minimum),
                    "seconds_median": _figures(timing.median),
                    "repeats": repeats,
                    "visible_units": units if variant.visible is None else variant.visible.shape[1],
                    "units": units,
                }
            )
            _say(f"  {name}: {speedup:.2f}× of an ideal {ideal:.2f}×, {peaks[name]:.0f} MB")
    return rows


def _figures(value: float) -> float:
    """Six significant figures."""
    return float(f"{value:.6g}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Speed-up against keep ratio with the ideal curve: a row of panels a case, a column a pass."""
    cases = list(dict.fromkeys(Case(*(row[key] for key in COLUMNS[:4])) for row in rows))
    figure = Figure(figsize=(9, 0.5 + 3.3 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), len(PASSES), squeeze=False, sharex=True, sharey="row")
    for (i, case), (j, kind) in product(enumerate(cases), enumerate(PASSES)):
        panel = panels[i, j]
        of_panel = [row for row in rows if row["pass"] == kind and row.items() >= vars(case).items()]
        drop = [row for row in of_panel if row["mode"] == "drop"]
        zero = [row for row in of_panel if row["mode"] == "zero"]
        keep = [row["keep"] for row in drop]
        panel.plot(keep, [row["ideal_speedup"] for row in drop], "x--", color="0.45", label="drop: ideal, by GMACs")
        panel.plot(keep, [row["speedup"] for row in drop], "o-", color="#0072b2", label="drop: measured")
        panel.plot(keep, [row["speedup"] for row in zero], "s-", color="#d55e00", ms=4, label="zero: measured")
        panel.axhline(1, color="0.7", lw=0.8, zorder=0)
        panel.set_title(f"{case.backbone.rstrip('/').rpartition('/')[2]}: {kind}", fontsize=10)
        # Both axes logarithmic: a constant efficiency is a constant distance, at every keep ratio.
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(keep, [f"{value:g}" for value in keep], minor=False)
        panel.set_yticks([1, 2, 5, 10, 20], ["1×", "2×", "5×", "10×", "20×"])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        if j == 0:
            panel.set_ylabel(f"speed-up over full\n{case.image_size} px, batch {case.batch}, {case.dtype}", fontsize=9)
        if i == len(cases) - 1:
            panel.set_xlabel("keep: share of visible units")
    panels[0, 0].legend(frameon=False, fontsize=9)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.masked_vs_full",
        description="Times Segmenter.encode (the backbone alone) on whole images, on visible units only (drop), and on "
        "images with masked pixels zeroed (zero). Options that take several values are combined.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    backbones = ["transformers/segformer-b0", "timm/vit_tiny_patch16_224"]
    add("--backbone", nargs="+", default=backbones, metavar="NAME", help=f"default: {' '.join(backbones)}")
    add("--image-size", nargs="+", type=int, default=[512], metavar="PX", help="side of the square images; default 512")
    add("--batch", nargs="+", type=int, default=[2], metavar="N", help="images a pass; default 2")
    keeps = [0.1, 0.3, 0.5, 0.75, 1.0]
    add("--keep", nargs="+", type=float, default=keeps, metavar="SHARE", help="default: 0.1 0.3 0.5 0.75 1.0")
    add("--dtype", nargs="+", default=["float32"], choices=list(DTYPES), help="of weights and images; default float32")
    add("--repeats", type=int, default=5, metavar="N", help="timed rounds, of which the minimum counts; default 5")
    add("--device", default="cpu", help="cpu (one thread, process time) or cuda; default cpu")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> tuple[list[Case], list[float], torch.device]:
    """Everything that can be wrong with the options is found here, before the first measurement.

    Raises:
        ValueError: names the option, its value, and what would fit.
    """
    least = {"--batch": options.batch, "--image-size": options.image_size, "--repeats": [options.repeats]}
    for name, values in least.items():
        if min(values) < 1:
            raise ValueError(f"{name}: {min(values)}; it must be at least 1")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: {options.device!r} is neither cpu nor cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this torch finds no CUDA GPU; leave the option out to measure the CPU")
    cases = [
        Case(*values)
        for values in dict.fromkeys(product(options.backbone, options.image_size, options.batch, options.dtype))
    ]
    keeps = sorted(set(options.keep))
    for case in cases:
        grid = case.build(torch.device("cpu")).unit_grid(case.image_size, case.image_size)
        for keep in keeps:
            visible_count(grid, keep)
    check_out(options.out)
    return cases, keeps, torch.device(options.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case and write JSON, Markdown and PNG."""
    options = parse(arguments)
    try:
        cases, keeps, device = prepare(options)
    except ValueError as error:
        _say(f"masked_vs_full: {error}")
        return 2
    torch.set_num_threads(1)
    out: Path = options.out
    machine = describe_machine(device, SOURCES)
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure(case, keeps, options.repeats, device)
        write_json(out, machine, rows)  # after every case: a long run that is stopped keeps what it has
        out.with_suffix(".md").write_text(markdown("masked_vs_full", machine, rows, COLUMNS), encoding="utf-8")
    draw(rows).savefig(out.with_suffix(".png"), dpi=110)
    _say(f"wrote {out}, and .md and .png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
