"""What a host finds of a job: its data, read from a folder and from a server, and the place for the run."""

import json
import shutil

import pytest

from maskmatch_scale.data.remote.transfer import TransferError
from maskmatch_scale.hosts.job import JobFacts, data_facts, sees, token_written
from tests.data.faulty_server import Fault, FaultyServer


def with_root(make_recipe, root, **data):
    return make_recipe(data={"root": str(root), **data}, engine={"precision": "fp32"})


def test_facts_survive_json(make_recipe, tmp_path):
    recipe = make_recipe(engine={"precision": "auto"})
    with token_written(tmp_path) as token:
        facts = JobFacts.here(recipe, token)
    assert JobFacts.from_values(json.loads(json.dumps(facts.values()))) == facts
    assert (facts.faults, facts.unreached, facts.sees_run_dir) == ((), (), True)
    assert facts.precision in ("fp32", "bf16", "autocast-bf16")  # what auto means here
    assert list(facts.data) == [recipe.data.root]
    assert JobFacts.here(recipe, "").sees_run_dir is None


def test_a_precision_that_this_host_lacks_is_a_fault(make_recipe):
    facts = JobFacts.here(make_recipe(engine={"precision": "fp16"}), "")
    assert any("engine.precision=fp16" in fault for fault in facts.faults) or facts.precision == "fp16"


def test_the_digest_is_of_the_shards_and_not_of_where_they_are(make_recipe, shapes, tmp_path):
    copy = shutil.copytree(shapes, tmp_path / "copy")
    (first,) = data_facts(with_root(make_recipe, shapes).data)[0].values()
    assert list(data_facts(with_root(make_recipe, copy).data)[0].values()) == [first]
    content = json.loads((copy / "index.json").read_text())
    content["streams"]["val"]["shards"][0]["sha256"] = "0" * 64
    (copy / "index.json").write_text(json.dumps(content))
    assert list(data_facts(with_root(make_recipe, copy).data)[0].values()) != [first]


def test_what_cannot_be_read_is_said(make_recipe, shapes, tmp_path):
    copy = shutil.copytree(shapes, tmp_path / "copy")
    (first, *_) = sorted(copy.glob("labelled*.tar"))
    first.unlink()
    digests, faults, unreached = data_facts(with_root(make_recipe, copy).data)
    assert (list(digests), faults, unreached) == ([str(copy)], (), (f"{first}: no such file",))
    digests, faults, _ = data_facts(with_root(make_recipe, tmp_path / "nowhere").data)
    assert digests == {}
    assert faults[0].startswith(f"data.root={tmp_path}/nowhere: no such folder")
    lists = {"unlabelled": [{"shards": f"{tmp_path}/gone-{{0..3}}.tar", "name": "a"}, {"shards": "s3://b/*.tar"}]}
    ((fault),) = data_facts(with_root(make_recipe, shapes, **lists).data)[1]
    assert f"{tmp_path}/gone-" in fault


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, None),
        (Fault(times=1, status=503), None),
        (Fault(status=403), "403"),
        (Fault(reset=True, cut_after=0), "the connection was cut"),
    ],
)
def test_a_store_is_asked_for_one_byte(make_recipe, shapes, tmp_path, fault, said):
    names = [path.name for path in shapes.glob("*.tar")]
    with FaultyServer(shapes, {} if fault is None else {name: [fault] for name in names}) as server:
        recipe = with_root(make_recipe, server.url, cache_dir=str(tmp_path / "cache"))
        digests, _, faults = data_facts(recipe.data)
        assert list(digests) == [server.url]
        assert all(request.sent <= 1 for request in server.requests if request.path.endswith(".tar"))
    assert (not faults) if said is None else (faults and all(said in line and ".tar: " in line for line in faults))


def test_no_secret_of_an_address_is_sent(make_recipe, shapes, tmp_path, monkeypatch):
    def fail(*_):
        raise TransferError("https://user:password@store/x?sig=abc is gone", final=True)

    with FaultyServer(shapes) as server:
        monkeypatch.setattr("maskmatch_scale.hosts.job.read_range", fail)
        recipe = with_root(make_recipe, server.url, cache_dir=str(tmp_path / "cache"))
        _, _, unreached = data_facts(recipe.data)
    assert unreached
    assert all(line.endswith(".tar: https://store/x is gone") for line in unreached)


def test_a_server_without_ranges_is_reached(make_recipe, shapes, tmp_path):
    with FaultyServer(shapes, ranges=False) as server:
        recipe = with_root(make_recipe, server.url, cache_dir=str(tmp_path / "cache"))
        assert data_facts(recipe.data)[1:] == ((), ())


def test_the_token_lies_where_the_run_will_be_and_is_gone_afterwards(tmp_path, small_disk):
    with token_written(tmp_path / "runs" / "a") as token:
        assert [str(path) for path in tmp_path.iterdir()] == [token]
        assert sees(tmp_path / token)
    assert list(tmp_path.iterdir()) == []
    disk = small_disk()
    disk.make_read_only()
    with token_written(disk.path / "run") as token:
        assert token == ""


def test_a_token_that_another_host_wrote_elsewhere_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("maskmatch_scale.hosts.job._TOKEN_S", 0.1)
    assert not sees(tmp_path / "gone")
