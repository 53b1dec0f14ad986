"""The grid of ablations: arms, what a cell measures, kill and restart, and what is refused."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import bases
from maskmatch_scale.train import train
from tests.conftest import ShapesSource

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.backbone_options={embed_dim: 24, depth: 2, num_heads: 2, patch_size: 16, img_size: 64}",
    *("data.crop_px=64", "method.threshold=0.3", "engine.micro_batch=2"),
]
"""Makes a model that trains in milliseconds of the task of scores."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with the streams of the scores."""
    root = tmp_path_factory.mktemp("pages")
    source = ShapesSource({"labelled": 6, "unlabelled": 12, "dev": 3, "val": 3, "val_font": 2})
    write_shards(source, root, workers=1, samples_per_shard=4, progress=False)
    return root


@pytest.fixture
def command(pages: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a small grid."""

    def arguments(*more: str, steps: int = 4, settings: list[str] = TINY) -> list[str]:
        where = ["--data", str(pages), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
        return ["--task", "scores_vit", *where, "--steps", str(steps), *more, "--set", *settings]

    return arguments


@pytest.fixture
def planned(command: Callable[..., list[str]]) -> Callable[..., Any]:
    """The cells of a grid, with their jobs written."""
    from benchmarks.ablation.__main__ import parse, plan

    return lambda *more, **keys: plan(parse(command(*more, **keys)))


def test_every_arm_of_todays_keys_is_a_recipe(pages: Path, tmp_path: Path) -> None:
    from benchmarks.ablation.arms import ARMS
    from benchmarks.ablation.tasks import Setting

    setting = Setting("scores_vit", pages, None, 2, 100, "cpu")
    recipes = {name: setting.recipe(arm, 3, 100, tmp_path) for name, arm in ARMS.items() if arm.group != "cheap step"}
    assert all(recipe.data.split_seed == recipe.run.seed == 3 for recipe in recipes.values())
    assert recipes["maskmatch"].method.mask.keep == 0.7  # the task's own
    assert recipes["mask_keep_0.1"].method.mask.keep == 0.1
    assert recipes["fixmatch"].method.mask.keep is None
    assert recipes["maskmatch_ensemble"].method.scales == (0.5, 1.0, 1.5)
    assert (recipes["masked_only"].method.base, recipes["masked_only"].method.mask.keep) == ("supervised", 0.7)
    assert recipes["maskmatch_margin_84"].method.teacher_margin_px == 84
    assert recipes["strong_keep_0.3_margin_32"].method.base_keep == 0.3
    assert recipes["all_labels"].data.labelled_count is None
    # Each changes something: no two arms but aliases of a task's own values are the same recipe.
    assert len({(recipe.to_yaml(), ARMS[name].variant) for name, recipe in recipes.items()}) > 0.8 * len(recipes)


def test_a_new_base_has_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.ablation import arms

    monkeypatch.setitem(bases.BASES, "newmatch", bases.BaseInfo("NewMatch", "nowhere:NewMatch"))
    names = [name for name, _ in arms._of_bases()]
    assert {"newmatch", "newmatch_mask", "newmatch_ensemble", "newmatch_mask_ensemble"} <= set(names)


def test_the_task_of_street_scenes(pages: Path, tmp_path: Path) -> None:
    from benchmarks.ablation.arms import ARMS
    from benchmarks.ablation.tasks import Setting

    setting = Setting("camvid", pages, tmp_path / "vit.pt", 8, 400, "cuda", ("method.threshold=0.8",))
    recipe = setting.recipe(ARMS["maskmatch"], 2, 1000, tmp_path)
    assert recipe.burn_in_steps == 100  # a quarter of S = 400 steps, in a longer run too
    assert (recipe.method.threshold, recipe.method.mask.keep, recipe.optim.schedule) == (0.8, 0.3, "constant")
    assert (recipe.engine.precision, recipe.engine.threads) == ("autocast-bf16", 1)
    assert [(source.stream, source.name) for source in recipe.data.unlabelled] == [("labelled", "unlabelled")]
    assert setting.recipe(ARMS["maskmatch_threshold_0.95"], 2, 400, tmp_path).method.threshold == 0.95


def write_costs(path: Path, **arms: tuple[float, float]) -> Path:
    """A file as `benchmarks.ablation.cost` writes it, of CPU-seconds and GMACs by arm."""
    rows = [{"arm": arm, "cpu_s": cpu_s, "gmacs": gmacs} for arm, (cpu_s, gmacs) in arms.items()]
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_cost_of_a_step_is_measured(pages: Path, tmp_path: Path) -> None:
    from benchmarks.ablation.cost import main
    from benchmarks.ablation.equal_cost import read_costs

    out = tmp_path / "cost.json"
    options = ["--task", "scores_vit", "--data", str(pages), "--arms", "fixmatch", "maskmatch", "--repeats", "2"]
    assert main([*options, "--out", str(out), "--set", *TINY]) == 0
    gmacs = {row["arm"]: row["gmacs"] for row in json.loads(out.read_text())["rows"]}
    assert gmacs["supervised"] < gmacs["fixmatch"] < gmacs["maskmatch"]
    assert read_costs(out).gmacs == gmacs
    assert all(seconds > 0 for seconds in read_costs(out).cpu_s.values())


def losses(run: Path) -> list[Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[record[key] for key in ("step", "loss", "grad_norm")] for record in records if record["kind"] == "train"]


def test_evaluations_change_no_loss_and_are_the_trainers(planned: Callable[..., Any], tmp_path: Path) -> None:
    """Also: a cell that goes on from a checkpoint finds the same, and evaluates what a stop has broken off."""
    from benchmarks.ablation.cell import run_cell
    from benchmarks.ablation.watch import Watch
    from maskmatch_scale.errors import TrainingStopped

    (cell,) = planned("--arms", "maskmatch", "--draws", "1", "--evaluate-every", "1", "--checkpoint-every", "2")
    plain = cell.job.parsed()
    plain = plain.model_copy(update={"run": plain.run.model_copy(update={"dir": str(tmp_path / "plain")})})
    train(plain)
    run_cell(cell.folder / "job.json")
    assert losses(cell.folder / "run") == losses(tmp_path / "plain")
    result = json.loads((cell.folder / "result.json").read_text())
    assert [point["step"] for point in result["curve"]] == [1, 2, 3, 4]
    at = result["results"]["equal steps"]
    records = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    trainers = next(record for record in records if record["kind"] == "eval" and record["weights"] == "ema")
    assert at["splits"]["dev"]["miou"] == trainers["miou"]
    assert at["splits"].keys() == {"dev", "val", "val_font"}
    assert at["pseudo_labels"]["images"] == 4  # of 6, 2 are drawn
    assert 0 < at["pseudo_labels"]["coverage"] <= 1
    assert at["wall_s"] > 0 < result["gmacs"]

    def stops_after_two(run: Any) -> Any:
        watch = Watch(run, cell.job, tmp_path / "progress")
        watch.after_step = lambda done, figures: run.ask_to_stop("enough", 75) if done == 2 else None
        return watch

    job = cell.folder / "job.json"
    (cell.folder / "result.json").unlink()
    with pytest.raises(TrainingStopped, match="enough"):
        train(cell.job.parsed(), callbacks=[stops_after_two])
    run_cell(job)
    again = json.loads((cell.folder / "result.json").read_text())
    assert [[p["step"], p["miou"]] for p in again["curve"]] == [[p["step"], p["miou"]] for p in result["curve"]]
    assert again["results"]["equal steps"]["splits"] == at["splits"]
    assert not (cell.folder / "run" / "checkpoints").exists()


def test_pseudo_labels_are_checked_with_the_margin_that_the_teacher_sees(pages: Path, tmp_path: Path) -> None:
    from benchmarks.ablation.arms import ARMS
    from benchmarks.ablation.cost import build
    from benchmarks.ablation.measure import check_pseudo_labels
    from benchmarks.ablation.tasks import Setting

    class ByColour:
        """A teacher that looks at each pixel alone, so that nothing depends on the margin but what is cut off."""

        seen: list[tuple[int, ...]] = []  # noqa: RUF012 - of the last check

        gathered = staticmethod(contextlib.nullcontext)

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            self.seen.append(tuple(images.shape))
            return 5 * images

    found = {}
    for name in ("fixmatch", "fixmatch_margin_32"):
        run, _ = build(Setting("scores_vit", pages, None, 2, 4, "cpu", tuple(TINY)), ARMS[name], 1, tmp_path / name)
        run.teacher, ByColour.seen = ByColour(), []  # type: ignore[assignment]
        found[name] = check_pseudo_labels(run, 4)
        side = 128 if "margin" in name else 64
        assert set(ByColour.seen) == {(1, 3, side, side)}
    assert found["fixmatch"] == found["fixmatch_margin_32"]
    assert 0 < found["fixmatch"]["accuracy"] < 1


def test_a_grid_that_is_killed_goes_on(
    command: Callable[..., list[str]], pages: Path, tmp_path: Path, capfd: Any
) -> None:
    """Two arms, two draws, at equal cost; the grid is killed while its second cell runs."""
    from benchmarks.ablation.__main__ import main, parse, plan
    from benchmarks.ablation.cost import main as cost
    from benchmarks.ablation.report import main as report

    costs = tmp_path / "cost.json"
    measured = ["--task", "scores_vit", "--data", str(pages), "--arms", "maskmatch", "--repeats", "1"]
    assert cost([*measured, "--out", str(costs), "--set", *TINY]) == 0
    gmacs = {row["arm"]: row["gmacs"] for row in json.loads(costs.read_text())["rows"]}
    write_costs(costs, supervised=(1.0, gmacs["supervised"]), maskmatch=(3.0, gmacs["maskmatch"]))
    grid = ["--arms", "supervised", "maskmatch", "--draws", "0", "1", "--cost", str(costs)]
    arguments = command(*grid, "--evaluate-every", "10", steps=30)
    killed = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))  # which has all imports
    killed.start()
    first, second = (tmp_path / "work" / arm / "draw-0" for arm in ("supervised", "maskmatch"))
    wait_for(lambda: (second / "progress").is_file())
    killed.kill()
    killed.join()
    wait_for(lambda: not running(second / "job.json"))  # its cell has ended too
    finished = (first / "result.json").stat().st_mtime_ns
    assert main(command(*grid, "--evaluate-every", "10", "--jobs", "2", steps=30)) == 0
    assert (first / "result.json").stat().st_mtime_ns == finished
    assert "4/4 cells done" in capfd.readouterr().err
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["arm"], row["draw"]) for row in found["rows"]] == [
        (arm, draw) for arm in ("supervised", "maskmatch") for draw in (0, 1)
    ]
    # A third of S steps is burn-in: 10 steps of 1 and 20 of 3.
    assert [row["marks"]["equal cost"] for row in found["rows"]] == [70, 70, 30, 30]
    assert {row["results"]["equal cost"]["step"] for row in found["rows"]} == {70, 30}
    steps = {row["draw"]: row["results"]["equal steps"]["splits"]["val"]["miou"] for row in found["rows"][:2]}
    others = {row["draw"]: row["results"]["equal steps"]["splits"]["val"]["miou"] for row in found["rows"][2:]}
    difference = next(
        row
        for row in found["differences"]
        if (row["arm"], row["minus"], row["at"], row["split"]) == ("maskmatch", "supervised", "equal steps", "val")
    )
    assert difference["difference"] == pytest.approx(sum(others[draw] - steps[draw] for draw in (0, 1)) / 2)
    assert difference["draws"] == 2
    assert found["machine"]["sources_sha256"]
    assert "## At equal cost" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert report([str(tmp_path / "work"), "--out", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "out.json").read_text()
    page = (tmp_path / "out.md").read_text()
    assert all(len(line) <= 120 for line in page.splitlines() if not line.startswith("|"))
    assert "as 30 steps of MaskMatch do, about 70 CPU-seconds" in page
    assert "uncommitted" not in page
    # The command on the page plans the very same cells: recipes, marks, evaluation.
    written = page.split("```")[1].replace("\\\n", " ").replace("SHARDS", arguments[3])
    written = written.replace("COSTS.json", str(costs)).replace("FOLDER", str(tmp_path / "work"))
    again = shlex.split(written)[3:]
    assert len(plan(parse(again))) == 4  # else `check_same` had refused
    with pytest.raises(UserError, match=r"another recipe: recipe\.method\.threshold"):
        plan(parse([word for word in again if not word.startswith("method.threshold")]))


def test_draws_start_from_trained_runs(
    command: Callable[..., list[str]], planned: Callable[..., Any], tmp_path: Path, pages: Path
) -> None:
    from benchmarks.ablation.__main__ import parse, plan
    from benchmarks.ablation.cell import run_cell
    from benchmarks.ablation.report import main as report

    [trained] = planned("--arms", "supervised", "--draws", "1", "--keep-checkpoints", "--evaluate-every", "4")
    run_cell(trained.folder / "job.json")
    start = tmp_path / "start"
    (tmp_path / "work").rename(start)
    grid = ["--arms", "fixmatch", "--draws", "1", "--start", str(start / "supervised"), "--evaluate-every", "4"]
    [cell] = planned(*grid)
    assert cell.job.start == "supervised, 4 steps"
    assert cell.job.recipe["model"]["pretrained"] == str(start / "supervised" / "draw-1" / "run")
    assert cell.job.recipe["method"]["burn_in"] == 0.0
    run_cell(cell.folder / "job.json")
    found = json.loads((cell.folder / "result.json").read_text())
    assert found["burn_in_steps"] == 0
    assert not (cell.folder / "run" / "checkpoints").exists()
    out = tmp_path / "out.json"
    assert report([str(tmp_path / "work"), "--out", str(out)]) == 0
    page = out.with_suffix(".md").read_text()
    assert "**Start**: each draw starts from the teacher of a trained run with the same labels (supervised, 4" in page
    set_by_hand = {row["key"] for row in json.loads(out.read_text())["settings"]}
    assert "method.burn_in" not in set_by_hand
    written = page.split("```")[1].replace("\\\n", " ").replace("SHARDS", str(pages)).replace("START", grid[5])
    again = plan(parse(shlex.split(written.replace("FOLDER", str(tmp_path / "work")))[3:]))
    assert [one.job.facts() for one in again] == [cell.job.facts()]
    with pytest.raises(UserError, match=r"--start: .*draw-0.*--keep-checkpoints"):
        planned("--arms", "fixmatch", "--draws", "0", *grid[4:])
    with pytest.raises(UserError, match=r"2 labelled images of draw 1, and this grid 3 of draw 1"):
        planned(*grid, "--labelled", "3")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def running(job: Path) -> bool:
    """Whether a process has this job."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(job).encode() in line.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_cell_that_fails_is_named(command: Callable[..., list[str]], capfd: Any) -> None:
    from benchmarks.ablation.__main__ import main

    assert main(command("--arms", "supervised", "--draws", "0", "--labelled", "99")) == 1
    assert "failed: supervised, draw 0: exit code 2: error: data.labelled_count=99" in capfd.readouterr().err


def test_what_the_time_does_not_allow_is_left_out(
    command: Callable[..., list[str]], tmp_path: Path, capfd: Any
) -> None:
    from benchmarks.ablation.__main__ import main

    assert main(command("--arms", "supervised", "fixmatch", "--draws", "0", "--minutes", "0.01")) == 0
    said = capfd.readouterr().err
    assert "left out: supervised, draw 0" in said
    assert "left out: fixmatch, draw 0" in said
    assert not running(tmp_path / "work")


def test_mistakes_are_one_line(
    command: Callable[..., list[str]], planned: Callable[..., Any], tmp_path: Path, capfd: Any
) -> None:
    from benchmarks.ablation.__main__ import main
    from benchmarks.ablation.report import main as report

    def refused(*more: str, **keys: Any) -> str:
        assert main(command("--draws", "0", *more, **keys)) == 2
        said: str = capfd.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "there is no arm 'maskmach'; did you mean maskmatch" in refused("--arms", "maskmach")
    assert "method.treshold" in refused("--arms", "fixmatch", settings=["method.treshold=0.5"])
    assert "run.seed=3: this key is not for --set" in refused("--arms", "fixmatch", settings=["run.seed=3"])
    assert "--weights: task scores_vit starts from scratch" in refused("--arms", "fixmatch", "--weights", "x.pt")
    assert "nowhere" in refused("--arms", "fixmatch", "--data", str(tmp_path / "nowhere"))
    assert "there is no nowhere" in refused("--arms", "fixmatch", "--splits", "val", "nowhere")
    assert "--reference: there is no arm 'fixmach'" in refused("--arms", "fixmatch", "--reference", "fixmach")
    assert "no val_seen" in refused("--arms", "fixmatch", "--task", "camvid", "--weights", "x.pt")
    assert not (tmp_path / "work").exists()

    (cell,) = planned("--arms", "fixmatch", "--draws", "0")
    job = cell.folder / "job.json"
    written = job.read_text()
    assert "another recipe: recipe.run.steps 4, now 5" in refused("--arms", "fixmatch", steps=5)
    settings = [*TINY, "method.burn_in=0"]
    assert "recipe.method.burn_in" in refused("--arms", "supervised", "fixmatch", settings=settings)
    assert job.read_text() == written
    assert not (tmp_path / "work" / "supervised").exists()
    content = json.loads(written)
    job.write_text(json.dumps({**content, "identity": {**content["identity"], "sources": "0123"}}))
    assert "made with other sources (0123, now" in refused("--arms", "fixmatch")

    assert report([str(tmp_path / "work"), "--out", str(tmp_path / "x.json")]) == 2
    assert "no finished cell there" in capfd.readouterr().err
    for work, sources in (("one", "a"), ("two", "b")):
        folder = tmp_path / work / work / "draw-0"
        folder.mkdir(parents=True)
        result = {**content, "arm": work, "identity": {"sources": sources}, "burn_in_steps": 1}
        (folder / "result.json").write_text(json.dumps(result))
    assert report([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "x.json")]) == 2
    assert "made with other sources (b)" in capfd.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("said", "settings", "changes"),
    [
        (r"other optim\.lr \(0\.125\) than", ["optim.lr=0.125"], {}),
        (r"other method\.burn_in \(0\.5\) than", ["method.burn_in=0.5"], {}),
        (r"other splits \(\['val'\]\) than", [], {"splits": ["val"]}),
        ("other measuring code", [], {"identity": {"sources": "a", "measuring code": "c"}}),
        ("costs 6 CPU-seconds at equal cost, and .* 22", [], {"marks": {"equal steps": 4, "equal cost": 4}}),
        ("other CPU-seconds of a step of the burn-in", [], {"cost": None}),
    ],
)
def test_cells_that_do_not_belong_together(
    planned: Callable[..., Any], said: str, settings: list[str], changes: dict[str, Any]
) -> None:
    """Two arms of one work folder, planned by two commands; what differs by arm or draw is no matter."""
    from benchmarks.ablation.gather import read_cells

    first = planned("--arms", "fixmatch_threshold_0.95", "--draws", "0", settings=[*TINY, "method.burn_in=0.25"])[0]
    second = planned("--arms", "supervised", "--draws", "1", settings=[*TINY, "method.burn_in=0.25", *settings])[0]
    same = {
        "identity": {"sources": "a", "measuring code": "b"},
        "marks": {"equal steps": 4, "equal cost": 16},
        "cost": {"cpu_s": 1.5, "burn_in_cpu_s": 1.5},
    }

    def write(cell: Any, **more: Any) -> None:
        content = json.loads((cell.folder / "job.json").read_text())
        result = {**content, **same, "burn_in_steps": cell.job.parsed().burn_in_steps, **more}
        (cell.folder / "result.json").write_text(json.dumps(result))

    write(first, marks={"equal steps": 4, "equal cost": 8}, cost={"cpu_s": 3.0, "burn_in_cpu_s": 1.5})
    if not settings:
        write(second)
        assert len(read_cells([first.folder, second.folder])) == 2
    write(second, **changes)
    with pytest.raises(UserError, match=said):
        read_cells([first.folder, second.folder])


