"""The figures of a run in one table row: for the terminal, for the report, and as JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from maskmatch_scale.recipe.bases import SUPERVISED, has_unlabelled_loss, title_of
from maskmatch_scale.record.run_files import RunFiles, Score, number, read_run, split_rank

START_UP_STEPS = 5
"""The first steps are left out of the median images/s, because caches and loader processes start in them."""

ONE_SEED = (
    "One seed for each method: these runs do not show how much the figures of a recipe change with another seed, "
    "so a small difference between two rows is no evidence that one is better. Train more seeds (run.seed) to find out."
)


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run; None: not recorded, or not yet."""

    path: Path
    name: str
    """Name of the run directory."""
    base: str
    """``method.base`` of the recipe."""
    views_of: str
    """Images that views are made of: unlabelled or labelled."""
    mask_keep: float | None
    """Share of visible units; None when the masked loss is off."""
    mask_mode: str | None
    mask_complement: bool
    """Whether there are two masked views of each image."""
    base_keep: float | None
    """Share of visible units of the base's views; None when they are whole, or there are none."""
    scales: tuple[float, ...]
    """Scales of the pseudo-labels; empty if the run makes none."""
    teacher: str
    """What makes them: `ema`, or name and step of a frozen teacher (the name alone before the first checkpoint); empty
    if the run makes none."""
    backbone: str
    seed: int | None
    steps_done: int
    steps_asked: int | None
    finished: bool
    """Whether all steps were taken, or the run ended early (`run.patience`), and it ended properly."""
    ended_early: str | None
    """Why not all steps were taken, in words; None: they were, or the run was stopped."""
    scores: tuple[Score, ...]
    """The newest evaluation of each split and weights; ``dev`` comes last."""
    progress: tuple[Score, ...]
    """Evaluations during training, steps ascending."""
    images_per_s: float | None
    """Median over steps, without the first :data:`START_UP_STEPS` and the cheaper steps of the burn-in."""
    tokens_per_s: float | None
    """Likewise."""
    mfu: float | None
    """Share of the GPUs' peak, 0–1, likewise."""
    gpu_peak_gb: float | None
    """The most that torch had allocated on one GPU in a step, 10⁹ bytes."""
    fetched_gb: float | None
    """10⁹ bytes of shards that were fetched from other machines, by all ranks; by rank 0 alone before the run ends."""
    seconds: float | None
    """Wall time of training in seconds."""
    cpu_s: float | None
    """CPU time of training in seconds, summed over ranks."""

    @property
    def method(self) -> str:
        """The name of the method, for example supervised, FixMatch or MaskMatch."""
        title = title_of(self.base, masked=self.mask_keep is not None)
        return f"{title}, views of labelled images" if self.views_of == "labelled" else title

    @property
    def backbone_name(self) -> str:
        """The backbone without its library or folder, for narrow places."""
        return self.backbone.rstrip("/").rpartition("/")[2]

    def score(self, split: str, weights: str) -> Score | None:
        """The newest evaluation of these weights on this split; None if there is none."""
        return next((score for score in self.scores if (score.split, score.weights) == (split, weights)), None)

    def in_training(self, weights: str) -> Score | None:
        """The last evaluation of these weights on ``dev`` by the run itself; None if there is none.

        A later one by `maskmatch evaluate` may predict in another way, which would not compare with other runs.
        """
        own = (score for score in reversed(self.progress) if (score.split, score.weights) == ("dev", weights))
        return next(own, None)


