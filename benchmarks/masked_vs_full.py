"""What masking saves: the backbone on whole images against visible units only, and against zeroed pixels.

Whole images run as the libraries ship their models, too, so that the table says what is gained over those.

python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation, SegformerModel

from benchmarks.harness import (
    Run,
    Timing,
    check_out,
    count_gmacs,
    describe_machine,
    gather_share,
    markdown,
    markdown_table,
    peak_mb,
    peak_tflops,
    time_interleaved,
    write_json,
)
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.models.segmenter import MaskMode
from maskmatch_scale.models.units import sample_visible, visible_count
from maskmatch_scale.models.weights import to_transformers_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "train")
CONTRACT = (
    *("backbone", "image_size", "batch", "dtype", "pass", "mode", "keep"),
    *("img_per_s", "gmacs", "speedup", "ideal_speedup", "efficiency", "peak_mb"),
)
"""The contract's keys of a row; more keys follow them in the JSON."""

COLUMNS = (*CONTRACT, "runner", "over_library", "gather_share")
"""Of the first table in Markdown; `mfu` follows where the device's peak is known."""

PEER_COLUMNS = (
    *("backbone", "image_size", "batch", "dtype", "part", "pass", "ours img/s", "library img/s", "speedup"),
    *("ours peak_mb", "library peak_mb", "max_abs_difference"),
)
"""Of the second table: a row for each pair of peers."""

CLASSES = 150
"""Of the whole model, as many as ADE20K has; the backbone does not depend on them."""

SOURCES = ("maskmatch_scale/models", "benchmarks/harness.py", "benchmarks/masked_vs_full.py")
"""What the figures depend on."""


@dataclass(frozen=True)
class Preset:
    """Values for the options that are not given."""

    backbone: tuple[str, ...]
    image_size: tuple[int, ...]
    batch: tuple[int, ...]
    dtype: tuple[str, ...]
    device: str
    repeats: int
    keep: tuple[float, ...]
    zero_keep: tuple[float, ...]
    """One is enough: zeroing computes everything, whatever the keep ratio."""


PRESETS = {
    "cpu": Preset(
        backbone=("transformers/segformer-b0", "transformers/segformer-b2", "timm/vit_small_patch16_224"),
        image_size=(512,), batch=(2,), dtype=("float32",), device="cpu", repeats=5,
        keep=(0.1, 0.3, 0.5, 0.75, 1.0), zero_keep=(0.3,),
    ),
    "gpu": Preset(
        backbone=(
            "timm/vit_base_patch16_224", "timm/vit_large_patch16_224", "timm/vit_giant_patch14_dinov2",
            "transformers/segformer-b5",
        ),
        image_size=(512, 768, 1024), batch=(4,), dtype=("bfloat16",), device="cuda", repeats=20,
        keep=(0.1, 0.3, 0.5, 0.75, 1.0), zero_keep=(0.3,),
    ),
}  # fmt: skip

EXAMPLES = """examples:
  python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
  python -m benchmarks.masked_vs_full --out /tmp/b2.json --backbone transformers/segformer-b2 --batch 1 --keep 0.3
  python -m benchmarks.masked_vs_full --out /tmp/gpu.json --preset gpu --image-size 512 --batch 16
"""


