"""Progress in logs and on a terminal."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from maskmatch_scale import progress
from maskmatch_scale.progress import Elsewhere, in_notebook, progress_of


def reported(capsys: pytest.CaptureFixture[str], elsewhere: Elsewhere = "lines", **options: bool) -> str:
    with progress_of("pages", 5, unit="samples", elsewhere=elsewhere, **options) as advance:
        advance()
        advance(3)
        advance()
    return capsys.readouterr().err


def test_a_log_gets_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    line = reported(capsys)
    assert line.startswith("pages: 5/5 samples, ")
    assert line.endswith(" a second, 0 s left\n")
    assert line.count("\n") == 1


def test_a_log_gets_lines_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    for elsewhere in ("lines", "lines if slow"):
        lines = reported(capsys, elsewhere).splitlines()
        assert [line.split()[1] for line in lines] == ["1/5", "4/5", "5/5"]


def test_a_log_may_get_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(capsys, "nothing") == reported(capsys, "lines if slow") == reported(capsys, wanted=False) == ""


def test_a_log_may_get_the_last_bar(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = reported(capsys, "last bar").splitlines()
    assert line.startswith("pages, samples ")
    assert "5/5" in line


@pytest.mark.parametrize("elsewhere", ["lines", "lines if slow", "last bar", "nothing"])
def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, elsewhere: Elsewhere
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "5/5" in reported(capsys, elsewhere)
    assert reported(capsys, elsewhere, wanted=False) == ""


def test_parts_of_a_step_count(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress_of("pages", 2, unit="samples") as advance:
        for _ in range(10):
            advance(0.1)
        advance(0.25)
        advance(0.75)
    lines = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "0.10/2"
    assert lines[-3:] == ["1/2", "1.25/2", "2/2"]


@pytest.mark.parametrize(
    ("names", "is_one"),
    [
        (("ZMQInteractiveShell",), True),
        (("ZMQInteractiveShell", "Shell"), True),  # as Colab has it
        (("TerminalInteractiveShell", "Shell"), False),
    ],
)
def test_a_notebook_is_known_by_its_shell_and_those_above_it(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], is_one: bool
) -> None:
    kind: type = object
    for name in names:
        kind = type(name, (kind,), {})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=kind))
    assert in_notebook() is is_one