@dataclass(frozen=True)
class Headline:
    """The comparison of runs as text, with one row for each run, in the order of the runs."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summarise(run: Path) -> RunSummary:
    """Read a run directory and sum it up.

    Raises:
        UserError: the folder is not a run directory, or one of its files cannot be read; the message names it.
    """
    return summarise_files(read_run(run))


def summarise_files(run: RunFiles) -> RunSummary:
    """Sum up a run that was already read."""
    settings, closing = run.settings, run.closing or {}
    base = str(settings.get("method.base", SUPERVISED))
    keep = number(settings.get("method.mask.keep"))
    masked = keep is not None and settings.get("method.mask.weight") != 0
    scales, views = settings.get("method.scales"), masked or has_unlabelled_loss(base)
    views_of = str(settings.get("method.views_of", "unlabelled")) if views else "unlabelled"
    labels = views and views_of == "unlabelled"
    steps_done = int(run.train.steps[-1]) if run.train.steps.size else 0
    steps_asked = _whole(settings.get("run.steps"))
    early = _early_end(closing.get("ended_early"), steps_done)
    return RunSummary(
        path=run.path,
        name=run.path.resolve().name,
        base=base,
        views_of=views_of,
        mask_keep=keep if masked else None,
        mask_mode=str(settings.get("method.mask.mode", "drop")) if masked else None,
        mask_complement=masked and bool(settings.get("method.mask.complement")),
        base_keep=number(settings.get("method.strong_view.keep")) if has_unlabelled_loss(base) else None,
        # The recipe of a supervised run has scales too, but they are not used.
        scales=tuple(scales) if isinstance(scales, list) and labels else (),
        teacher=(run.frozen_teacher or _name_of(str(settings.get("method.teacher", "ema")))) if labels else "",
        backbone=str(settings.get("model.backbone", "unknown backbone")),
        seed=_whole(settings.get("run.seed")),
        steps_done=steps_done,
        steps_asked=steps_asked,
        finished=early is not None
        or (run.closing is not None and steps_asked is not None and steps_done >= steps_asked),
        ended_early=early,
        scores=run.scores,
        progress=run.progress,
        images_per_s=_median_rate(run, "images_per_s"),
        tokens_per_s=_median_rate(run, "tokens_per_s"),
        mfu=_median_rate(run, "mfu"),
        gpu_peak_gb=number(closing.get("gpu_peak_gb")),
        fetched_gb=_fetched_gb(closing.get("fetched"), run.fetched_mb),
        seconds=number(closing.get("seconds")),
        cpu_s=number(closing.get("cpu_s")),
    )


def _name_of(teacher: str) -> str:
    """The name of the run or export that `method.teacher` names, also by a checkpoint in it."""
    path = Path(teacher)
    return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def _early_end(found: object, steps_done: int) -> str | None:
    """What `summary.json` says of an early end; None if there was none, or the run has gone on since."""
    if not isinstance(found, dict) or found.get("step") != steps_done:
        return None
    best = number(found.get("best_miou"))
    than = "" if best is None else f" than {best:.3f} at step {found.get('best_step')}"
    return f"ended early at step {steps_done}: {found.get('evaluations')} evaluations without a better dev mIoU{than}"


def in_order(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Order the runs by backbone, then those without a mask first, then supervised ones first.

    Otherwise backbones and runs keep the order in which they were given.
    """
    backbones = list(dict.fromkeys(run.backbone for run in runs))
    return sorted(
        runs,
        key=lambda run: (backbones.index(run.backbone), run.mask_keep is not None, has_unlabelled_loss(run.base)),
    )


def method_labels(runs: Sequence[RunSummary]) -> list[str]:
    """A label for each run: its method, and how it differs from other runs of that method and backbone."""
    facts = [
        {
            "teacher": f"teacher {run.teacher}",
            "scales": f"{len(run.scales)} scales" if len(run.scales) > 1 else "one scale",
            "mode": run.mask_mode or "",
            "keep": f"keep {run.mask_keep:g}" if run.mask_keep is not None else "",
            "masks": "two masks" if run.mask_complement else "one mask",
            "base_keep": "whole views" if run.base_keep is None else f"views at keep {run.base_keep:g}",
            "seed": f"seed {run.seed}",
        }
        for run in runs
    ]
    peers = defaultdict(list)
    for place, run in enumerate(runs):
        peers[run.method, run.backbone].append(place)
    labels = [run.method for run in runs]
    for places in peers.values():
        telling = [key for key in facts[places[0]] if len({facts[place][key] for place in places}) > 1]
        for place in places if telling else ():
            labels[place] += f" ({', '.join(facts[place][key] for key in telling)})"
    return labels


def shown_splits(runs: Sequence[RunSummary]) -> list[str]:
    """The splits on which runs are compared: ``dev`` only if no run was evaluated on another split."""
    splits = sorted({score.split for run in runs for score in run.scores}, key=split_rank)
    return [split for split in splits if split != "dev"] or splits


def headline(runs: Sequence[RunSummary]) -> Headline:
    """The comparison with a column for every figure, for an HTML page; "–" stands for a missing figure."""
    splits = shown_splits(runs)
    columns = ["run", "method", "seed", "steps"]
    for split in splits:
        columns += [f"{split} mIoU", f"{split} mIoU (student)", f"{split} pixel accuracy"]
    columns += ["images/s", "MFU", "peak GB of a GPU", "fetched GB", "time"]
    rows = []
    for run, label in zip(runs, method_labels(runs)):
        row = [run.name, label, "–" if run.seed is None else str(run.seed), steps_of(run)]
        for split in splits:
            row += _split_figures(run, split)
        mfu = "–" if run.mfu is None else f"{run.mfu:.0%}"
        peak = "–" if run.gpu_peak_gb is None else f"{run.gpu_peak_gb:.1f}"
        fetched = "–" if run.fetched_gb is None else f"{run.fetched_gb:.3g}"
        rows.append((*row, _rate(run.images_per_s), mfu, peak, fetched, duration(run.seconds)))
    # Columns without any figure are left out (if no student was evaluated, for example).
    filled = [column for column in range(len(columns)) if any(row[column] != "–" for row in rows)]
    return Headline(
        columns=tuple(columns[column] for column in filled),
        rows=tuple(tuple(row[column] for column in filled) for row in rows),
    )


