"""Predicting many images into a folder: each once, whichever rank it falls to and however often it is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.file_bands import FileBands
from maskmatch_scale.data.images.tiff import has_rasterio
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.precision import autocast
from maskmatch_scale.errors import UserError, of_this_rank
from maskmatch_scale.evaluation.inference import Inference, inference_with
from maskmatch_scale.export.opening import Model, open_model
from maskmatch_scale.predict.device import DTYPES, FittingBatches, choose_device, choose_precision
from maskmatch_scale.predict.failures import Failures, say
from maskmatch_scale.predict.inputs import ImageFile, Input, Shard, deal, find_inputs
from maskmatch_scale.predict.label_maps import refuse_label_maps
from maskmatch_scale.predict.naming import output_names
from maskmatch_scale.predict.outputs import Outputs, Wanted
from maskmatch_scale.predict.overlay import MOST_OVERLAY_PX
from maskmatch_scale.predict.polygons import need_coco, need_geojson
from maskmatch_scale.predict.reading import OpenImage, Reader, Task
from maskmatch_scale.predict.rows import Rows, rows_of
from maskmatch_scale.predict.settings import NAME, claim
from maskmatch_scale.progress import Advance, progress_of
from maskmatch_scale.redact import shown


@dataclass(frozen=True)
class Options:
    """How and into what images are predicted."""

    wanted: Wanted = field(default_factory=Wanted)
    overlay_px: int = 4096
    """Longest side of an overlay."""
    weights: str | None = None
    """`ema` or `student`; None: `ema`, or whatever an export has."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:N`; None: a GPU if there is one."""
    precision: str = "auto"
    batch: int | None = None
    """Windows in a forward pass; None: found by trying."""
    overwrite: bool = False
    """Whether predictions that are there are made again."""
    bands: tuple[str, ...] | None = None
    """Names of the bands of each file, in their order, `-` for those that are not used; None: not said."""


@dataclass(frozen=True)
class Done:
    """What a rank has done."""

    predicted: int
    skipped: int
    """Finished before."""
    failed: int
    failures: Path
    """File that lists them."""
    say_by_exit_code: bool
    """Whether this process has to end with an error because of them, or of those of other ranks."""


def predict(
    model: Path, words: Sequence[str], out: Path, options: Options | None = None, overrides: Sequence[str] = ()
) -> Done:
    """Predict images into a folder, this rank's share of them.

    Images that cannot be read are said on stderr and listed in ``out``; the others are predicted. Images whose files
    are all there are not predicted again.

    Args:
        model: run directory, checkpoint folder, or export.
        words: what to predict, see :func:`~maskmatch_scale.predict.inputs.find_inputs`.
        out: folder for the predictions.
        options: how; None: by the defaults.
        overrides: ``evaluation.key=value``.

    Raises:
        UserError: the model, the words, the options or ``out`` cannot be used; nothing was written then.
        OSError: an output cannot be written.
    """
    options = options or Options()
    place = Place.from_environment()
    device = choose_device(options.device, place)
    precision = choose_precision(options.precision, device)
    if options.weights not in (None, "ema", "student"):
        raise UserError(f"--weights {options.weights}: it must be ema or student")
    if options.overlay_px > MOST_OVERLAY_PX:
        raise UserError(f"--overlay-px {options.overlay_px}: at most {MOST_OVERLAY_PX}; JPEG holds no larger pictures")
    for kind in options.wanted.polygons:
        {"coco": need_coco, "geojson": need_geojson}[kind]()
    failures = Failures(out, place)
    failures.begin()
    opened = open_model(model, options.weights, overrides)
    inference = inference_with(opened.segmenter, opened.evaluation, opened.crop_px, device)
    inputs = find_inputs(words, out, opened.data)
    tiffs = [each.location for each in inputs if isinstance(each, ImageFile) and each.is_tiff]
    if opened.bands:
        tiffs += [each.location for each in inputs if isinstance(each, ImageFile)]
    if tiffs:
        has_rasterio(tiffs[0])
    bands = _bands_of(opened, options, inputs)
    suspect = refuse_label_maps(inputs, opened.palette)
    if suspect is not None and place.rank == 0:
        say(f"note: {suspect} may be a label map (one channel, areas of one value); it is predicted as an image")
    names = dict(zip(inputs, output_names([each.location for each in inputs]), strict=True))
    shares = deal(inputs, place.rank, place.world_size)
    reader = Reader(opened.data, opened.exif_orientation, bands, _Once())
    total = sum(map(reader.count, shares))

    settings = _settings(opened, inference, precision, options)
    since_ns = claim(out, settings, overwrite=options.overwrite, first_rank=place.rank == 0)
    with ExitStack() as stack:
        stack.enter_context(of_this_rank())
        failures.forget_earlier()
        outputs = Outputs(
            out, options.wanted, opened.classes, opened.palette, opened.segmenter.num_classes, options.overlay_px
        )
        if place.world_size > 1 and device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // place.local_world_size))
        batches = FittingBatches(opened.segmenter.to(device), options.batch, device)
        inference = replace(inference, recipe=inference.recipe.model_copy(update={"window_batch": batches.batch}))
        job = _Job(inference, batches, outputs, failures, DTYPES[precision])
        title = "predict" if place.world_size == 1 else f"predict, rank {place.rank}"
        advance = stack.enter_context(progress_of(title, total, unit="images"))
        for share in shares:
            for task in reader.tasks(share, names[share.input]):
                is_tiff = isinstance(share.input, ImageFile) and share.input.is_tiff
                # A second sample of the same key has the name, and so the files, of the first one.
                skip = not options.overwrite and task.fault is None
                if skip and outputs.finished(task.name, tiff=is_tiff, since_ns=since_ns):
                    job.skipped += 1
                    advance(task.share)
                else:
                    if options.overwrite and (task.fault is None or task.fault.reason != "duplicate_key"):
                        outputs.remove(task.name)
                    job.predict(task, advance)
        return Done(job.predicted, job.skipped, failures.count, failures.path, failures.say_by_exit_code())


