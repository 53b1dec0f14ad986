"""ONNX graphs of exports, run by onnxruntime, against the run's own segmenter."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.errors import CommandFailed
from maskmatch_scale.export import load_export
from maskmatch_scale.export.graph import add, write
from maskmatch_scale.export.graph.check import Difference, compare
from maskmatch_scale.export.hand_on import hand_on
from maskmatch_scale.export.write import export_run
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.recipe import load_recipe
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.train import train
from tests.conftest import TINY_SEGFORMER, TINY_VIT, draw_shapes, recipe_maker

SEGFORMER = {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER}
VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}
RUNS = {"segformer": SEGFORMER, "vit": VIT | {"unit_px": 16}}


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """Trains a run of one of RUNS, once."""
    done: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in done:
            make = recipe_maker(shapes, tmp_path_factory.mktemp("runs"))
            done[name] = train(make(model=RUNS[name], run={"steps": 2}))
        return done[name]

    return give


@pytest.fixture(scope="module")
def handed_on(runs, tmp_path_factory):
    """Exports one of RUNS with its graphs, once: the folder, and the lines for the user."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def give(name: str) -> tuple[Path, list[str]]:
        if name not in done:
            out = tmp_path_factory.mktemp("exports") / "out"
            done[name] = out, list(hand_on(runs(name), out, onnx=True))
        return done[name]

    return give


@pytest.fixture
def export(runs, tmp_path):
    return shutil.copytree(exported(runs("vit"), tmp_path / "made"), tmp_path / "out")


def exported(run: Path, out: Path) -> Path:
    export_run(run, out)
    return out


