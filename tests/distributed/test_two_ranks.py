"""Two CPU ranks under the real deepspeed launcher against one process with the same global batch.

Every stage and precision against plain PyTorch: test_matrix.py. Here: what one rank of ours gives, two give.
"""

import pytest

from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT, recipe_maker
from tests.distributed.launching import deepspeed, launch, records

pytestmark = pytest.mark.distributed

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "pixel_shuffle"}
CONFIGURATIONS = {
    "segformer": {},  # synchronised BatchNorm, the default
    "vit-scales": {"model": VIT, "method": {"scales": [0.5, 1.0, 1.5], "mask": {"view": "strong", "pixels": "masked"}}},
    "vit-accumulation": {"model": VIT, "engine": {"accumulation": 2}},
    "zero-3": {"model": VIT, "engine": {"zero_stage": 3}},
    # CutMix's pairs lie on two ranks.
    "one-image": {"model": VIT, "engine": {"micro_batch": 1}},
    "one-image-zero-3": {
        "engine": {"micro_batch": 1, "zero_stage": 3},
        "method": {"mask": {"view": "strong"}, "strong_view": {"cutmix_probability": 1.0}},
    },
    "unimatch": {"method": {"base": "unimatch"}},
    "unimatch-v2-zero-3": {"model": VIT, "engine": {"zero_stage": 3}, "method": {"base": "unimatch_v2"}},
    # The teacher's logits are exchanged.
    "mean-teacher-one-image": {
        "model": VIT,
        "engine": {"micro_batch": 1},
        "method": {"base": "mean_teacher", "scales": [0.5, 1.0], "strong_view": {"cutmix_probability": 1.0}},
    },
    # Of more than the student's crop.
    "margin-one-image": {
        "model": VIT,
        "engine": {"micro_batch": 1, "zero_stage": 3},
        "method": {
            "base": "mean_teacher",
            "scales": [0.5, 1.0],
            "teacher_margin_px": 24,
            "strong_view": {"cutmix_probability": 1.0},
        },
    },
    # So are labels.
    "labelled-views-one-image": {
        "model": VIT,
        "engine": {"micro_batch": 1, "zero_stage": 2},
        "method": {
            "views_of": "labelled",
            "mask": {"keep": 0.5, "complement": True},
            "strong_view": {"keep": 0.5, "cutmix_probability": 1.0},
        },
    },
}
PER_RANK = {
    # These differ from one rank by design, but go on exactly.
    "per-rank": {"model": {"batchnorm": "per_rank"}},
    "per-rank-zero-3": {"model": {"batchnorm": "per_rank"}, "engine": {"zero_stage": 3}},
}
RESUMED = ("vit-scales", "zero-3", *PER_RANK)
STEPS = 5


def recipe_of(make_recipe, name, folder):
    sections = {key: dict(value) for key, value in (CONFIGURATIONS | PER_RANK)[name].items()}
    engine = {"micro_batch": 2} | sections.pop("engine", {})
    run = {"dir": str(folder / name), "steps": STEPS, "checkpoint_every": 3}
    optim = {"lr": 1e-3, "clip_norm": 0.5, "warmup_steps": 2}
    # Two lanes: the one process of the reference reads what two ranks read, in their order.
    return make_recipe(engine=engine, run=run, optim=optim, data={"lanes": 2}, **sections)


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory, shapes):
    """Run directories of every configuration on two ranks, and of one that continues from its third step."""
    folder = tmp_path_factory.mktemp("two-ranks")
    make = recipe_maker(shapes, folder)
    jobs = [{"recipe": recipe_of(make, name, folder).model_dump(mode="json")} for name in CONFIGURATIONS | PER_RANK]
    for name in RESUMED:
        again = recipe_of(make, name, folder / "continued").model_dump(mode="json")
        jobs.append({"recipe": again, "resume": str(folder / name / "checkpoints" / "step-00000003")})
    # So small a rate leaves every score what the first one was.
    run = {"dir": str(folder / "early-end"), "steps": 9, "evaluate_every": 1, "patience": 2}
    early = make(model=VIT, engine={"micro_batch": 1, "zero_stage": 3}, optim={"lr": 1e-12}, run=run)
    first, again = ({"recipe": early.model_dump(mode="json"), "resume": resume} for resume in (None, "auto"))
    jobs = [first, *jobs, again]  # rank 0 ends a run after rank 1, which must not find it alive
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_ranks_equal_one(two_ranks, make_recipe, tmp_path, name):
    # The reference: one process, no accumulation, ZeRO-1, the same global batch.
    reference = recipe_of(make_recipe, name, tmp_path)
    images = 2 * reference.engine.micro_batch * reference.engine.accumulation
    plain = {"zero_stage": 1, "accumulation": 1, "micro_batch": images, "activation_checkpointing": False}
    engine = reference.engine.model_copy(update=plain)
    alone = train(reference.model_copy(update={"engine": engine}))
    for one, two in zip(records(alone), records(two_ranks / name), strict=True):
        for key in ("loss", "loss_x", "loss_u", "loss_m", "coverage", "grad_norm"):
            # float32 sums in another order, over five steps of AdamW.
            expected = None if one[key] is None else pytest.approx(one[key], rel=2e-4, abs=1e-6)
            assert two[key] == expected, (name, one["step"], key)
    # The teacher's forward, not its shards: what it predicts on `dev` is the same.
    for one, two in zip(records(alone, "eval"), records(two_ranks / name, "eval"), strict=True):
        assert two["weights"] == one["weights"]
        assert two["pixel_accuracy"] == pytest.approx(one["pixel_accuracy"], abs=2e-3)
    for weights in ("ema", "student"):
        expected, found = (open_run(run, weights)[1].state_dict() for run in (alone, two_ranks / name))
        assert expected.keys() == found.keys()
        for key in expected:
            assert (expected[key].float() - found[key].float()).abs().max() < 1e-4, (name, weights, key)


@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_continue_exactly(two_ranks, name):
    whole, continued = records(two_ranks / name), records(two_ranks / "continued" / name)
    assert [r["loss"] for r in continued] == [r["loss"] for r in whole][3:]


def test_two_ranks_end_early_together_and_stay_ended(two_ranks):
    run = two_ranks / "early-end"
    assert [r["step"] for r in records(run)] == [1, 2, 3]
    evaluated = [(r["step"], r["weights"]) for r in records(run, "eval")]
    assert evaluated == [(1, "ema"), (2, "ema"), (3, "ema"), (3, "student")]
    assert [(r["step"], r["best_step"]) for r in records(run, "early_end")] == [(3, 1)]
    for rank in range(2):
        log = (run / "log" / f"rank-{rank}.txt").read_text()
        assert log.count("step 3: the run ends early, after 2 evaluations") == 2  # of both starts


def test_a_mistake_is_one_message_and_exit_code_2(make_recipe, tmp_path):
    recipe = make_recipe(data={"root": str(tmp_path / "nowhere")}).to_yaml()
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = deepspeed("--module", "maskmatch_scale", "train", tmp_path / "recipe.yaml", timeout_s=300)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("maskmatch: error:") == 1
    assert "nowhere: no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