def caveat(runs: Sequence[RunSummary]) -> str | None:
    """A warning if methods are compared and one of them has a single seed; else None."""
    seeds = defaultdict(set)
    for run in runs:
        seeds[run.method, run.backbone].add(run.seed)
    return ONE_SEED if len(seeds) > 1 and min(map(len, seeds.values())) == 1 else None


def summary_table(runs: Sequence[RunSummary]) -> Table:
    """The comparison for a terminal of 80 columns: a section for each backbone, a line for each split of a run."""
    runs = in_order(runs)
    splits = shown_splits(runs)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, caption=caveat(runs), caption_justify="left")
    table.add_column("run\nmethod", overflow="fold")
    table.add_column("split")
    for header in ("mIoU", "mIoU\nstudent", "pixel\nacc.", "img/s", "steps", "time"):
        table.add_column(header, justify="right", no_wrap=True)
    backbone = None
    for run, label in zip(runs, method_labels(runs)):
        if run.backbone != backbone:
            backbone = run.backbone
            table.add_section()
            table.add_row(Text(run.backbone_name, style="bold"))
        figures = ["\n".join(column) for column in zip(*(_split_figures(run, split) for split in splits))] or ["–"] * 3
        shared = (_rate(run.images_per_s), steps_of(run), duration(run.seconds))
        # Text, not str, because rich would read a folder name such as "[old]" as markup.
        table.add_row(*map(Text, (f"{run.name}\n{label}", "\n".join(splits), *figures, *shared)))
    return table


def as_rows(runs: Sequence[RunSummary]) -> list[dict[str, object]]:
    """The comparison for programs: one JSON-ready object for each run.

    ``split``, ``miou`` and ``pixel_accuracy`` are those of the EMA weights on the first split of
    :attr:`RunSummary.scores`; ``scores`` holds every split and weights.
    """
    rows: list[dict[str, object]] = []
    for run in in_order(runs):
        first = next((score for score in run.scores if score.weights == "ema"), None)
        rows.append(
            {
                "run": run.name,
                "path": str(run.path),
                "method": run.method,
                "backbone": run.backbone,
                "seed": run.seed,
                "steps_done": run.steps_done,
                "steps_asked": run.steps_asked,
                "finished": run.finished,
                "split": first and first.split,
                "miou": first and first.miou,
                "pixel_accuracy": first and first.pixel_accuracy,
                "scores": [
                    {
                        "split": score.split,
                        "weights": score.weights,
                        "step": score.step,
                        "miou": score.miou,
                        "pixel_accuracy": score.pixel_accuracy,
                    }
                    for score in run.scores
                ],
                "images_per_s": run.images_per_s,
                "tokens_per_s": run.tokens_per_s,
                "mfu": run.mfu,
                "gpu_peak_gb": run.gpu_peak_gb,
                "fetched_gb": run.fetched_gb,
                "seconds": run.seconds,
                "cpu_s": run.cpu_s,
            }
        )
    return rows


def _median_rate(run: RunFiles, name: str) -> float | None:
    """Median of one of :data:`RATES` over steps; see :attr:`RunSummary.images_per_s`."""
    rates, steps = run.train.values[name], run.train.steps
    burn_in = round((number(run.settings.get("method.burn_in")) or 0) * (_whole(run.settings.get("run.steps")) or 0))
    # A run that ended within the burn-in has only such steps: then they count too.
    for first in (burn_in + START_UP_STEPS, START_UP_STEPS, 0):
        settled = rates[(steps > first) & np.isfinite(rates)]
        if settled.size:
            return float(np.median(settled))
    return None


def _fetched_gb(fetched: object, of_rank_0_mb: float) -> float | None:
    fetched_bytes = number(fetched.get("bytes")) if isinstance(fetched, dict) else None
    return (of_rank_0_mb / 1e3 or None) if fetched_bytes is None else fetched_bytes / 1e9


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def steps_of(run: RunSummary) -> str:
    """Steps done, and how many were asked for: "40/100"."""
    return f"{run.steps_done}" if run.steps_asked is None else f"{run.steps_done}/{run.steps_asked}"


def _split_figures(run: RunSummary, split: str) -> list[str]:
    """Three figures: the teacher's mIoU, the student's mIoU, the teacher's pixel accuracy."""
    ema, student = run.score(split, "ema"), run.score(split, "student")
    figures = (ema and ema.miou, student and student.miou, ema and ema.pixel_accuracy)
    return ["–" if figure is None else f"{figure:.3f}" for figure in figures]


def _rate(per_second: float | None) -> str:
    return "–" if per_second is None else f"{per_second:.1f}" if per_second < 100 else f"{per_second:.0f}"


def duration(seconds: float | None) -> str:
    """A duration in at most two units: "48s", "4m07s", "2h05m", "6d03h"."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{part_unit}"
    return f"{whole}s"
