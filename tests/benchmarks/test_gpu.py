"""The benchmarks on a GPU: their command lines are right, each ends in its time, and a list says what was left out."""

import json
import time
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def gpu(monkeypatch):
    """Modules of the package, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return lambda name: import_module(f"benchmarks.gpu.{name}")


def test_every_case_is_a_command_that_its_benchmark_takes(gpu, tmp_path):
    cases = gpu("cases").GPU_CASES
    assert len({case.name for case in cases}) == len(cases)
    sizes = {(case.benchmark, case.backbone.rpartition("/")[2], case.image_size) for case in cases}
    for backbone in ("vit_base_patch16_224", "vit_large_patch16_224", "segformer-b2", "segformer-b5"):
        for benchmark, side in (("masked_vs_full", 512), ("masked_vs_full", 1024), ("train_step", 512)):
            assert (benchmark, backbone, side) in sizes
        assert ("engine_overhead", backbone, 512) in sizes
    for case in cases:
        command = import_module(f"benchmarks.{case.benchmark}.__main__")
        parsed = command.parse(["--out", str(tmp_path / "x.json"), *case.options("cuda")])
        if case.benchmark == "masked_vs_full":
            parsed.device = "cpu"
            (prepared,), *_ = command.prepare(parsed)
            assert (prepared.image_size, prepared.batch) == (case.image_size, case.images)


def test_all_cases_of_an_h100_are_planned_within_the_time(gpu):
    """16 minutes, and what is planned first fits in any case."""
    cases = gpu("cases").GPU_CASES
    on_h100 = [case.estimate_s(989.0) for case in cases]
    assert all(estimate > 20 for estimate in on_h100)
    assert sum(on_h100[:12]) < 16 * 60
    # More work or a slower GPU takes longer.
    assert all(case.estimate_s(312.0) >= estimate for case, estimate in zip(cases, on_h100, strict=True))


def test_a_case_ends_when_its_time_is_over(gpu, tmp_path):
    case = gpu("cases").TOY_CASES[0]
    began = time.monotonic()
    outcome = gpu("measure").run_case(case, "cpu", tmp_path / "x.json", 0.3, lambda spent: None)
    assert outcome.status == "cut off"
    assert "nothing was written" in outcome.reason
    assert time.monotonic() - began >= 0.3


def test_without_a_gpu_it_says_so(gpu, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = gpu("__main__").main
    assert main(["--out", str(tmp_path / "results")]) == 2
    assert "there is no GPU here; --device cpu" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "results"), "--device", "cpu", "--only", "nothing"]) == 2
    assert not (tmp_path / "results").exists()


def test_what_there_is_no_time_for_is_listed(gpu, tmp_path, monkeypatch):
    command = gpu("__main__")
    outcomes = iter([gpu("measure").Outcome("written", 2.0)])

    def run_case(*arguments):
        time.sleep(0.7)
        return next(outcomes)

    monkeypatch.setattr(command, "run_case", run_case)
    monkeypatch.setattr(gpu("cases").Case, "estimate_s", lambda case, peak_tflops: 0.1)
    assert command.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.01"]) == 0
    result = json.loads((tmp_path / "cases.json").read_text())
    assert [row["status"] for row in result["rows"]] == ["written", "left out", "left out"]
    assert result["machine"]["commit"]
    assert "no time was left" in (tmp_path / "cases.md").read_text()


def test_a_later_call_goes_on_where_the_time_of_an_earlier_one_was_over(gpu, tmp_path, monkeypatch):
    command, ran = gpu("__main__"), []

    def run_case(case, device, out, *more):
        ran.append(case.name)
        if len(ran) == 2:
            return gpu("measure").Outcome("cut off", 2.0, "after 2 s")
        out.write_text("{}")
        return gpu("measure").Outcome("written", 2.0)

    monkeypatch.setattr(command, "run_case", run_case)
    call = ["--out", str(tmp_path), "--device", "cpu"]
    assert command.main(call) == 0
    names = [case.name for case in gpu("cases").TOY_CASES]
    assert ran == names
    first = json.loads((tmp_path / "cases.json").read_text())["rows"]
    assert command.main(call) == 0
    assert ran == [*names, names[1]]
    rows = {row["case"]: row for row in json.loads((tmp_path / "cases.json").read_text())["rows"]}
    assert {row["status"] for row in rows.values()} == {"written"}
    assert rows[names[0]] == first[0]
    assert command.main([*call, "--only", names[0]]) == 0  # named: again
    assert ran[-1] == names[0]


@pytest.mark.slow  # every benchmark imports its libraries anew, and one starts a launcher
@pytest.mark.distributed
def test_the_same_commands_on_a_cpu(gpu, tmp_path):
    assert gpu("__main__").main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "15"]) == 0
    result = json.loads((tmp_path / "cases.json").read_text())
    assert [row["status"] for row in result["rows"]] == ["written"] * 3
    for row in result["rows"]:
        written = json.loads((tmp_path / f"{row['case']}.json").read_text())
        assert written["rows"]
        assert all(entry["mfu"] is None for entry in written["rows"])  # there is no peak of a CPU
        assert {"torch", "commit", "date"} <= written["machine"].keys()
        assert (tmp_path / f"{row['case']}.md").is_file()
