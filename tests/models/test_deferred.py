"""Weights that are made one at a time are, bit for bit, those of a build that keeps everything."""

import copy
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import SegformerConfig, SegformerForImageClassification

from maskmatch_scale.models import build_segmenter, deferred
from maskmatch_scale.models.deferred import DeferredBuild, build_deferred
from tests.conftest import TINY_SEGFORMER, TINY_VIT

VIT = "timm/vit_tiny_patch16_224"
EVA = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DEEP = {"embed_dim": 24, "depth": 4, "num_heads": 2}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """So that nearly every weight of a tiny model is freed at once."""
    monkeypatch.setattr(deferred, "SMALLEST_BYTES", 64)
    monkeypatch.setattr(deferred, "RESIDENT_BYTES", 2048)


def check_same(build, least=1):
    """Compare a deferred build with a plain one: parameters (made twice), buffers, and what is drawn next."""
    torch.manual_seed(3)
    whole = build()
    drawn_next = torch.rand(3)
    torch.manual_seed(3)
    module, weights = build_deferred(build)
    assert torch.equal(torch.rand(3), drawn_next)
    assert weights is not None
    parameters, expected = dict(module.named_parameters()), dict(whole.named_parameters())
    assert list(parameters) == list(expected)
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    assert meta == [name for name in parameters if name in weights]
    assert len(meta) >= least
    state = torch.get_rng_state()
    for _ in range(2):
        for name, value in expected.items():
            made = weights.make(name) if name in weights else parameters[name]
            assert torch.equal(made, value), name
            assert made.dtype == value.dtype
            assert parameters[name].requires_grad == value.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    for (name, buffer), (_, value) in zip(module.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, value), name
    return module, weights


RANDOM = {
    "vit-linear": (VIT, {"head": "linear", "backbone_options": TINY_VIT}),
    "vit-pixel-shuffle": (VIT, {"head": "pixel_shuffle", "backbone_options": TINY_VIT}),
    "vit-segformer-head": (VIT, {"head": "segformer", "backbone_options": TINY_VIT}),
    "vit-dpt": (VIT, {"head": "dpt", "backbone_options": DEEP, "image_size": (64, 96)}),
    # Weights are scaled by the number of their layer after all have been drawn.
    "eva": ("timm/eva02_tiny_patch14_224", {"backbone_options": EVA, "image_size": 56}),
    "dinov3": ("timm/vit_small_patch16_dinov3", {"backbone_options": EVA}),
    "segformer": ("transformers/segformer-b0", {"backbone_options": TINY_SEGFORMER}),
    "segformer-dpt": ("transformers/segformer-b0", {"head": "dpt", "backbone_options": TINY_SEGFORMER}),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_weights(name):
    backbone, options = RANDOM[name]
    check_same(lambda: build_segmenter(backbone, 3, **options), least=20)


def test_random_weights_in_other_forms():
    class Awkward(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
            self.embedding = nn.Parameter(torch.randn(1, 10, 32) * 0.02)
            self.never_written = nn.Parameter(torch.zeros(40))
            self.register_buffer("table", torch.empty(64, 8).normal_())
            nn.init.trunc_normal_(self.layers[0].weight, std=1.0)  # torch draws until all numbers lie within two
            for part in self.layers[1].weight.chunk(2):
                nn.init.xavier_uniform_(part)
            nn.init.orthogonal_(self.layers[2].weight)
            with torch.no_grad():
                self.layers[3].weight.copy_(self.layers[0].weight.t() @ self.layers[1].weight)
                self.layers[0].weight.data.div_(3)  # after another weight was made of it
                self.joined = nn.Parameter(torch.empty(64, 32))
                for part, layer in zip(self.joined.chunk(2), self.layers):  # from weights that were freed, to a part
                    part.copy_(layer.weight)
                self.embedding[:, 0] = self.table[0, 0]
            self.limit = float(self.layers[2].weight.detach().abs().max())

    module, weights = check_same(Awkward)
    assert module.limit == float(weights.make("layers.2.weight").abs().max())


def timm_file(folder, backbone, options, half=False):
    torch.manual_seed(7)
    state = timm.create_model(backbone.removeprefix("timm/"), num_classes=0, **options).state_dict()
    path = folder / "timm.safetensors"
    save_file({f"module.{k}": v.half() if half else v for k, v in state.items()}, path)
    return path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [224, (64, 96)])
@pytest.mark.parametrize(
    ("backbone", "options"),
    [(VIT, TINY_VIT), ("timm/eva02_tiny_patch14_224", EVA), ("timm/vit_small_patch16_dinov3", EVA)],
)
def test_a_local_file_of_timm(tmp_path, backbone, options, size, half):
    size = (56, 84) if size != 224 and "patch14" in backbone else size
    file = timm_file(tmp_path, backbone, options, half)
    check_same(lambda: build_segmenter(backbone, 3, pretrained=file, image_size=size, backbone_options=options))


def test_a_local_file_for_another_patch(tmp_path):
    file = timm_file(tmp_path, VIT, TINY_VIT)
    options = TINY_VIT | {"patch_size": 8}
    check_same(lambda: build_segmenter(VIT, 3, pretrained=file, image_size=64, backbone_options=options))


def test_a_local_pickle_of_timm(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT).state_dict(), tmp_path / "vit.pth")
    check_same(lambda: build_segmenter(VIT, 3, pretrained=tmp_path / "vit.pth", backbone_options=TINY_VIT))


