"""The report: one self-contained HTML file on one or several runs.

This module collects what the report contains; ``report.html.jinja`` is its layout, ``report.css`` its style, and
``report.js`` what moves in it; both become part of the page.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from maskmatch_scale.errors import UserError
from maskmatch_scale.files import write_whole
from maskmatch_scale.record.curves import COLOURS, Curve, Points, against, chart
from maskmatch_scale.record.pictures import PictureRun, held_out_pictures
from maskmatch_scale.record.run_files import RunFiles, number, read_run, split_rank
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.record.summary import (
    START_UP_STEPS,
    RunSummary,
    caveat,
    headline,
    in_order,
    method_labels,
    summarise_files,
)
from maskmatch_scale.record.swept import shown, swept


@dataclass(frozen=True)
class _Run:
    """A run as the report shows it."""

    files: RunFiles
    summary: RunSummary
    name: str
    """Name of its folder. If several runs have that name, the path from their common parent."""
    label: str
    colour: str


@dataclass(frozen=True)
class _Group:
    """The runs of one backbone."""

    backbone: str
    runs: tuple[_Run, ...]
    charts: tuple[tuple[str, Markup], ...]
    """Title and SVG of each chart that has anything to show."""
    swept: tuple[tuple[str, Markup, tuple[Points, ...]], ...]
    """Title and SVG of the results by a setting in which the runs differ, and the lines in it that have a name."""


@dataclass(frozen=True)
class _ClassTable:
    """IoU by class on one split."""

    split: str
    runs: tuple[_Run, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    """Class name and the IoU of each run."""
    miou: tuple[float | None, ...]
    """Of each run."""


@dataclass(frozen=True)
class _Saves:
    """The checkpoints of one run, in words."""

    run: _Run
    cells: tuple[str, ...]
    """As :data:`SAVES_COLUMNS`, "–" for what is not known."""
    failed: tuple[str, ...]
    """Lines on the last ones that could not be written."""


SAVES_COLUMNS = ("written", "failed", "newest", "GB each", "step waits for copy", "written in", "best on dev")
MOST_FAILED = 10
"""Lines on failed checkpoints that are shown of a run."""


def write_report(runs: Sequence[Path], out: Path | None = None, live_s: int = 0) -> Path:
    """Write one HTML file on the runs, which needs no other file.

    Args:
        runs: run directories. Of an unfinished run the report shows what there is, and names what is missing.
        out: the file; by default ``report.html`` in the run, or in the nearest common parent of several.
        live_s: about how often the file is written again, in seconds: a browser that shows it loads it again. 0: it is
            not.

    Returns:
        The file. It is written under another name and renamed, so it is always complete.

    Raises:
        UserError: no run is given, a folder is not a run directory, a file of a run cannot be read (the message names
            it), or ``out`` is a folder.
    """
    paths = list({path.resolve(): path for path in runs})
    if not paths:
        raise UserError("no run directory given")
    out = out or RunFolder(paths[0] if len(paths) == 1 else _common_parent(paths)).report
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the HTML file to write")
    page = _render([read_run(path) for path in paths], live_s)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


def _render(read: Sequence[RunFiles], live_s: int) -> str:
    runs = _arranged(read)
    summaries = [run.summary for run in runs]
    backbones = list(dict.fromkeys(run.summary.backbone for run in runs))
    figures = headline(summaries)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        _part("report.html.jinja")
    )
    return page.render(
        # The two files are ours, and hold nothing of a run.
        style=Markup(_part("report.css")),
        script=Markup(_part("report.js")),
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs in {_common_parent([r.path for r in read]).name}",
        runs=runs,
        columns=figures.columns,
        rows=figures.rows,
        caveat=caveat(summaries),
        start_up_steps=START_UP_STEPS,
        missing=[(run, gaps) for run in runs if (gaps := _missing(run))],
        groups=[
            _group(place, name, [r for r in runs if r.summary.backbone == name]) for place, name in enumerate(backbones)
        ],
        class_tables=_class_tables(runs),
        pictures=held_out_pictures(
            [PictureRun(r.files.path, r.name, r.label, r.summary.backbone, r.summary.mask_keep) for r in runs]
        ),
        differing=_differing(runs),
        saves_columns=SAVES_COLUMNS,
        saves=[_saves(run) for run in runs if run.files.saves],
        live_s=live_s,
        written=round(time.time()) if live_s else None,
    )


def _part(name: str) -> str:
    """A file beside this one."""
    return files("maskmatch_scale.record").joinpath(name).read_text(encoding="utf-8")


def _arranged(read: Sequence[RunFiles]) -> list[_Run]:
    """The runs in the order of the summary table, each with a name of its own, and a colour by backbone."""
    by_path = {run.path: run for run in read}
    summaries = in_order([summarise_files(run) for run in read])
    repeated = Counter(summary.name for summary in summaries)
    parent = _common_parent(list(by_path))
    used: Counter[str] = Counter()
    runs = []
    for summary, label in zip(summaries, method_labels(summaries)):
        name = summary.name if repeated[summary.name] == 1 else os.path.relpath(summary.path, parent)
        colour = COLOURS[used[summary.backbone] % len(COLOURS)]
        used[summary.backbone] += 1
        runs.append(_Run(by_path[summary.path], summary, name, label, colour))
    return runs


def _missing(run: _Run) -> list[str]:
    """What a reader may look for in this run and not find, and what to do about it."""
    summary = run.summary
    held_out = [score for score in summary.scores if score.split != "dev"]
    gaps = []
    if summary.ended_early is not None:
        gaps.append(summary.ended_early)
    elif summary.steps_asked is None or summary.steps_done < summary.steps_asked:
        gaps.append(f"training is at step {summary.steps_done} of {summary.steps_asked or 'an unknown number'}")
    elif not summary.finished:
        gaps.append("all steps are recorded, but not the end of the run (no summary.json)")
    if not held_out:
        gaps.append("not evaluated on held-out samples (maskmatch evaluate does it)")
    gaps += [
        f"{score.split} ({score.weights}) was evaluated at step {score.step}"
        for score in held_out
        if score.step is not None and score.step != summary.steps_done
    ]
    failed = sum(save.error is not None for save in run.files.saves)
    if failed:
        gaps.append(f"{failed} checkpoints could not be written")
    skipped = number((run.files.closing or {}).get("images_skipped"))
    if skipped:
        gaps.append(f"{skipped:.0f} bad samples were skipped (the folder skipped/ lists them)")
    if not any(RunFolder(run.files.path).all_pictures.glob("[!.]*")):
        gaps.append("no pictures of held-out samples (maskmatch evaluate writes them)")
    return gaps


def _group(place: int, backbone: str, runs: Sequence[_Run]) -> _Group:
    def train_chart(key: str, title: str, *, smooth: bool) -> tuple[str, Markup]:
        curves = [Curve(run.label, run.colour, run.files.train.steps, run.files.train.values[key]) for run in runs]
        return title, chart(f"{key}-{place}", title, curves, smooth=smooth)

    dev = [curve for run in runs for curve in _dev_curves(run)]
    charts = (
        train_chart("loss_x", "Labelled loss L_x", smooth=True),
        train_chart("loss_u", "Unlabelled loss L_u", smooth=True),
        train_chart("loss_m", "Masked loss L_m", smooth=True),
        train_chart("coverage", "Coverage: share of confident pixels", smooth=True),
        ("mIoU on dev", chart(f"miou-{place}", "mIoU on dev", dev, markers=True)),
        train_chart("lr", "Learning rate", smooth=False),
    )
    return _Group(backbone, tuple(runs), tuple((title, svg) for title, svg in charts if svg), _swept(place, runs))


def _swept(place: int, runs: Sequence[_Run]) -> tuple[tuple[str, Markup, tuple[Points, ...]], ...]:
    """Charts of the teacher's last mIoU on ``dev`` in training. Runs that have not finished do not compare."""
    scores = [run.summary.in_training("ema") if run.summary.finished else None for run in runs]
    known = [(run.files.settings, score.miou if score else None) for run, score in zip(runs, scores)]
    charts = []
    for count, setting in enumerate(swept(known)):
        title = f"mIoU on dev by {setting.key}"
        svg = against(f"swept-{place}-{count}", title, setting.key, setting.lines)
        charts.append((title, svg, tuple(line for line in setting.lines if line.label)))
    return tuple(charts)


