"""Settings that are chosen: they fit, load as a recipe, keep the images of a step. And what is said if nothing fits."""

from dataclasses import replace

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.planning.build import build, rebuilt
from maskmatch_scale.planning.choose import choose
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.memory import CONTEXT_BYTES, FRAGMENTATION, step_peak
from maskmatch_scale.planning.stages import at_every_stage
from maskmatch_scale.planning.states import states
from maskmatch_scale.recipe import parse_recipe
from tests.planning.subjects import built_of, recipe_of

WIDE = {"backbone_options": {"embed_dim": 192, "depth": 6, "num_heads": 3, "img_size": 64}}
"""Enough parameters for states to count."""
SUPERVISED = {"base": "supervised", "mask": {"keep": None}, "scales": [1.0]}


def with_room(room_bytes, ranks=4):
    """GPUs of which tensors can take so much."""
    memory = int(room_bytes / (1 - FRAGMENTATION)) + CONTEXT_BYTES + 100
    return cluster_of(ranks, replace(gpu_named("h100"), memory_bytes=memory))


@pytest.fixture(scope="module")
def built():
    # At stage 0 there are no buckets, which would be most of so small a model's memory.
    engine = {"micro_batch": 64, "zero_stage": 0}
    return built_of(
        {"backbone": "timm/vit_tiny_patch16_224", "num_classes": 3} | WIDE, engine=engine, method=SUPERVISED
    )


def test_what_fits_stays_as_it_is(built):
    choice = choose(built, with_room(10**10))
    assert choice.overrides == ()
    assert choice.fits_as_written


def test_chosen_overrides_load_as_a_recipe_that_fits(built):
    needs = step_peak(built.subject, 4)
    cluster = with_room(needs * 0.8)
    choice = choose(built, cluster)
    assert "engine.micro_batch=32" in choice.overrides or "engine.activation_checkpointing=true" in choice.overrides
    assert not choice.fits_as_written
    content = built.asked.model_dump(mode="json")
    chosen = parse_recipe(content, overrides=choice.overrides)
    engine = chosen.engine
    assert engine.micro_batch * engine.accumulation == 64
    assert step_peak(build(chosen, cluster.gpu).subject, 4) <= needs * 0.8
    assert any("as written a rank needs" in reason for reason in choice.reasons)


def test_where_nothing_fits_one_line_says_what_is_needed(built):
    with pytest.raises(UserError) as error:
        choose(built, with_room(10**5))
    message = str(error.value)
    for word in ("4 × h100", "engine.zero_stage=3", "GB", "more GPUs do not help"):
        assert word in message


@pytest.fixture
def built_for_stage_3(tmp_path):
    """By a JSON that names the stage, with hardly any buckets."""
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}')
    engine = {"zero_stage": 3, "deepspeed_json": str(file), "micro_batch": 64}
    model = {"backbone": "timm/vit_tiny_patch16_224", "num_classes": 3} | WIDE
    return built_of(model, engine=engine, method=SUPERVISED)


def test_a_json_for_one_stage_is_planned_for_that_stage(built_for_stage_3):
    built = built_for_stage_3
    assert choose(built, with_room(10**10)).overrides == ()
    assert {stage.zero_stage for stage in at_every_stage(built, with_room(10**10))} == {3}
    smaller = choose(built, with_room(0.9 * step_peak(built.subject, 4)))
    assert smaller.subject.recipe.engine.zero_stage == 3


def test_what_is_offloaded_has_to_fit_into_the_host(built_for_stage_3):
    built = built_for_stage_3
    # Of three ranks' number doubled and doubled again, what is proposed is the next that eight GPUs a host divide.
    small = with_room(step_peak(least_of(built, 3), 3) * 1.02, ranks=3)
    host = states(least_of(built, 3), 3)[1].offloaded
    choose(built, replace(small, host_memory_bytes=4 * host))
    for share, more in ((0.6, 8), (0.3, 16)):
        with pytest.raises(UserError, match=rf"of the .* that are its share of the host's memory; use --gpus {more}$"):
            choose(built, replace(small, host_memory_bytes=int(3 * share * host)))


def least_of(built, ranks):
    """With everything offloaded, one image at a time."""
    setting = {"library": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    return rebuilt(built, ranks, **setting, micro_batch=1, accumulation=64, activation_checkpointing=True)


def test_what_rules_memory_savers_out_is_named():
    recipe = recipe_of(method=SUPERVISED, engine={"compile": True})
    cluster = with_room(10**5)
    with pytest.raises(UserError, match=r"engine.compile=true rules out"):
        choose(build(recipe, cluster.gpu), cluster)


def test_more_ranks_never_need_more(built):
    peaks = [step_peak(built.subject, ranks) for ranks in (1, 2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
