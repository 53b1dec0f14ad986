"""One whole MaskMatch step, ours against the straightforward implementation, and where its time goes.

python -m benchmarks.train_step --out benchmarks/results/train_step.json
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation

from benchmarks.harness import (
    check_out,
    describe_machine,
    markdown,
    markdown_table,
    peak_mb,
    time_interleaved,
    write_json,
)
from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.maskmatch import MaskMatch, Step
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.models.units import visible_count, zero_masked_pixels
from maskmatch_scale.models.weights import to_transformers_name
from maskmatch_scale.recipe import MaskRecipe, MethodRecipe

COLUMNS = (
    *("backbone", "image_size", "classes", "images", "step", "seconds_min", "seconds_median"),
    *("speedup", "limit", "efficiency", "peak_mb"),
)
PART_COLUMNS = ("backbone", "step", "part", "seconds_min", "share")
SOURCES = ("maskmatch_scale", "benchmarks/harness.py", "benchmarks/train_step.py")
SCALES = (0.5, 1.0, 1.5)
EXAMPLES = """examples:
  python -m benchmarks.train_step --out benchmarks/results/train_step.json
  python -m benchmarks.train_step --out /tmp/b5.json --backbone transformers/segformer-b5 --device cuda --images 8
"""

Run = Callable[[], object]


class Straightforward(nn.Module):
    """What one writes first: the library's model as it ships, and a linear head on a ViT's tokens."""

    def __init__(self, segmenter: Segmenter, name: str, size: int) -> None:
        super().__init__()
        state = {k: v for k, v in segmenter.state_dict().items() if not k.startswith("context.")}
        library, _, model = name.partition("/")
        self.is_segformer = library == "transformers"
        if self.is_segformer:
            config = copy.deepcopy(segmenter.backbone.config)
            config.num_labels = segmenter.num_classes
            self.model = SegformerForSemanticSegmentation(config)
            self.model.load_state_dict({to_transformers_name(key): value for key, value in state.items()})
        else:
            self.model = timm.create_model(model, num_classes=0, img_size=size, dynamic_img_size=True)
            backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
            self.model.load_state_dict(backbone)
            self.head = nn.Conv2d(self.model.embed_dim, segmenter.num_classes, 1)
            self.head.weight.data = state["head.classifiers.0.weight"][..., None, None].clone()
            self.head.bias.data = state["head.classifiers.0.bias"].clone()

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the model's own resolution."""
        if self.is_segformer:
            return self.model(images).logits
        patch = self.model.patch_embed.patch_size[0]
        tokens = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        maps = tokens.transpose(1, 2).unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))
        return self.head(maps)


