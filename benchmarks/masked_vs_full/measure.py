"""Measuring one case: time, multiply–adds, memory and gathers of all its variants, as rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SegformerModel

from benchmarks.harness import Timing, count_gmacs, gather_share, peak_mb, say, time_interleaved
from benchmarks.masked_vs_full.cases import DTYPES, Case, Variant, make_pass
from maskmatch_scale.models.units import sample_visible, visible_count

PASSES = ("forward", "train")


@dataclass(frozen=True)
class Measured:
    """One variant of one pass."""

    timing: Timing
    gmacs: float
    peak_mb: float
    gather_share: float | None = None


def measure(
    case: Case,
    keeps: Sequence[float],
    zero_keeps: Sequence[float],
    repeats: int,
    device: torch.device,
    peak: float | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure one case.

    Args:
        case: what to build.
        keeps: keep ratios of drop, in (0, 1].
        zero_keeps: keep ratios of zero.
        repeats: timed rounds.
        device: where the passes run.
        peak: 10¹² FLOP/s that the device can reach with this dtype; None: not known.

    Returns:
        Rows of the encoder (full, library, drop, zero), and rows of the pairs of peers (ours, library).
    """
    segmenter = case.build(device)
    library = case.build_library(segmenter)
    grid = segmenter.unit_grid(case.image_size, case.image_size)
    units = grid[0] * grid[1]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=draw)
    images = images.to(device, DTYPES[case.dtype])
    variants = [Variant("ours", 1.0, None), Variant("library", 1.0, None)]
    for keep in sorted({*keeps, *zero_keeps}):
        visible = sample_visible(case.batch, grid, visible_count(grid, keep), draw).to(device)
        variants += [Variant("drop", keep, visible)] if keep in keeps else []
        variants += [Variant("zero", keep, visible)] if keep in zero_keeps else []
    encoders = {variant.name: variant.encoder(segmenter, library) for variant in variants}
    wholes: dict[str, Callable[[Tensor], list[Tensor]]] = {}
    if isinstance(segmenter.backbone, SegformerModel):
        wholes = {"ours": lambda x: [segmenter(x)], "library": lambda x: [library(x).logits]}
    differences = {"encoder": _difference(encoders["ours 1"], encoders["library 1"], images, segmenter, library)}
    if wholes:
        differences["whole model"] = _difference(wholes["ours"], wholes["library"], images, segmenter, library)

    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    for kind in PASSES:
        segmenter.train(kind == "train")
        library.train(kind == "train")
        functions = encoders | {f"whole model, {runner}": function for runner, function in wholes.items()}
        say(f"{case}: {kind}, {len(functions)} variants × {repeats}")
        modules = {name: library if "library" in name else segmenter for name in functions}
        runs = {name: make_pass(function, images, modules[name], kind) for name, function in functions.items()}
        peaks = {name: peak_mb(run, _held(modules[name], name, images), device) for name, run in runs.items()}
        timings = time_interleaved(runs, repeats, device, warmed_up=True)
        measured = {}
        for variant in variants:
            name = variant.name
            share = gather_share(runs[name], device) if variant.mode == "drop" else None
            measured[name] = Measured(
                timings[name], variant.gmacs(segmenter, case.image_size, kind), peaks[name], share
            )
        fastest = min(("ours", "library"), key=lambda runner: measured[f"{runner} 1"].timing.minimum)
        full, theirs = measured[f"{fastest} 1"], measured["library 1"]
        for variant in variants:
            found, mode, runner = measured[variant.name], variant.mode, "ours"
            if mode == "ours":
                found, mode, runner = full, "full", fastest
            elif mode == "library":
                runner = "library"
            tail = {
                "part": "encoder",
                "runner": runner,
                "over_library": _figures(theirs.timing.minimum / found.timing.minimum),
                "gather_share": None if found.gather_share is None else _figures(found.gather_share),
                "visible_units": units if variant.visible is None else variant.visible.shape[1],
                "units": units,
            }
            head = {"pass": kind, "mode": mode, "keep": variant.keep}
            figures = _figures_of(case, head, full, found, peak)
            rows.append(figures | {"repeats": repeats} | tail)
            say(
                f"  {mode} {variant.keep:g}: {figures['speedup']:.2f}× of an ideal {figures['ideal_speedup']:.2f}×, "
                f"{found.peak_mb:.0f} MB"
            )

        pairs = {"encoder": {runner: measured[f"{runner} 1"] for runner in ("ours", "library")}}
        if wholes:
            pairs["whole model"] = {}
            for runner in wholes:
                name = f"whole model, {runner}"
                # One image: its count does not depend on the others, and the plain attention needs much memory.
                one = make_pass(functions[name], images[:1], modules[name], kind)
                pairs["whole model"][runner] = Measured(timings[name], count_gmacs(one), peaks[name])
        for part, pair in pairs.items():
            for runner, found in pair.items():
                tail = {"part": part, "runner": runner, "max_abs_difference": differences[part]}
                head = {"pass": kind, "mode": runner, "keep": 1.0}
                peers.append(_figures_of(case, head, pair["library"], found, peak) | {"repeats": repeats} | tail)
            say(f"  {part}: {peers[-2]['speedup']:.2f}× as fast as the library's own")
    return rows, peers


def _held(module: Any, name: str, images: Tensor) -> list[Tensor]:
    """Tensors that exist before and after a pass: the images, and weights and buffers of the module that runs."""
    if not name.startswith("whole model"):
        # timm's models are the encoder; transformers' and ours have a head beside it.
        module = getattr(module, "backbone", getattr(module, "segformer", module))
    return [*module.parameters(), *module.buffers(), images]


def _figures_of(
    case: Case, head: dict[str, Any], reference: Measured, found: Measured, peak: float | None
) -> dict[str, Any]:
    """The keys of `report.CONTRACT`, with speed-ups over `reference`, and the seconds from which they are computed."""
    speedup = reference.timing.minimum / found.timing.minimum
    ideal = reference.gmacs / found.gmacs
    img_per_s = case.batch / found.timing.minimum
    mfu = None if peak is None else _figures(2 * found.gmacs * 1e9 * img_per_s / (peak * 1e12))
    return {
        **vars(case),
        **head,
        "img_per_s": _figures(img_per_s),
        "gmacs": _figures(found.gmacs),
        "speedup": _figures(speedup),
        "ideal_speedup": _figures(ideal),
        "efficiency": _figures(speedup / ideal),
        "peak_mb": _figures(found.peak_mb),
        "seconds_min": _figures(found.timing.minimum),
        "seconds_median": _figures(found.timing.median),
        "wall_min": _figures(found.timing.wall_minimum),
        "wall_median": _figures(found.timing.wall_median),
        "mfu": mfu,
    }


def _difference(
    ours: Callable[[Tensor], list[Tensor]],
    library: Callable[[Tensor], list[Tensor]],
    images: Tensor,
    *modules: nn.Module,
) -> float:
    """Largest absolute difference of the outputs in evaluation mode; it shows that both do the same work."""
    for module in modules:
        module.eval()
    with torch.no_grad():
        pairs = zip(ours(images), library(images), strict=True)
        return _figures(max(float((a.float() - b.float()).abs().max()) for a, b in pairs))


def _figures(value: float) -> float:
    """Six significant figures."""
    return float(f"{value:.6g}")
