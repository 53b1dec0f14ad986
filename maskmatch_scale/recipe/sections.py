"""Every key of a recipe, in sections, with type, unit, default and meaning.

The string below a key is its documentation. docs/recipe.md is generated from it, and error messages search it for the
key that was meant.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, model_validator

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe.engines import ENGINES
from maskmatch_scale.recipe.learning import MethodRecipe, OptimRecipe
from maskmatch_scale.recipe.recording import RecordRecipe
from maskmatch_scale.recipe.running import EvaluationRecipe, RunRecipe
from maskmatch_scale.recipe.section import Section
from maskmatch_scale.recipe.soundness import unsound
from maskmatch_scale.recipe.tables import OneOf
from maskmatch_scale.recipe.values import (
    BadSamples,
    Positive,
    Probability,
    ScaleRange,
    Shards,
    Share,
    SidesPx,
    shard_ranges,
)
from maskmatch_scale.recipe.where import Where
from maskmatch_scale.redact import PIPE, redacted_values, shown


class RecipeError(UserError):
    """A recipe that cannot be run: the message names the key, its value and what to do."""


class SourceRecipe(Section):
    """One of several sources of labelled or unlabelled samples."""

    root: str | None = None
    """Shard folder: a local one, or a URL. Also an archive of img2dataset, wids, Energon or open_clip, or a list of
    shards with their numbers of samples: see docs/streaming.md. A source needs this or `shards`."""
    shards: Shards | None = None
    """Without `root`: shards without an index, which are read in sequence (docs/streaming.md): a path or URL with
    braces (`x-{000..127}.tar`) or `*`, or a `pipe:` command. For `data.unlabelled` alone. Beside `root`: which shards
    of its stream are used, by their numbers in the index, from 0 on: `0-999`, or `0-9,20`; null = all."""
    where: str | None = None
    """Which samples are used, by fields of their `.json` members: `width >= 512 and similarity > 0.3`
    (docs/streaming.md); null = all. Samples without such a field are not."""
    part: Share = 1.0
    """Share of its samples that is used, of those that `shards` and `where` leave: drawn from `data.split_seed` and the
    source's name, as whole shards if there are many. Of shards without an index: share of the shards."""
    labels: str | None = None
    """Shard folder with the label maps of these images, in its stream `labelled`; samples are matched by their keys.
    For `data.labelled` alone; null = they are beside the images."""
    stream: str | None = None
    """Stream of its index; null = `labelled` in `data.labelled` (with `labels`: `unlabelled` if there is no such
    stream), `unlabelled` in `data.unlabelled`."""
    name: str | None = None
    """Name from which the random order of its samples is drawn; null = the stream's name. The sources of one list need
    different names."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often it is read, relative to the weights of the other sources."""

    @property
    def is_sequential(self) -> bool:
        """Whether its shards have no index."""
        return self.root is None

    @model_validator(mode="after")
    def _one_place(self) -> SourceRecipe:
        root, shards = (json.dumps(redacted_values(place)) for place in (self.root, self.shards))
        if self.root is None and self.shards is None:
            raise ValueError(f"root={root} and shards={shards}: a source needs one of them")
        if self.root is not None and self.shards is not None:
            try:
                shard_ranges(self.shards)
            except ValueError as error:
                raise ValueError(
                    f"root={root} and shards={shards}: beside root, {error}. For shards without an index leave out root"
                ) from None
        if self.root is None and self.shards is not None and re.fullmatch(r"[\d\s,-]+", self.shards):
            raise ValueError(f"shards={shards}: numbers of shards need an index to be numbers in; name it as root")
        if self.is_sequential and self.stream is not None:
            raise ValueError(
                f"shards={shards} with stream={self.stream!r}: streams are listed in an index, and these shards have "
                "none; leave it out (`name` gives the source a name)"
            )
        return self

    @model_validator(mode="after")
    def _condition(self) -> SourceRecipe:
        if self.where is not None:
            Where(self.where)
        return self


