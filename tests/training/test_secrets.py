"""Shards behind a password: the run reads them, and nothing that it prints or writes holds the password."""

import base64
import json
import shutil
from contextlib import contextmanager

import pytest

from tests.conftest import rewrite_shard
from tests.data.faulty_server import Fault, FaultyServer

SECRETS = ("hunter2", "t0ken")


class PrivateServer(FaultyServer):
    """Answers 401 unless user and password are given."""

    @contextmanager
    def _begun(self, path, headers):
        with super()._begun(path, headers) as (request, fault):
            known = "Basic " + base64.b64encode(b"me:hunter2").decode()
            yield request, fault if headers.get("Authorization") == known else Fault(status=401)


def check_no_secret(text, where):
    for secret in SECRETS:
        assert secret not in text, f"{where}: {text[max(0, text.index(secret) - 200) :][:300]}"


@pytest.fixture
def quiet(maskmatch):
    """Exit code and stderr of `maskmatch …` in this process; what it prints has no secret."""

    def run(*arguments):
        code, out, err = maskmatch(*arguments)
        check_no_secret(out, "stdout")
        check_no_secret(err, "stderr")
        assert "Traceback" not in err, err
        return code, err

    return run


def test_a_run_over_shards_behind_a_password(quiet, make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    rewrite_shard(root, "unlabelled-000000.tar", {"unlabelled-0000.webp": b"no picture"})
    with PrivateServer(
        root, {"unlabelled-000001.tar": Fault(status=500), "unlabelled-000002.tar": Fault(wrong_bytes=True)}
    ) as server:
        address = server.url.replace("://", "://me:hunter2@")
        patterns = [f"{address}/unlabelled-{{000003..000007}}.tar?sig=t0ken"]
        assert quiet("shards", "index", *patterns, tmp_path / "index", "--cache-dir", tmp_path / "cache")[0] == 0
        assert (tmp_path / "index" / "index.json").stat().st_mode & 0o077 == 0
        recipe = make_recipe(
            data={
                "root": f"{address}/?sig=t0ken",
                "unlabelled": [{"root": f"{address}/?sig=t0ken"}, {"root": str(tmp_path / "index"), "name": "signed"}],
                "cache_dir": str(tmp_path / "cache"),
                "fetch_attempts": 1,
                "max_bad_share": 1.0,
                "workers": 1,
            },
            engine={"precision": "fp32", "library": "accelerate", "zero_stage": 0},
            run={"steps": 12, "checkpoint_every": 6},
        )
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.to_yaml())
        assert quiet("train", file)[0] == 0
        run = tmp_path / "run"
        skipped = [json.loads(line) for line in (run / "skipped" / "rank-0.jsonl").read_text().splitlines()]
        assert {line["reason"] for line in skipped} == {"not_an_image", "shard_unreadable"}
        assert quiet("train", file, "run.steps=13", "--resume", "auto")[0] == 0
        assert quiet("evaluate", run, "--weights", "ema")[0] == 0
        assert quiet("report", run)[0] == 0
        assert quiet("export", run, tmp_path / "export")[0] == 0
        # What ends a run with one line.
        code, err = quiet("train", file, "data.bad_unlabelled=fail", f"run.dir={tmp_path / 'strict'}")
        assert (code, "data.bad_unlabelled=fail" in err) == (1, True), err
        for override, said in (
            (f"data.root={address.replace('hunter2', 't0ken')}/?sig=t0ken", "HTTP 401"),
            (f"data.root={address}/nowhere?sig=t0ken", "HTTP 404"),
            (f"data.rot={address}/nowhere?sig=t0ken", "data.rot"),
            (f"data.root=[{address}/?sig=t0ken]", "data.root"),
        ):
            code, err = quiet("train", file, override, f"run.dir={tmp_path / 'other'}")
            assert (code, said in err) == (2, True), err
    assert any(request.path == "labelled-000000.tar" for request in server.requests)
    kept = [path for folder in ("run", "export", "strict") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {"rank-0.txt", "metrics.jsonl", "report.html", "stream.json", "README.md"} <= {path.name for path in kept}
    for path in kept:
        if path.name == "recipe.yaml":
            assert path.stat().st_mode & 0o077 == 0, "only its owner may read the addresses"
            assert "hunter2" in path.read_text()  # without it the run could not be evaluated
        else:
            check_no_secret(path.read_bytes().decode(errors="replace"), path)
    for path in (tmp_path / "cache").rglob(".*"):
        check_no_secret(path.read_bytes().decode(errors="replace"), path)


def test_tools_over_shards_behind_a_password(quiet, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    rewrite_shard(root, "unlabelled-000000.tar", {"unlabelled-0000.webp": b"no picture"})
    with PrivateServer(root) as server:
        address = f"{server.url.replace('://', '://me:hunter2@')}/?sig=t0ken"
        cache = ("--cache-dir", tmp_path / "cache")
        assert quiet("shards", "show", address, "--out", tmp_path / "sheet.png", *cache)[0] == 0
        code, err = quiet("shards", "verify", address, "--workers", "1", *cache)
        assert (code, "not_an_image" in err or "unlabelled-0000" in err) == (2, True), err