@dataclass(frozen=True)
class Case:
    """One backbone at one size; its variants are timed against each other."""

    backbone: str
    image_size: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.backbone} {self.image_size} px, batch {self.batch}, {self.dtype}"

    def build(self, device: torch.device) -> Segmenter:
        """Random weights, the same in every run; on the meta device none, but every check.

        Raises:
            ValueError: the backbone is unknown or the size does not fit.
        """
        torch.manual_seed(0)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            segmenter = build_segmenter(self.backbone, CLASSES, image_size=self.image_size, context=False)
        segmenter.unit_grid(self.image_size, self.image_size)
        return segmenter.to(device, DTYPES[self.dtype])

    def build_library(self, segmenter: Segmenter) -> nn.Module:
        """The library's own model around the segmenter's weights, which both then share.

        timm: `create_model` with the same size, its `forward_features` to be called. transformers: the whole
        `SegformerForSemanticSegmentation`, whose `segformer` is the encoder.
        """
        library, _, name = self.backbone.partition("/")
        first = next(segmenter.parameters())
        state = segmenter.state_dict()
        model: nn.Module
        if library == "timm":
            model = timm.create_model(name, num_classes=0, img_size=self.image_size, dynamic_img_size=True)
            state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone")}
        else:
            model = SegformerForSemanticSegmentation(segmenter.backbone.config)
            state = {to_transformers_name(key): value for key, value in state.items()}
        _, unexpected = model.to(first.device, first.dtype).load_state_dict(state, strict=False, assign=True)
        assert not unexpected, unexpected
        return model


@dataclass(frozen=True)
class Variant:
    """How the backbone sees the images."""

    mode: str  # ours | library | drop | zero
    keep: float
    visible: Tensor | None
    """int64 (batch, k); None: whole images."""

    @property
    def name(self) -> str:
        """Tells the variants of a case apart."""
        return f"{self.mode} {self.keep:g}"

    def encoder(self, segmenter: Segmenter, library: nn.Module) -> Callable[[Tensor], list[Tensor]]:
        """Images (B, 3, H, W) to features."""
        if self.mode == "library":
            return library_encoder(library, segmenter)
        mode: MaskMode = "zero" if self.mode == "zero" else "drop"
        return lambda images: segmenter.encode(images, self.visible, mode)

    def gmacs(self, segmenter: Segmenter, image_size: int, kind: str) -> float:
        """10⁹ multiply–adds that an image needs in this mode, by the formula of `models/cost.py`."""
        cost = encoder_train_macs if kind == "train" else encoder_macs
        k = self.visible.shape[1] if self.mode == "drop" and self.visible is not None else None
        return cost(segmenter, image_size, image_size, k) / 1e9


def library_encoder(library: Any, segmenter: Segmenter) -> Callable[[Tensor], list[Tensor]]:
    """The library's own forward through its encoder, as maps (B, C, h, w) like those of `Segmenter.encode`."""
    if isinstance(segmenter.backbone, SegformerModel):
        # As transformers' own segmentation model calls it: the maps of all stages.
        return lambda images: list(library.segformer(images, output_hidden_states=True).hidden_states)
    patch = segmenter.patch_px

    def features(images: Tensor) -> list[Tensor]:
        # Models that pool by an average norm behind it, in `fc_norm`; elsewhere that does nothing.
        tokens = library.fc_norm(library.forward_features(images))[:, library.num_prefix_tokens :]
        size = images.shape[2] // patch, images.shape[3] // patch
        return [tokens.reshape(len(images), *size, -1).permute(0, 3, 1, 2)]

    return features


