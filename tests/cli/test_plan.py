"""`maskmatch plan`: its table, its JSON, and bad input in one line."""

import json

import pytest
from omegaconf import OmegaConf

from maskmatch_scale.cli.plan import _whole
from maskmatch_scale.planning.measured import MeasuredGpu, Point, write_measurement
from tests.planning.subjects import VIT, recipe_of


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    made = recipe_of(VIT, method={"base": "supervised", "mask": {"keep": None}})
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(made.model_dump(mode="json"))))
    return file


def test_json_has_everything(maskmatch, recipe):
    code, out, err = maskmatch(
        "plan", recipe, "--gpus", 16, "--gpu", "a100-40", "--price", 2, "--images", 64_000, "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["parameters"] > 20_000
    assert found["images_a_step"] == 32
    assert found["cluster"]["gpu"]["memory_bytes"] == 40_000_000_000
    assert found["memory"]["fits"]
    assert found["memory"]["peak"] > 0
    assert {row["zero_stage"] for row in found["memory"]["stages"]} == {0, 1, 2, 3}
    assert found["length"]["steps"] == 2000
    assert found["length"]["price"] == pytest.approx(2 * found["length"]["gpu_hours"])
    assert found["length"]["gpu_hours"] == pytest.approx(2000 * found["step"]["seconds"] * 16 / 3600)
    assert [one["what"] for one in found["network"]] == ["gradients", "weights after the step", "sums"]
    assert found["chosen"]["overrides"] == []
    assert found["chosen"]["fits_as_written"]
    assert found["samples"] == {"labelled": None, "unlabelled": None}
    assert any("data.root cannot be read here" in note for note in found["notes"])


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_keeps_within_the_terminal(maskmatch, recipe, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = maskmatch("plan", recipe, "--gpus", 8)
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    for word in ("8 × h100", "ZeRO-3", "largest micro_batch", "labelled view", "gradients", "GPU-hours", "chosen"):
        assert word in out, word


def test_data_that_are_here_are_counted(maskmatch, recipe, shapes):
    code, out, _ = maskmatch("plan", recipe, f"data.root={shapes}", "--gpus", 2, "--json")
    found = json.loads(out)
    assert (code, found["samples"]["labelled"]) == (0, 8)
    assert found["loading"]["bytes_known"]


def test_a_measurement_takes_the_place_of_data_sheets(maskmatch, recipe, tmp_path):
    points = (Point("aten.clone", "float32", 0, 1000, 1.0), Point("AdamW", "float32", 0, 1000, 1.0))
    write_measurement(MeasuredGpu("cpu", 10**11, 1e9, 1e9, 1e3, 0.0, "here", points), tmp_path / "cpu.json")
    code, out, _ = maskmatch("plan", recipe, "--measured", tmp_path / "cpu.json", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["step"]["seconds"] > 1000  # a second for each thousand bytes
    assert found["cluster"]["gpu"]["source"] == "here"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h10"], "--gpu h10: not in the table; did you mean h100?"),
        (["--gpus", "0"], "--gpus 0: it must be at least 1"),
        (["--gpus", "12"], "--gpus 12 with --gpus-per-host 8"),
        (["--link", "wire"], "--link wire: neither a number"),
        (["--gpu-memory", "-3"], "--gpu-memory -3"),
        (["engine.zero_stages=1"], "did you mean engine.zero_stage"),
        (["data.crop_px=60"], "data.crop_px=[60, 60]"),
        (["model.backbone=timm/resnet50"], "resnet50"),
        (["--measured", "none.json"], "--measured none.json: No such file or directory"),
        (["--measured", "a.json", "--measure", "b.json"], "--measure and --measured"),
        (["--gpu-memory", "1"], "does not fit on 1 × h100"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: it must be above 0 GB"),
        (["--gpu-memory", "nan", "--measured", "a.json"], "--gpu-memory nan: it must be above 0 GB"),
        (["--gpu-memory", "0", "--measure", "a.json"], "--gpu-memory 0: it must be above 0 GB"),
        (["--gpu", "cpu"], "--gpu cpu: not in the table; there are b200,"),
        (["--price", "inf"], "--price inf"),
        (["--host-memory", "0"], "--host-memory 0: it must be above 0 GB"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(maskmatch, recipe, arguments, said):
    code, out, err = maskmatch("plan", recipe, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("maskmatch: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_its_help_has_an_example(maskmatch):
    code, out, _ = maskmatch("plan", "--help")
    assert code == 0
    assert "Example: maskmatch plan configs/one-view.yaml" in out


@pytest.mark.parametrize("written", ["100e6", "100_000_000", "1e8"])
def test_images_are_counted_as_people_write_them(written):
    assert _whole(written) == 100_000_000


@pytest.mark.parametrize("written", ["many", "1.5", "0", "-3", "inf", "nan", "1e99"])
def test_images_that_are_no_whole_number_are_one_line(maskmatch, recipe, written):
    code, out, err = maskmatch("plan", recipe, f"--images={written}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--images {written}" in err
