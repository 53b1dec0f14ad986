"""`maskmatch shards verify | show | index` as a user runs them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from maskmatch_scale.cli.main import app
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import sha256
from maskmatch_scale.train import train
from tests.conftest import rewrite_shard
from tests.data import foreign_shards
from tests.data.faulty_server import FaultyServer
from tests.data.s3_server import SIGNED, Bucket


def run(*arguments):
    result = CliRunner().invoke(app, ["shards", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def bad(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "bad")
    rewrite_shard(root, ShardIndex.load(root).streams["val"].shards.file(0), {"val-0000.webp": b"rubbish"})
    return root


def test_verify_names_every_fault(shapes, bad):
    assert run("verify", shapes).stdout.splitlines()[-1] == "42 samples, no faults"
    with pytest.raises(UserError, match="42 samples, 1 fault, named above"):
        run("verify", bad)
    assert "label maps of" not in run("verify", bad, "--shallow").stdout


def test_faults_as_json(bad, capsys):
    with pytest.raises(UserError):
        app(["shards", "verify", str(bad), "--json"], standalone_mode=False)
    fault, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (fault["key"], fault["reason"], fault["stream"]) == ("val-0000", "not_an_image", "val")
    assert (last["summary"]["faults"], last["summary"]["samples"]) == (1, 42)
    assert list(last["summary"]["streams"]["labelled"]["class_pixels"]) == ["ground", "square", "disc"]


def test_pixels_of_each_class(tmp_path):
    """Two samples of 8 × 8 px; one class never occurs, and most of `val` is ignored."""
    for number, values in enumerate(([0] * 60 + [2] * 4, [0] * 64, [255] * 60 + [2] * 4)):
        for folder, pixels in (("images", [number] * 64), ("labels", values)):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture = Image.fromarray(np.reshape(np.array(pixels, np.uint8), (8, 8)))
            picture.save(tmp_path / folder / f"{'val' if number == 2 else number}.png")
    (tmp_path / "val.csv").write_text(
        "image,label,stream\n"
        + "".join(
            f"images/{name}.png,labels/{name}.png,{stream}\n"
            for name, stream in (("0", "labelled"), ("1", "labelled"), ("val", "val"))
        )
    )
    written = run("write", "list", tmp_path / "val.csv", tmp_path / "out", "--classes", classes_file(tmp_path))
    said = ["stream 'labelled': no pixel of class 'square'", "stream 'val': no pixel of classes 'ground', 'square'"]
    said.append("stream 'val': 93.8% of the pixels are ignored")
    warned = [f"warning: {line}" for line in said]
    assert [line for line in written.stderr.splitlines() if line.startswith("warning")] == warned
    verified = run("verify", tmp_path / "out")
    assert [line for line in verified.stderr.splitlines() if line.startswith("warning")] == warned
    rows = [line.replace(" ", "") for line in verified.stdout.splitlines()]
    assert {"│ground│96.88%│2│", "│square│0.00%│0│", "│disc│3.12%│1│", "│ignored│93.75%│1│"} <= set(rows)
    summary = json.loads(run("verify", tmp_path / "out", "--json").stdout)["summary"]
    assert summary == {
        "samples": 3,
        "faults": 0,
        "streams": {
            "labelled": {
                "samples": 2,
                "class_pixels": {"ground": 124, "square": 0, "disc": 4},
                "class_samples": {"ground": 2, "square": 0, "disc": 1},
                "ignored_pixels": 0,
            },
            "val": {
                "samples": 1,
                "class_pixels": {"ground": 0, "square": 0, "disc": 4},
                "class_samples": {"ground": 0, "square": 0, "disc": 1},
                "ignored_pixels": 60,
            },
        },
        "warnings": said,
    }


def test_show_makes_a_picture(shapes, tmp_path):
    out = tmp_path / "sheet.png"
    assert str(out) in run("show", shapes, "--out", out, "--count", 3).stdout.replace("\n", "")
    with Image.open(out) as sheet:
        assert sheet.width > 500


def classes_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("ground 0 0 0\nsquare 255 0 0\ndisc 0 0 255\n")
    return path


def test_an_index_for_shards_that_exist(shapes, tmp_path, make_recipe):
    """The same entries as the writer's, and a run trains from it."""
    shards = tmp_path / "mine"
    shutil.copytree(shapes, shards, ignore=shutil.ignore_patterns("index.json"))
    last = len(ShardIndex.load(shapes).streams["unlabelled"].shards) - 1
    options = ["--labelled", shards / "labelled-*.tar", "--split", f"dev={shards}/dev-*.tar"]
    options += ["--classes", classes_file(tmp_path), "--workers", 1]
    run("index", f"{shards}/unlabelled-{{000000..{last:06d}}}.tar", shards, *options)
    written, found = ShardIndex.load(shapes), ShardIndex.load(shards)
    for name in ("labelled", "unlabelled", "dev"):
        ours, theirs = found.streams[name], written.streams[name]
        assert (ours.labelled, ours.shards) == (theirs.labelled, theirs.shards)
    assert (found.classes, found.palette) == (written.classes, written.palette)
    train(make_recipe(data={"root": str(shards)}, run={"steps": 1}))


def test_label_maps_that_are_not_asked_for_are_told(shapes, tmp_path):
    told = "stream 'unlabelled': each image of its first shard has a .png beside it, which is not read"
    assert told in run("index", shapes / "labelled-*.tar", tmp_path / "a", "--workers", 1).stderr
    assert told not in run("index", shapes / "unlabelled-*.tar", tmp_path / "b", "--workers", 1).stderr


