"""Measuring one case: time and memory of both steps and of their parts, as rows of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Run, peak_mb, say, time_interleaved
from benchmarks.train_step.cases import Case

GRAPHED = "ours, CUDA graphs"


def measure(case: Case, repeats: int, peak: float | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the two steps, and rows of their parts.

    Args:
        case: what to measure.
        repeats: timed rounds.
        peak: 10¹² FLOP/s that the device can reach in this precision; None: not known.
    """
    say(f"{case.backbone}: checking that both steps agree")
    differences = case.disagreement()
    pseudo = case.pseudo_label()
    masked = case.step.masked
    assert masked is not None

    def masked_levels() -> list[Tensor]:
        with case.arithmetic():
            return case.segmenter.encode(case.maskmatch.normalise(masked.view.images), masked.visible)

    def masked_encoder() -> None:
        levels = masked_levels()
        torch.autograd.backward(levels, [torch.zeros_like(level) for level in levels])

    detached = [level.detach().requires_grad_() for level in masked_levels()]
    grid = case.segmenter.unit_grid(case.image_size, case.image_size)

    def context() -> None:
        assert case.segmenter.context is not None
        with case.arithmetic():
            guesses = case.segmenter.context(detached, masked.visible, grid)
        torch.autograd.backward(guesses, [torch.zeros_like(guess) for guess in guesses])

    parts: dict[str, dict[str, Run]] = {
        "ours": {
            "teacher, three scales": case.pseudo_label,
            "labelled view": lambda: case.view("loss_x", pseudo),
            "strong view": lambda: case.view("loss_u", pseudo),
            "masked view": lambda: case.view("loss_m", pseudo),
            "of it: encoder": masked_encoder,
            "of it: context decoder": context,
            "optimizer and EMA": lambda: case.update(case.segmenter, case.teacher),
        },
        "straightforward": {
            "teacher, three scales": case.plain_pseudo_label,
            "labelled view": case.plain_labelled,
            "strong view": lambda: case.plain_strong(pseudo),
            "masked view": lambda: case.plain_masked(pseudo),
            "optimizer and EMA": lambda: case.update(case.plain, case.plain_teacher),
        },
    }
    runs: dict[str, Run] = {"ours": case.ours, "straightforward": case.straightforward}
    if case.device.type == "cuda" and case.segmenter.family.captured_whole:
        runs[GRAPHED] = case.graphed
    steps = list(runs)
    runs |= {f"{step}/{part}": run for step, of_step in parts.items() for part, run in of_step.items()}
    # Both steps once: AdamW makes its state in the first one.
    case.ours()
    case.straightforward()
    peaks = {}
    for name, module, teacher in (
        ("ours", case.segmenter, case.teacher),
        ("straightforward", case.plain, case.plain_teacher),
    ):
        held = [*module.parameters(), *teacher.parameters()]
        peaks[name] = peak_mb(runs[name], held, case.device)
    if GRAPHED in runs:  # after the peaks, because graphs keep their memory
        case.graphed()
    say(f"{case.backbone}: {len(runs)} variants × {repeats}")
    timings = time_interleaved(_with_gradients(runs, case), repeats, case.device)
    base = {name: getattr(case, name) for name in ("backbone", "image_size", "classes", "images", "precision")}
    limit = case.limit()
    rows = []
    for name in steps:
        is_ours = name != "straightforward"
        speedup = timings["straightforward"].minimum / timings[name].minimum
        tflops = case.work("ours" if is_ours else name).flops / timings[name].minimum / 1e12
        rows.append(
            {
                **base,
                "step": name,
                "keep": case.keep,
                "seconds_min": timings[name].minimum,
                "seconds_median": timings[name].median,
                "speedup": speedup,
                "limit": limit if is_ours else 1.0,
                "efficiency": speedup / limit if is_ours else 1.0,
                "peak_mb": peaks.get(name),
                "tflops": tflops,
                "mfu": None if peak is None else tflops / peak,
                "repeats": repeats,
                **differences,
            }
        )
        say(f"  {name}: {timings[name].minimum:.2f} s, {speedup:.2f}×, limit of masking alone {limit:.2f}×")
    part_rows = [
        {
            **base,
            "step": step,
            "part": part,
            "seconds_min": timings[f"{step}/{part}"].minimum,
            "share": timings[f"{step}/{part}"].minimum / timings[step].minimum,
        }
        for step, of_step in parts.items()
        for part in of_step
    ]
    return rows, part_rows


def _with_gradients(runs: dict[str, Run], case: Case) -> dict[str, Run]:
    """The runs, each without gradients left from another; the part of the optimizer gets gradients of zero."""

    def with_some(run: Run, module: nn.Module) -> Run:
        def step() -> None:
            for parameter in module.parameters():
                parameter.grad = zeros[parameter]
            run()

        zeros = {parameter: torch.zeros_like(parameter) for parameter in module.parameters()}
        return step

    def without(run: Run) -> Run:
        def step() -> None:
            run()
            for module in (case.segmenter, case.plain):
                module.zero_grad(set_to_none=True)

        return step

    ready = {}
    for name, run in runs.items():
        if name.endswith("optimizer and EMA"):
            ready[name] = with_some(run, case.segmenter if name.startswith("ours") else case.plain)
        else:
            ready[name] = without(run)
    return ready
