"""The recipe of a run: every key, its unit, its default.

A recipe is a YAML file in sections; ``section.key=value`` overrides come after it. OmegaConf reads and merges,
pydantic types and checks, and every mistake is one :class:`RecipeError` that names the key and the value.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from yaml import YAMLError

from maskmatch_scale.errors import UserError


class RecipeError(UserError):
    """A recipe that cannot be run: the message names the key, its value and what to do."""


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _pair(value: object) -> object:
    """One number stands for both sides of a square; strict typing wants a tuple where YAML has a list."""
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the first number must not be larger than the second")
    return value


Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
BadSamples = Literal["fail", "skip"]
SidesPx = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(_pair)]
ScaleRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


class SourceRecipe(Section):
    """One of several sources of labelled or unlabelled samples."""

    root: str
    """Shard folder: a local one, or a URL."""
    stream: str | None = None
    """Stream of its index; null = `labelled` or `unlabelled`, as the list that it stands in."""
    name: str | None = None
    """What its order is drawn from; null = the stream's name. Sources of one list need different ones."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the samples, relative to the others'."""


class DataRecipe(Section):
    """Where samples come from, and the weak view made of them."""

    root: str
    """Shard folder: tar shards and their index.json (`maskmatch shards write`). A local folder, an http(s):// URL, or
    any that fsspec opens (s3://, gs://)."""
    labelled: tuple[SourceRecipe, ...] = ()
    """Sources of labelled samples; empty = the stream `labelled` of `root`. All must have the classes of `root`."""
    unlabelled: tuple[SourceRecipe, ...] = ()
    """Sources of unlabelled samples; empty = the stream `unlabelled` of `root`. Labels in their shards are not read."""
    labelled_count: Annotated[int, Field(ge=0)] | None = None
    """How many labelled samples are drawn from the labelled sources; null = all of them. 0 = a run without labels,
    which needs `model.pretrained`."""
    split_seed: int = 0
    """Which labelled samples are drawn."""
    unlabelled_per_labelled: Annotated[int, Field(ge=1)] = 1
    """Unlabelled images in a batch for each labelled one (for each of `engine.micro_batch` in a run without labels)."""
    shuffle_window: Annotated[int, Field(ge=1)] = 4096
    """Samples that are shuffled with each other, within shards that are shuffled as wholes. 1 = shards alone."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """Parts of an epoch that are read side by side; null = as many as ranks, so that each reads shards of its own. A
    number keeps the order the same whatever the ranks; it must divide the labelled images of a global micro-batch."""
    bad_labelled: BadSamples = "fail"
    """A labelled sample that cannot be used: fail = the run stops and names it; skip = another takes its place."""
    bad_unlabelled: BadSamples = "skip"
    """Likewise for unlabelled samples. Skipped ones are counted in metrics.jsonl and listed in RUN/skipped/."""
    max_bad_share: Probability = 0.01
    """Share of the samples read that may be skipped before the run stops."""
    max_image_px: Annotated[int, Field(ge=1)] = 100_000_000
    """Largest image, in pixels, that is decoded; a larger one is a bad sample."""
    exif_orientation: bool = False
    """Turn unlabelled images as their EXIF data says. Labelled ones stay as they are stored, as their label maps do."""
    cache_dir: str | None = None
    """Folder for shards fetched from elsewhere, shared by the ranks of a machine; null = ~/.cache/maskmatch_scale."""
    cache_gb: Positive = 50.0
    """Bound on that folder, in 10⁹ bytes; what was used least recently goes first."""
    fetch_timeout_s: Positive = 60.0
    """Seconds without data after which a fetch is tried again."""
    fetch_attempts: Annotated[int, Field(ge=1)] = 8
    """Tries of a fetch, with growing pauses, before the shard counts as unreadable."""
    allow_pipe: bool = False
    """Whether an index may name `pipe:` shards, which run a shell command."""
    crop_px: SidesPx = (512, 512)
    """Height and width of a training crop in px (one number: a square)."""
    scale_range: ScaleRange = (0.5, 2.0)
    """Weak view: factor by which an image is resized before the crop, log-uniform between the two."""
    flip_probability: Probability = 0.5
    """Weak view: share of crops mirrored left-right. 0 where handedness means something (text, music)."""
    rare_class_crops: Probability = 0.0
    """Share of labelled crops laid around a pixel of a class drawn by frequency^-1/2, so that rare classes are seen."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes a rank; 0 loads between steps."""


class ModelRecipe(Section):
    """The network."""

    backbone: str
    """`timm/<name>`, `transformers/segformer-b0` … `-b5`, or `transformers/<folder with a config.json>`."""
    head: Literal["segformer", "linear", "pixel_shuffle", "dpt"] | None = None
    """null = the family's usual one (segformer for SegFormer, linear for ViT)."""
    num_classes: Annotated[int, Field(ge=2, le=255)] | None = None
    """null = as many as the index of the data names."""
    unit_px: Annotated[int, Field(ge=1)] | None = None
    """Side of a masking unit in px; null = the family's usual one."""
    pretrained: bool | str | None = None
    """null or false = random, true = the library's own weights, or a local file or folder, also an export of ours."""
    backbone_options: dict[str, Any] = {}
    """Keyword arguments for timm.create_model, or keys of SegformerConfig, that replace the library's."""
    batchnorm: Literal["synchronised", "per_rank", "frozen"] = "synchronised"
    """BatchNorm in a SegFormer's head: statistics of a micro-batch over all ranks, of each rank's own, or the running
    ones, never changed."""


class MaskRecipe(Section):
    """The masked-modelling task: predict the segmentation from some units only."""

    keep: Annotated[float, Field(gt=0, le=1)] | None = 0.3
    """Share of units the student sees; null turns the masked loss off."""
    mode: Literal["drop", "zero"] = "drop"
    """drop: masked units are not computed. zero: their pixels are painted (MIC's way, saves nothing)."""
    view: Literal["weak", "strong"] = "weak"
    """Which view is masked."""
    pixels: Literal["all", "masked", "visible"] = "all"
    """Where the masked loss is taken."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_m."""


class StrongViewRecipe(Section):
    """Photometric strong view, drawn for each image by itself. A strength of 0 switches an operation off."""

    brightness: Annotated[float, Field(ge=0)] = 0.5
    """Factor drawn from [max(0, 1-b), 1+b]."""
    contrast: Annotated[float, Field(ge=0)] = 0.5
    """Factor drawn from [max(0, 1-c), 1+c], around the image's own mean grey."""
    saturation: Annotated[float, Field(ge=0)] = 0.5
    """Factor drawn from [max(0, 1-s), 1+s]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    """Shift drawn from [-h, h], in turns of the colour circle."""
    jitter_probability: Probability = 0.8
    """Share of images whose colours are jittered."""
    grey_probability: Probability = 0.2
    """Share of images turned grey."""
    blur_sigma_px: ScaleRange = (0.1, 2.0)
    """Gaussian blur: standard deviation in px."""
    blur_probability: Probability = 0.5
    """Share of images blurred."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Gaussian noise: largest standard deviation (drawn from 0 to this), pixel values 0–1."""
    cutmix_probability: Probability = 0.5
    """Share of images that get a box of their neighbour in the batch."""
    cutmix_area: ScaleRange = (0.02, 0.4)
    """Box area as a share of the image."""


class MethodRecipe(Section):
    """MaskMatch: a weak-to-strong base, with masks and a multi-scale ensemble on top."""

    base: Literal["supervised", "fixmatch"] = "fixmatch"
    """Weak-to-strong base."""
    mask: MaskRecipe = MaskRecipe()
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 1.5)
    """Q: scales at which the teacher labels an image; [1.0] switches the ensemble off."""
    threshold: Probability = 0.95
    """τ: a pixel counts where the teacher's confidence reaches it."""
    unlabelled_weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_u: weight of the base's unlabelled loss."""
    burn_in: Probability = 0.0
    """Share of the run at its start with the labelled loss alone; nothing unlabelled is read or computed in it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.996
    """α: largest decay of the teacher's average; the decay at step t is min(1 - 1/(t+1), α)."""
    ema_buffers: Literal["average", "copy"] = "average"
    """Floating buffers of the teacher (BatchNorm's running statistics): averaged like weights, or the student's own."""
    class_weights: Literal["none", "inverse_sqrt"] = "none"
    """Weights of the labelled loss; inverse_sqrt: (share of the drawn labelled pixels)^-1/2, mean 1 over pixels."""
    strong_view: StrongViewRecipe = StrongViewRecipe()


