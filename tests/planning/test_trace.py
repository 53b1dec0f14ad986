"""A pass without memory keeps and needs what a real one does, by torch's own allocations."""

import resource
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.resample import upsampling_bands
from maskmatch_scale.planning.build import rebuilt
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.planning.trace import images_of, passes_of, trace
from tests.planning.conftest import FAMILIES
from tests.planning.subjects import built_of


def real_pass(subject, family, part):
    """Bytes that are kept at the end of the forward pass, and the most in forward and backward, of a real pass."""
    recipe, images = subject.recipe, 2
    student = build_segmenter(
        num_classes=3, checkpoint_activations=recipe.engine.activation_checkpointing, **FAMILIES[family]
    )
    maskmatch = MaskMatch(student, recipe.method, 0, 255).train()
    draws = view_draws(student, recipe.method, 0, recipe.data.crop_px)
    batch = Batch.empty(images, images, recipe.data.crop_px, draws.width)
    for tensor in batch.tensors[:3]:
        tensor.random_(3)
    batch.unlabelled_valid.fill_(True)
    batch.draws.copy_(draws(range(images)))
    step = maskmatch.prepare(Batch(*batch.tensors, tuple(range(images))))
    pseudo = PseudoLabels(step.labels, step.labelled_pixels)
    for view in (*step.views, step.masked.view):
        pseudo.mixed(view.cutmix)
    scale = torch.ones(3, dtype=torch.float64)
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    maskmatch(part, step, pseudo, scale)  # what is made once: weights of upsampling
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss, _ = maskmatch(part, step, pseudo, scale)
        with torch.profiler.record_function("backward begins"):
            pass
        loss.backward()
    events = profiler.profiler.kineto_results.events()
    (middle,) = (event.start_ns() for event in events if event.name() == "backward begins")
    now = saved = most = 0
    for moment, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        most = max(most, now)
        saved = now if moment < middle else saved
    return saved, most


def flops_of(found):
    return sum(operation.flops * operation.count for operation in found.operations)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", ["loss_x", "loss_u", "loss_m"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_that_of_a_real_pass(make_subject, family, part, checkpointing):
    subject = make_subject(family, engine={"activation_checkpointing": checkpointing}, data={"crop_px": 128})
    saved, most = real_pass(subject, family, part)
    planned = trace(subject, part, 2)
    # Checkpointing keeps the state of the generator for each block, 5 kB: not of tensors that operations make.
    states = 4 * 5056 if checkpointing else 0
    assert planned.saved_bytes == pytest.approx(saved, rel=0.02, abs=states)
    # Beside it kernels allocate work spaces of their own, which a tiny model shows most.
    assert planned.peak_bytes == pytest.approx(most, rel=0.08, abs=states)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_by_the_same_for_every_image(make_subject, family):
    subject = make_subject(family)
    for part in passes_of(subject):
        one, two, three = (trace(subject, part, images) for images in (4, 6, 8))
        for name in ("saved_bytes", "left_bytes"):
            values = [getattr(found, name) for found in (one, two, three)]
            assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=0.01, abs=64)


def test_passes_are_those_of_the_recipe(make_subject):
    assert passes_of(make_subject()) == ("views", "teacher", "loss_x", "loss_u", "loss_m")
    alone = make_subject(method={"base": "supervised", "mask": {"keep": None}})
    assert passes_of(alone) == ("views", "loss_x")
    assert images_of(alone, "loss_x") == 2


def test_dropped_units_cost_less_than_whole_views(make_subject):
    subject = make_subject(data={"crop_px": 256})
    whole, masked = trace(subject, "loss_u", 2), trace(subject, "loss_m", 2)
    assert flops_of(masked) < 0.75 * flops_of(whole)
    assert masked.saved_bytes < whole.saved_bytes


def test_16_bit_weights_halve_activations(make_subject):
    wide, narrow = (
        trace(make_subject(images=4, engine={"precision": precision}), "loss_x", 4).saved_bytes
        for precision in ("fp32", "bf16")
    )
    assert narrow < 0.65 * wide


def test_a_frozen_backbone_keeps_nothing(make_subject):
    trained, frozen = make_subject(), make_subject(freeze="backbone")
    assert trace(frozen, "loss_x", 2).saved_bytes < 0.3 * trace(trained, "loss_x", 2).saved_bytes


def test_nothing_without_memory_is_left_in_caches(make_subject):
    trace(make_subject("segformer"), "loss_x", 2)
    (band, *_) = upsampling_bands(4, 8, 8, torch.float32, torch.device("cpu"))
    assert band.weight.sum() == 8


def test_seven_billion_parameters_need_little_memory(make_subject):
    with torch.device("meta"):
        student = build_segmenter("timm/vit_7b_patch16_dinov3.lvd1689m", 3)
    small = make_subject(data={"crop_px": 512}, engine={"precision": "bf16", "zero_stage": 3})
    subject = Subject(small.recipe, student, None, 2, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = trace(subject, "loss_m", 2)
    assert flops_of(found) > 1e13
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; the weights are 13 GB


def test_passes_without_gradients_are_traced_once_for_all_settings():
    built = built_of()
    others = [
        rebuilt(built, 1, library="deepspeed", zero_stage=stage, activation_checkpointing=again)
        for stage in (1, 3)
        for again in (False, True)
    ]
    for part in ("views", "teacher"):
        first, *rest = (trace(subject, part, 2) for subject in others)
        assert all(found is first for found in rest)
        # What is shared is what each would find by itself.
        assert all(trace(replace(subject, like=None), part, 2) == first for subject in others)
    kept, again = others[0], others[1]
    assert trace(again, "loss_x", 2).saved_bytes < trace(kept, "loss_x", 2).saved_bytes


def test_products_are_torchs_own_after_a_zero_3_engine(make_subject, monkeypatch):
    """DeepSpeed replaces `torch.nn.functional.linear` for the whole process; its own asks weights for their state."""
    subject = make_subject(engine={"zero_stage": 3})
    expected = trace(subject, "loss_x", 2)
    linear = import_deepspeed().runtime.zero.linear.zero3_linear_wrap
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    assert trace(make_subject(engine={"zero_stage": 3}), "loss_x", 2) == expected
    assert torch.nn.functional.linear is linear