class DataRecipe(Section):
    """Where samples come from, and the weak view made of them."""

    root: str
    """Shard folder: tar shards and their index.json, as `maskmatch shards write` makes it. A local folder, an
    http(s):// URL, one of an object store (s3://, gs://, az://), or any that fsspec opens (hf://)."""
    labelled: tuple[SourceRecipe, ...] = ()
    """Sources of labelled samples; empty = the stream `labelled` of `data.root`. All must have the classes of
    `data.root`."""
    unlabelled: tuple[SourceRecipe, ...] = ()
    """Sources of unlabelled samples; empty = the stream `unlabelled` of `data.root`. Labels in their shards are not
    read."""
    channels: tuple[str, ...] | None = None
    """Names of the bands that the model sees, in the order of its input channels; null = all bands that the index of
    `data.root` names, or red, green and blue if it names none. Other sources must have bands of the same names."""
    value_ranges: dict[str, tuple[float, float]] = {}  # noqa: RUF012 - pydantic copies it
    """Which stored values of a band become 0 and 255, by its name, in place of those that the index says:
    {nir: [0, 4000]}."""
    remap: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Classes that become another one when label maps are read: from a class name of the index to another one, to a new
    name (classes with the same new name are merged), or to `ignore`. The others stay. Class values count up in the
    order of the index; a merged class stands where the first of its members stood."""
    sequential_lanes: Annotated[int, Field(ge=1)] | None = None
    """Number of parts in which the shards of sources without an index are read side by side, over all ranks; a multiple
    of ranks × `data.workers`. null = as many as that (at least one for each rank) in a new run, and as many as before
    in one that continues."""
    labelled_count: Annotated[int, Field(ge=0)] | None = None
    """How many labelled samples are drawn from the labelled sources; null = all of them. 0 = a run without labels,
    which needs a trained model in `model.pretrained` or `method.teacher`."""
    split_seed: int = 0
    """Seed of the draw of `data.labelled_count` samples, and of the `part` of each source."""
    unlabelled_per_labelled: Annotated[int, Field(ge=1)] = 1
    """Unlabelled images in a batch for each labelled one. In a run without labels: for each of `engine.micro_batch`."""
    shuffle_window: Annotated[int, Field(ge=1)] = 4096
    """Number of samples that are shuffled among each other, after the order of the shards was shuffled. 1 = only the
    order of the shards is shuffled."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """Number of parts of an epoch that are read side by side; null = as many as ranks, so that each rank reads shards
    of its own. A fixed number keeps the order of samples the same for every number of ranks; it must divide the
    labelled images of a global micro-batch."""
    bad_labelled: BadSamples = "fail"
    """What happens when a labelled sample cannot be used. fail: the run stops and names it. skip: another sample takes
    its place."""
    bad_unlabelled: BadSamples = "skip"
    """The same for unlabelled samples. Skipped samples are counted in metrics.jsonl and listed in RUN/skipped/."""
    max_bad_share: Probability = 0.01
    """Share of the samples read that may be skipped before the run stops."""
    max_image_px: Annotated[int, Field(ge=1)] = 100_000_000
    """Largest number of pixels of an image that is decoded; a sample with a larger image cannot be used."""
    exif_orientation: bool = False
    """Rotate and mirror unlabelled images as their EXIF orientation says. Labelled images stay as they are stored, like
    their label maps."""
    cache_dir: str | None = None
    """Folder for shards fetched from elsewhere, shared by the ranks of a machine; null = maskmatch_scale in the first
    of $XDG_CACHE_HOME, ~/.cache, $SLURM_TMPDIR, $LOCAL_SCRATCH, $TMPDIR and /tmp that is on a local disk."""
    cache_gb: Positive = 50.0
    """Largest size of `data.cache_dir`, in 10⁹ bytes; shards that were used least recently are deleted first."""
    fetch_timeout_s: Positive = 60.0
    """Seconds without new data after which the fetch of a shard is tried again."""
    fetch_attempts: Annotated[int, Field(ge=1)] = 8
    """Number of tries to fetch a shard, with growing pauses between them, before it counts as unreadable."""
    outage_s: Positive | None = None
    """Seconds that a loader process may spend on shards that do not come, without one that does, before the network is
    taken for lost: then the run writes a checkpoint and stops. At most half of `engine.collective_timeout_s`, for which
    the other ranks wait; null = a quarter of it."""
    allow_pipe: bool = False
    """Whether a source or an index may name `pipe:` shards, which run a shell command."""
    crop_px: SidesPx = (512, 512)
    """Height and width of a training crop in px (one number: a square)."""
    scale_range: ScaleRange = (0.5, 2.0)
    """Weak view: range of the factor by which an image is resized before the crop, drawn log-uniformly."""
    flip_probability: Probability = 0.5
    """Weak view: share of crops mirrored left to right. Use 0 where left and right differ in meaning (text, music)."""
    rare_class_crops: Probability = 0.0
    """Share of labelled crops that are placed around a pixel of a drawn class. Classes are drawn with probability
    proportional to frequency^-1/2, so that rare classes are seen more often."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes of each rank; 0 = samples are loaded in the training process, between steps. While an evaluation
    runs, as many processes of its own decode its next images."""

    @model_validator(mode="after")
    def _sequential(self) -> DataRecipe:
        for source in self.labelled:
            if source.is_sequential:
                raise ValueError(
                    f"labelled: {shown(source.shards or '')} as `shards`: labelled samples are drawn and counted, "
                    "which needs an index (`maskmatch shards index`); give its folder as `root`"
                )
        for source in self.unlabelled:
            place = shown(source.root or source.shards or "")
            if source.labels is not None:
                raise ValueError(
                    f"unlabelled: {place} with labels={shown(source.labels)}: labels of unlabelled images are not "
                    "read; move the source to data.labelled, or leave out its labels"
                )
            if source.is_sequential and (source.shards or "").startswith(PIPE) and not self.allow_pipe:
                raise ValueError(
                    f"unlabelled: {place}: pipe: runs a shell command, which is off; set data.allow_pipe=true if you "
                    "trust it"
                )
        return self


class ModelRecipe(Section):
    """The network."""

    backbone: str
    """`timm/<name>`, `transformers/segformer-b0` … `-b5`, or `transformers/<folder with a config.json>`."""
    head: Literal["segformer", "linear", "pixel_shuffle", "dpt"] | None = None
    """Segmentation head; null = the family's usual one (segformer for SegFormer, linear for ViT)."""
    num_classes: Annotated[int, Field(ge=2, le=255)] | None = None
    """Number of classes; null = as many as the index of the data names."""
    unit_px: Annotated[int, Field(ge=1)] | None = None
    """Side of a masking unit in px; null = the family's usual one."""
    pretrained: bool | str | None = None
    """Initial weights. null or false: random. true: the library's pretrained weights. A path: a local file or folder of
    weights, a run, a checkpoint or an export. Where they do not fit the head, as with a classifier of other classes, it
    starts at random, and the run says so; a backbone that does not fit is refused. Of a torch file only tensors are
    read, because unpickling anything else could run any code."""
    backbone_options: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Keyword arguments for timm.create_model, or keys of SegformerConfig, that replace the library's defaults. A ViT's
    `img_size` is what its position embedding is laid out for; other sizes of images are taken, too."""
    batchnorm: Literal["synchronised", "per_rank", "frozen"] = "synchronised"
    """BatchNorm in a SegFormer's head. synchronised: statistics of a micro-batch over all ranks. per_rank: statistics
    of each rank's own images. frozen: the running statistics, which never change."""