class OptimRecipe(Section):
    """AdamW and its schedule. No decay on biases, norms and other one-dimensional parameters."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    lr_reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Labelled images a step for which `lr` was chosen: `lr` is multiplied by (those of this run) / (this number), the
    linear scaling rule. null = `lr` as it stands, whatever the batch."""
    head_lr_multiplier: Positive = 1.0
    """Factor on it for the head and the context decoder."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """ViT: every block learns at this factor of the rate of the next deeper one (BEiT: 0.65 to 0.9); 1 = all alike."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear rise to the peak learning rate."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """Fall to zero at the last step."""
    poly_power: Positive = 0.9
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; null = never clipped."""


class EngineRecipe(Section):
    """How the step runs on the hardware."""

    library: Literal["deepspeed", "accelerate"] = "deepspeed"
    """deepspeed: ZeRO on any number of ranks. accelerate: one process or plain data parallelism (zero_stage 0)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "autocast-bf16"] = "fp32"
    """bf16, fp16: such weights with fp32 masters. autocast-bf16: fp32 weights, bf16 arithmetic. auto: the fastest of
    fp32, bf16 and autocast-bf16 that is right for this model on this machine."""
    micro_batch: Annotated[int, Field(ge=1)] = 2
    """Labelled images a rank in one forward and backward."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches a rank in one step."""
    offload_optimizer: bool = False
    """Keep optimizer state and fp32 masters in host memory and take the step there (ZeRO-1 to 3)."""
    offload_parameters: bool = False
    """Keep the shards of the weights in host memory, too (ZeRO-3)."""
    activation_checkpointing: bool = False
    """Run the backbone's blocks again in backward instead of keeping what they computed: the same gradients, less
    memory, one more forward pass of the blocks."""
    compile: bool = False
    """torch.compile the blocks of a ViT, the student's and the teacher's (ZeRO-0 to 2)."""
    deepspeed_json: str | None = None
    """File with further DeepSpeed settings: ZeRO++, buckets, communication. What the recipe says too must agree."""
    collective_timeout_s: Annotated[int, Field(ge=1)] = 1800
    """Seconds that a rank waits for the others in one collective before the job ends with an error."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads a rank; null = cores shared out among the ranks of a machine."""


