"""Five bands from shards to a run, its evaluation, its predictions and its export: everywhere the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.errors import UserError
from maskmatch_scale.export import load_export
from maskmatch_scale.export.hand_on import hand_on
from maskmatch_scale.export.write import export_run
from maskmatch_scale.runs.evaluate import evaluate_run, inference_of
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from tests.bands.conftest import MODELS, draw_bands, write_tiff
from tests.data.banded import NAMES


def mapped(stored):
    """By the rule of the documentation, of the range 0 to 4000."""
    return np.rint(stored / 4000 * 255).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_sees_all_bands(bands_runs, model):
    run = bands_runs(model)
    assert [band["name"] for band in json.loads((run / "data.json").read_text())["bands"]] == list(NAMES)
    _, segmenter, step = open_run(run, "ema")
    assert (segmenter.channels, step) == (NAMES, 2)
    state = json.loads(next((run / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["model"]["channels"] == [f"{name} (0 to 4000)" for name in NAMES]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss_m"] for record in records if record["kind"] == "train"]
    assert len(losses) == 2
    assert all(np.isfinite(losses))


@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_scores_and_shows_the_colours(bands_runs, model):
    run = bands_runs(model)
    (record,) = evaluate_run(run, "dev", ("ema",), locality=model == "vit")
    assert 0 <= record["miou"] <= 1
    pictures = sorted((run / "pictures" / "dev").glob("*/image.png"))
    recipe, _, _ = open_run(run, "ema")
    for picture, sample in zip(pictures, evaluation_samples(recipe.data, "dev"), strict=True):
        assert np.array_equal(np.array(Image.open(picture)), sample.image[:3].permute(1, 2, 0).numpy())
        visible = np.array(Image.open(picture.parent / "visible.png"))
        assert visible.shape == (64, 64, 3)
        seen = (visible != 128).any(-1)
        assert np.array_equal(visible[seen], sample.image[:3, 16:80, 32:96].permute(1, 2, 0).numpy()[seen])


@pytest.mark.parametrize("model", MODELS)
def test_predictions_of_files_shards_and_exports_are_those_of_the_run(bands_runs, bands, tiffs, tmp_path, cli, model):
    run = bands_runs(model)
    recipe, segmenter, _ = open_run(run, "ema")
    inference = inference_of(recipe, segmenter, torch.device("cpu"))
    expected = {n: inference.predict(segmenter, torch.from_numpy(mapped(draw_bands(n)))).numpy() for n in (1, 7)}
    export_run(run, tmp_path / "export")

    for source in (run, tmp_path / "export"):
        out = tmp_path / f"of-{source.name}"
        assert cli("predict", source, tiffs / "images", "--out", out)[0] == 0
        for number, classes in expected.items():
            assert np.array_equal(np.array(Image.open(out / "ids" / f"{number:02d}.tif")), classes)
    assert cli("predict", run, bands, "--out", tmp_path / "of-shards")[0] == 0
    found = {path.stem: path for path in (tmp_path / "of-shards" / "ids").rglob("*.png")}
    assert len(found) == 9
    for number, classes in expected.items():
        assert np.array_equal(np.array(Image.open(found[f"{number:02d}"])), classes)

    exported = load_export(tmp_path / "export")
    images = torch.randn(2, 5, 64, 96)
    assert exported(images).equal(segmenter(images))
    for image in (draw_bands(7).transpose(1, 2, 0), tiffs / "images" / "07.tif"):
        assert np.array_equal(exported.predict(image).classes, expected[7])


@pytest.mark.parametrize("model", MODELS)
def test_an_export_says_its_bands_and_the_library_loads_it(bands_runs, tmp_path, model):
    run = bands_runs(model)
    export_run(run, tmp_path / "export")
    content = json.loads((tmp_path / "export" / "segmenter.json").read_text())
    assert content["bands"] == [{"name": name, "low": 0.0, "high": 4000.0} for name in NAMES]
    assert len(content["mean"]) == len(content["std"]) == 5
    card = (tmp_path / "export" / "README.md").read_text()
    assert "5 channels, in this order" in card
    assert "- swir: 0 to 4000" in card
    assert "(B, 5, H, W)" in card
    segmenter = open_run(run, "ema")[1]
    images = torch.randn(1, 5, 64, 64)
    with torch.no_grad():
        if model == "segformer":
            from transformers import SegformerForSemanticSegmentation

            theirs = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "export").eval()
            assert theirs.config.num_channels == 5
            assert not (tmp_path / "export" / "preprocessor_config.json").exists()
            torch.testing.assert_close(theirs(images).logits, segmenter(images))
        else:
            import timm

            theirs = timm.create_model(f"local-dir:{tmp_path / 'export' / 'backbone'}", pretrained=True).eval()
            assert theirs.pretrained_cfg["input_size"][0] == 5
            features = segmenter.encode(images)[0].flatten(2).transpose(1, 2)
            torch.testing.assert_close(theirs(images)[:, theirs.num_prefix_tokens :], features)


@pytest.mark.slow
def test_a_graph_has_as_many_channels(bands_runs, tiffs, tmp_path):
    pytest.importorskip("onnxruntime")
    list(hand_on(bands_runs("vit"), tmp_path / "export", onnx=True))
    facts = json.loads((tmp_path / "export" / "onnx.json").read_text())
    assert facts["input"]["shape"] == ["batch", 5, 64, 64]
    assert facts["channels"] == list(NAMES)
    assert facts["checked_on"] == "2 images of the split dev"
    assert "float32 (1, 5, 64, 64)" in (tmp_path / "export" / "README.md").read_text()
    list(hand_on(tmp_path / "export", None, onnx=True, onnx_images=[tiffs / "images"]))
    facts = json.loads((tmp_path / "export" / "onnx.json").read_text())
    assert facts["checked_on"] == "8 images given by --onnx-images"


def test_data_without_a_band_are_refused_by_its_name(bands_runs, bands, tmp_path, shapes):
    """A run keeps its bands and ranges: an index that has others by now changes nothing, or is refused."""
    run = tmp_path / "run"
    run.symlink_to(bands_runs("vit"))
    (before,) = evaluate_run(run, "dev", ("ema",))
    content = json.loads((bands / "index.json").read_text())
    kept = (bands / "index.json").read_text()
    try:
        for band in content["bands"]:
            band["high"] = 9000.0
        (bands / "index.json").write_text(json.dumps(content))
        (after,) = evaluate_run(run, "dev", ("ema",))
        assert after["miou"] == before["miou"]
        content["bands"][3]["name"] = "pan"
        (bands / "index.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="'nir' is no band of the data; its bands are red, green, blue, pan, swir"):
            evaluate_run(run, "dev", ("ema",))
    finally:
        (bands / "index.json").write_text(kept)


def test_a_run_continues_with_the_same_bands_alone(make_bands_recipe):
    recipe = make_bands_recipe("vit", run={"steps": 1})
    run = train(recipe)
    longer = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 2})})
    for key, value, said in (
        ("channels", NAMES[:3], r"channels red \(0 to 4000\), .*, swir \(0 to 4000\), this run has red .*4000\);"),
        ("channels", NAMES[::-1], r"this run has swir \(0 to 4000\), nir"),
        ("value_ranges", {"nir": (0.0, 100.0)}, r"nir \(0 to 100\)"),
    ):
        changed = longer.model_copy(update={"data": longer.data.model_copy(update={key: value})})
        with pytest.raises(CheckpointError, match=f"it has another model: .*{said}"):
            train(changed, "auto")
    train(longer, "auto")
    assert open_run(run, "ema")[2] == 2


def test_chosen_bands_in_another_order(make_bands_recipe, tmp_path):
    recipe = make_bands_recipe("vit", data={"channels": ["swir", "red"], "value_ranges": {"red": [0, 2000]}})
    run = train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 1})}))
    _, segmenter, _ = open_run(run, "ema")
    assert segmenter.channels == ("swir", "red")
    stored = json.loads((run / "data.json").read_text())["bands"]
    assert stored == [{"name": "swir", "low": 0, "high": 4000}, {"name": "red", "low": 0, "high": 2000}]
    (record,) = evaluate_run(run, "dev", ("ema",))
    assert record["miou"] is not None


def test_weights_of_other_bands_are_adapted_and_said(bands_runs, make_bands_recipe, capsys):
    start = bands_runs("vit")
    model = MODELS["vit"] | {"pretrained": str(start)}
    train(make_bands_recipe("vit", model=model, data={"channels": list(NAMES[:3])}, run={"steps": 1}))
    said = capsys.readouterr()
    text = said.out + said.err
    assert "stem: 5 → 3 channels" in text
    assert "its channels are red (0 to 4000), green" in text


def test_a_teacher_of_other_bands_is_refused(bands_runs, make_bands_recipe):
    recipe = make_bands_recipe(
        "vit", method={"teacher": str(bands_runs("vit")), "scales": [1.0]}, data={"channels": ["red", "green", "blue"]}
    )
    with pytest.raises(UserError, match=r"^method\.teacher=.*: its channels are red .*swir .*data\.channels") as error:
        train(recipe)
    assert "\n" not in str(error.value)
    run = train(make_bands_recipe("vit", method={"teacher": str(bands_runs("vit")), "scales": [1.0]}, run={"steps": 1}))
    assert open_run(run, "student")[1].channels == NAMES


@pytest.mark.parametrize("key", ["in_chans", "num_channels"])
def test_options_of_the_backbone_do_not_say_it(make_bands_recipe, key):
    options = MODELS["vit"]["backbone_options"] | {key: 5}
    with pytest.raises(UserError, match=rf"^model\.backbone_options\.{key}: the data decide .*; remove it$"):
        train(make_bands_recipe("vit", model=MODELS["vit"] | {"backbone_options": options}))


def test_a_plan_counts_the_channels(make_bands_recipe, bands):
    from maskmatch_scale.planning.build import build
    from maskmatch_scale.planning.hardware import gpu_named
    from maskmatch_scale.planning.trace import trace

    peaks = []
    for channels in (list(NAMES), ["nir"]):
        built = build(make_bands_recipe("vit", data={"channels": channels}), gpu_named("h100"))
        assert built.subject.student.in_channels == len(channels)
        peaks.append(trace(built.subject, "views", 2).peak_bytes)
    assert peaks[0] > 3 * peaks[1]


def test_one_band_is_shown_in_grey(make_bands_recipe, tmp_path, cli):
    run = train(make_bands_recipe("vit", data={"channels": ["nir"]}, run={"steps": 1}))
    image = write_tiff(tmp_path / "x.tif", draw_bands(3)[3:4])
    assert cli("predict", run, image, "--out", tmp_path / "out")[0] == 0
    evaluate_run(run, "dev", ("ema",))
    shown = np.array(Image.open(next((run / "pictures" / "dev").glob("*/image.png"))))
    assert np.array_equal(shown[..., 0], shown[..., 1])
    assert np.array_equal(shown[..., 0], shown[..., 2])