class EngineRecipe(Section):
    """How the step runs on the hardware."""

    library: Annotated[str, BeforeValidator(OneOf(ENGINES))] = "deepspeed"
    """deepspeed: ZeRO on any number of ranks. accelerate: one process or plain data parallelism, with
    `engine.zero_stage` 0."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "autocast-bf16"] = "auto"
    """bf16, fp16: weights of that type with fp32 master weights. autocast-bf16: fp32 weights, bf16 arithmetic. auto:
    the fastest of fp32, bf16 and autocast-bf16 that is right for this model on this machine."""
    micro_batch: Annotated[int, Field(ge=1)] = 2
    """Labelled images of each rank in one forward and backward pass. Each view of the unlabelled ones has its own."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches of each rank in one optimizer step."""
    offload_optimizer: bool = False
    """Keep optimizer state and fp32 master weights in host memory and run the optimizer step there (ZeRO-1 to 3)."""
    offload_parameters: bool = False
    """Keep the shards of the weights in host memory too (ZeRO-3)."""
    activation_checkpointing: bool = False
    """Compute the backbone's blocks a second time in the backward pass instead of keeping their activations: the same
    gradients, less memory, one more forward pass of the blocks."""
    compile: bool = False
    """Compile the backbone's blocks with torch.compile, those of student and teacher (ZeRO-0 to 2)."""
    # Decision: docs/decisions/0063-views-as-cuda-graphs.md.
    cuda_graphs: bool = False
    """Record each view's forward and backward pass once as CUDA graphs and replay them, so that a step is not slowed by
    launching its operations. For a ViT under `engine.library: accelerate`, on one GPU, with a head other than
    `segformer`. Bases that perturb features (unimatch, unimatch_v2) run their views without a graph."""
    deepspeed_json: str | None = None
    """JSON file with further DeepSpeed settings: ZeRO++, buckets, communication. Settings that the recipe has too must
    agree with it."""
    collective_timeout_s: Annotated[int, Field(ge=1)] = 1800
    """Seconds that a rank waits for the other ranks in one collective before the job ends with an error that names the
    ranks that did not come."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of each rank; null = the cores of the machine divided by its ranks."""