def test_a_cell_of_code_that_was_edited_meanwhile_does_not_run(planned: Callable[..., Any]) -> None:
    from benchmarks.ablation.cell import run_cell

    (cell,) = planned("--arms", "fixmatch", "--draws", "0")
    job = cell.folder / "job.json"
    content = json.loads(job.read_text())
    for name in ("sources", "measuring code"):
        job.write_text(json.dumps({**content, "identity": {**content["identity"], name: "0123"}}))
        with pytest.raises(UserError, match=rf"the {name} changed since this grid began \(0123, now"):
            run_cell(job)
    assert not (cell.folder / "run").exists()


def test_a_cost_of_another_step_is_refused(planned: Callable[..., Any]) -> None:
    from benchmarks.ablation.cell import run_cell

    (cell,) = planned("--arms", "fixmatch", "--draws", "0")
    job = cell.folder / "job.json"
    cost = {"cpu_s": 1.0, "burn_in_cpu_s": 1.0, "gmacs": 5.0}
    job.write_text(json.dumps({**json.loads(job.read_text()), "cost": cost}))
    with pytest.raises(
        UserError, match=r"a step of 5 GMACs, and this run's has 0\.\d+; measure it with the same --set"
    ):
        run_cell(job)
    assert not (cell.folder / "result.json").exists()


def test_progress_says_what_is_left(tmp_path: Path) -> None:
    from benchmarks.ablation.pool import Cell, progress_line

    cells = []
    for arm, status, weight, shown in (
        ("one", "done", 1.0, None),
        ("two", "running", 2.0, "5 10"),
        ("three", "waiting", 2.0, None),
    ):
        folder = tmp_path / arm
        folder.mkdir()
        if shown:
            (folder / "progress").write_text(shown)
        cells.append(Cell(SimpleNamespace(arm=arm, draw=0), folder, weight, status))  # type: ignore[arg-type]
    line = progress_line(cells, 100.0)  # 2 of 5 are done in 100 s
    assert line == "01:40: 1/3 cells done; running: two, draw 0 50%; about 02:30 left"
