"""The log of a rank: no secrets in it, and no end of a run because of it."""

import logging

import pytest

from maskmatch_scale.runs.log_file import LogFile


@pytest.fixture
def logger():
    made = logging.Logger("a run's")
    yield made
    for handler in made.handlers:
        handler.close()


def test_secrets_are_left_out_of_messages_and_tracebacks(tmp_path, logger):
    logger.addHandler(LogFile(tmp_path / "log"))
    logger.info("reading %s", "https://me:hunter2@host/x.tar")
    try:
        raise RuntimeError("Max retries exceeded with url: /x.tar?X-Amz-Signature=hunter2")
    except RuntimeError as error:
        logger.error("the run ended", exc_info=error)
    text = (tmp_path / "log").read_text()
    assert "INFO reading https://host/x.tar" in text
    assert "RuntimeError: Max retries exceeded with url: /x.tar" in text
    assert "hunter2" not in text.replace('"Max retries', "")


def test_what_a_full_disk_refuses_is_counted(small_disk, logger, capsys):
    disk = small_disk(16)
    path = disk.path / "log"
    logger.addHandler(LogFile(path))
    logger.info("first")
    disk.fill()
    for _ in range(3):
        logger.info("x" * 5000)
    disk.free()
    logger.info("last")
    _, err = capsys.readouterr()
    assert err == (
        f"maskmatch: warning: {path}: no room is left on this disk (bytes or number of files); free some, or name "
        "another disk; what is logged meanwhile is lost\n"
    )
    lines = path.read_text().splitlines()
    assert "first" in lines[0]
    assert "last" in lines[-1]
    assert "(3 records before this one could not be written)" in lines
