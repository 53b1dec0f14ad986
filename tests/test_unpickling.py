"""Nothing foreign is ever unpickled, because pickles run any code: a real malicious file, and a search in the code."""

import argparse
import ast
import os
from pathlib import Path

import pytest
import timm
import torch
from transformers import SegformerConfig

from maskmatch_scale.models import build_segmenter
from tests.conftest import TINY_SEGFORMER, TINY_VIT

ROOT = Path(__file__).parents[1]
VIT = "timm/vit_tiny_patch16_224"


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_malicious(file, proof, legacy):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    content = {"state_dict": model.state_dict(), "args": Malicious(proof)}
    made = file.with_name("made")
    torch.save(content, made, _use_new_zipfile_serialization=not legacy)
    torch.load(made, weights_only=False)
    proof.rmdir()  # the file does what it is meant to do
    made.rename(file)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("backbone", [VIT, "transformers/segformer-b0"])
@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin", "weights.ckpt", "named.safetensors"])
def test_a_malicious_file_does_nothing(tmp_path, backbone, name, legacy):
    folder, proof = tmp_path / "weights", tmp_path / "proof"
    folder.mkdir()
    write_malicious(folder / name, proof, legacy)
    SegformerConfig(**TINY_SEGFORMER).save_pretrained(folder)
    options = TINY_VIT if backbone == VIT else TINY_SEGFORMER
    sources = [folder / name]
    if name in ("model.pth", "pytorch_model.bin"):
        sources.append(folder)
    for source in sources:
        with pytest.raises(ValueError) as caught:
            build_segmenter(backbone, 3, pretrained=source, backbone_options=options)
        assert not proof.exists()
        assert "\n" not in str(caught.value).strip() or name == "named.safetensors"
        if name != "named.safetensors" and source != folder:
            assert "holds more than tensors" in str(caught.value)
            assert str(source) in str(caught.value)


def test_an_older_timm_would_not_unpickle_either(tmp_path, monkeypatch):
    """Versions of timm have read files with other defaults: the file must not reach timm at all."""
    file = tmp_path / "model.pth"
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT).state_dict()
    torch.save(state, file)
    monkeypatch.setattr("timm.models._builder.load_state_dict", lambda *_, **__: pytest.fail("timm reads the file"))
    for source in (file, tmp_path):
        segmenter = build_segmenter(VIT, 3, pretrained=source, backbone_options=TINY_VIT)
        assert segmenter.state_dict()["backbone.pos_embed"].equal(state["pos_embed"])


def test_an_average_is_taken_before_what_it_averages(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    state = model.state_dict()
    torch.save({"state_dict": {k: v * 0 for k, v in state.items()}, "state_dict_ema": state}, tmp_path / "model.pth")
    segmenter = build_segmenter(VIT, 3, pretrained=tmp_path / "model.pth", backbone_options=TINY_VIT)
    assert segmenter.state_dict()["backbone.pos_embed"].equal(state["pos_embed"])


def test_what_training_scripts_keep_beside_the_weights(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="save its state dict alone"):
        build_segmenter(VIT, 3, pretrained=tmp_path / "model.pth", backbone_options=TINY_VIT)


UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.loads", "dill.load", "dill.loads", "joblib.load",
    "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.load",
    "numpy.load", "pandas.read_pickle", "pd.read_pickle", "eval", "exec", "torch.hub.load", "torch.jit.load",
}  # fmt: skip
MADE_SAFE = {
    ("torch.load", "weights_only", "True"),
    ("np.load", "allow_pickle", "False"),
}
"""Calls that are not unsafe with this argument."""
OWN = {
    # What torch's flight recorder of this very process has just pickled.
    ("maskmatch_scale/engine/watch.py", "pickle.loads"),
}


def unsafe_calls(source):
    """Names of calls that unpickle or run what they read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            made_safe = any((name, k.arg, ast.unparse(k.value)) in MADE_SAFE for k in node.keywords)
            if name in {*UNSAFE, "torch.load"} and not made_safe:
                yield name


def test_the_search_finds_calls():
    source = "import torch, pickle\ntorch.load(f)\ntorch.load(f, weights_only=False)\ntorch.load(f, weights_only=True)"
    assert list(unsafe_calls(source)) == ["torch.load", "torch.load"]
    assert list(unsafe_calls("yaml.load(a); pickle.loads(b)")) == ["yaml.load", "pickle.loads"]
    numpy = "np.load(f); np.load(f, allow_pickle=True); np.load(f, allow_pickle=False); pickle.load(f, allow_pickle=0)"
    assert list(unsafe_calls(numpy)) == ["np.load", "np.load", "pickle.load"]


@pytest.mark.parametrize("folder", ["maskmatch_scale", "benchmarks", "launch"])
def test_no_code_unpickles(folder):
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / folder).rglob("*.py")
        for name in unsafe_calls(path.read_text())
    }
    assert found <= OWN
