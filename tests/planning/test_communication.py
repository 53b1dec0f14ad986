"""Bytes by docs/zero.md, and the seconds of rings; tests/distributed/test_planned_traffic.py has real collectives."""

from dataclasses import replace

import pytest

from maskmatch_scale.planning.communication import Traffic, losses_of, seconds, step_traffic
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.setting import Link
from tests.planning.subjects import SEGFORMER, built_of


def traffic(model=None, ranks=4, **sections):
    subject = built_of(*([model] if model else []), **sections).subject
    student = subject.student
    parameters = sum(p.numel() for p in student.parameters())
    context = sum(p.numel() for name, p in student.named_parameters() if name.startswith("context."))
    return {one.what: one for one in step_traffic(subject, ranks)}, parameters, context


@pytest.mark.parametrize(("precision", "wide"), [("fp32", 4), ("bf16", 2), ("autocast-bf16", 4)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_table_of_zero_md(stage, precision, wide):
    """G = 4 bytes a gradient; a view whose features are not guessed leaves out the context decoder."""
    if (stage, precision) == (0, "bf16"):
        pytest.skip("the recipe is refused")
    found, count, context = traffic(engine={"zero_stage": stage, "precision": precision})
    once, views = 4 * count, 4 * (3 * count - 2 * context)
    gradients = found["gradients"]
    assert (gradients.kind, gradients.payload) == {
        0: ("all_reduce", once),
        1: ("all_reduce", once),
        2: ("all_reduce", views),
        3: ("reduce_scatter", views),
    }[stage]
    assert (gradients.during == "backward") == (stage >= 2)
    if stage in (1, 2):
        assert found["weights after the step"].payload == wide * count
    if stage == 3:
        assert found["weights, forward"].payload + found["weights, backward"].payload == wide / 4 * 2 * views
    assert ("masters for the average" in found) == (stage in (1, 2) and precision == "bf16")


@pytest.mark.parametrize(
    ("scales", "accumulation", "zero", "times"),
    [([0.5, 1.0], 2, {}, 1), ([0.5, 1.0], 2, {"stage3_max_live_parameters": 0}, 4)],
)
def test_the_teacher_at_stage_3_sends_its_weights_once_or_in_every_forward(tmp_path, scales, accumulation, zero, times):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": ' + str(zero).replace("'", '"') + "}")
    engine = {"zero_stage": 3, "accumulation": accumulation, "deepspeed_json": str(file)}
    found, count, context = traffic(engine=engine, method={"scales": scales})
    assert found["teacher's weights"].payload == pytest.approx(4 * (count - context) * times)


def test_batchnorm_sends_statistics_of_every_view():
    found, *_ = traffic(SEGFORMER)
    assert found["BatchNorm"].calls == 9
    assert "BatchNorm" not in traffic(SEGFORMER | {"batchnorm": "frozen"})[0]


def test_one_rank_sends_nothing():
    assert step_traffic(built_of().subject, 1) == []


def test_losses_of_a_step():
    assert losses_of(built_of().subject) == ("loss_x", "loss_u", "loss_m")
    assert losses_of(built_of(method={"base": "supervised", "mask": {"keep": None}}).subject) == ("loss_x",)


def sent(kind="all_reduce", payload=8e9):
    return Traffic("gradients", kind, payload, 1, None)


def cluster(ranks, a_host, within=100e9, between=10e9, latency=0.0):
    made = cluster_of(ranks, gpu_named("h100"), gpus_per_host=a_host)
    return replace(made, within=Link("w", within, latency, ""), between=Link("b", between, latency, ""))


def test_rings():
    assert seconds(sent(), cluster(1, 1)) == 0
    assert seconds(sent(), cluster(8, 8)) == pytest.approx(2 * 7 / 8 * 8e9 / 100e9)
    assert seconds(sent("all_gather"), cluster(8, 8)) == pytest.approx(7 / 8 * 8e9 / 100e9)
    # Between hosts what one rank sends goes over all adapters of a host together.
    assert seconds(sent(), cluster(16, 8)) == pytest.approx(2 * 15 / 16 * 8e9 / 80e9)
    assert seconds(sent(), cluster(2, 1)) == pytest.approx(8e9 / 10e9)


def test_latency_counts_calls_and_all_reduces_go_along_trees():
    many = cluster(1024, 8, latency=1e-5)
    few = Traffic("sums", "all_reduce", 8, 3, None)
    assert seconds(few, many) == pytest.approx(3 * 2 * (7 + 7) * 1e-5, rel=1e-3)
    assert seconds(replace(few, kind="all_gather"), many) == pytest.approx(3 * 1024 * 1e-5, rel=1e-3)
