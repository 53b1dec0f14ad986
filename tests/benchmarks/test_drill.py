"""The drill: what it counts as lost, that it sees a resume that is broken, and a short one with real kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskmatch_scale.checkpoints.index import FileEntry, read_index
from maskmatch_scale.files import sha256
from tests.data.faulty_server import FaultyServer


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Any]:
    from benchmarks.drill.job import left_over
    from benchmarks.drill.setting import Setting
    from benchmarks.small_runs import write_samples

    write_samples(tmp_path / "shards")
    with FaultyServer(tmp_path / "shards") as server:
        yield Setting(tmp_path, 3, 3, server, ("preloaded",), "preloaded", short=True)
    assert not left_over(tmp_path)


class Notes:
    """A job of which there are only notes: one source of three samples, each step takes two."""

    def __init__(self, *notes: dict[str, Any]) -> None:
        self._notes = [{"rank": 0, **note} for note in notes]

    def notes(self, what: str | None = None) -> list[dict[str, Any]]:
        return [note for note in self._notes if what in (None, note["what"])]


def begins(session: int, start: int) -> dict[str, Any]:
    return {"what": "begins", "session": session, "start": start, "world_size": 1, "accumulation": 1}


def steps(session: int, first: int, *samples: str) -> list[dict[str, Any]]:
    """Steps of a session from ``first`` on. A sample is its epoch and its key: `0a`."""
    notes: list[dict[str, Any]] = []
    for step, both in enumerate(samples, first):
        read = [["stream", int(sample[0]), sample[1]] for sample in both.split()]
        notes.append({"what": "read", "session": session, "number": step - 1, "samples": read})
        notes.append({"what": "step", "session": session, "step": step})
    return notes


WHOLE = Notes(begins(0, 0), *steps(0, 1, "0a 0b", "0c 1b", "1a 1c"))


@pytest.mark.parametrize(
    ("notes", "again", "lost", "repeated", "moved"),
    [
        # Killed after step 2, continued from step 1: step 2 counts once.
        ([begins(0, 0), *steps(0, 1, "0a 0b", "0c 1b"), begins(1, 1), *steps(1, 2, "0c 1b", "1a 1c")], 1, 0, 0, 0),
        # What the loader has read ahead, or an end before the first step, counts for nothing.
        ([begins(0, 0), *steps(0, 1, "0a 0b", "0c 1b")[:3], begins(1, 1), begins(2, 1), *steps(2, 2, "0c 1b", "1a 1c")],
         0, 0, 0, 0),
        # The continued run is one step late: two samples come again, and the last two of the other run never do.
        ([begins(0, 0), *steps(0, 1, "0a 0b"), begins(1, 1), *steps(1, 2, "0a 0b", "0c 1b")], 0, 0, 2, 2),
        # It is one step early.
        ([begins(0, 0), *steps(0, 1, "0a 0b"), begins(1, 1), *steps(1, 2, "1a 1c", "2a 2b")], 0, 2, 0, 2),
        # A step that is nowhere.
        ([begins(0, 0), *steps(0, 1, "0a 0b"), begins(1, 2), *steps(1, 3, "1a 1c")], 0, 2, 0, 1),
    ],
)  # fmt: skip
def test_lost_and_repeated_samples(
    notes: list[dict[str, Any]], again: int, lost: int, repeated: int, moved: int
) -> None:
    from benchmarks.drill.evidence import compare_samples, steps_again

    job: Any = Notes(*notes)
    other: Any = WHOLE
    found = compare_samples(job, other, 3, {"stream": 3})
    assert (found.lost, found.repeated, found.moved_steps) == (lost, repeated, moved)
    assert steps_again(job) == again


def test_a_row_is_met_only_if_nothing_was_lost() -> None:
    from benchmarks.drill.report import Row

    right = {"phase": "kill", "case": "all", "faults": 3, "survived": 3, "lost": 0, "repeated": 0}
    assert Row(**right, losses=0.0, weights=0.0).met
    assert Row(**right, losses=1e-8, weights=1e-3, tolerance=1e-6).met
    for wrong in ({"survived": 2}, {"lost": 1}, {"repeated": 1}, {"losses": 1e-9}, {"weights": 1e-30}, {"outlived": 1}):
        assert not Row(**right | {"losses": 0.0, "weights": 0.0} | wrong).met
    assert not Row(**right, losses=1e-5, tolerance=1e-6).met
    assert Row(**right | {"lost": 2}, losses=1e-2, weights=1.0, may_lose=2).met
    assert not Row(**right | {"repeated": 3}, losses=0.0, weights=0.0, may_lose=2).met


def test_the_file_keeps_rows_of_other_phases(tmp_path: Path) -> None:
    from benchmarks.drill.report import Row, earlier_rows, write_report

    rows = [Row("kill", "all", 3, 3, note="two"), Row("disk", "full", 1, 0, weights=float("inf"))]
    write_report(tmp_path / "drill.json", rows, 7)
    assert earlier_rows(tmp_path / "drill.json", ["kill"]) == rows[1:]
    assert json.loads((tmp_path / "drill.json").read_text())["machine"]["seed"] == 7
    assert "| disk | full | 1 | 0 |" in (tmp_path / "drill.md").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_short_drill(setting: Any) -> None:
    from benchmarks.drill import damage, kills

    rows = [*kills.run(setting), *damage.run(setting)]
    assert [row.met for row in rows] == [True] * len(rows), rows
    whole = rows[3]
    assert (whole.faults, whole.weights, whole.losses) == (3, 0, 0)
    assert (whole.lost, whole.repeated, whole.moved_steps) == (0, 0, 0)
    # Of the same job, but its newest checkpoint says that the samples of a step were not taken yet.
    stopped = next(job for job in setting.jobs if job.folder.name == "damage")
    broken = stopped.copy(setting.work / "broken")
    newest = sorted(broken.run.glob("checkpoints/step-*"))[-1]
    _set_back(newest)
    assert set(broken.finish(setting.plain).codes) == {0}
    found = setting.losses(broken, damage.STEPS)
    assert found["repeated"] == 4  # two ranks, a labelled and an unlabelled sample each
    assert found["weights"] > 0
    assert found["losses"] > 0


def _set_back(checkpoint: Path) -> None:
    """Change where the samples continue, by one step, and enter the new checksum."""
    file = checkpoint / "stream.json"
    stream = json.loads(file.read_text())
    for side in ("labelled", "unlabelled"):
        stream[side]["start"] += 1
    file.write_text(json.dumps(stream))
    index = read_index(checkpoint)
    index.files[file.name] = FileEntry(file.stat().st_size, sha256(file))
    index.write(checkpoint)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_phases(tmp_path: Path) -> None:
    from benchmarks.drill.__main__ import PHASES, main

    out = tmp_path / "drill.json"
    assert main(["--out", str(out), "--kills", "4", "--seed", "1", "--short", "--quick"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(dict.fromkeys(row["phase"] for row in rows)) == list(PHASES)
