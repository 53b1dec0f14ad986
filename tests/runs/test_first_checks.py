"""Streams that a recipe reads and the data do not have: what the message offers."""

import json
import shutil

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.runs.first_checks import check_start, check_streams


@pytest.fixture
def without(shapes, tmp_path):
    """A copy of the shard folder without some of its streams, as a source has written it."""

    def make(*streams, source="folder", unlabel=()):
        root = shutil.copytree(shapes, tmp_path / "-".join(["copy", *streams, *unlabel, source]))
        content = json.loads((root / "index.json").read_text())
        for stream in streams:
            del content["streams"][stream]
        for stream in unlabel:
            content["streams"][stream]["labelled"] = False
        content["source"] = source
        (root / "index.json").write_text(json.dumps(content))
        return root

    return make


def refused(recipe):
    with pytest.raises(DataError) as caught:
        check_streams(recipe, load_index(recipe.data.root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "option"),
    [("voc", "--all-images"), ("cityscapes", "--train-extra"), ("coco-stuff", "--unlabeled2017"), ("folder", None)],
)
def test_no_unlabelled_stream(make_recipe, without, source, option):
    root = without("unlabelled", source=source)
    recipe = make_recipe(data={"root": str(root)})
    said = refused(recipe)
    assert said.startswith(f"data.root={root}: no stream 'unlabelled' (it has ")
    assert (f"write it again with {option}" in said) == (option is not None)
    assert "'data.unlabelled=[{root: FOLDER}]'" in said
    assert said.endswith("method.base=supervised method.mask.keep=null")


def test_what_the_message_offers_is_taken(make_recipe, without, shapes):
    root = str(without("unlabelled"))
    content = make_recipe(data={"root": root}).model_dump(mode="json")
    for overrides in (
        ["method.base=supervised", "method.mask.keep=null"],
        [f"data.unlabelled=[{{root: {shapes}}}]"],
    ):
        recipe = parse_recipe(content, overrides=overrides)
        check_streams(recipe, load_index(root))
        check_start(recipe, None)
    assert refused(parse_recipe(content, overrides=["method.mask.keep=null"])).endswith("method.base=supervised")


def test_no_labelled_stream(make_recipe, without):
    root = without("labelled", "dev", "val")
    said = refused(make_recipe(data={"root": str(root)}))
    assert "no stream 'labelled' (it has unlabelled)" in said
    assert "--classes FILE" in said
    assert "data.labelled_count=0 model.pretrained=RUN" in said
    assert "no label maps" in refused(make_recipe(data={"root": str(without(unlabel=["labelled"]))}))


def test_a_labelled_stream_of_another_name_is_offered(make_recipe, without):
    root = without("labelled")
    content = json.loads((root / "index.json").read_text())
    content["streams"]["train"] = content["streams"].pop("dev")
    (root / "index.json").write_text(json.dumps(content))
    recipe = make_recipe(data={"root": str(root)})
    said = refused(recipe)
    offered = said.rpartition("'data")[2].rstrip("'")
    assert "stream: train" in offered
    check_streams(parse_recipe(recipe.model_dump(mode="json"), overrides=[f"data{offered}"]), load_index(str(root)))


def test_a_stream_that_a_source_names(make_recipe, shapes):
    recipe = make_recipe(data={"root": str(shapes), "unlabelled": [{"root": str(shapes), "stream": "more"}]})
    assert "data.unlabelled: stream=more: stream 'more' is not in its index" in refused(recipe)


def test_several_hosts_are_left_to_the_checks_that_tell_the_others(make_recipe, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    recipe = make_recipe(data={"root": "nowhere"})
    check_start(recipe, None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"data\.root=nowhere: no such folder"):
        check_start(recipe, None)