def make_pass(function: Callable[[Tensor], list[Tensor]], images: Tensor, module: nn.Module, kind: str) -> Run:
    """One forward pass without gradients, or one forward and backward pass, over images (B, 3, H, W)."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return function(images)

    # Made once: what the head, or the loss, would hand back is no work of the pass.
    gradients = [torch.randn_like(output) for output in forward()] if kind == "train" else []

    def train() -> None:
        torch.autograd.backward(function(images), gradients)
        module.zero_grad(set_to_none=True)

    return train if kind == "train" else forward


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
        device: where to.
        peak: 10¹² FLOP/s that device and dtype can reach; None: not known.

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
        _say(f"{case}: {kind}, {len(functions)} variants × {repeats}")
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
            _say(
                f"  {mode} {variant.keep:g}: {figures['speedup']:.2f}× of an ideal {figures['ideal_speedup']:.2f}×, "
                f"{found.peak_mb:.0f} MB"
            )

        pairs = {"encoder": {runner: measured[f"{runner} 1"] for runner in ("ours", "library")}}
        if wholes:
            pairs["whole model"] = {}
            for runner in wholes:
                name = f"whole model, {runner}"
                # One image: an image's count does not depend on the others, and the plain attention is large.
                one = make_pass(functions[name], images[:1], modules[name], kind)
                pairs["whole model"][runner] = Measured(timings[name], count_gmacs(one), peaks[name])
        for part, pair in pairs.items():
            for runner, found in pair.items():
                tail = {"part": part, "runner": runner, "max_abs_difference": differences[part]}
                head = {"pass": kind, "mode": runner, "keep": 1.0}
                peers.append(_figures_of(case, head, pair["library"], found, peak) | {"repeats": repeats} | tail)
            _say(f"  {part}: {peers[-2]['speedup']:.2f}× as fast as the library's own")
    return rows, peers


def _held(module: Any, name: str, images: Tensor) -> list[Tensor]:
    """What is there before and after a pass: the images, and the weights and buffers of what runs."""
    if not name.startswith("whole model"):
        # timm's models are the encoder; transformers' and ours have a head beside it.
        module = getattr(module, "backbone", getattr(module, "segformer", module))
    return [*module.parameters(), *module.buffers(), images]


def _figures_of(
    case: Case, head: dict[str, Any], reference: Measured, found: Measured, peak: float | None
) -> dict[str, Any]:
    """The contract's keys, with speed-ups over `reference`, and the seconds that they come from."""
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
    """Largest absolute difference of outputs in evaluation mode: the peers must do the same work."""
    for module in modules:
        module.eval()
    with torch.no_grad():
        pairs = zip(ours(images), library(images), strict=True)
        return _figures(max(float((a.float() - b.float()).abs().max()) for a, b in pairs))


