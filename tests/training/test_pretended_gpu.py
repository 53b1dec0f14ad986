"""A whole step on a GPU that is not there: nothing in it waits for the device, and every tensor lies on it.

torch's `FakeTensorMode` makes tensors of any device without memory. Reading a value from one (`.item()`, `bool(…)`, a
size that depends on data) raises `DataDependentOutputException`: on a GPU it would make the host wait. Tensors of two
devices in one operation raise, too. Left out: backward, whose engine asks for a real device, and dropout, whose
generator does.
"""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime, require_device
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.resample import upsampling_bands
from maskmatch_scale.recipe.bases import BASES
from maskmatch_scale.training.step import take_step
from tests.conftest import TINY_SEGFORMER, TINY_VIT

GPU = torch.device("cuda", 0)
BACKBONES = {
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT | {"depth": 4}},
}


def pretend(module, mode):
    """Parameters and buffers made anew as tensors on the GPU that is not there."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                moved = mode.from_tensor(value.detach()).to(GPU)
                part._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = mode.from_tensor(value).to(GPU)
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


@contextmanager
def autocast():
    """bfloat16 autocast of the pretended GPU; `torch.autocast` switches itself off where there is none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


class HostCopies(TorchDispatchMode):
    """Notes operations that bring a tensor from the host to the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        to_gpu = isinstance(result, torch.Tensor) and result.device.type == "cuda"
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if to_gpu and any(tensor.device.type == "cpu" and tensor.dim() for tensor in given):
            self.found.append(func)
        return result


def one_step(recipe, family, head, arithmetic):
    """Views, pseudo-labels and losses of one micro-batch, twice; returns loss, sums and the second's host copies."""
    torch.manual_seed(0)
    segmenter = build_segmenter(num_classes=3, head=head, **BACKBONES[family])
    draw = view_draws(segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    host = TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw)[0]
    maskmatch = MaskMatch(segmenter, recipe.method, recipe.run.seed, 255, torch.ones(3)).train()
    teacher = copy.deepcopy(segmenter).eval()

    def taught(images):
        with arithmetic():
            return teacher(images)

    upsampling_bands.cache_clear()  # one of its entries would be a tensor of another mode
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pretend(maskmatch, mode)
        pretend(teacher, mode)
        batch = host.with_tensors([mode.from_tensor(tensor) for tensor in host.tensors]).to(GPU)
        for _ in range(2):  # the first step makes what is kept: weights of upsampling
            with HostCopies() as copies:
                step = maskmatch.prepare(batch)
                pixels = maskmatch.denominators(step)
                pseudo = maskmatch.pseudo_label(step, taught)
                with arithmetic():
                    losses = [maskmatch(part, step, pseudo, 2 / pixels.clamp(min=1)) for part in step.parts]
    loss = sum(loss for loss, _ in losses)
    sums = torch.stack([total for _, total in losses])
    upsampling_bands.cache_clear()
    return loss, sums, copies.found


@pytest.mark.parametrize("precision", ["fp32", "autocast-bf16"])
@pytest.mark.parametrize("head", ["segformer", "linear", "pixel_shuffle", "dpt"])
@pytest.mark.parametrize("family", BACKBONES)
def test_a_step_never_waits_for_the_device(make_recipe, family, head, precision):
    if family == "vit" and head == "segformer":
        pytest.skip("fuses levels of several resolutions, which a ViT has not")
    strong = {"noise": 0.1, "hue": 0.2, "blur_probability": 0.5, "cutmix_probability": 0.5, "keep": 0.5}
    recipe = make_recipe(
        method={"scales": [0.5, 1.0, 1.5], "mask": {"keep": 0.5}, "strong_view": strong}, engine={"micro_batch": 3}
    )
    loss, sums, copies = one_step(recipe, family, head, nullcontext if precision == "fp32" else autocast)
    assert loss.device == sums.device == GPU
    assert copies == []


