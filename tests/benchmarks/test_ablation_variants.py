"""Variants of the ablation: from which step on they change a run, by which formula; a restart changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.method.losses import cross_entropy_sum
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.cost import encoder_macs
from maskmatch_scale.models.resample import upsampling_bands
from maskmatch_scale.train import train
from maskmatch_scale.training.step import take_step
from tests.benchmarks.test_ablation import TINY, importable  # noqa: F401 - a fixture of every test
from tests.conftest import ShapesSource
from tests.method.parts import colour_teacher
from tests.training.test_pretended_gpu import BACKBONES, GPU, HostCopies, PretendedRank, Untouched, pretend

STEPS, BURN_IN = 8, 2
SETTINGS = (*TINY, f"method.burn_in={BURN_IN / STEPS}", "method.threshold=0.4")
"""The tiny model's confidences lie on both sides of 0.4."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with the streams of the scores."""
    root = tmp_path_factory.mktemp("pages")
    source = ShapesSource({"labelled": 6, "unlabelled": 24, "dev": 3, "val": 3, "val_font": 2})
    write_shards(source, root, workers=1, samples_per_shard=8, progress=False)
    return root


@pytest.fixture
def setting(pages: Path) -> Any:
    from benchmarks.ablation.tasks import Setting

    return Setting("scores_vit", pages, None, 2, STEPS, "cpu", SETTINGS)


@pytest.fixture
def built(setting: Any, tmp_path: Path) -> Callable[[str], Any]:
    """A run of an arm without burn-in, and what its variant is built with; none is built yet."""
    from benchmarks.ablation.arms import ARMS
    from benchmarks.ablation.cost import build

    return lambda arm: build(setting, ARMS[arm], STEPS, tmp_path / arm)[0]


