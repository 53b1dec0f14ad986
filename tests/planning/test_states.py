"""Bytes of a rank at every stage; `tests/benchmarks/test_plan_vs_measured.py` compares them with real engines."""

import pytest

from maskmatch_scale.planning.states import bytes_a_parameter, states


@pytest.mark.parametrize(
    ("stage", "precision", "whole", "divided"),
    [
        (0, "fp32", 16, 0),
        (1, "fp32", 8, 12),
        (2, "fp32", 4, 16),
        (3, "fp32", 0, 20),
        (1, "bf16", 6, 12),
        (2, "bf16", 2, 16),
        (3, "bf16", 0, 18),
        (0, "autocast-bf16", 16, 0),
        (1, "fp16", 4, 12),
    ],
)
def test_bytes_a_parameter(stage, precision, whole, divided):
    found = bytes_a_parameter(stage, precision)
    assert (sum(found[0].values()), sum(found[1].values())) == (whole, divided)


def test_what_is_divided_among_ranks(make_subject):
    sizes = {stage: states(make_subject(engine={"zero_stage": stage}), 4)[0] for stage in range(4)}
    whole = sizes[0]
    assert whole.masters == whole.buckets == whole.gathered == 0
    assert sizes[1].moments == pytest.approx(whole.moments / 4, abs=4)
    assert sizes[1].gradients == whole.gradients
    assert sizes[2].gradients == pytest.approx(whole.gradients / 4, abs=4)
    assert sizes[2].average == whole.average > 3.9 * sizes[3].average
    assert sizes[3].gathered > 0


def test_offloading_moves_states_to_the_host(make_subject):
    here, _ = states(make_subject(engine={"zero_stage": 3}), 2)
    engine = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    there, host = states(make_subject(engine=engine), 2)
    assert there.masters == there.moments == 0
    assert there.weights < here.weights
    assert host.offloaded >= here.masters + here.moments
    assert host.peak >= host.offloaded


def test_frozen_weights_have_no_optimizer_state(make_subject):
    trained, _ = states(make_subject(engine={"zero_stage": 1}), 1)
    subject = make_subject(freeze="backbone", engine={"zero_stage": 1})
    frozen, _ = states(subject, 1)
    assert frozen.weights == trained.weights
    assert frozen.average == trained.average
    elements = sum(parameter.numel() for parameter in subject.student.parameters() if parameter.requires_grad)
    assert frozen.moments == 8 * elements < trained.moments