def _settings(model: Model, inference: Inference, precision: str, options: Options) -> dict[str, Any]:
    """What predictions depend on, as the file of settings has it."""
    wanted, how = options.wanted, model.evaluation
    return {
        NAME: model.name,
        "step": model.step,
        "weights": model.weights,
        "fingerprint": model.fingerprint(),
        "mode": how.mode,
        "window_px": list(inference.window_px) if how.mode == "sliding" else None,
        "overlap": how.overlap if how.mode == "sliding" else None,
        "scales": list(how.scales),
        "flip": how.flip,
        "precision": precision,
        "exif_orientation": model.exif_orientation,
        "overlay_px": options.overlay_px if wanted.overlay else None,
        "confidence": wanted.confidence,
        "probabilities": wanted.probabilities,
        "polygons": list(wanted.polygons),
        "classes": list(model.classes),
        "palette": [list(colour) for colour in model.palette],
    } | ({} if options.bands is None else {"bands": list(options.bands)})


def _bands_of(model: Model, options: Options, inputs: Sequence[Input]) -> FileBands:
    """The channels of the model and which bands of files they are.

    Raises:
        UserError: `--bands` does not fit them, or an index names no such bands.
    """
    try:
        bands = FileBands(model.bands, options.bands)
    except ValueError as error:
        raise UserError(f"--bands {','.join(options.bands or ())}: {error}") from None
    for each in {shard.bands: shard for shard in inputs if isinstance(shard, Shard)}.values():
        if each.bands is not None:
            try:
                bands.of_pages(each.bands)
            except ValueError as error:
                raise UserError(f"{shown(each.location)}: {str(error).removeprefix('data.channels: ')}") from None
    return bands


class _Once:
    """Says the first line of its kind on stderr."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, line: str) -> None:
        if not self._said:
            self._said = True
            print(f"maskmatch: {line} (said once)", file=sys.stderr, flush=True)  # noqa: T201


class _Job:
    """Predicts one image after the other."""

    def __init__(
        self,
        inference: Inference,
        segmenter: FittingBatches,
        outputs: Outputs,
        failures: Failures,
        dtype: torch.dtype | None,
    ) -> None:
        self._inference, self._segmenter, self._outputs = inference, segmenter, outputs
        self._failures, self._dtype = failures, dtype
        self.predicted = self.skipped = 0

    def predict(self, task: Task, advance: Advance) -> None:
        """Predict an image, or note that it cannot be read."""
        left = task.share
        try:
            with task.open() as image:
                height = image.size_px[0]
                with self._outputs.writing(task.name, image) as write:
                    for rows in self._rows(image):
                        write(rows)
                        part = task.share * len(rows.classes) / height
                        if left - part > 0:
                            advance(part)
                            left -= part
            self.predicted += 1
        except BadSample as fault:
            self._failures.add(task.where, fault)
        advance(left)

    def _rows(self, image: OpenImage) -> Iterator[Rows]:
        with autocast(self._inference.device, self._dtype):
            yield from rows_of(
                self._inference.blocks(self._segmenter, image),
                image,
                probabilities=self._outputs.wanted.probabilities,
            )
