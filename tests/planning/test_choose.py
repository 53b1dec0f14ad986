"""Settings that are chosen: they fit, load as a recipe, keep the images of a step. And what is said if nothing fits."""

from dataclasses import replace

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.choose import choose
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.memory import CONTEXT_BYTES, FRAGMENTATION, step_peak
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


def test_what_rules_memory_savers_out_is_named():
    recipe = recipe_of(method=SUPERVISED, engine={"compile": True})
    cluster = with_room(10**5)
    with pytest.raises(UserError, match=r"engine.compile=true rules out"):
        choose(build(recipe, cluster.gpu), cluster)


def test_more_ranks_never_need_more(built):
    peaks = [step_peak(built.subject, ranks) for ranks in (1, 2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
