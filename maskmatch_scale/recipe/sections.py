"""Every key of a recipe, in sections, with type, unit, default and meaning.

The string below a key is its documentation. docs/recipe.md is generated from it, and error messages search it for the
key that was meant.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, model_validator

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe.bases import BASES
from maskmatch_scale.recipe.engines import ENGINES
from maskmatch_scale.recipe.recording import RecordRecipe
from maskmatch_scale.recipe.section import Section
from maskmatch_scale.recipe.soundness import unsound
from maskmatch_scale.recipe.tables import OneOf
from maskmatch_scale.recipe.values import (
    BadSamples,
    Positive,
    Probability,
    ScaleRange,
    SidesPx,
    StepRange,
    StopSignal,
)


class RecipeError(UserError):
    """A recipe that cannot be run: the message names the key, its value and what to do."""


class SourceRecipe(Section):
    """One of several sources of labelled or unlabelled samples."""

    root: str
    """Shard folder: a local one, or a URL."""
    stream: str | None = None
    """Stream of its index; null = `labelled` in `data.labelled`, `unlabelled` in `data.unlabelled`."""
    name: str | None = None
    """Name from which the random order of its samples is drawn; null = the stream's name. The sources of one list need
    different names."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often it is read, relative to the weights of the other sources."""


class DataRecipe(Section):
    """Where samples come from, and the weak view made of them."""

    root: str
    """Shard folder: tar shards and their index.json, as `maskmatch shards write` makes it. A local folder, an
    http(s):// URL, or a URL that fsspec opens (s3://, gs://)."""
    labelled: tuple[SourceRecipe, ...] = ()
    """Sources of labelled samples; empty = the stream `labelled` of `data.root`. All must have the classes of
    `data.root`."""
    unlabelled: tuple[SourceRecipe, ...] = ()
    """Sources of unlabelled samples; empty = the stream `unlabelled` of `data.root`. Labels in their shards are not
    read."""
    labelled_count: Annotated[int, Field(ge=0)] | None = None
    """How many labelled samples are drawn from the labelled sources; null = all of them. 0 = a run without labels,
    which needs a trained model in `model.pretrained`."""
    split_seed: int = 0
    """Seed of the draw of `data.labelled_count` samples."""
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
    """Folder for shards fetched from elsewhere, shared by the ranks of a machine; null = ~/.cache/maskmatch_scale."""
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
    """Whether an index may name `pipe:` shards, which run a shell command."""
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
    weights, a run, a checkpoint or an export. Of a torch file only tensors are read, because unpickling anything else
    could run any code."""
    backbone_options: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Keyword arguments for timm.create_model, or keys of SegformerConfig, that replace the library's defaults. A ViT's
    `img_size` is what its position embedding is laid out for; other sizes of images are taken, too."""
    batchnorm: Literal["synchronised", "per_rank", "frozen"] = "synchronised"
    """BatchNorm in a SegFormer's head. synchronised: statistics of a micro-batch over all ranks. per_rank: statistics
    of each rank's own images. frozen: the running statistics, which never change."""


class MaskRecipe(Section):
    """The masked-modelling task: predict the segmentation from some units only."""

    keep: Annotated[float, Field(gt=0, le=1)] | None = 0.3
    """Share of units the student sees; null turns the masked loss off."""
    mode: Literal["drop", "zero"] = "drop"
    """drop: masked units are not computed. zero: pixels of masked units are set to zero, as in MIC, which saves no
    computation."""
    view: Literal["weak", "strong"] = "weak"
    """View that is masked."""
    pixels: Literal["all", "masked", "visible"] = "all"
    """Pixels over which the masked loss is taken: all, those of masked units, or those of visible units."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_m: weight of the masked loss."""


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
    """Gaussian blur: range of the standard deviation, in px."""
    blur_probability: Probability = 0.5
    """Share of images blurred."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Gaussian noise: its standard deviation is drawn from 0 to this number, for pixel values 0–1."""
    cutmix_probability: Probability = 0.5
    """CutMix: share of images that get a box of their neighbour in the global batch."""
    cutmix_area: ScaleRange = (0.02, 0.4)
    """CutMix: range of the box's area, as a share of the image."""


class MethodRecipe(Section):
    """MaskMatch: a weak-to-strong base, with masks and a multi-scale ensemble on top."""

    base: Annotated[str, BeforeValidator(OneOf(BASES))] = "fixmatch"
    """Weak-to-strong base."""
    mask: MaskRecipe = MaskRecipe()
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 1.5)
    """Q: scales at which the teacher predicts an image; the mean of these predictions gives the pseudo-labels. [1.0]
    switches the ensemble off."""
    threshold: Probability = 0.95
    """τ: a pixel's pseudo-label counts where the teacher's confidence is at least this."""
    unlabelled_weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_u: weight of the base's unlabelled loss."""
    # Decision: docs/decisions/0009-burn-in-as-a-share.md.
    burn_in: Probability = 0.0
    """Share of the run, at its start, that trains with the labelled loss alone; no unlabelled sample is read or
    computed in it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.996
    """α: largest decay of the teacher's moving average; the decay at step t is min(1 - 1/(t+1), α)."""
    ema_buffers: Literal["average", "copy"] = "average"
    """Floating-point buffers of the teacher (BatchNorm's running statistics). average: averaged like weights. copy:
    copied from the student."""
    class_weights: Literal["none", "inverse_sqrt"] = "none"
    """Weights of the classes in the labelled loss. inverse_sqrt: (the class's share of the pixels of the drawn labelled
    samples)^-1/2, scaled to mean 1 over pixels."""
    strong_view: StrongViewRecipe = StrongViewRecipe()


