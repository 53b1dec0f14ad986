"""What `maskmatch export` writes, loaded by the libraries alone and by our loader, against the run's own segmenter."""

import html
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor, SegformerModel

from maskmatch_scale.checkpoints.keeping import Keep, Keeper
from maskmatch_scale.checkpoints.reading import load_weights
from maskmatch_scale.errors import UserError
from maskmatch_scale.export import load_export
from maskmatch_scale.export.write import export_run
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.runs.model import build_student, open_run
from maskmatch_scale.train import train
from tests.checkpoints.made_up import cut, write
from tests.cli.test_main import run as command
from tests.conftest import TINY_SEGFORMER, TINY_VIT, recipe_maker

SEGFORMER = {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER}
VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}
MODELS = {
    "segformer": SEGFORMER,
    "segformer pixel_shuffle": SEGFORMER | {"head": "pixel_shuffle"},
    "vit linear": VIT | {"unit_px": 16},
    "vit dpt": VIT | {"head": "dpt", "backbone_options": TINY_VIT | {"depth": 4, "drop_path_rate": 0.1}},
}


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """Trains a run of one of MODELS, once."""
    done: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp("runs")
            # The teacher after its second step is no longer the student.
            recipe = recipe_maker(shapes, folder)(
                model=MODELS[name], method={"scales": [1.0], "threshold": 0.3, "ema_decay": 0.6}, run={"steps": 2}
            )
            done[name] = train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"checkpoint_every": 1})}))
        return done[name]

    return give


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def text_of(folder: Path) -> str:
    return "".join(p.read_text() for p in folder.rglob("*") if p.suffix in (".json", ".md"))


@pytest.mark.parametrize("weights", ["ema", "student"])
@pytest.mark.parametrize("name", MODELS)
def test_our_loader_gives_the_runs_logits_exactly(runs, images, tmp_path, monkeypatch, name, weights):
    run, out = runs(name), tmp_path / "out"
    export_run(run, out, weights)
    _, segmenter, _ = open_run(run, weights)

    def offline(*_):
        raise AssertionError("the loader asked the network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    loaded = load_export(out)
    assert not loaded.training
    assert loaded.context is None
    assert (loaded.unit_px, loaded.mean, loaded.std) == (segmenter.unit_px, segmenter.mean, segmenter.std)
    assert loaded(images).equal(segmenter(images))
    other = open_run(run, {"ema": "student", "student": "ema"}[weights])[1]
    assert not loaded(images).equal(other(images))

    described = json.loads((out / "segmenter.json").read_text())
    assert described["classes"] == ["ground", "square", "disc"]
    assert described["palette"][2] == [0, 0, 255]
    assert (described["ignore_index"], described["step"], described["weights"]) == (255, 2, weights)
    assert not any("context" in key for path in out.rglob("*.safetensors") for key in load_file(path))
    assert not list(tmp_path.glob(".*"))
    # What is passed on names nothing of this machine.
    assert str(run.parent) not in text_of(out)
    assert str(tmp_path) not in text_of(out)


def test_transformers_loads_a_segformer_with_its_head(runs, images, tmp_path):
    run, out = runs("segformer"), tmp_path / "out"
    call = export_run(run, out)
    assert call == f'transformers.SegformerForSemanticSegmentation.from_pretrained("{out}")'
    model, info = SegformerForSemanticSegmentation.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.id2label == {0: "ground", 1: "square", 2: "disc"}
    assert model.config.label2id["disc"] == 2
    _, segmenter, _ = open_run(run, "ema")
    torch.testing.assert_close(model.eval()(images).logits, segmenter(images), rtol=0, atol=1e-5)
    with torch.no_grad():
        theirs, ours = model.double()(images.double()).logits, segmenter.double()(images.double())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-10)


