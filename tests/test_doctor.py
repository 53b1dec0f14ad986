"""`maskmatch doctor`: what it says of the machine is there, what it says of a backbone agrees with the model itself."""

import json
import sys
from importlib.metadata import version

import pytest
import torch

from maskmatch_scale.cli import main as cli
from maskmatch_scale.doctor import describe_machine, examine
from maskmatch_scale.errors import UserError
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.cost import encoder_macs


def run(capsys, monkeypatch, *arguments):
    """(exit code, stdout, stderr) of `maskmatch doctor …` in this process."""
    monkeypatch.setattr(sys, "argv", ["maskmatch", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_the_machine(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--json")
    machine = json.loads(out)
    assert (code, machine) == (0, describe_machine())
    assert machine["torch"] == torch.__version__
    assert machine["timm"] == version("timm")
    assert torch.cuda.is_available() or machine["GPU"].startswith("none found")
    assert machine["threads of torch"].startswith(f"{torch.get_num_threads()} ")
    code, out, _ = run(capsys, monkeypatch)
    assert code == 0
    assert all(name in out for name in machine)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("maskmatch_scale.doctor._PACKAGES", ("no_such_package",))
    machine = describe_machine()
    assert machine["no_such_package"] == "not installed"
    assert all(machine[name].startswith("none") for name in ("C++ compiler", "CUDA compiler", "ninja"))


def test_a_segformer(capsys, monkeypatch):
    arguments = ("--backbone", "transformers/segformer-b0", "--image-size", 128, "--keep", 0.5)
    code, out, _ = run(capsys, monkeypatch, *arguments, "--json")
    found = json.loads(out)
    segmenter = build_segmenter("transformers/segformer-b0", 2, context=False)
    assert (code, found["supported"], found["unit_px"], found["rounded_from"]) == (0, True, 32, None)
    assert found["strides"] == [4, 8, 16, 32]
    assert found["tokens"] == [1024, 256, 64, 16]
    assert (found["visible_units"], found["units"]) == (8, 16)
    assert found["parameters_m"] * 1e6 == sum(parameter.numel() for parameter in segmenter.backbone.parameters())
    full, keep = encoder_macs(segmenter, 128, 128), encoder_macs(segmenter, 128, 128, 8)
    assert (found["gmacs_full"], found["gmacs_keep"]) == (full / 1e9, keep / 1e9)
    assert found["ideal_speedup"] == pytest.approx(full / keep)
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    assert all(part in out for part in ("yes, SegFormer", "1024, 256, 64, 16", "8 of 16 units", f"{full / keep:.2f}×"))


def test_the_default_size_is_rounded_to_whole_units(capsys, monkeypatch):
    found = examine("timm/vit_giant_patch14_dinov2")
    assert (found["image_size"], found["rounded_from"], found["unit_px"]) == (504, 512, 28)
    assert (found["tokens"], found["prefix_tokens"], found["strides"]) == ([36 * 36], 1, [14])
    assert examine("timm/vit_tiny_patch16_224")["rounded_from"] is None
    _, out, _ = run(capsys, monkeypatch, "--backbone", "timm/vit_tiny_patch14_dinov2", "--json")
    assert out == ""  # no such model: nothing on stdout
    _, out, _ = run(capsys, monkeypatch, "--backbone", "timm/vit_small_patch14_dinov2")
    assert "rounded from 512" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--backbone", "timm/resnet18"], "timm/resnet18 is no ViT"),
        (["--backbone", "timm/swin_tiny_patch4_window7_224"], "SwinTransformer"),
        (["--backbone", "transformers/nowhere"], "transformers/nowhere"),
        (["--backbone", "vit"], "'vit'"),
        (["--backbone", "timm/vit_tiny_patch16_224", "--image-size", "500"], "500×500"),
        (["--backbone", "timm/vit_tiny_patch16_224", "--image-size", "0"], "--image-size 0"),
        (["--backbone", "timm/vit_tiny_patch16_224", "--keep", "0"], "keep: 0.0"),
        (["--image-size", "512"], "--backbone"),
    ],
)
def test_what_is_not_supported_is_one_line(capsys, monkeypatch, arguments, named):
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("maskmatch: error: ")
    assert err.count("\n") == 1
    assert named in err


def test_help_has_an_example(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--help")
    assert code == 0
    assert "Example:" in out


def test_a_mistake_in_python_is_a_user_error():
    with pytest.raises(UserError, match="no model"):
        examine("timm/no_such_model")
