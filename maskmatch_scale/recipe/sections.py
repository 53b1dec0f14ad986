"""Every key of a recipe, by sections: its type, its unit, its default, its meaning.

The string below a key is its documentation: messages search it, and docs/recipe.md is generated from it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe.bases import check_base
from maskmatch_scale.recipe.soundness import unsound


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

    base: Annotated[str, BeforeValidator(check_base)] = "fixmatch"
    """Weak-to-strong base: one of the table in recipe/bases.py."""
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
        for refused, why in unsound(self):
            if refused:
                raise ValueError(why)
        return self

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