def test_the_image_processor_normalises_as_the_run_does(runs, tmp_path):
    export_run(runs("segformer"), tmp_path / "out")
    processor = SegformerImageProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3)).astype(np.uint8)
    segmenter = load_export(tmp_path / "out")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (segmenter.mean, segmenter.std))
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    found = processor(pixels, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_transformers_loads_the_encoder_of_another_head(runs, images, tmp_path):
    run, out = runs("segformer pixel_shuffle"), tmp_path / "out"
    assert export_run(run, out) == f'maskmatch_scale.export.load_export("{out}")'
    model, info = SegformerModel.from_pretrained(out / "backbone", output_loading_info=True)
    assert not any(info.values()), info
    _, segmenter, _ = open_run(run, "ema")
    with torch.no_grad():
        theirs = model.double().eval()(images.double(), output_hidden_states=True).hidden_states
        ours = segmenter.double().encode(images.double())
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    head = load_file(out / "head.safetensors")
    assert head.keys() == segmenter.head.state_dict().keys()


def timm_models(out: Path, name: str) -> list[nn.Module]:
    """The backbone of an export, loaded in both ways of the model card."""
    arguments = json.loads((out / "backbone" / "config.json").read_text())["model_args"]
    file = out / "backbone" / "model.safetensors"
    return [
        timm.create_model(name, checkpoint_path=file, **arguments).eval(),
        timm.create_model(f"local-dir:{out / 'backbone'}", pretrained=True).eval(),
    ]


@pytest.mark.parametrize("name", ["vit linear", "vit dpt"])
def test_timm_loads_a_vit(runs, images, tmp_path, name):
    run, out = runs(name), tmp_path / "out"
    export_run(run, out)
    assert len({file.stat().st_mode for file in out.rglob("*") if file.is_file()}) == 1
    _, segmenter, _ = open_run(run, "ema")
    with torch.no_grad():
        expected = segmenter.encode(images)[-1].flatten(2).transpose(1, 2)
        for model in timm_models(out, "vit_tiny_patch16_224"):
            torch.testing.assert_close(model(images)[:, model.num_prefix_tokens :], expected, rtol=0, atol=1e-6)


# Norms behind the pooling and before it, pooling with parameters of its own, rotary embeddings of both kinds.
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_mixed_224",
        "vit_tiny_patch16_224.augreg_in21k",
        "vit_base_patch16_224.mae",
    ],
)
@pytest.mark.parametrize("pool", [None, "avg"])
def test_timm_loads_its_other_vits(make_recipe, tmp_path, name, pool):
    pooling = {} if pool is None else {"global_pool": pool}
    patch = 14 if "patch14" in name else 16
    recipe = make_recipe(
        data={"crop_px": [4 * patch, 6 * patch]},
        model={
            "backbone": f"timm/{name}",
            "backbone_options": {"embed_dim": 24, "depth": 1, "num_heads": 2, **pooling},
            "unit_px": patch,
        },
    )
    segmenter = untrained_run(recipe).eval()
    export_run(Path(recipe.run.dir), tmp_path / "out")
    images = torch.randn(1, 3, 4 * patch, 6 * patch)
    assert load_export(tmp_path / "out")(images).equal(segmenter(images))
    with torch.no_grad():
        expected = segmenter.encode(images)[-1].flatten(2).transpose(1, 2)
        for model in timm_models(tmp_path / "out", name):
            torch.testing.assert_close(model(images)[:, model.num_prefix_tokens :], expected, rtol=0, atol=1e-6)


def untrained_run(recipe):
    """Writes a run directory whose checkpoint holds random weights of the recipe's model, and gives that model."""
    from maskmatch_scale.data.shards.index import ShardIndex

    segmenter = build_student(recipe, ShardIndex.load(recipe.data.root), pretrained=False)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    run = Path(recipe.run.dir)
    teacher = {f"ema/{name}": value for name, value in segmenter.state_dict().items()}
    assert write(run / "checkpoints", 1, cut(teacher, {}, 2)).error is None
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    return segmenter


@pytest.mark.parametrize("head", ["segformer", "linear"])
def test_a_backbone_of_a_folder_takes_its_configuration_along(make_recipe, tmp_path, images, head):
    folder = tmp_path / "segformer-b0"  # an official size's name, which must not be taken for it
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "segformer", **TINY_SEGFORMER}))
    model = {"backbone": f"transformers/{folder}", "head": head, "num_classes": 5}
    recipe = make_recipe(model=model)
    segmenter = untrained_run(recipe).eval()
    export_run(Path(recipe.run.dir), tmp_path / "out")
    shutil.rmtree(folder)
    assert load_export(tmp_path / "out")(images).equal(segmenter(images))
    assert str(tmp_path) not in text_of(tmp_path / "out")
    if head == "segformer":
        config = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").config
        assert config.id2label == {0: "ground", 1: "square", 2: "disc", 3: "unnamed 3", 4: "unnamed 4"}


