"""Archives as they are, on two ranks: one in img2dataset's layout, one without any index, from real servers.

The first is indexed by `shards index` from the notes beside its shards. The job is killed at moments that nobody chose,
and ends as if it never was.
"""

import random
import subprocess
from contextlib import ExitStack

import pytest

from tests.data import s3_server
from tests.data.batches.archive import sequential, write_archive
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.foreign_shards import img2dataset
from tests.distributed.killing import check_same_run, kill_until_done, stream_state, train_whole
from tests.distributed.launching import BIN, environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 24


@pytest.fixture(params=["http", "s3"])
def archives(request, tmp_path, monkeypatch):
    """Addresses of both archives on a server of this kind."""
    img2dataset(tmp_path / "archives" / "theirs", (9, 7, 0, 8))
    write_archive(tmp_path / "archives" / "plain")
    with ExitStack() as stack:
        if request.param == "http":
            faults = {"*": [Fault(times=1, cut_after=5000)], "plain/a-003.tar": [Fault(times=2, status=503)]}
            url = stack.enter_context(FaultyServer(tmp_path / "archives", faults)).url
        else:
            if s3_server.moto_server() is None:
                pytest.skip(s3_server.MISSING)
            server = stack.enter_context(s3_server.running())
            for name, value in (s3_server.SIGNED | {"AWS_ENDPOINT_URL": f"http://{server}"}).items():
                monkeypatch.setenv(name, value)
            bucket = s3_server.Bucket(server, "archives").make()
            for path in sorted((tmp_path / "archives").rglob("*.*")):
                bucket.put(str(path.relative_to(tmp_path / "archives")), path.read_bytes())
            url = "s3://archives"
        yield f"{url}/theirs", f"{url}/plain"


def test_trained_killed_and_resumed_exactly(archives, shapes, make_recipe, tmp_path):
    theirs, plain = archives
    index = ["shards", "index", f"{theirs}/{{00000..00003}}.tar", str(tmp_path / "index")]
    subprocess.run([BIN / "maskmatch", *index], env=environment(), check=True)

    def recipe_in(folder):
        folder.mkdir()
        made = make_recipe(
            data={
                "unlabelled": [{"root": str(tmp_path / "index"), "name": "theirs", "weight": 2}, sequential(plain)],
                "unlabelled_per_labelled": 3,
                "shuffle_window": 6,
                "cache_dir": str(folder / "cache"),
                "workers": 2,
                "fetch_timeout_s": 3.0,
            },
            engine={"micro_batch": 1, "precision": "fp32"},
            method={"burn_in": 0.1},
            run={"dir": str(folder / "run"), "steps": STEPS, "checkpoint_every": 2, "evaluate_every": 0},
        )
        (folder / "recipe.yaml").write_text(made.to_yaml())
        return folder / "recipe.yaml"

    whole, part = recipe_in(tmp_path / "whole"), recipe_in(tmp_path / "part")
    train_whole(whole)
    kills = kill_until_done(part, tmp_path / "log.txt", random.Random(7))
    assert kills >= 2
    check_same_run(whole, part, STEPS)
    assert [list(rank["lanes"]["archive"]) for rank in stream_state(whole, STEPS)["ranks"]] == [["0", "1"], ["2", "3"]]