@pytest.mark.parametrize("head", ["linear", "dpt"])
@pytest.mark.parametrize("name", ["vit-dpt", "segformer"])
def test_a_file_of_our_own(tmp_path, name, head):
    backbone, options = RANDOM[name]
    save_file(build_segmenter(backbone, 3, **options | {"head": "linear"}).state_dict(), tmp_path / "ema.safetensors")
    start = {"head": head, "pretrained": tmp_path / "ema.safetensors"}
    check_same(lambda: build_segmenter(backbone, 3, **options | start))


@pytest.mark.parametrize("what", ["folder", "file"])
def test_transformers_own_weights(tmp_path, what):
    config = SegformerConfig(num_labels=5, **TINY_SEGFORMER)
    SegformerForImageClassification(config).save_pretrained(tmp_path)
    source = tmp_path if what == "folder" else tmp_path / "model.safetensors"
    options = {"pretrained": source, "backbone_options": TINY_SEGFORMER}
    check_same(lambda: build_segmenter("transformers/segformer-b0", 3, **options))


def test_little_is_in_memory_at_once(monkeypatch, tmp_path):
    # A file with the weights of sixteen layers of 16 kB, and room for two of them.
    monkeypatch.setattr(deferred, "RESIDENT_BYTES", 2**15)
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")
    held = []
    plain = DeferredBuild._free_oldest

    def counted(self, keep):
        plain(self, keep)
        held.append(sum(memory.storage.nbytes() for memory in self.notes.memories.values()))

    monkeypatch.setattr(DeferredBuild, "_free_oldest", counted)

    def build():
        module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
        module.load_state_dict(deferred.read_deferred(tmp_path / "layers.safetensors"))
        return module

    module, weights = build_deferred(build)
    assert max(held) <= 2**15
    assert all(parameter.is_meta for parameter in module.parameters())
    assert sum(memory.storage.nbytes() for memory in weights._build.notes.memories.values()) == 0
    assert torch.equal(weights.make("9.weight"), layers[9].weight)


def test_a_copy_of_the_model_shares_what_makes_its_weights():
    module, weights = build_deferred(lambda: build_segmenter(VIT, 3, backbone_options=TINY_VIT))
    module.deferred = weights
    assert copy.deepcopy(module).deferred is weights


def linear(do):
    """Builds a linear layer, and then does something with it."""

    def build():
        layer = nn.Linear(32, 32)
        do(layer.weight)
        return layer

    return build


NOT_AGAIN = {
    "read past torch": lambda weight: weight.detach().numpy(),
    "a generator of its own": lambda weight: weight.data.normal_(generator=torch.Generator().manual_seed(0)),
    "a tensor laid on it": lambda weight: torch.empty(0).set_(weight.data.untyped_storage()),
}


@pytest.mark.parametrize("what", NOT_AGAIN)
def test_what_cannot_be_made_again_is_built_whole_with_one_line(caplog, what):
    build = linear(NOT_AGAIN[what])
    torch.manual_seed(3)
    expected = build().weight
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        module, weights = build_deferred(build)
    assert weights is None
    assert torch.equal(module.weight, expected)
    assert [record.message for record in caplog.records if "built whole" in record.message]


def test_a_source_that_has_changed_is_an_error():
    source = torch.ones(32, 32)
    _, weights = build_deferred(linear(lambda weight: weight.data.copy_(source)))
    assert torch.equal(weights.make("weight"), source)
    source.zero_()
    with pytest.raises(RuntimeError, match="has changed since"):
        weights.make("weight")