class EvaluationRecipe(Section):
    """Sliding-window evaluation at the label's own resolution."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Smallest share by which neighbouring windows (of data.crop_px) overlap."""
    window_batch: Annotated[int, Field(ge=1)] = 8
    """Windows in one forward."""
    pictures: Annotated[int, Field(ge=0)] = 4
    """Held-out samples whose predictions are kept for the report."""


class RunRecipe(Section):
    """The run itself."""

    dir: str
    """Run directory."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps; 0 = as many as `epochs` need."""
    epochs: Positive | None = None
    """Instead of steps: how many samples are read, as a multiple of all unlabelled ones (in a supervised run: labelled
    ones). Of several sources each has its share by weight, not by size."""
    last_batch: Literal["drop", "pad"] = "pad"
    """With `epochs`, where the samples do not fill the last step: drop = leave them out, pad = fill it from the next
    epoch."""
    seed: int = 0
    """Everything random but the labelled draw follows from it."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between checkpoints; 0 = at the end only."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between evaluations on `dev`; 0 = at the end only."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines of progress; metrics wait on the device until then."""
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 0
    """Steps with a non-finite loss that are left out before the run stops (above 0: one device sync a step)."""


class Recipe(Section):
    """Everything a run depends on, apart from the machine."""

    data: DataRecipe
    model: ModelRecipe
    method: MethodRecipe = MethodRecipe()
    optim: OptimRecipe = OptimRecipe()
    engine: EngineRecipe = EngineRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    run: RunRecipe

    @model_validator(mode="after")
    def _sound_together(self) -> Recipe:
        for refused, why in self._unsound():
            if refused:
                raise ValueError(why)
        return self

    def _unsound(self) -> Iterator[tuple[bool, str]]:
        """Combinations that train wrongly or not at all: whether the recipe has one, the reason and what to do."""
        yield from self._unsound_without_labels()
        yield (
            self.run.epochs is not None and self.method.burn_in == 1,
            "run.epochs with method.burn_in=1: nothing unlabelled is ever read; set run.steps",
        )
        yield (
            bool(self.run.steps) == (self.run.epochs is not None),
            f"run.steps={self.run.steps} and run.epochs={json.dumps(self.run.epochs)}: a run needs one of "
            "them, and only one",
        )
        engine, accelerate = self.engine, self.engine.library == "accelerate"
        stage, precision = f"engine.zero_stage={engine.zero_stage}", f"engine.precision={engine.precision}"
        yield (
            accelerate and engine.zero_stage > 0,
            f"{stage} with engine.library=accelerate, which shards nothing: set engine.zero_stage=0",
        )
        yield (
            accelerate and engine.precision == "bf16",
            f"{precision} with engine.library=accelerate, which keeps no fp32 masters: use autocast-bf16",
        )
        for key in ("offload_optimizer", "offload_parameters", "deepspeed_json"):
            yield (
                accelerate and bool(getattr(engine, key)),
                f"engine.{key} with engine.library=accelerate: that is DeepSpeed's; use engine.library=deepspeed",
            )
        yield (
            engine.zero_stage == 0 and engine.precision == "bf16",
            f"{stage} with {precision}: DeepSpeed takes a hidden optimizer step there; use engine.zero_stage=1 or "
            "engine.precision=autocast-bf16",
        )
        yield (
            engine.zero_stage == 0 and engine.precision == "fp16" and not accelerate,
            f"{stage} with {precision}: DeepSpeed's wrapper for it has other rules for its master weights and no test "
            "here; use engine.zero_stage=1",
        )
        yield (
            engine.offload_optimizer and engine.zero_stage == 0,
            f"{stage} with engine.offload_optimizer=true: offloading is a part of ZeRO; use engine.zero_stage=1",
        )
        yield (
            engine.offload_parameters and engine.zero_stage < 3,
            f"{stage} with engine.offload_parameters=true: only ZeRO-3 shards the weights; use engine.zero_stage=3",
        )
        yield (
            engine.compile and engine.zero_stage == 3,
            f"{stage} with engine.compile=true: ZeRO-3 gathers weights in hooks that a compiled block does not run; "
            "use engine.zero_stage=2 or engine.compile=false",
        )
        yield (
            engine.compile and not self.model.backbone.startswith("timm/"),
            f"model.backbone={self.model.backbone} with engine.compile=true: only the blocks of a ViT are compiled; "
            "set engine.compile=false",
        )
        yield (
            engine.compile and engine.activation_checkpointing,
            "engine.compile=true with engine.activation_checkpointing=true: not proven right together; switch one off",
        )
        yield (
            self.optim.layer_decay < 1 and not self.model.backbone.startswith("timm/"),
            f"optim.layer_decay={self.optim.layer_decay} with model.backbone={self.model.backbone}: it is defined for "
            "a ViT's blocks; set optim.layer_decay=1",
        )
        yield (
            bool(self.run.max_nonfinite_steps) and engine.accumulation > 1,
            f"run.max_nonfinite_steps={self.run.max_nonfinite_steps} with engine.accumulation={engine.accumulation}: "
            "a step cannot be left out half way; set the first to 0 or the second to 1",
        )

    def _unsound_without_labels(self) -> Iterator[tuple[bool, str]]:
        none, method = self.data.labelled_count == 0, self.method
        yield (
            none and not isinstance(self.model.pretrained, str),
            f"data.labelled_count=0 with model.pretrained={json.dumps(self.model.pretrained)}: without labels the "
            "teacher must be a trained segmenter from the start; name a run, a checkpoint or an export there",
        )
        yield (
            none and method.burn_in > 0,
            f"data.labelled_count=0 with method.burn_in={method.burn_in}: a burn-in has the labelled loss alone, and "
            "there is none; set method.burn_in=0",
        )
        unlabelled = method.base != "supervised" and method.unlabelled_weight > 0
        yield (
            none and not unlabelled and (method.mask.keep is None or method.mask.weight == 0),
            "data.labelled_count=0 and no unlabelled loss (method.base, method.unlabelled_weight, method.mask): there "
            "is nothing to learn from",
        )
        yield (
            none and bool(self.data.labelled),
            "data.labelled_count=0 with sources in data.labelled: leave one of them out",
        )

    def with_steps(self, samples: int, images: int, *, labelled: bool) -> Recipe:
        """The recipe with `run.epochs` turned into `run.steps`, if it has epochs.

        Args:
            samples: of an epoch.
            images: of a step, of the same kind.
            labelled: whether they are read in the burn-in too.

        Raises:
            RecipeError: not even one step comes of it.
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
            # The burn-in is a rounded share of all steps, and comes on top: as many as leave the right number.
            steps = max(whole, math.floor(whole / (1 - self.method.burn_in)) - 2)
            while steps - round(self.method.burn_in * steps) < whole:
                steps += 1
        run = self.run.model_copy(update={"steps": steps, "epochs": None})
        return self.model_copy(update={"run": run})

    @property
    def burn_in_steps(self) -> int:
        """Steps with the labelled loss alone."""
        return round(self.method.burn_in * self.run.steps)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, readable by :func:`load_recipe` again."""
        text: str = OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))
        return text


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply ``section.key=value`` overrides, check everything.

    Args:
        path: YAML file.
        overrides: for example ``["run.steps=20", "method.scales=[0.5,1]", "method.mask.keep=null"]``.

    Returns:
        The recipe, frozen.

    Raises:
        RecipeError: one line that names the key, its value and the nearest valid key or what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path}: no such file")
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise RecipeError(f"recipe {path}: not a mapping of sections; see configs/ for examples")
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals or not key:
                raise RecipeError(f"override {override!r}: write it as section.key=value")
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        content = OmegaConf.to_container(config, resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"recipe {path}: {' '.join(str(error).split())}") from None
    return parse_recipe(content, source=str(path))