def _figures(value: float) -> float:
    """Six significant figures."""
    return float(f"{value:.6g}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pair_up(peers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `PEER_COLUMNS`: ours and the library's, which lie one after the other, side by side."""
    return [
        {
            **{key: ours[key] for key in PEER_COLUMNS if key in ours},
            "ours img/s": ours["img_per_s"],
            "library img/s": library["img_per_s"],
            "ours peak_mb": ours["peak_mb"],
            "library peak_mb": library["peak_mb"],
        }
        for ours, library in zip(peers[::2], peers[1::2], strict=True)
    ]


def page(machine: Mapping[str, Any], rows: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]]) -> str:
    """The two tables in Markdown."""
    known = any(row["mfu"] is not None for row in rows)
    columns = (*COLUMNS, "mfu") if known else COLUMNS
    return "\n".join(
        [
            markdown("masked_vs_full", machine, rows, columns),
            "## Against the libraries as they ship",
            "",
            "Whole images, the same weights: `Segmenter` against the forward of timm and of transformers. `speedup` is",
            "the library's seconds over ours.",
            "",
            markdown_table(pair_up(peers), PEER_COLUMNS),
        ]
    )


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Speed-up against keep ratio with the ideal curve: a row of panels a case, a column a pass."""
    cases = list(dict.fromkeys(Case(*(row[key] for key in CONTRACT[:4])) for row in rows))
    figure = Figure(figsize=(10, 0.6 + 3.4 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), len(PASSES), squeeze=False, sharex=True, sharey="row")
    for (i, case), (j, kind) in product(enumerate(cases), enumerate(PASSES)):
        panel = panels[i, j]
        of_panel = [row for row in rows if row["pass"] == kind and row.items() >= vars(case).items()]
        drop = [row for row in of_panel if row["mode"] == "drop"]
        zero = [row for row in of_panel if row["mode"] == "zero"]
        library = [row for row in of_panel if row["mode"] == "library"]
        keep = [row["keep"] for row in drop]
        panel.plot(keep, [row["ideal_speedup"] for row in drop], "x--", color="0.45", label="drop: ideal, by GMACs")
        panel.plot(keep, [row["speedup"] for row in drop], "o-", color="#0072b2", label="drop: measured (% of ideal)")
        for row in drop:
            panel.annotate(
                f"{row['efficiency']:.0%}", (row["keep"], row["speedup"]), (0, -6), textcoords="offset points",
                ha="center", va="top", fontsize=8, color="#0072b2",
            )  # fmt: skip
        panel.plot(
            [row["keep"] for row in zero], [row["speedup"] for row in zero], "s", color="#d55e00", ms=5,
            label="zero: measured",
        )  # fmt: skip
        panel.plot(
            [1.0] * len(library), [row["speedup"] for row in library], "D", color="#009e73", ms=5, mfc="none",
            label="whole image: the library's own",
        )  # fmt: skip
        panel.axhline(1, color="0.7", lw=0.8, zorder=0)
        panel.set_title(f"{case.backbone.rstrip('/').rpartition('/')[2]}: {kind}", fontsize=10)
        # Both axes logarithmic: a constant efficiency is a constant distance, at every keep ratio.
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(keep, [f"{value:g}" for value in keep], minor=False)
        panel.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5×", "1×", "2×", "5×", "10×", "20×", "50×"])
        panel.minorticks_off()
        panel.margins(x=0.07)
        panel.spines[["top", "right"]].set_visible(False)
        if j == 0:
            panel.set_ylabel(f"speed-up over full\n{case.image_size} px, batch {case.batch}, {case.dtype}", fontsize=9)
        if i == len(cases) - 1:
            panel.set_xlabel("keep: share of visible units")
    for i, case in enumerate(cases):
        shown = [
            row[key]
            for row in rows
            if row.items() >= vars(case).items()
            for key in ("speedup", "ideal_speedup")
        ]  # fmt: skip
        panels[i, 0].set_ylim(min(shown) / 1.35, max(shown) * 1.2)  # room for the percentages
    panels[0, 0].legend(frameon=False, fontsize=8.5)
    return figure


class _Parser(argparse.ArgumentParser):
    """One line for a wrong option, as everywhere in this project."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"masked_vs_full: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong.

    Options that were not given are None, until `fill_in`.
    """
    parser = _Parser(
        "python -m benchmarks.masked_vs_full",
        description="Times Segmenter.encode (the backbone alone) on whole images, on visible units only (drop), and on "
        "images with masked pixels zeroed (zero), and the libraries' own forward on whole images. Options that take "
        "several values are combined.",
        epilog=EXAMPLES + "\n" + "\n".join(_describe(name, preset) for name, preset in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    add("--preset", choices=list(PRESETS), default="cpu", help="values of the options not given; default cpu")
    add("--backbone", nargs="+", metavar="NAME", help="timm/<model> or transformers/segformer-b0 … -b5, or a folder")
    add("--image-size", nargs="+", type=int, metavar="PX", help="side of the square images, whole units; a preset's "
        "own sizes are rounded to whole units")  # fmt: skip
    add("--batch", nargs="+", type=int, metavar="N", help="images a pass")
    add(
        "--keep",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="keep ratios of drop; a preset's own that leave no unit visible are left out",
    )
    add("--zero-keep", nargs="+", type=float, metavar="SHARE", help="keep ratios of zero; default: those of --keep if "
        "it is given, else the preset's")  # fmt: skip
    add("--dtype", nargs="+", choices=list(DTYPES), help="of weights and images")
    add("--repeats", type=int, metavar="N", help="timed rounds, of which the minimum counts")
    add("--device", help="cpu (one thread, process time) or cuda")
    add("--peak-tflops", type=float, metavar="X", help="10¹² FLOP/s that the device can reach, for mfu; default: from "
        "a table of GPUs, by dtype")  # fmt: skip
    return parser.parse_args(arguments)


def _describe(name: str, preset: Preset) -> str:
    values = (f"{key} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in vars(preset).items())
    return f"preset {name}:\n  " + "\n  ".join(values)


def prepare(options: argparse.Namespace) -> tuple[list[Case], list[float], list[float], torch.device]:
    """Fill in the preset; everything that can be wrong with the options is found here, before the first measurement.

    Returns:
        Cases, keep ratios of drop, keep ratios of zero, device.

    Raises:
        ValueError: names the option, its value, and what would fit.
    """
    preset = PRESETS[options.preset]
    own_sizes, own_keeps = options.image_size is None, options.keep is None
    if options.zero_keep is None:
        options.zero_keep = options.keep
    for name, value in vars(preset).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = {"--batch": options.batch, "--image-size": options.image_size, "--repeats": [options.repeats]}
    for name, values in least.items():
        if min(values) < 1:
            raise ValueError(f"{name}: {min(values)}; it must be at least 1")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise ValueError(f"--peak-tflops: {options.peak_tflops}; it must be above 0")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: {options.device!r} is neither cpu nor cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this torch finds no CUDA GPU; --preset cpu or --device cpu measures the CPU")
    keeps, zero_keeps = sorted(set(options.keep)), sorted(set(options.zero_keep))
    sizes = {
        backbone: whole_units(backbone, options.image_size) if own_sizes else options.image_size
        for backbone in options.backbone
    }
    cases = [
        Case(backbone, size, batch, dtype)
        for backbone in sizes
        for size, batch, dtype in dict.fromkeys(product(sizes[backbone], options.batch, options.dtype))
    ]
    for case in cases:
        grid = case.build(torch.device("meta")).unit_grid(case.image_size, case.image_size)
        if own_keeps:  # like its sizes, a preset's keep ratios give way to small images
            keeps = [keep for keep in keeps if round(keep * grid[0] * grid[1])]
        for keep in (*keeps, *zero_keeps):
            visible_count(grid, keep)
    check_out(options.out)
    return cases, keeps, zero_keeps, torch.device(options.device)


def whole_units(backbone: str, sizes: Sequence[int]) -> list[int]:
    """The multiples of the backbone's unit that are nearest to `sizes`, pixels.

    Raises:
        ValueError: the backbone is unknown or unsupported.
    """
    with torch.device("meta"):
        unit = build_segmenter(backbone, CLASSES, context=False).unit_px
    return [max(unit, round(size / unit) * unit) for size in sizes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case and write JSON, Markdown and PNG; 0, 1 if a case did not fit into memory, 2 for a mistake."""
    options = parse(arguments)
    try:
        cases, keeps, zero_keeps, device = prepare(options)
    except ValueError as error:
        _say(f"masked_vs_full: {' '.join(str(error).split())}")
        return 2
    torch.set_num_threads(1)
    out: Path = options.out
    machine = describe_machine(device, SOURCES)
    peaks = {name: options.peak_tflops or peak_tflops(device, DTYPES[name]) for name in options.dtype}
    for name, value in peaks.items():
        if value is not None:
            machine[f"peak_tflops_{name}"] = value
    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    code = 0
    for case in cases:
        try:
            measured = measure(case, keeps, zero_keeps, options.repeats, device, peaks[case.dtype])
        except torch.OutOfMemoryError:  # the other cases of a long run may fit
            _say(f"masked_vs_full: {case}: out of GPU memory, left out; try a smaller --batch")
            code = 1
            torch.cuda.empty_cache()
            continue
        rows, peers = rows + measured[0], peers + measured[1]
        write_json(out, machine, rows, peers=peers)  # after every case: a long run that is stopped keeps what it has
        out.with_suffix(".md").write_text(page(machine, rows, peers), encoding="utf-8")
    if rows:
        draw(rows).savefig(out.with_suffix(".png"), dpi=110)
        _say(f"wrote {out}, and .md and .png beside it")
    return code


if __name__ == "__main__":
    sys.exit(main())