def test_a_relative_folder_of_an_official_name_loads(runs, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_run(runs("segformer"), Path("segformer-b0"))
    assert load_export("segformer-b0")(images).equal(open_run(runs("segformer"), "ema")[1](images))


def test_an_older_checkpoint_is_exported_when_it_is_named(runs, images, tmp_path):
    run = runs("segformer")
    first = run / "checkpoints" / "step-00000001"
    export_run(first, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "segmenter.json").read_text())["step"] == 1
    segmenter = open_run(run, "ema")[1].eval()
    segmenter.load_state_dict(load_weights(first, "ema"))
    assert load_export(tmp_path / "out")(images).equal(segmenter(images))


def test_a_damaged_checkpoint_is_not_exported(runs, images, tmp_path):
    """The one before it is, as when a run continues; and an empty folder is taken."""
    run = shutil.copytree(runs("segformer"), tmp_path / "run")
    part = next((run / "checkpoints" / "step-00000002").glob("part-*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    (tmp_path / "out").mkdir()
    export_run(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "segmenter.json").read_text())["step"] == 1
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        export_run(part.parent, tmp_path / "other")


def test_a_run_that_goes_on_keeps_what_is_exported(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs("segformer"), tmp_path / "run")
    keeper = Keeper(run / "checkpoints", Keep(1, 0, 0), 2)

    def goes_on(*arguments, **options):
        keeper.tidy(2)
        return build_student(*arguments, **options)

    monkeypatch.setattr("maskmatch_scale.export.write.build_student", goes_on)
    export_run(run / "checkpoints" / "step-00000001", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "segmenter.json").read_text())["step"] == 1
    keeper.tidy(2)
    assert not (run / "checkpoints" / "step-00000001").exists()


@pytest.mark.parametrize("name", MODELS)
def test_another_run_starts_from_an_export(runs, images, make_recipe, tmp_path, name):
    export_run(runs(name), tmp_path / "out")
    segmenter = open_run(runs(name), "ema")[1]
    model = MODELS[name]
    settings = {"head": model.get("head"), "backbone_options": model["backbone_options"]}
    again = build_segmenter(model["backbone"], 3, pretrained=tmp_path / "out", **settings).eval()
    assert again(images).equal(segmenter(images))
    more = build_segmenter(model["backbone"], 7, pretrained=str(tmp_path / "out"), **settings).eval()
    assert all(a.equal(b) for a, b in zip(more.encode(images), segmenter.encode(images), strict=True))
    assert more(images).shape[1] == 7
    recipe = make_recipe(model=model | {"pretrained": str(tmp_path / "out")}, run={"steps": 1})
    assert train(recipe).is_dir()


def test_the_card_says_what_is_known_and_what_is_not(runs, tmp_path):
    run = shutil.copytree(runs("segformer"), tmp_path / "run")
    export_run(run, tmp_path / "before")
    (run / "evaluation").mkdir()
    record = {"split": "val", "weights": "ema", "step": 2, "miou": 0.4321, "pixel_accuracy": 0.8765}
    record["inference"] = "whole images"
    scores = {"iou": {"ground": 0.9, "square": 0.1239, "disc": None}}
    (run / "evaluation" / "val-ema.json").write_text(json.dumps(record | scores))
    export_run(run, tmp_path / "after")
    before, after = ((tmp_path / name / "README.md").read_text() for name in ("before", "after"))
    for part in (
        "ground, square, disc", "MaskMatch", "`transformers/segformer-b0`", "step 2 of 2", "random weights",
        "8 labelled images and 24 unlabelled ones", "`shapes`", "64×64 px", "1 rank, precision fp32", "seed 0",
        "0.485, 0.456, 0.406",
        'SegformerForSemanticSegmentation.from_pretrained("before")', 'load_export("before")', "must fill this in",
        "| dev | 5 | 2 |",
    ):  # fmt: skip
        assert part in before, part
    assert "| val | 5 | 2 | 0.432 | 0.876 |" in after
    assert "| square | 0.124 |" in after
    assert "Predicted: sliding windows of 64×64 px overlapping by at least 25%." in before
    assert "dev: sliding windows of 64×64 px overlapping by at least 25%. val: whole images." in after
    assert "| val |" not in before
    # Figures of later weights are marked as such.
    export_run(run / "checkpoints" / "step-00000001", tmp_path / "first")
    assert "another step than 1" in (tmp_path / "first" / "README.md").read_text()
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "evaluation")
    export_run(run, tmp_path / "none")
    assert "no evaluation of these weights" in (tmp_path / "none" / "README.md").read_text()


NAMES = ("<script>alert(1)</script>", "a|b\nc", "`x` [link](http://e.org) *b* ~~c~~ & \\ _d_")