def _dev_curves(run: _Run) -> list[Curve]:
    """Scores on ``dev`` during training: a line for the teacher, and a dashed one for the student."""
    curves = []
    for weights in ("ema", "student"):
        scores = [s for s in run.files.progress if (s.split, s.weights) == ("dev", weights)]
        steps = np.array([score.step for score in scores], dtype=np.int64)
        values = np.array([math.nan if score.miou is None else score.miou for score in scores])
        curves.append(Curve(f"{run.label}, {weights}", run.colour, steps, values, dashed=weights == "student"))
    return curves


def _class_tables(runs: Sequence[_Run]) -> list[_ClassTable]:
    """A table for each split on which some run's teacher was evaluated by class, held-out splits first."""
    tables = []
    for split in sorted({score.split for run in runs for score in run.summary.scores}, key=split_rank):
        scores = [(run, score.iou) for run in runs if (score := run.summary.score(split, "ema")) and score.iou]
        names = dict.fromkeys(name for _, iou in scores for name in iou)
        if names:
            rows = tuple((name, tuple(iou.get(name) for _, iou in scores)) for name in names)
            miou = tuple(score.miou for run, _ in scores if (score := run.summary.score(split, "ema")))
            tables.append(_ClassTable(split, tuple(run for run, _ in scores), rows, miou))
    return tables


def _saves(run: _Run) -> _Saves:
    written = [save for save in run.files.saves if save.error is None]
    failed = [save for save in run.files.saves if save.error is not None]
    newest = written[-1] if written else None
    best = run.files.best
    return _Saves(
        run,
        (
            str(len(written)),
            str(len(failed)),
            "–" if newest is None else f"step {newest.step}",
            "–" if newest is None or newest.bytes is None else f"{newest.bytes / 1e9:.3g}",
            _median_s([save.copy_s for save in written]),
            _median_s([save.write_s for save in written]),
            "–" if best is None else f"{best[0]}: {best[1]:.3f}",
        ),
        tuple(f"step {save.step}: {save.error}" for save in failed[-MOST_FAILED:]),
    )


def _median_s(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.median(known):.2g} s" if known else "–"


def _differing(runs: Sequence[_Run]) -> list[tuple[str, list[str]]]:
    """Recipe keys whose values differ between runs, with the value in each run ("" if it has no such key).

    ``run.dir`` is left out, because it always differs and the run is named after it.
    """
    keys = dict.fromkeys(key for run in runs for key in run.files.settings if key != "run.dir")
    table = [(key, [shown(run.files.settings, key) for run in runs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _common_parent(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))
