"""What a run says of the weights that it starts from, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from maskmatch_scale.export.write import export_run
from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.train import train
from tests.conftest import TINY_SEGFORMER

SEGFORMER = {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER}


def hub_folder(folder, **settings):
    SegformerForSemanticSegmentation(SegformerConfig(**TINY_SEGFORMER, **settings)).save_pretrained(folder)
    return folder


def start(make_recipe, pretrained, **sections):
    model = SEGFORMER | {"pretrained": str(pretrained)}
    return make_recipe(model=model, run={"steps": 1}, engine={"precision": "fp32"}, **sections)


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if "model.pretrained" in line]


def test_a_segformer_of_the_hub_with_other_classes_starts_a_run(make_recipe, tmp_path, capfd):
    folder = hub_folder(tmp_path / "hub", num_labels=150)
    recipe = start(make_recipe, folder)
    run = train(recipe)
    (line,) = lines_of(capfd.readouterr().out)
    assert "classifier: 150 → 3 classes, new (head.classifier.weight, head.classifier.bias)" in line
    assert str(folder) in line
    assert len(lines_of((run / "log" / "rank-0.txt").read_text())) == 1
    # A run that goes on has weights of its own.
    train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 2})}), resume="auto")
    assert lines_of(capfd.readouterr().out) == []


def test_classes_in_another_order_are_a_warning(make_recipe, tmp_path, capfd):
    names = {0: "ground", 1: "disc", 2: "square"}
    train(start(make_recipe, hub_folder(tmp_path / "hub", id2label=names)))
    (line,) = lines_of(capfd.readouterr().out)
    assert "warning: " in line
    assert "(1 is 'disc' there and 'square' here, 2 is 'square' there and 'disc' here)" in line


@pytest.mark.parametrize("names", [{0: "ground", 1: "square", 2: "disc"}, {n: f"LABEL_{n}" for n in range(3)}])
def test_the_same_classes_and_unnamed_ones_are_none(make_recipe, tmp_path, capfd, names):
    train(start(make_recipe, hub_folder(tmp_path / "hub", id2label=names)))
    assert lines_of(capfd.readouterr().out) == []


def test_a_run_and_an_export_of_other_classes(make_recipe, tmp_path, capfd):
    run = train(make_recipe(model=SEGFORMER, run={"steps": 1, "dir": str(tmp_path / "first")}))
    export_run(run, tmp_path / "export")
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(data | {"classes": ["a", "square", "disc"]}))
    described = json.loads((tmp_path / "export" / "segmenter.json").read_text())
    (tmp_path / "export" / "segmenter.json").write_text(json.dumps(described | {"classes": ["b", "square", "disc"]}))
    capfd.readouterr()
    for pretrained, name in ((run, "a"), (tmp_path / "export", "b")):
        recipe = start(make_recipe, pretrained)
        train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(tmp_path / f"run-{name}")})}))
        (line,) = lines_of(capfd.readouterr().out)
        assert f"(0 is '{name}' there and 'ground' here)" in line
        more = recipe.model_copy(update={
            "model": recipe.model.model_copy(update={"num_classes": 7}),
            "run": recipe.run.model_copy(update={"dir": str(tmp_path / f"more-{name}")}),
        })  # fmt: skip
        train(more)
        (line,) = lines_of(capfd.readouterr().out)
        assert "classifier: 3 → 7 classes, new" in line


def test_the_recipe_of_the_page_trains(make_recipe, shapes, tmp_path, capfd):
    """docs/from_the_hub.md, with a tiny folder of the hub and tiny crops."""
    page = (Path(__file__).parents[2] / "docs" / "from_the_hub.md").read_text()
    content = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert parse_recipe(content).model.pretrained == "weights/segformer-b2-ade"
    small = make_recipe().model_dump(mode="json")
    content["data"] = small["data"]
    content["model"] = SEGFORMER | {"pretrained": str(hub_folder(tmp_path / "hub", num_labels=150))}
    content["method"] |= {"scales": [1.0]}
    content["engine"] = small["engine"] | {"precision": "fp32"}
    content["run"] = {"dir": str(tmp_path / "run"), "steps": 1}
    train(parse_recipe(content))
    (line,) = lines_of(capfd.readouterr().out)
    assert "classifier: 150 → 3 classes" in line
    assert "`classifier: 150 → 12 classes, new (head.classifier.weight, head.classifier.bias)`" in page


def test_another_size_is_one_line(maskmatch, make_recipe, tmp_path):
    folder = tmp_path / "hub"
    options = TINY_SEGFORMER | {"depths": [1, 2, 1, 1]}
    SegformerForSemanticSegmentation(SegformerConfig(**options)).save_pretrained(folder)
    (tmp_path / "recipe.yaml").write_text(start(make_recipe, folder).to_yaml())
    code, _, err = maskmatch("train", tmp_path / "recipe.yaml")
    lines = [line for line in err.splitlines() if line.startswith("maskmatch: ")]
    assert (code, len(lines)) == (2, 1)
    assert "does not fit the backbone" in lines[0]
    assert not (tmp_path / "run").exists()