def parse_recipe(content: object, source: str = "recipe") -> Recipe:
    """Check plain nested data as :func:`load_recipe` does; ``source`` opens every message.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    try:
        # As JSON, so that strict typing still takes a YAML list for a tuple.
        return Recipe.model_validate_json(json.dumps(content))
    except TypeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first mistake as one line, unknown keys first: they usually explain the missing ones."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    key = _dotted(first["loc"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}={_shown(first['input'])}; did you mean {_nearest(key)}?{more}"
    if first["type"] == "missing":
        return f"missing key {key}: it has no default{more}"
    message = first["msg"].removeprefix("Value error, ")
    return message + more if not key else f"{key}={_shown(first['input'])}: {message}{more}"


def _nearest(key: str) -> str:
    """The valid key most like an unknown one: by its last name first, by what its docstring says of it next."""
    section, _, name = key.rpartition(".")
    words = name.replace("_", " ").lower()
    docs = {full: field.description or "" for full, field in _fields(Recipe)}
    valid = sorted({prefix for full in docs for prefix in _prefixes(full)})

    def likeness(candidate: str) -> float:
        its_section, _, its_name = candidate.rpartition(".")
        named = difflib.SequenceMatcher(None, name, its_name).ratio()
        described = max(
            (difflib.SequenceMatcher(None, words, phrase).ratio() for phrase in _phrases(docs, candidate, words)),
            default=0.0,
        )
        return max(named, 0.9 * described) + 0.2 * (its_section == section)

    return max(valid, key=likeness)


def _phrases(docs: Mapping[str, str], key: str, like: str) -> Iterator[str]:
    """Runs of as many words as ``like`` has in a key's docstring, if it has at least two."""
    count = len(like.split())
    words = docs.get(key, "").lower().replace(".", " ").split()
    if count >= 2:
        for start in range(len(words) - count + 1):
            yield " ".join(words[start : start + count])


def _dotted(location: Sequence[str | int]) -> str:
    """Location of a mistake as a dotted key, without pydantic's names for union members and list places."""
    key = ""
    valid = {prefix for name in _keys(Recipe) for prefix in _prefixes(name)}
    for part in location:
        longer = f"{key}.{part}" if key else str(part)
        if key in valid and longer not in valid and _is_leaf(key):
            break
        key = longer
    return key


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _is_leaf(key: str) -> bool:
    return key in set(_keys(Recipe))


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the recipe, dotted, with its field."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _keys(section: type[BaseModel]) -> Iterator[str]:
    return (key for key, _ in _fields(section))


def _shown(value: object) -> str:
    return json.dumps(value) if not isinstance(value, Mapping) else "{…}"