def session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", RUNS)
def test_a_graph_gives_what_the_run_gives_on_held_out_images(runs, handed_on, name):
    run, (out, lines) = runs(name), handed_on(name)
    assert "model.onnx: checked on 5 images of the split dev" in lines
    segmenter, recipe = load_export(out), load_recipe(run / "recipe.yaml")
    inference = inference_of(recipe, segmenter, torch.device("cpu"))
    for file, batch in (("model.onnx", 1), ("model-batch.onnx", 1), ("model-batch.onnx", 2)):
        graph = session(out / file)
        (given,), (taken,) = graph.get_inputs(), graph.get_outputs()
        assert (given.name, taken.name) == ("images", "logits")
        assert given.shape == [1 if file == "model.onnx" else "batch", 3, 64, 64]
        for sample in evaluation_samples(recipe.data, "val", numbers=range(2)):
            images = inference.normalise(sample.image[:, 10:74, 20:84])[None].repeat(batch, 1, 1, 1)
            (found,) = graph.run(None, {"images": images.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(found), segmenter(images), rtol=0, atol=1e-5)
        opsets = {entry.domain: entry.version for entry in onnx.load(out / file).opset_import}
        assert opsets[""] == 18
    facts = json.loads((out / "onnx.json").read_text())
    assert facts["input"] == {"name": "images", "dtype": "float32", "shape": ["batch", 3, 64, 64]}
    assert facts["checked_on"] == "5 images of the split dev"
    assert set(facts["difference_from_torch"]) == {"model.onnx", "model-batch.onnx"}
    assert 0 <= facts["difference_from_torch"]["model.onnx"]["probabilities"] < 1e-5
    assert facts["difference_from_torch"]["model.onnx"]["same_class"] == 1
    card = (out / "README.md").read_text()
    assert "5 images of the split dev: probabilities differ by at most" in card
    assert card.index("## Loading") < card.index("## ONNX") < card.index("## Not known")
    assert not list(out.glob(".*"))
    # What is passed on names nothing of this machine.
    for file in (out / "model.onnx", out / "model-batch.onnx", out / "onnx.json", out / "README.md"):
        for path in (run.parent, out.parent, Path(add.__file__).parents[3], Path(torch.__file__).parents[1]):
            assert str(path).encode() not in file.read_bytes()


def test_the_cards_code_runs(handed_on, monkeypatch):
    out, _ = handed_on("vit")
    monkeypatch.chdir(out.parent)
    section = (out / "README.md").read_text().split("## ONNX")[1]
    names = {"images": np.zeros((1, 3, 64, 64), np.float32)}
    exec(section.split("```python\n")[1].split("```")[0], names)
    assert names["logits"].shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ("backbone", "options", "head", "size"),
    [
        ("timm/vit_tiny_patch16_224", TINY_VIT | {"depth": 4}, "dpt", (32, 64)),
        ("timm/vit_small_patch14_reg4_dinov2", {"embed_dim": 24, "depth": 1, "num_heads": 2}, "linear", (28, 42)),
        pytest.param("timm/vit_small_patch16_dinov3", {"embed_dim": 24, "depth": 1, "num_heads": 2}, "pixel_shuffle",
                     (32, 48), marks=pytest.mark.slow),
        pytest.param("timm/eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, "segformer",
                     (28, 42), marks=pytest.mark.slow),
        pytest.param("timm/deit3_small_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, "linear", (32, 48),
                     marks=pytest.mark.slow),
        pytest.param("transformers/segformer-b0", TINY_SEGFORMER, "linear", (64, 96), marks=pytest.mark.slow),
        pytest.param("transformers/segformer-b0", TINY_SEGFORMER, "pixel_shuffle", (64, 96), marks=pytest.mark.slow),
        pytest.param("transformers/segformer-b0", TINY_SEGFORMER, "dpt", (70, 50), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_graphs_of_other_heads_and_backbones(tmp_path, backbone, options, head, size):
    """The position embedding is laid out for the size: nothing of it is resized when the graph runs."""
    torch.manual_seed(0)
    segmenter, fixed = (
        build_segmenter(backbone, 3, head=head, backbone_options=options, context=False).eval() for _ in range(2)
    )
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    fixed.load_state_dict(segmenter.state_dict())
    fixed.encoder.fix_size(*size)
    tiles = [torch.randn(1, 3, *size) for _ in range(3)]
    for name, any_batch, batch in (("a.onnx", False, 1), ("b.onnx", True, 2)):
        write.write_graph(fixed, tmp_path / name, size, any_batch=any_batch)
        found = compare(segmenter, tmp_path / name, tiles, batch)
        assert found.is_rounding, found
        assert found.logits_std > 0.01
        graph = onnx.load(tmp_path / name).graph
        positions = {value.name: value.dims for value in graph.initializer if "pos_embed" in value.name}
        assert len(positions) == (fixed.encoder.position_px is not None)
        for value in positions:
            assert {node.op_type for node in graph.node if value in node.input} == {"Add"}


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"],
)
def test_fixing_the_size_changes_what_is_stored_and_not_what_is_computed(name):
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    segmenter = build_segmenter(f"timm/{name}", 3, backbone_options=options, context=False).eval()
    patch = segmenter.patch_px
    images = torch.randn(2, 3, 2 * patch, 4 * patch)
    before = segmenter(images)
    segmenter.encoder.fix_size(2 * patch, 4 * patch)
    if segmenter.encoder.position_px:
        assert segmenter.encoder.model.pos_embed.shape[1] - segmenter.encoder.prefix_tokens == 2 * 4
    torch.testing.assert_close(segmenter(images), before, rtol=0, atol=1e-6)


def test_an_export_is_added_to_where_it_is(maskmatch, export, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        Image.fromarray(draw_shapes(number)[0]).save(pictures / f"{number}.png")
    before = {file.name: file.read_bytes() for file in export.rglob("*.safetensors")}
    code, out, err = maskmatch("export", export, "--onnx", "--onnx-size", 32, 48)
    assert (code, "maskmatch: " in err) == (0, False)
    assert "random noise, no real images (an export has no data; name images with --onnx-images)" in out
    assert session(export / "model.onnx").get_inputs()[0].shape == [1, 3, 32, 48]
    code, out, _ = maskmatch("export", export, "--onnx", "--onnx-images", pictures, "--onnx-images", pictures / "0.png")
    assert (code, "checked on 3 images given by --onnx-images" in out) == (0, True)
    assert session(export / "model.onnx").get_inputs()[0].shape == [1, 3, 64, 64]  # the crop, as evaluations take it
    assert (export / "README.md").read_text().count("## ONNX") == 1
    assert before == {file.name: file.read_bytes() for file in export.rglob("*.safetensors")}


def test_a_graph_has_the_window_of_the_exports_evaluations_and_the_exports_name(export, monkeypatch):
    described = json.loads((export / "segmenter.json").read_text())
    described["evaluation"]["window_px"] = [32, 48]
    (export / "segmenter.json").write_text(json.dumps(described))
    assert add.plan_for_export(export, None, ()).size_px == (32, 48)
    monkeypatch.chdir(export)
    list(hand_on(Path(), None, onnx=True, onnx_size_px=(32, 32)))
    assert f'InferenceSession("{export.name}/model.onnx")' in (export / "README.md").read_text()


def test_without_the_runs_data_it_says_that_it_was_checked_on_noise(maskmatch, runs, tmp_path):
    run = shutil.copytree(runs("vit"), tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("root: ", "root: /gone"))
    code, out, _ = maskmatch("export", run, tmp_path / "out", "--onnx")
    assert (code, "random noise, no real images (data.root of the run cannot be read: " in out) == (0, True)
    assert "no real images" in (tmp_path / "out" / "README.md").read_text()


def test_large_weights_are_beside_the_graph(monkeypatch, export):
    monkeypatch.setattr(write, "INLINE_BYTES", 0)
    list(hand_on(export, None, onnx=True))
    for name in ("model.onnx", "model-batch.onnx"):
        assert (export / f"{name}.data").stat().st_size > 100_000 > (export / name).stat().st_size
        assert session(export / name).run(None, {"images": np.zeros((1, 3, 64, 64), np.float32)})[0].shape[1] == 3
    monkeypatch.undo()
    list(hand_on(export, None, onnx=True))
    assert not list(export.glob("*.data"))


def test_a_graph_that_differs_is_not_kept(monkeypatch, maskmatch, runs, tmp_path):
    """A weight of the graph is changed in its file, as a faulty export or runtime would change a result."""
    whole = write.write_graph

    def spoiled(segmenter, path, size_px, *, any_batch):
        whole(segmenter, path, size_px, any_batch=any_batch)
        graph = onnx.load(path)
        (bias,) = [value for value in graph.graph.initializer if value.name.endswith("classifiers.0.bias")]
        values = onnx.numpy_helper.to_array(bias) + np.float32([0.05, 0, 0])
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(graph, path)

    monkeypatch.setattr(add, "write_graph", spoiled)
    code, out, err = maskmatch("export", runs("vit"), tmp_path / "out", "--onnx")
    assert code == 1
    assert err.count("\n") == 1
    assert "model.onnx is not kept" in err
    assert "logits by 5.0e-02" in err
    assert str(tmp_path / "out") in out
    assert load_export(tmp_path / "out") is not None
    assert not [file for file in (tmp_path / "out").rglob("*") if "onnx" in file.name]
    assert "ONNX" not in (tmp_path / "out" / "README.md").read_text()


def test_a_graph_of_any_batch_that_differs_is_left_out_with_a_line(monkeypatch, export):
    whole = write.write_graph

    def spoiled(segmenter, path, size_px, *, any_batch):
        if any_batch:
            raise CommandFailed("torch cannot export this model as ONNX: a reason")
        whole(segmenter, path, size_px, any_batch=any_batch)

    monkeypatch.setattr(add, "write_graph", spoiled)
    lines = list(hand_on(export, None, onnx=True))
    assert lines[-1] == "model-batch.onnx is left out: torch cannot export this model as ONNX: a reason"
    assert sorted(file.name for file in export.glob("*onnx*")) == ["model.onnx", "onnx.json"]
    assert "model-batch" not in (export / "README.md").read_text()


def test_a_full_disk_is_one_line_and_leaves_the_export(maskmatch, export, small_disk):
    disk = small_disk(kib=1024)
    out = shutil.copytree(export, disk.path / "out")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    disk.fill(leave=65536)
    code, _, err = maskmatch("export", out, "--onnx")
    lines = [line for line in err.splitlines() if line.startswith("maskmatch: ")]
    assert (code, len(lines)) == (2, 1)
    assert "model.onnx: no room is left on this disk" in lines[0]
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("difference", "is_rounding"),
    [
        (Difference(1e-4, 1.0, 1e-4, 1.0), True),
        (Difference(1e-4, 1.0, 2e-3, 1.0), False),
        (Difference(2e-2, 1.0, 1e-4, 1.0), False),
        (Difference(float("nan"), 1.0, 1e-4, 1.0), False),
        (Difference(1e-4, 1.0, float("nan"), 1.0), False),
        (Difference(1e-4, float("nan"), 1e-4, 1.0), False),
    ],
)
def test_what_counts_as_rounding(difference, is_rounding):
    assert difference.is_rounding is is_rounding


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "out", "--onnx", "--onnx-size", "50", "64"], ["--onnx-size 50 64", "patches of 16 px"]),
        (["run", "out", "--onnx", "--onnx-images", "nowhere"], ["--onnx-images nowhere", "no such file"]),
        (["run", "out", "--onnx", "--onnx-images", "empty"], ["--onnx-images empty", "no image"]),
        (["run", "out", "--onnx", "--onnx-images", "run/recipe.yaml"], ["recipe.yaml"]),
        (["run", "out", "--onnx-size", "64", "64"], ["belong to --onnx"]),
        (["run", "--onnx"], ["run: name the folder", "maskmatch export run OUT"]),
        (["export", "out", "--onnx"], ["an export already", "leave out OUT (out)"]),
        (["export", "--onnx", "--weights", "ema"], ["an export already", "leave out --weights"]),
        (["export"], ["an export already", "--onnx"]),
        (["nowhere", "out", "--onnx"], ["nowhere", "no such run, checkpoint or export"]),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    maskmatch, monkeypatch, runs, export, tmp_path, arguments, parts
):
    export.rename(tmp_path / "export")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").symlink_to(runs("vit"))
    monkeypatch.chdir(tmp_path)
    code, _, err = maskmatch("export", *arguments)
    assert code == 2
    assert err.startswith("maskmatch: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not Path("out").exists()
    assert not list(Path("export").glob("*onnx*"))


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_its_extra(maskmatch, monkeypatch, runs, tmp_path, library):
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = maskmatch("export", runs("vit"), tmp_path / "out", "--onnx")
    assert code == 2
    assert err == f"maskmatch: error: --onnx: {library} is not installed; pip install 'maskmatch_scale[onnx]'\n"
    assert not (tmp_path / "out").exists()