def up(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Full-resolution logits."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


@dataclass
class Case:
    """One backbone; both steps start from the same weights and see the same views."""

    backbone: str
    image_size: int
    classes: int
    images: int
    keep: float
    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        size = self.image_size
        self.segmenter = build_segmenter(self.backbone, self.classes, image_size=size).to(self.device)
        # Threshold 0: every pixel counts, whatever random weights are sure of.
        recipe = MethodRecipe(mask=MaskRecipe(keep=self.keep), scales=SCALES, threshold=0.0)
        self.maskmatch = MaskMatch(self.segmenter, recipe, 0, 255).to(self.device).train()
        self.teacher = copy.deepcopy(self.segmenter).eval().requires_grad_(False)
        self.plain = Straightforward(self.segmenter, self.backbone, size).to(self.device).train()
        self.plain_teacher = copy.deepcopy(self.plain).eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        shape = (self.images, 3, size, size)
        batch = Batch(
            torch.randint(256, shape, dtype=torch.uint8, generator=draw),
            torch.randint(self.classes, (self.images, size, size), generator=draw),
            torch.randint(256, shape, dtype=torch.uint8, generator=draw),
            torch.ones(self.images, size, size, dtype=torch.bool),
            tuple(range(self.images)),
        )
        self.step: Step = self.maskmatch.prepare(batch.to(self.device))
        self.scale = 1 / self.maskmatch.denominators(self.step).clamp(min=1)
        self.optimizers = {
            module: torch.optim.AdamW(module.parameters(), lr=1e-5) for module in (self.segmenter, self.plain)
        }

    # --- ours, part by part ------------------------------------------------------------------------------------------

    def pseudo_label(self) -> PseudoLabels:
        """The teacher at three scales."""
        pseudo = self.maskmatch.pseudo_label(self.step, self.teacher)
        assert pseudo is not None
        return pseudo

    def forward_backward(self, pseudo: PseudoLabels) -> Tensor:
        """All views, all losses."""
        loss, sums = self.maskmatch(self.step, pseudo, self.scale)
        loss.backward()
        return sums

    def update(self, student: nn.Module, teacher: nn.Module) -> None:
        """Optimizer and teacher, the same for both implementations."""
        self.optimizers[student].step()
        self.optimizers[student].zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1e-3)

    def ours(self) -> None:
        """One step of this package."""
        self.forward_backward(self.pseudo_label())
        self.update(self.segmenter, self.teacher)

    # --- the straightforward step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def plain_pseudo_label(self) -> PseudoLabels:
        """Full-resolution probabilities of every scale, then their mean."""
        assert self.step.unlabelled is not None
        images = self.maskmatch.normalise(self.step.unlabelled.weak.images)
        patch = self.segmenter.patch_px
        maps = []
        for scale in SCALES:
            sides = [max(patch, round(side * scale / patch) * patch) for side in images.shape[2:]]
            maps.append(up(self.plain_teacher(up(images, sides)), images.shape[2:]).softmax(1))
        confidence, labels = torch.stack(maps).mean(0).max(1)
        return PseudoLabels(labels, confidence >= 0.0)

    def plain_pass(self, images: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """One view: forward, full-resolution logits, cross-entropy, backward."""
        logits = up(self.plain(self.maskmatch.normalise(images)), target.shape[1:])
        loss = F.cross_entropy(logits, target.masked_fill(~counted, -100), reduction="sum") / counted.sum()
        loss.backward()
        return loss.detach()

    def plain_labelled(self) -> Tensor:
        """L_x."""
        return self.plain_pass(self.step.labelled_images, self.step.labels, self.step.labelled_pixels)

    def plain_strong(self, pseudo: PseudoLabels) -> Tensor:
        """L_u."""
        (view,) = self.step.views
        mixed = pseudo.mixed(view.cutmix)
        return self.plain_pass(view.images, mixed.labels, mixed.confident & view.valid)

    def plain_masked(self, pseudo: PseudoLabels) -> Tensor:
        """L_m with masked pixels zeroed."""
        assert self.step.masked is not None
        masked = self.step.masked
        grid = self.segmenter.unit_grid(self.image_size, self.image_size)
        # Zero in normalised space, as `mode="zero"`: normalise, zero, and undo what plain_pass will do again.
        images = self.maskmatch.normalise(masked.view.images)
        painted = zero_masked_pixels(images, masked.visible, grid, self.segmenter.unit_px)
        painted = painted * self.maskmatch.std + self.maskmatch.mean
        return self.plain_pass(painted, pseudo.labels, pseudo.confident & masked.counted)

    def straightforward(self) -> None:
        """One step with three passes."""
        pseudo = self.plain_pseudo_label()
        self.plain_labelled()
        self.plain_strong(pseudo)
        self.plain_masked(pseudo)
        self.update(self.plain, self.plain_teacher)

    # --- what must agree ---------------------------------------------------------------------------------------------

    def disagreement(self) -> dict[str, float]:
        """Where the maths is the same: difference of labels (share of pixels), of L_x, and of L_u, dropout off.

        Losses of the views together normalise by one batch in ours (BatchNorm), by three in theirs: they are compared
        in eval mode.
        """
        modules = (self.maskmatch, self.plain)
        for module in modules:
            module.eval()
        ours, theirs = self.pseudo_label(), self.plain_pseudo_label()
        sums = self.maskmatch(self.step, ours, self.scale)[1] * self.scale
        plain_x, plain_u = self.plain_labelled(), self.plain_strong(ours)
        for module in modules:
            module.zero_grad(set_to_none=True)
            module.train()
        return {
            "labels_differ": float((ours.labels != theirs.labels).double().mean()),
            "loss_x_differs": abs(float(sums[0] - plain_x)),
            "loss_u_differs": abs(float(sums[1] - plain_u)),
        }

    # --- counts ------------------------------------------------------------------------------------------------------

    def limit(self) -> float:
        """Amdahl's limit of masking: backbone multiply–adds of a step without dropping over those of one with it."""
        unit, size = self.segmenter.unit_px, self.image_size
        visible = visible_count(self.segmenter.unit_grid(size, size), self.keep)
        patch = self.segmenter.patch_px
        teacher = sum(
            encoder_macs(self.segmenter, side, side)
            for side in (max(patch, round(size * scale / patch) * patch) for scale in SCALES)
        )
        whole = encoder_train_macs(self.segmenter, size, size)
        assert size % unit == 0
        dropped = encoder_train_macs(self.segmenter, size, size, visible)
        return (teacher + 3 * whole) / (teacher + 2 * whole + dropped)


def measure(case: Case, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the two steps, and rows of their parts."""
    _say(f"{case.backbone}: checking that both steps agree")
    differences = case.disagreement()
    pseudo = case.pseudo_label()
    masked_off = replace(case.step, masked=None)
    masked = case.step.masked
    assert masked is not None

    def views_only() -> None:
        case.maskmatch(masked_off, pseudo, case.scale)[0].backward()

    def masked_pass() -> None:
        (case.maskmatch._masked_loss_sum(masked, pseudo) * 1e-6).backward()

    def masked_encoder() -> None:
        levels = case.segmenter.encode(case.maskmatch.normalise(masked.view.images), masked.visible)
        torch.autograd.backward(levels, [torch.zeros_like(level) for level in levels])

    detached = [level.detach().requires_grad_() for level in case.segmenter.encode(
        case.maskmatch.normalise(masked.view.images), masked.visible
    )]  # fmt: skip
    grid = case.segmenter.unit_grid(case.image_size, case.image_size)

    def context() -> None:
        assert case.segmenter.context is not None
        guesses = case.segmenter.context(detached, masked.visible, grid)
        torch.autograd.backward(guesses, [torch.zeros_like(guess) for guess in guesses])

    parts: dict[str, dict[str, Run]] = {
        "ours": {
            "teacher, three scales": case.pseudo_label,
            "labelled and strong view": views_only,
            "masked view": masked_pass,
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
    runs |= {f"{step}/{part}": run for step, of_step in parts.items() for part, run in of_step.items()}
    # A part must leave gradients, for the optimizer's own part to have work.
    case.ours()
    case.straightforward()
    peaks = {}
    for name, module, teacher in (
        ("ours", case.segmenter, case.teacher),
        ("straightforward", case.plain, case.plain_teacher),
    ):
        held = [*module.parameters(), *teacher.parameters()]
        peaks[name] = peak_mb(runs[name], held, case.device)
    _say(f"{case.backbone}: {len(runs)} variants × {repeats}")
    timings = time_interleaved(_with_gradients(runs, case), repeats, case.device)
    base = {"backbone": case.backbone, "image_size": case.image_size, "classes": case.classes, "images": case.images}
    limit = case.limit()
    rows = []
    for name in ("ours", "straightforward"):
        speedup = timings["straightforward"].minimum / timings[name].minimum
        rows.append(
            {
                **base,
                "step": name,
                "keep": case.keep,
                "seconds_min": timings[name].minimum,
                "seconds_median": timings[name].median,
                "speedup": speedup,
                "limit": limit if name == "ours" else 1.0,
                "efficiency": speedup / limit if name == "ours" else 1.0,
                "peak_mb": peaks[name],
                "repeats": repeats,
                **differences,
            }
        )
        _say(f"  {name}: {timings[name].minimum:.2f} s, {speedup:.2f}×, limit of masking alone {limit:.2f}×")
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
    """Every variant starts without gradients, but the optimizer's part needs some."""

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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def draw(rows: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> Figure:
    """Two stacked bars a backbone: where a step's seconds go."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    figure = Figure(figsize=(9, 0.8 + 1.6 * len(backbones)), layout="constrained")
    colours = {
        "teacher, three scales": "#0072b2", "labelled and strong view": "#117733", "labelled view": "#009e73",
        "strong view": "#56b4e9", "masked view": "#d55e00", "optimizer and EMA": "0.6",
    }  # fmt: skip
    for panel, backbone in zip(figure.subplots(len(backbones), 1, squeeze=False).flat, backbones):
        for place, step in enumerate(("ours", "straightforward")):
            left = 0.0
            for part in parts:
                if (part["backbone"], part["step"]) != (backbone, step) or part["part"].startswith("of it"):
                    continue
                panel.barh(place, part["seconds_min"], left=left, color=colours[part["part"]], label=part["part"])
                left += part["seconds_min"]
            row = next(r for r in rows if (r["backbone"], r["step"]) == (backbone, step))
            panel.text(left, place, f"  {row['seconds_min']:.3g} s, {row['speedup']:.2f}×", va="center", fontsize=9)
        limit = next(r["limit"] for r in rows if r["backbone"] == backbone and r["step"] == "ours")
        panel.set_yticks([0, 1], ["ours", "straightforward"])
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(
            f"{backbone.rpartition('/')[2]}: masking alone could give {limit:.2f}×", fontsize=10, loc="left"
        )
        panel.set_xlabel("seconds a step", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    handles = {text: handle for panel in figure.axes for handle, text in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.train_step",
        description="Times one whole MaskMatch step (teacher at scales 0.5, 1, 1.5; labelled, strong and masked view; "
        "backward; AdamW; EMA) of this package against the straightforward implementation: the libraries' models as "
        "they ship, masked pixels zeroed, three passes, full-resolution logits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    backbones = ["transformers/segformer-b2", "timm/vit_small_patch16_224"]
    add("--backbone", nargs="+", default=backbones, metavar="NAME", help=f"default: {' '.join(backbones)}")
    add("--image-size", type=int, default=512, metavar="PX", help="side of the square images; default 512")
    add("--images", type=int, default=1, metavar="N", help="labelled images, and as many unlabelled; default 1")
    add("--classes", type=int, default=21, metavar="N", help="default 21, as in Pascal VOC")
    add("--keep", type=float, default=0.3, metavar="SHARE", help="share of visible units; default 0.3")
    add("--repeats", type=int, default=5, metavar="N", help="timed rounds, of which the minimum counts; default 5")
    add("--device", default="cpu", help="cpu (one thread, process time) or cuda; default cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every backbone and write JSON, Markdown and PNG."""
    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        for name in ("image_size", "images", "repeats"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(options, name)}; it must be at least 1")
        if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device: {options.device!r} is not here; cpu or, with a GPU, cuda")
        check_out(options.out)
        device = torch.device(options.device)
        for backbone in options.backbone:  # found now, not after the first one was measured
            with torch.device("meta"):
                segmenter = build_segmenter(backbone, options.classes)
            visible_count(segmenter.unit_grid(options.image_size, options.image_size), options.keep)
    except ValueError as error:
        _say(f"train_step: {error}")
        return 2
    machine = describe_machine(device, SOURCES)
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for backbone in options.backbone:
        case = Case(backbone, options.image_size, options.classes, options.images, options.keep, device)
        new_rows, new_parts = measure(case, options.repeats)
        rows, parts = rows + new_rows, parts + new_parts
        write_json(options.out, machine, rows, parts=parts)
        page = markdown("train_step", machine, rows, COLUMNS)
        page += "\n## Where the time goes\n\n" + markdown_table(parts, PART_COLUMNS)
        options.out.with_suffix(".md").write_text(page, encoding="utf-8")
    draw(rows, parts).savefig(options.out.with_suffix(".png"), dpi=110)
    _say(f"wrote {options.out}, and .md and .png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
