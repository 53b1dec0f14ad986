"""The state of engines and teachers as pieces, one rank: a new engine continues as if it had never stopped.

On two ranks: tests/distributed/test_state.py.
"""

import json

import pytest
import torch

from maskmatch_scale.engine import setup
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.parts import buffer_pieces, restore_buffers
from maskmatch_scale.engine.ranks import Runtime
from tests.engine.state import Job, Stored, Toy, apart

ACCELERATE = {"library": "accelerate", "zero_stage": 0}
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 20}}
SCALED = {"fp16": {"initial_scale_power": 4, "loss_scale_window": 2}}
"""A loss scale that does not overflow at once, and grows within these few steps."""
ENGINES = {
    **{f"accelerate-{p}": ACCELERATE | {"precision": p} for p in ("fp32", "autocast-bf16", "fp16")},
    **{f"0-{p}": {"zero_stage": 0, "precision": p} for p in ("fp32", "autocast-bf16")},
    **{
        f"{stage}-{precision}": {"zero_stage": stage, "precision": precision}
        for stage in (1, 2, 3)
        for precision in ("fp32", "autocast-bf16", "bf16")
    },
    **{f"{stage}-fp16": {"zero_stage": stage, "precision": "fp16", "deepspeed_json": SCALED} for stage in (1, 2, 3)},
    "1-fp16-overflow": {"zero_stage": 1, "precision": "fp16"},
    **{
        f"{stage}-{precision}-offload": {"zero_stage": stage, "precision": precision, "offload_optimizer": True}
        for stage in (1, 2, 3)
        for precision in ("fp32", "autocast-bf16", "bf16")
    },
    **{
        f"3-{precision}-offload-parameters": {
            "zero_stage": 3,
            "precision": precision,
            "offload_optimizer": True,
            "offload_parameters": True,
        }
        for precision in ("fp32", "bf16")
    },
    # Small parameters are whole between steps by default, and all are in one sub-group.
    **{f"3-{p}-cut": {"zero_stage": 3, "precision": p, "deepspeed_json": CUT} for p in ("fp32", "bf16")},
}


@pytest.fixture
def build(make_recipe, tmp_path, monkeypatch):
    """Makes a `Job` under the engine of a name."""

    def make(name, **options):
        if "fp16" in name and "accelerate" not in name:
            from deepspeed.accelerator import get_accelerator

            # DeepSpeed trains in fp16 on a CPU that has instructions for it. torch computes without them, slowly.
            monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        engine = dict(ENGINES[name])
        if "deepspeed_json" in engine:
            file = tmp_path / "deepspeed.json"
            file.write_text(json.dumps(engine["deepspeed_json"]))
            engine["deepspeed_json"] = str(file)
        optim = {"lr": 1e-2, "clip_norm": 0.5, "weight_decay": 0.1}
        recipe = make_recipe(engine=engine, optim=optim, method={"burn_in": 0.25}, run={"steps": 8})
        return Job(recipe, setup.start(Place.from_environment(), recipe.engine), **options)

    return make


@pytest.mark.parametrize("name", ENGINES)
def test_a_new_engine_continues_bit_for_bit(build, name):
    whole = build(name)
    whole.train(0, 3)
    stored, progress = Stored(whole.pieces()), json.loads(json.dumps(whole.engine.progress()))
    losses = whole.train(3, 2)
    again = build(name)
    again.restore(stored, progress)
    assert not apart(Stored(again.pieces()).whole, stored.whole)
    assert again.train(3, 2) == losses
    assert not apart(Stored(again.pieces()).whole, Stored(whole.pieces()).whole)
    assert again.engine.progress() == whole.engine.progress()
    assert again.logits().equal(whole.logits())


def test_the_loss_scale_goes_on(build):
    """Otherwise the fp16 cases above could pass with a scale that nothing changes."""
    job, fresh = build("1-fp16"), build("1-fp16").engine.progress()
    job.train(0, 3)
    found = job.engine.progress()
    assert found["optimizer_step"] == 3
    assert found["loss_scaler"]["scale"] > fresh["loss_scaler"]["scale"] == 16
    job = build("1-fp16-overflow")
    job.train(0, 3)
    assert job.engine.progress()["optimizer_step"] < 3


TURNS = (
    ("1-fp32", "3-fp32-cut", "1-fp32", "2-fp32", "0-fp32"),
    ("0-fp32", "accelerate-fp32", "3-fp32", "accelerate-fp32"),
    ("2-fp32-offload", "1-fp32-offload", "3-fp32-offload-parameters", "1-autocast-bf16"),
    ("accelerate-fp16", "0-autocast-bf16", "3-autocast-bf16-offload"),
    ("1-bf16", "3-bf16-cut", "2-bf16-offload", "1-fp16", "3-fp16", "1-fp32"),
)


