"""Peaks of a step, and the largest micro-batch that fits."""

import pytest

from maskmatch_scale.planning.memory import device_memory, plan_memory, usable_bytes, with_micro_batch
from maskmatch_scale.planning.setting import Cluster, Gpu, Link


def cluster(memory_bytes, ranks=2):
    gpu = Gpu("a card", memory_bytes, 1e13, 1e14, 1e12, 1e-5, "made up")
    link = Link("a wire", 1e10, 1e-6, "made up")
    return Cluster(ranks, ranks, gpu, link, link, 8, 2**36)


def test_one_view_at_a_time_needs_less_than_all_together(make_subject):
    plan = plan_memory(make_subject(images=8, device="cuda", data={"crop_px": 128}), cluster(1_600_000_000))
    assert plan.peak < plan.together
    assert set(plan.peaks) == {"views", "teacher", "loss_x", "loss_u", "loss_m", "step"}
    assert plan.fits == (plan.largest_micro_batch >= 8)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_largest_micro_batch_fits_and_a_tenth_more_does_not(make_subject, stage):
    subject = make_subject(device="cuda", data={"crop_px": 64}, engine={"zero_stage": stage})
    plan = plan_memory(subject, cluster(1_500_000_000 + 150_000_000))
    images = plan.largest_micro_batch
    assert images > 2
    for count, fits in ((images, True), (images + 1 + images // 10, False)):
        _, peaks = device_memory(with_micro_batch(subject, count), 2)
        assert (max(peaks.values()) <= plan.usable) == fits


def test_a_model_that_does_not_fit_has_no_micro_batch(make_subject):
    plan = plan_memory(make_subject(device="cuda"), cluster(1_500_000_000))
    assert (plan.largest_micro_batch, plan.fits, plan.usable) == (0, False, 0)


def test_accumulated_micro_batches_keep_their_views(make_subject):
    once, _ = device_memory(make_subject(), 2)
    one = device_memory(make_subject(), 2)[1]
    four = device_memory(make_subject(engine={"accumulation": 4}), 2)[1]
    assert four["loss_m"] > one["loss_m"] >= once


def test_a_reserve_is_left(make_subject):
    assert usable_bytes(80_000_000_000) < 73_000_000_000