@pytest.mark.parametrize(
    "mask",
    [
        {"keep": 0.5, "mode": "zero"},
        {"keep": 0.5, "view": "strong", "pixels": "masked"},
        {"keep": 0.5, "complement": True},
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_every_base_and_mask(make_recipe, base, mask):
    recipe = make_recipe(method={"base": base, "scales": [1.0], "mask": mask})
    loss, _, copies = one_step(recipe, "segformer", None, nullcontext)
    assert loss.device == GPU
    assert copies == []


def test_what_waits_is_found(make_recipe, monkeypatch):
    """The control: a value that is read on the host, and a tensor that was left there."""
    recipe = make_recipe(method={"scales": [1.0]})
    plain = MaskMatch.denominators

    def waiting(self, step):
        pixels = plain(self, step)
        return pixels * 2 if pixels.sum() > 0 else pixels

    with monkeypatch.context() as patched:
        patched.setattr(MaskMatch, "denominators", waiting)
        with pytest.raises(DataDependentOutputException):
            one_step(recipe, "vit", None, nullcontext)
    with monkeypatch.context() as patched:
        patched.setattr(MaskMatch, "denominators", lambda self, step: plain(self, step) * torch.ones(3))
        with pytest.raises(RuntimeError, match="device"):
            one_step(recipe, "vit", None, nullcontext)
    monkeypatch.setattr(MaskMatch, "denominators", lambda self, step: plain(self, step) * torch.ones(3).to(GPU))
    assert one_step(recipe, "vit", None, nullcontext)[2]


class Untouched:
    """An engine and a teacher that compute the forward alone."""

    skipped, grad_norm, every_gradient_first = False, None, True

    def __init__(self, module, segmenter):
        self.module, self.segmenter = module, segmenter
        self.calls = []

    def accumulate(self, *arguments, last):
        self.calls.append("last" if last else "more")
        return self.module(*arguments)[1]

    def __call__(self, images):
        return self.segmenter(images)

    def gathered(self):
        return nullcontext()

    def step(self, number):
        self.calls.append("step")

    def lr(self, number):
        return 1e-3

    def update(self, decay):
        self.calls.append("update")


class PretendedRank(Runtime):
    """A rank on a GPU; its sums go nowhere, and its watch is the host's, since events ask for a driver."""

    def sum_over_ranks(self, values):
        return require_device(values, self.device).clone()

    def stopwatch(self):
        return lambda: lambda: 0.0


def test_the_whole_of_take_step(make_recipe):
    recipe = make_recipe(engine={"accumulation": 2}, method={"scales": [1.0]})
    segmenter = build_segmenter(num_classes=3, **BACKBONES["vit"])
    draw = view_draws(segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    batches = TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw)
    host = [batches[number] for number in range(4)]
    maskmatch = MaskMatch(segmenter, recipe.method, recipe.run.seed, 255).train()
    upsampling_bands.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pretend(maskmatch, mode)
        engine = Untouched(maskmatch, segmenter)
        made = iter([batch.with_tensors([mode.from_tensor(t) for t in batch.tensors]) for batch in host])
        run = SimpleNamespace(
            recipe=recipe, engine=engine, teacher=engine, maskmatch=maskmatch, student=segmenter, batches=batches,
            runtime=PretendedRank(Place(0, 0, 2, 2), GPU, 1), frozen_teacher=None,
        )  # fmt: skip
        for step in range(2):
            with HostCopies() as copies:
                figures = take_step(run, step, made)
    upsampling_bands.cache_clear()
    assert engine.calls == [*["more"] * 5, "last", "step", "update"] * 2
    assert len(copies.found) == 2 * len(host[0].tensors)  # the batches themselves, from page-locked memory
    assert {value.device for value in figures.on_device.values()} == {GPU}
    assert set(figures.on_device) >= {"loss", "loss_x", "loss_u", "loss_m", "coverage"}