def test_an_index_elsewhere_goes_on_where_it_was_interrupted(shapes, tmp_path, monkeypatch):
    from maskmatch_scale.data.tools import survey

    out, looked = tmp_path / "out", []
    plain = survey._look_at

    def stops(location, *others):
        if len(looked) == 3:
            raise KeyboardInterrupt
        looked.append(location)
        return plain(location, *others)

    monkeypatch.setattr(survey, "_look_at", stops)
    assert run("index", shapes / "unlabelled-*.tar", out, "--workers", 1).exit_code != 0
    with (out / ".survey.jsonl").open("a") as file:
        file.write('{"identity": "cut o')
    monkeypatch.setattr(survey, "_look_at", lambda *a: looked.append(a[0]) or plain(*a))
    run("index", shapes / "unlabelled-*.tar", out, "--workers", 1)
    assert len(looked) == len(set(looked)) == len(ShardIndex.load(shapes).streams["unlabelled"].shards)
    assert len(ShardStream(out, "unlabelled")) == 24
    assert ShardStream(out, "unlabelled")[0].key == "unlabelled-0000"


def test_more_shards_do_not_rescan_all(shapes, tmp_path):
    out, cache = tmp_path / "out", ("--cache-dir", tmp_path / "cache", "--workers", 1)
    count = len(ShardIndex.load(shapes).streams["unlabelled"].shards)
    with FaultyServer(shapes) as server:

        def index(last, *options):
            before = len(server.requests)
            run("index", f"{server.url}/unlabelled-{{000000..{last:06d}}}.tar", out, *cache, *options)
            assert len(ShardIndex.load(out).streams["unlabelled"].shards) == last + 1
            # Of those whose samples are unknown, the first is asked for a note of img2dataset's.
            return [request.path for request in server.requests[before:] if request.path.endswith(".tar")]

        assert len(index(count - 3)) == count - 2
        assert index(count - 1) == [f"unlabelled-{number:06d}.tar" for number in (count - 2, count - 1)]
        assert index(0) == []
        assert index(count - 1) == []
        assert len(index(count - 1, "--rescan")) == count


def test_a_local_shard_that_changed_is_looked_at_again(shapes, tmp_path):
    shards = shutil.copytree(shapes, tmp_path / "mine")
    command = ("index", shards / "unlabelled-*.tar", shards, "--workers", 1)
    run(*command)
    file = ShardIndex.load(shards).streams["unlabelled"].shards.file(0)
    rewrite_shard(shards, file, {"unlabelled-0000.webp": None})
    run(*command)
    table = ShardIndex.load(shards).streams["unlabelled"].shards
    assert (int(table.samples[0]), table.sha256(0)) == (2, sha256(shards / file))
    assert len((shards / ".survey.jsonl").read_text().splitlines()) == len(table)


def test_an_index_for_shards_in_an_object_store(shapes, tmp_path, make_recipe, s3_server, monkeypatch):
    """Listed, looked at by a pool, and read by a rank and its loader processes."""
    bucket = Bucket(s3_server, "archive").make()
    for shard in shapes.glob("unlabelled-*.tar"):
        bucket.put(f"some/folder/{shard.name}", shard.read_bytes())
    for name, value in {**SIGNED, "AWS_ENDPOINT_URL": f"http://{s3_server}"}.items():
        monkeypatch.setenv(name, value)
    cache = tmp_path / "cache"
    run("index", "s3://archive/some/folder/*.tar", tmp_path / "out", "--cache-dir", cache, "--workers", 2)
    theirs, ours = (ShardIndex.load(root).streams["unlabelled"].shards for root in (tmp_path / "out", shapes))
    assert [theirs.sha256(number) for number in range(len(theirs))] == [ours.sha256(n) for n in range(len(ours))]
    bucket.put("index.json", (tmp_path / "out" / "index.json").read_bytes())
    shutil.rmtree(cache)
    recipe = make_recipe(
        data={"unlabelled": [{"root": "s3://archive"}], "cache_dir": str(cache), "workers": 1}, run={"steps": 2}
    )
    train(recipe)
    with pytest.raises(UserError, match=r"s3://archive/some/\*\.zip: matches no file"):
        run("index", "s3://archive/some/*.zip", tmp_path / "out")


def test_mistakes(shapes, tmp_path):
    shard = shapes / "unlabelled-000000.tar"
    for arguments, message in [
        ((tmp_path,), "no shards: give patterns"),
        ((tmp_path / "x-*.tar", tmp_path), "no such file"),
        ((shard, tmp_path, "--labelled", shard), "--classes FILE must say"),
        ((shard, shard, tmp_path), "is listed twice"),
        ((Path(__file__), tmp_path), "not a.*tar"),
        ((tmp_path, tmp_path / "out"), r"no index; looked for index\.json, "),
        ((shard, tmp_path, "--split", "val"), "write NAME=PATTERN"),
    ]:
        with pytest.raises(UserError, match=message):
            run("index", *arguments, "--workers", 1)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(UserError, match="cut off after"):
        run("index", cut, tmp_path, "--workers", 1)


def test_show_of_a_list(tmp_path):
    """The picture is beside the list."""
    foreign_shards.text(tmp_path)
    run("show", tmp_path / "shards.txt", "--count", 2)
    assert (tmp_path / "contact-sheet.png").is_file()
