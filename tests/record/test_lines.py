"""Lines that a full disk refuses wait, and are written in their order when there is room."""

from maskmatch_scale.record.lines import LinesFile


def test_lines_wait_for_room(small_disk):
    disk, said = small_disk(16), []
    file = LinesFile(disk.path / "skipped" / "rank-0.jsonl", said.append)
    file.append([])
    assert not file.path.exists()
    file.append(["0"])
    disk.fill()
    file.append(["x" * 5000, "1"])
    file.append(["2"])
    assert file.path.read_text() == "0\n"
    assert file.waiting == 3
    assert file.fault is not None
    assert file.fault.startswith(f"{file.path}: no room is left")
    disk.free()
    file.append()
    assert (file.path.read_text().split(), file.waiting, file.fault) == (["0", "x" * 5000, "1", "2"], 0, None)
    assert [line.partition(": ")[0] for line in said] == ["warning", str(file.path)]