def figures(run: Path) -> dict[int, list[float | None]]:
    """Losses and norm of the gradient by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss_x", "loss_u", "loss_m", "grad_norm", "coverage")
    return {record["step"]: [record[name] for name in names] for record in records if record["kind"] == "train"}


_plain: dict[str, dict[int, list[float | None]]] = {}


@pytest.mark.parametrize(
    ("arm", "plain", "first"),
    [
        ("fixmatch_lambda_ramp", "fixmatch", 1),
        ("maskmatch_lambda_ramp", "maskmatch", 1),
        ("maskmatch_threshold_ramp", "maskmatch", 1),
        ("fixmatch_threshold_down", "fixmatch", 1),
        ("maskmatch_threshold_by_class", "maskmatch", 2),
        ("fixmatch_threshold_freematch", "fixmatch", 2),
        ("fixmatch_soft_labels", "fixmatch", 1),
        ("maskmatch_context_off", "maskmatch", 1),
        ("strong_keep_0.3_context_off", "strong_keep_0.3", 1),
        ("strong_keep_0.3_labels_twice", "strong_keep_0.3", 2),
        ("maskmatch_scales_in_turn", "maskmatch_ensemble", 1),
    ],
)
def test_a_variant_changes_the_run_from_its_step_on_and_goes_on_after_a_stop(
    setting: Any, tmp_path: Path, arm: str, plain: str, first: int
) -> None:
    from benchmarks.ablation.arms import ARMS
    from benchmarks.ablation.variants import callbacks_of
    from maskmatch_scale.training.callbacks import Callback

    def trained(name: str, folder: str, *callbacks: Any, resume: str | None = None) -> dict[int, list[float | None]]:
        recipe = setting.recipe(ARMS[name], 1, STEPS, tmp_path / folder)
        return figures(train(recipe, resume, callbacks=[*callbacks_of(ARMS[name].variant, STEPS), *callbacks]))

    if plain not in _plain:
        _plain[plain] = trained(plain, "plain")
    without, found = _plain[plain], trained(arm, "whole")
    assert list(found) == list(range(1, STEPS + 1))
    changed = [step for step in found if found[step] != without[step]]
    assert changed[0] == BURN_IN + first

    class StopsAfterFive(Callback):  # of labels that are used twice, the second time is to come
        def after_step(self, done: int, figures: Any) -> None:
            if done == 5:
                self.run.ask_to_stop("enough", 75)

    with pytest.raises(TrainingStopped, match="enough"):
        trained(arm, "stopped", StopsAfterFive)
    assert trained(arm, "stopped", resume="auto") == found


def test_ramps_by_hand(built: Callable[[str], Any]) -> None:
    from benchmarks.ablation.variants import VARIANTS

    run = built("maskmatch")
    ramp = VARIANTS["lambda_ramp"](run, 10)
    ramp.first = 2
    for step, share in ((0, 0), (2, 0), (3, 0.25), (4, 0.5), (6, 1), (9, 1), (30, 1)):
        ramp.before_step(step)
        weights = [1.0, run.recipe.method.unlabelled_weight * share, run.recipe.method.mask.weight * share]
        assert run.maskmatch.part_weights.tolist() == weights
    up, down = VARIANTS["threshold_ramp"](run, 10), VARIANTS["threshold_down"](run, 10)
    for variant, start in ((up, 0.5), (down, 0.99)):
        variant.first = 2
        for step, share in ((1, 0), (2, 0), (4, 0.25), (6, 0.5)):
            variant.before_step(step)
            assert run.maskmatch.threshold == pytest.approx(start + (0.4 - start) * share)
        for step in (10, 30):
            variant.before_step(step)
            assert run.maskmatch.threshold == 0.4


def labelled_by(run: Any, teacher: Any, number: int) -> tuple[Any, Any]:
    """The step of a micro-batch, and its pseudo-labels."""
    (batch,) = load_batches(run.batches, number, number + 1)
    step = run.maskmatch.prepare(batch)
    return step, run.maskmatch.pseudo_label(step, teacher)


@pytest.mark.parametrize("name", ["threshold_by_class", "threshold_freematch"])
def test_thresholds_by_class_by_hand(built: Callable[[str], Any], name: str) -> None:
    from benchmarks.ablation.variants import VARIANTS

    run = built("fixmatch")
    variant = VARIANTS[name](run, STEPS)
    classes = run.student.num_classes
    seen: list[list[list[float]]] = [[] for _ in range(classes)]  # of each class a value a batch
    confidences = []
    before: Any = 0.4
    for number in range(2):
        less = torch.tensor([0.0, 0.0, 0.0 if number else 50.0]).view(1, 3, 1, 1)  # class 2 not in the first batch

        def teacher(images: Any, less: Any = less) -> Any:
            return colour_teacher(images) - less

        step, pseudo = labelled_by(run, teacher, number)
        weak = step.unlabelled.weak
        logits = teacher(run.maskmatch.normalise(weak.images))
        p = F.interpolate(logits, size=weak.images.shape[2:], mode="bilinear").softmax(1).double()
        sure, label = p.max(1)
        tau = before[label] if isinstance(before, torch.Tensor) else before
        unclear = (sure - tau).abs() < 1e-5
        assert bool(((pseudo.confident == (sure >= tau)) | unclear).all())  # by what was known before
        sure, label = sure[weak.valid], label[weak.valid]
        confidences.append(sure.mean())
        for own in range(classes):
            if name == "threshold_freematch":
                seen[own].append(p[:, own][weak.valid].mean())
            elif bool((label == own).any()):
                seen[own].append(sure[label == own].mean())
        before = run.maskmatch.threshold
        # Of two values the plain mean.
        levels = [sum(values) / len(values) if values else None for values in seen]
        highest = max(level for level in levels if level is not None)
        top = sum(confidences) / len(confidences) if name == "threshold_freematch" else 0.4
        expected = [float(top * (1.0 if level is None else level / highest)) for level in levels]
        torch.testing.assert_close(before, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert variant.state()["variant"]["updates"] == ([2, 2, 1] if name == "threshold_by_class" else [2, 2, 2])


def test_soft_cross_entropy_by_hand(built: Callable[[str], Any]) -> None:
    from benchmarks.ablation.variants import VARIANTS
    from benchmarks.ablation.variants.soft_labels import soft_cross_entropy_sum

    run = built("fixmatch")
    VARIANTS["soft_labels"](run, STEPS)
    step, pseudo = labelled_by(run, colour_teacher, 0)
    (view,) = step.views
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = run.maskmatch.base.loss_sum([logits], step.views, pseudo)
    found = torch.autograd.grad(2 * loss, logits)[0]

    def up(maps: Any) -> Any:
        return F.interpolate(maps, size=view.images.shape[2:], mode="bilinear")

    p = view.cutmix(up(colour_teacher(run.maskmatch.normalise(step.unlabelled.weak.images))).softmax(1))
    counted = view.cutmix(pseudo.confident) & view.valid
    assert 0 < counted.double().mean() < 1
    expected = -(p * up(logits).log_softmax(1)).sum(1)[counted].sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(2 * expected, logits)[0])
    # The target of a teacher that is certain is its label.
    hard = pseudo.mixed(view.cutmix)
    certain = copy.copy(hard.probabilities)
    object.__setattr__(certain, "logits", tuple(1e4 * own for own in certain.logits))
    torch.testing.assert_close(
        soft_cross_entropy_sum(logits, certain, counted),
        cross_entropy_sum(logits, hard.labels, counted),
        rtol=1e-3,
        atol=0,
    )


def test_without_context_masked_features_are_zero(built: Callable[[str], Any]) -> None:
    from benchmarks.ablation.variants import VARIANTS

    run = built("maskmatch")
    step, _ = labelled_by(run, colour_teacher, 0)
    images = run.maskmatch.normalise(step.masked.view.images)
    other = copy.deepcopy(run.student)
    with_context = other(images, step.masked.visible)
    other.context = None
    expected = other(images, step.masked.visible)
    assert not torch.equal(with_context, expected)
    names = [name for name, _ in run.student.named_parameters()]
    VARIANTS["context_off"](run, STEPS)
    assert torch.equal(run.student(images, step.masked.visible), expected)
    assert [name for name, _ in run.student.named_parameters()] == names  # where checkpoints look for them


def test_labels_are_used_twice(built: Callable[[str], Any]) -> None:
    from benchmarks.ablation.variants import VARIANTS

    run = built("strong_keep_0.3")
    work = run.work
    variant = VARIANTS["labels_twice"](run, STEPS)
    calls: list[int] = []

    def teacher(images: Any) -> Any:
        calls.append(len(images))
        return colour_teacher(images)

    steps, labels = [], []
    for number in range(4):
        variant.before_step(number)
        step, pseudo = labelled_by(run, teacher, number)
        steps.append(step)
        labels.append(pseudo)
        assert bool(variant.state()) == (number % 2 == 0)
    assert len(calls) == 2
    for one, two in ((0, 1), (2, 3)):
        assert torch.equal(steps[one].unlabelled.weak.images, steps[two].unlabelled.weak.images)
        assert torch.equal(labels[one].labels, labels[two].labels)
        assert torch.equal(labels[one].confident, labels[two].confident)
        assert not torch.equal(steps[one].labelled_images, steps[two].labelled_images)
        assert not torch.equal(steps[one].views[0].images, steps[two].views[0].images)
        assert not torch.equal(steps[one].visible, steps[two].visible)
    assert not torch.equal(steps[0].unlabelled.weak.images, steps[2].unlabelled.weak.images)
    assert variant.summary() == {}
    teacher_flops = 2 * calls[0] * encoder_macs(run.student, 64, 64)
    assert (run.work.tokens, run.work.flops) == (work.tokens, work.flops - teacher_flops // 2)


def test_scales_come_in_turn(built: Callable[[str], Any]) -> None:
    from benchmarks.ablation.variants import VARIANTS

    run = built("maskmatch_ensemble")
    work = run.work
    variant = VARIANTS["scales_in_turn"](run, STEPS)
    sizes: list[int] = []

    def teacher(images: Any) -> Any:
        sizes.append(images.shape[-1])
        return colour_teacher(images)

    for number in range(4):
        variant.before_step(number)
        labelled_by(run, teacher, number)
    assert sizes == [32, 64, 96, 32]
    assert run.recipe.method.scales == (0.5, 1.0, 1.5)  # as its checkpoints say

    alone = built("maskmatch").work.flops  # of the scale 1
    macs = [encoder_macs(run.student, side, side) for side in (32, 64, 96)]
    images = 2
    assert work.flops == alone + 2 * images * (macs[0] + macs[2])
    assert run.work.flops == pytest.approx(alone + 2 * images * (sum(macs) / 3 - macs[1]), abs=1)


def test_every_variant_of_an_arm_is_there_and_has_a_cost(pages: Path, tmp_path: Path) -> None:
    from benchmarks.ablation.arms import ARMS
    from benchmarks.ablation.cost import main
    from benchmarks.ablation.variants import VARIANTS

    assert {arm.variant for arm in ARMS.values()} - {None} == set(VARIANTS)
    out = tmp_path / "cost.json"
    arms = ["strong_keep_0.3", "strong_keep_0.3_labels_twice", "maskmatch_ensemble", "maskmatch_scales_in_turn"]
    options = ["--task", "scores_vit", "--data", str(pages), "--arms", *arms, "--repeats", "2", "--out", str(out)]
    assert main([*options, "--set", *SETTINGS]) == 0
    gmacs = {row["arm"]: row["gmacs"] for row in json.loads(out.read_text())["rows"]}
    assert gmacs["strong_keep_0.3_labels_twice"] < gmacs["strong_keep_0.3"]
    assert gmacs["maskmatch_scales_in_turn"] < gmacs["maskmatch_ensemble"]


def test_a_cell_runs_its_variant(pages: Path, tmp_path: Path) -> None:
    from benchmarks.ablation.__main__ import parse, plan
    from benchmarks.ablation.cell import run_cell
    from benchmarks.ablation.variants import callbacks_of

    where = ["--data", str(pages), "--work", str(tmp_path), "--out", str(tmp_path / "out.json"), "--draws", "0"]
    small = ["--steps", "4", "--eval-images", "1", "--splits", "--arms", "fixmatch_threshold_by_class"]
    (cell,) = plan(parse(["--task", "scores_vit", *where, *small, "--set", *SETTINGS]))
    run_cell(cell.folder / "job.json")
    recipe = cell.job.parsed()
    own = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(tmp_path / "own")})})
    run = train(own, callbacks=callbacks_of("threshold_by_class", 4))
    assert figures(cell.folder / "run") == figures(run)
    assert figures(run) != figures(
        train(own.model_copy(update={"run": own.run.model_copy(update={"dir": str(tmp_path / "x")})}))
    )
    result = json.loads((cell.folder / "result.json").read_text())
    assert result["variant"] == "threshold_by_class"
    assert result["results"]["equal steps"]["pseudo_labels"]["images"] == 1


def test_the_variant_is_part_of_a_cell(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.ablation import variants
    from benchmarks.ablation.__main__ import parse, plan
    from benchmarks.ablation.gather import read_cells
    from benchmarks.ablation.job import read_job

    where = ["--data", str(pages), "--work", str(tmp_path), "--out", str(tmp_path / "out.json"), "--draws", "0"]
    names = ["fixmatch", "fixmatch_lambda_ramp", "fixmatch_soft_labels"]
    options = parse(["--task", "scores_vit", *where, "--steps", "4", "--arms", *names, "--set", *SETTINGS])
    plain, ramp, soft = plan(options)
    job = read_job(ramp.folder / "job.json")
    assert job.variant == "lambda_ramp" == job.facts()["variant"]
    assert job.identity == plain.job.identity | variants.identity_of_variant("lambda_ramp")
    assert "variants" not in plain.job.identity
    plan(options)  # the same again

    content = json.loads((ramp.folder / "job.json").read_text())
    (ramp.folder / "job.json").write_text(json.dumps({**content, "variant": "threshold_ramp"}))
    with pytest.raises(UserError, match='variant "threshold_ramp", now "lambda_ramp"'):
        plan(options)
    (ramp.folder / "job.json").write_text(json.dumps({**content, "variant": "lambda_ramp"}))
    for cell in (plain, ramp, soft):
        written = json.loads((cell.folder / "job.json").read_text())
        (cell.folder / "result.json").write_text(json.dumps({**written, "burn_in_steps": 1}))
    assert len(read_cells([plain.folder, ramp.folder, soft.folder])) == 3
    content["identity"]["variants"] = "0123"
    (ramp.folder / "result.json").write_text(json.dumps({**content, "burn_in_steps": 1}))
    assert len(read_cells([plain.folder, ramp.folder])) == 2
    with pytest.raises(UserError, match="made with other variants"):
        read_cells([plain.folder, ramp.folder, soft.folder])
    monkeypatch.setattr("benchmarks.ablation.__main__.identity_of_variant", lambda variant: {"variants": "4567"})
    with pytest.raises(UserError, match="made with other variants"):
        plan(options)


@pytest.mark.parametrize(
    "name", ["lambda_ramp", "threshold_by_class", "threshold_freematch", "soft_labels", "labels_twice"]
)
def test_no_variant_waits_for_the_device(make_recipe: Callable[..., Any], name: str) -> None:
    """On a GPU that is not there, see the tests whose parts these are."""
    from benchmarks.ablation.variants import VARIANTS

    recipe = make_recipe(
        run={"steps": 5}, method={"scales": [0.5, 1.0, 1.5], "mask": {"keep": 0.5}, "strong_view": {"keep": 0.5}}
    )
    segmenter = build_segmenter(num_classes=3, **BACKBONES["vit"])
    draw = view_draws(segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    batches = TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw)
    host = [batches[number] for number in range(5)]
    maskmatch = MaskMatch(segmenter, recipe.method, recipe.run.seed, 255).train()
    upsampling_bands.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pretend(maskmatch, mode)
        engine = Untouched(maskmatch, segmenter)
        made = iter([batch.with_tensors([mode.from_tensor(t) for t in batch.tensors]) for batch in host])
        run: Any = SimpleNamespace(
            recipe=recipe, engine=engine, teacher=engine, maskmatch=maskmatch, student=segmenter, batches=batches,
            runtime=PretendedRank(Place(0, 0, 1, 1), GPU, 1), frozen_teacher=None, resumed={},
        )  # fmt: skip
        variant = VARIANTS[name](run, 5)
        for step in range(5):
            with HostCopies() as copies:
                variant.before_step(step)
                figures = take_step(run, step, made)
            if step > 2:  # the first ones make what is kept: weights of upsampling, of every scale
                assert len(copies.found) == len(host[0].tensors)
    upsampling_bands.cache_clear()
    assert {value.device for value in figures.on_device.values()} == {GPU}
