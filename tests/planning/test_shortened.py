"""A deep model is planned from short ones, and every figure is that of the deep one."""

from collections import Counter
from dataclasses import replace

import pytest

from maskmatch_scale.planning import trace as module
from maskmatch_scale.planning.shortened import alike_blocks, shortened
from maskmatch_scale.planning.trace import Trace, extended, passes_of, trace
from tests.planning.subjects import SEGFORMER, VIT, built_of

DEEP_VIT = VIT | {"backbone_options": VIT["backbone_options"] | {"depth": 12}}
ROPE = DEEP_VIT | {
    "backbone": "timm/vit_small_patch16_dinov3",
    "backbone_options": {"depth": 8, "embed_dim": 32, "num_heads": 2},
}
DEEP_SEGFORMER = SEGFORMER | {
    "backbone_options": SEGFORMER["backbone_options"] | {"depths": [1, 1, 9, 1], "drop_path_rate": 0.1}
}
MODELS = {
    "linear": DEEP_VIT | {"head": "linear"},
    "dpt": DEEP_VIT | {"head": "dpt", "backbone_options": DEEP_VIT["backbone_options"] | {"depth": 16}},
    "drop path": DEEP_VIT | {"backbone_options": DEEP_VIT["backbone_options"] | {"drop_path_rate": 0.1}},
    "rope": ROPE,
    "segformer": DEEP_SEGFORMER,
}


def counted(found):
    counts = Counter()
    for operation in found.operations:
        counts[replace(operation, count=1)] += operation.count
    return counts


@pytest.fixture
def runs(monkeypatch):
    """How many of the blocks that are alike were run, for each pass that was traced."""
    kept, traced = [], module._traced
    monkeypatch.setattr(module, "_traced", lambda *args: kept.append(alike_blocks(args[-2])) or traced(*args))
    return kept


@pytest.mark.parametrize(
    ("name", "again"), [*((name, False) for name in MODELS), ("linear", True), ("segformer", True)]
)
def test_a_deep_model_is_as_its_short_ones_say(monkeypatch, runs, name, again):
    subject = built_of(
        MODELS[name],
        engine={"activation_checkpointing": again, "precision": "auto"},
        method={"mask": {"keep": 0.5}, "scales": [0.5, 1.0]},
    ).subject
    parts = passes_of(subject)
    assert set(parts) == {"views", "teacher", "loss_x", "loss_u", "loss_m"}
    short = {part: module._trace(subject, part, 2) for part in parts}
    assert max(runs) <= 3, "a whole model was run"
    monkeypatch.setattr(module, "_FEWEST_BLOCKS", 10**6)
    for part in parts:
        whole = module._trace(subject, part, 2)
        assert counted(short[part]) == counted(whole)
        assert replace(short[part], operations=()) == replace(whole, operations=())


def test_frozen_blocks_are_another_kind(monkeypatch):
    subject = built_of(DEEP_VIT, optim={"freeze": 5}).subject
    assert alike_blocks(subject.student) == 7
    short = module._trace(subject, "loss_x", 2)
    monkeypatch.setattr(module, "_FEWEST_BLOCKS", 10**6)
    whole = module._trace(subject, "loss_x", 2)
    assert counted(short) == counted(whole)
    assert replace(short, operations=()) == replace(whole, operations=())


def test_blocks_that_give_levels_stay():
    student = built_of(MODELS["dpt"]).subject.student
    assert alike_blocks(student) == 13
    short = shortened(student, 2)
    assert len(short.backbone.blocks) == 5
    assert sum(bool(block._forward_hooks) for block in short.backbone.blocks) == 3
    assert len(student.backbone.blocks) == 16


def test_a_peak_at_another_moment_is_not_extended():
    one, more = Trace((), 10, 30, 30, 5, 20), Trace((), 20, 42, 40, 5, 31)
    assert extended(one, more, 6) == Trace((), 70, 102, 90, 5, 86)
    for wrong in ({"peak_bytes": 40}, {"forward_peak_bytes": 29}, {"late_peak_bytes": 39}, {"left_bytes": 6}):
        assert extended(one, replace(more, **wrong), 6) is None


def test_few_blocks_are_run_whole(runs):
    subject = built_of(VIT | {"backbone_options": VIT["backbone_options"] | {"depth": 4}}).subject
    trace(subject, "loss_x", 2)
    assert runs == [4]
