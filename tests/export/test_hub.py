"""Pushing an export: to a real server with the Hub's endpoints, and what cannot be pushed."""

import socket

import pytest
from huggingface_hub import ModelCard, constants

from maskmatch_scale.export import load_export
from maskmatch_scale.train import train
from tests.conftest import recipe_maker
from tests.export.hub_server import TOKEN, HubServer


@pytest.fixture(scope="module")
def run_dir(shapes, tmp_path_factory):
    return train(recipe_maker(shapes, tmp_path_factory.mktemp("run"))(run={"steps": 1}))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Lets huggingface_hub ask the server of an address, with a token or without."""

    def use(url, token=TOKEN):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)

    return use


def test_an_export_is_pushed_with_its_card(maskmatch, hub, run_dir, tmp_path):
    out = tmp_path / "out"
    with HubServer() as server:
        hub(server.url)
        code, printed, err = maskmatch("export", run_dir, out, "--push", "someone/tiny")
        assert code == 0, err
        assert printed.splitlines()[-1] == f"pushed: {server.url}/someone/tiny"
        assert server.unknown == []
        assert server.repositories["someone/tiny"]["visibility"] == "private"
        assert server.files == {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
        assert any(len(content) > 1024 for content in server.large.values())
        # Once more, from the folder, without what another command is writing.
        (out / ".onnx-x").mkdir()
        (out / ".onnx-x" / "model.onnx").write_text("half")
        code, printed, _ = maskmatch("export", out, "--push", "someone/tiny", "--public")
        assert (code, server.commits) == (0, 2)
        assert not any("onnx" in name for name in server.files)
        assert TOKEN not in printed + err


def test_files_that_this_export_has_not_are_removed_from_the_repository(maskmatch, hub, run_dir, tmp_path):
    out = tmp_path / "out"
    kept = {"LICENSE": b"theirs", "pictures/model.onnx": b"theirs"}
    with HubServer() as server:
        hub(server.url)
        server.files |= kept | {"model.onnx": b"old", "onnx.json": b"old", "backbone/config.json": b"old"}
        code, _, err = maskmatch("export", run_dir, out, "--push", "someone/tiny")
        assert code == 0, err
        mine = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
        assert server.files == kept | mine


def test_a_new_repository_is_public_if_that_is_asked_for(maskmatch, hub, run_dir, tmp_path):
    with HubServer() as server:
        hub(server.url)
        assert maskmatch("export", run_dir, tmp_path / "out", "--push", "tiny", "--public")[0] == 0
        assert server.repositories["someone/tiny"]["visibility"] == "public"


def test_the_card_has_the_front_matter_of_the_hub(maskmatch, run_dir, tmp_path):
    assert maskmatch("export", run_dir, tmp_path / "out")[0] == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-segmentation")
    assert data.tags == ["semantic-segmentation", "maskmatch_scale"]
    assert data.license is None


def gone() -> str:
    """The address of a server that is not there any more."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("failing", "status", "token", "code", "parts"),
    [
        ("", 0, "hf_another", 2, ["the hub answers 401: Invalid username", "hf auth login"]),
        ("create", 403, TOKEN, 2, ["the hub answers 403", "may it write"]),
        ("commit", 400, TOKEN, 2, ["the hub answers 400"]),
        ("commit", 501, TOKEN, 1, ["the hub answers 501"]),
        (None, 0, TOKEN, 1, ["ConnectError: ", "onnection refused"]),
    ],
)
def test_what_is_not_pushed_stays(maskmatch, hub, run_dir, tmp_path, failing, status, token, code, parts):
    out = tmp_path / "out"
    with HubServer(failing or "", status) as server:
        hub(gone() if failing is None else server.url, token)
        found, _, err = maskmatch("export", run_dir, out, "--push", "someone/tiny")
    assert found == code
    lines = [line for line in err.splitlines() if line.startswith("maskmatch: ")]
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), err
    assert f"the export is complete in {out}; push it again: maskmatch export {out} --push someone/tiny" in lines[0]
    assert token not in err
    assert "Traceback" not in err
    assert load_export(out) is not None


@pytest.mark.parametrize(
    ("repo", "token", "offline", "parts"),
    [
        ("someone/tiny", None, False, ["--push: there is no token", "HF_TOKEN"]),
        ("a/b/c", TOKEN, False, ["--push a/b/c", "USER/NAME"]),
        ("someone/tiny", TOKEN, True, ["HF_HUB_OFFLINE"]),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    maskmatch, hub, monkeypatch, run_dir, tmp_path, repo, token, offline, parts
):
    hub(gone(), token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    code, _, err = maskmatch("export", run_dir, tmp_path / "out", "--push", repo)
    assert (code, err.count("\n")) == (2, 1)
    assert all(part in err for part in parts), err
    assert not (tmp_path / "out").exists()