class OptimRecipe(Section):
    """AdamW and its schedule. No decay on biases, norms and other one-dimensional parameters."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    lr_reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Labelled images per step for which `optim.lr` was chosen. The rate is multiplied by (labelled images per step of
    this run) / (this number), the linear scaling rule. null = the rate is not scaled."""
    head_lr_multiplier: Positive = 1.0
    """Factor on `optim.lr` for the head and the context decoder."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """ViT only: each block's rate is this factor times the rate of the block after it (BEiT: 0.65 to 0.9). 1 = the same
    rate everywhere."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """AdamW's β₁ and β₂."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """How the learning rate falls to zero at the last step; constant = it does not fall."""
    poly_power: Positive = 0.9
    """Exponent of the schedule `poly`."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; a larger gradient is scaled down to it. null = never clipped."""


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
    deepspeed_json: str | None = None
    """JSON file with further DeepSpeed settings: ZeRO++, buckets, communication. Settings that the recipe has too must
    agree with it."""
    collective_timeout_s: Annotated[int, Field(ge=1)] = 1800
    """Seconds that a rank waits for the other ranks in one collective before the job ends with an error that names the
    ranks that did not come."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of each rank; null = the cores of the machine divided by its ranks."""


class EvaluationRecipe(Section):
    """Evaluation at the label's own resolution, in training and by `maskmatch evaluate`."""

    # Decision: docs/decisions/0051-one-way-of-inference.md.
    mode: Literal["sliding", "whole"] = "sliding"
    """sliding: overlapping windows, whose probabilities are averaged. whole: each image in one forward pass, padded to
    whole patches; fewer products, and memory that grows with the image. With `engine.compile` every new size of image
    is compiled."""
    window_px: SidesPx | None = None
    """Height and width of a window in px (one number: a square), for `sliding`; null = `data.crop_px`."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Smallest share by which neighbouring windows overlap."""
    window_batch: Annotated[int, Field(ge=1)] = 8
    """Windows in one forward pass."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """Factors by which each window, or whole image, is resized; the mean of the probabilities counts."""
    flip: bool = False
    """Whether mirror images (left to right) are predicted too, and averaged with the rest."""
    pictures: Annotated[int, Field(ge=0)] = 4
    """Held-out samples whose predictions are kept for the report; 0 = none."""


class RunRecipe(Section):
    """The run itself."""

    dir: str
    """Run directory."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Number of optimizer steps; 0 = as many as `run.epochs` needs."""
    epochs: Positive | None = None
    """Length of the run instead of `run.steps`: how often all unlabelled samples are read (in a supervised run: all
    labelled samples). Several sources share these reads by their weights, not by their sizes."""
    last_batch: Literal["drop", "pad"] = "pad"
    """With `run.epochs`, when the samples do not fill the last step. drop: leave them out. pad: fill the step from the
    next epoch."""
    seed: int = 0
    """Seed of everything random except the draw of labelled samples (`data.split_seed`)."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: Annotated[int, Field(ge=0)] = 2
    """How many of the last checkpoints are kept. By default two: if the newest is damaged, the one before is taken. The
    newest one is never deleted, whatever is set here."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints whose step is a multiple of this are kept too; 0 = none."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many of the best checkpoints are kept too, by the teacher's mIoU on `dev`. If an evaluation is among the best
    so far, a checkpoint is written after its step. 0 = none."""
    max_failed_saves: Annotated[int, Field(ge=1)] = 3
    """Number of checkpoints in a row that cannot be written, for example because the disk is full, before the run
    stops."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between evaluations on the split `dev`; 0 = only at the end."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines of progress; metrics stay on the device until then."""
    max_hours: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Hours after which the run stops with a checkpoint and exit code 75, counted from the start of the process, anew
    at every start; the checkpoint is complete by then. 0 = no limit (docs/stopping.md)."""
    stop_signals: tuple[StopSignal, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")
    """Signals after which the run stops with a checkpoint and exit code 75, when any rank gets one: of SIGTERM, SIGINT,
    SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU. [] = none (docs/stopping.md)."""
    profile: StepRange | None = None
    """[first, last]: steps, counted from 1, of which every rank writes a trace of torch's profiler to
    RUN/profile/rank-N.json.gz (docs/watching.md). null = none."""
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps with non-finite gradients that are left out before the run stops. Above 0 it costs one device
    synchronisation per step at ZeRO-0 and under accelerate; DeepSpeed's other stages always wait."""


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