@pytest.mark.parametrize("names", TURNS, ids=" ".join)
def test_other_engines_stages_and_precisions_have_the_same_state(build, names):
    job = build(names[0])
    job.train(0, 3)
    stored, progress = Stored(job.pieces()), job.engine.progress()
    for name in names[1:]:
        job = build(name)
        job.restore(stored, progress)
        assert job.engine.progress()["optimizer_step"] == progress["optimizer_step"]
        assert not apart(Stored(job.pieces()).whole, stored.whole)
        if "-bf16" in name and "autocast" not in name:
            rounded = {n: value.bfloat16() for n, value in stored.whole.items() if n.startswith("student/")}
            used = whole_weights(job.module)
            assert not [n for n, value in used.items() if not value.equal(rounded[f"student/{n}"])]


def whole_weights(module):
    """The weights of forward passes, gathered at ZeRO-3."""
    from deepspeed import zero

    parameters = list(module.parameters())
    with zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("name", ["accelerate-fp32", "0-fp32", "1-fp32", "1-bf16", "2-fp32", "3-fp32-cut"])
def test_before_its_first_step_an_optimizer_has_no_moments(build, name):
    whole = build(name)
    stored, progress = Stored(whole.pieces()), whole.engine.progress()
    assert progress["optimizer_step"] == 0
    assert {key.partition("/")[0] for key in stored.names()} == {"student", "ema"}
    again = build(name)
    again.train(0, 1)
    again.restore(stored, progress)
    assert again.engine.progress() == progress
    assert again.train(0, 2) == whole.train(0, 2)


@pytest.mark.parametrize("name", ["accelerate-fp32", "0-fp32", "1-fp32", "3-fp32-cut"])
def test_a_parameter_that_was_frozen_starts_with_moments_of_zero(build, name):
    job = build(name)
    job.train(0, 3)
    stored, progress = Stored(job.pieces()), job.engine.progress()
    assert "student/backbone.0.weight" in stored.names()
    assert "exp_avg/backbone.0.weight" not in stored.names()
    thawed = build(name, thawed=True)
    thawed.restore(stored, progress)
    found = Stored(thawed.pieces()).whole
    assert not found["exp_avg/backbone.0.weight"].any()
    assert not apart(found, stored.whole, of=stored.names())
    thawed.train(3, 1)
    moved = Stored(thawed.pieces()).whole["student/backbone.0.weight"]
    assert not moved.equal(stored.whole["student/backbone.0.weight"])


@pytest.mark.parametrize("name", ["accelerate-fp32", "1-fp32", "3-fp32-cut"])
def test_what_does_not_fit_is_named(build, name):
    job = build(name)
    stored, progress = Stored(job.pieces()), job.engine.progress()
    stored.whole["student/head.weight"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"student/head\.weight has shape \(4, 3\) .*, and \(2, 3\) in this model"):
        job.restore(stored, progress)
    del stored.whole["student/head.weight"]
    with pytest.raises(KeyError, match=r"student/head\.weight"):
        job.restore(stored, progress)


def test_buffers_of_ranks_are_taken_in_turn(make_recipe):
    def rank(number, ranks, mean):
        toy = Toy()
        toy.mean.fill_(mean)
        return toy, Runtime(Place(number, number, ranks, ranks), torch.device("cpu"), 1)

    own, shared = (make_recipe(model={"batchnorm": kind}) for kind in ("per_rank", "synchronised"))
    pieces = [p for r in range(2) for toy, at in [rank(r, 2, r + 1)] for p in buffer_pieces("student", toy, own, at)]
    stored = Stored(pieces)
    assert {name for name in stored.names() if "mean" in name} == {
        "student/mean", "rank-0/student/mean", "rank-1/student/mean",
    }  # fmt: skip
    assert not any("fixed" in name for name in stored.names())
    for ranks, recipe, expected in ((3, own, [1, 2, 1]), (1, own, [1]), (2, shared, [1, 1])):
        for number in range(ranks):
            toy, at = rank(number, ranks, 9)
            restore_buffers("student", toy, stored, recipe, at)
            assert toy.mean.eq(expected[number]).all()
    toy, alone = rank(0, 1, 5)
    stored = Stored(buffer_pieces("student", toy, own, alone))
    assert set(stored.names()) == {"student/mean", "student/seen"}
    toy, at = rank(1, 2, 9)
    restore_buffers("student", toy, stored, own, at)
    assert toy.mean.eq(5).all()