class Recipe(Section):
    """Everything a run depends on, apart from the machine."""

    data: DataRecipe
    model: ModelRecipe
    method: MethodRecipe = MethodRecipe()
    optim: OptimRecipe = OptimRecipe()
    engine: EngineRecipe = EngineRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    record: RecordRecipe = RecordRecipe()
    run: RunRecipe

    @model_validator(mode="after")
    def _sound_together(self) -> Recipe:
        for refused, why in unsound(self):
            if refused:
                raise ValueError(why)
        return self

    def with_steps(self, samples: int, images: int, *, labelled: bool) -> Recipe:
        """The recipe with `run.epochs` converted to `run.steps`; the recipe itself if it has no epochs.

        Args:
            samples: number of samples in an epoch.
            images: number of images of the same kind in a step, over all ranks.
            labelled: whether they are labelled, and so read in the burn-in too.

        Raises:
            RecipeError: the samples do not fill one step.
        """
        if self.run.epochs is None:
            return self
        needed = self.run.epochs * samples / images
        steps = whole = math.floor(needed + 1e-9) if self.run.last_batch == "drop" else math.ceil(needed - 1e-9)
        if whole < 1:
            raise RecipeError(
                f"run.epochs={self.run.epochs:g} with run.last_batch=drop: {samples} samples fill no step of {images} "
                "images; set run.last_batch=pad, or take fewer images a step"
            )
        if not labelled:
            # Unlabelled samples are read after the burn-in only, which is a rounded share of all steps. So find the
            # smallest number of steps that leaves enough steps after it.
            steps = max(whole, math.floor(whole / (1 - self.method.burn_in)) - 2)
            while steps - round(self.method.burn_in * steps) < whole:
                steps += 1
        run = self.run.model_copy(update={"steps": steps, "epochs": None})
        return self.model_copy(update={"run": run})

    @property
    def burn_in_steps(self) -> int:
        """Number of steps with the labelled loss alone."""
        return round(self.method.burn_in * self.run.steps)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, which :func:`load_recipe` can read."""
        text: str = OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))
        return text