@pytest.mark.parametrize("name", ["segformer", "vit linear"])
def test_names_of_any_characters_are_shown_as_they_are(runs, images, tmp_path, monkeypatch, name):
    run = shutil.copytree(runs(name), tmp_path / "run")
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(data | {"classes": NAMES, "source": "s`o|u\nrce <b>"}))
    (run / "evaluation").mkdir()
    record = {"split": "v|<i>", "weights": "ema", "step": 2, "miou": 0.4321, "iou": dict.fromkeys(NAMES, 0.25)}
    (run / "evaluation" / "val-ema.json").write_text(json.dumps(record))
    folder = 'o"u`t ``` <u>|\n- x'
    monkeypatch.chdir(tmp_path)
    export_run(run, Path(folder))
    card = Path(folder, "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert list(yaml.safe_load(front)) == ["library_name", "pipeline_tag", "tags"]
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)
    for shown_name in (*NAMES, folder):
        assert html.escape(" ".join(shown_name.split())) in shown
    assert "<code>s`o|u rce &lt;b&gt;</code>" in shown
    for tag in ("<script", "<b>", "<i>", "<u>", "<em>", "<s>", 'http://e.org"', "<li>x"):
        assert tag not in shown
    assert shown.count("<h1>") == 1
    rows = [re.findall("<td>(.*?)</td>", row) for row in shown.split("<tr>") if "0.250" in row]
    assert [len(row) for row in rows] == [2, 2, 2]
    for block in card.split("```python\n")[1:]:
        names = {"images": images, "image": Image.new("RGB", (96, 64))}
        exec(block.split("\n```")[0], names)


@pytest.mark.parametrize("name", ["segformer", "segformer pixel_shuffle", "vit dpt"])
def test_the_cards_code_runs(runs, images, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    export_run(runs(name), Path("out"))
    blocks = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1:]
    names = {"images": images, "image": Image.new("RGB", (96, 64))}
    for block in blocks:
        exec(block.split("```")[0], names)
    assert names["labels"].shape[-2:] == (64, 96)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_where_and_how_to_load(capsys, monkeypatch, runs, tmp_path):
    capsys.readouterr()
    code, printed, _ = command(
        capsys, monkeypatch, "export", runs("vit linear"), tmp_path / "out", "--weights", "student"
    )
    assert code == 0
    assert printed.splitlines()[-2:] == [
        str(tmp_path / "out"), f'load it: maskmatch_scale.export.load_export("{tmp_path / "out"}")'
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "segmenter.json").read_text())["weights"] == "student"
    code, printed, _ = command(capsys, monkeypatch, "export", "--help")
    assert (code, "Example:" in printed) == (0, True)


@pytest.mark.parametrize(
    ("spoil", "arguments", "parts"),
    [
        (None, ["nowhere", "out"], ["nowhere", "no such run, checkpoint or export"]),
        (None, ["run", "out", "--weights", "best"], ["--weights best", "ema or student"]),
        (None, ["run", "run"], ["run: it exists and is not an empty folder", "name another folder"]),
        (None, ["run", "run/recipe.yaml"], ["not an empty folder"]),
        ("recipe", ["run", "out"], ["no recipe.yaml"]),
        ("data", ["run", "out"], ["class names and palette", "data.root", "gone"]),
        ("classes", ["run", "out"], ["head.classifier", "recipe.yaml", "restore the files"]),
    ],
)
def test_mistakes(capsys, monkeypatch, runs, tmp_path, spoil, arguments, parts):
    run = shutil.copytree(runs("segformer"), tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    if spoil == "recipe":
        (run / "recipe.yaml").unlink()
    elif spoil == "data":
        (run / "recipe.yaml").write_text(recipe.replace("root: ", "root: gone"))
        (run / "data.json").unlink()  # as in runs of older versions
    elif spoil == "classes":
        (run / "recipe.yaml").write_text(recipe.replace("num_classes: null", "num_classes: 4"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code, _, err = command(capsys, monkeypatch, "export", *arguments)
    assert code == 2
    assert err.startswith("maskmatch: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not (tmp_path / "out").exists()


def test_what_is_no_export_is_named(runs, tmp_path):
    with pytest.raises(UserError, match=r"not an export .*maskmatch export"):
        load_export(tmp_path)
    export_run(runs("vit linear"), tmp_path / "out")
    (tmp_path / "out" / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"not a complete export: .*head\.safetensors"):
        load_export(tmp_path / "out")
    (tmp_path / "out" / "segmenter.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"segmenter\.json: format: .*; export the run again"):
        load_export(tmp_path / "out")
