"""The figures of a run, and the tables made of them."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from maskmatch_scale.record.summary import as_rows, caveat, headline, in_order, method_labels, summarise, summary_table

FIXMATCH = {"base": "fixmatch", "mask": {"keep": None}}


def printed(runs, width=80):
    text = io.StringIO()
    Console(file=text, width=width).print(summary_table(runs))
    return text.getvalue()


def append(run, *lines):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(lines)


def train_record(step, **figures):
    return json.dumps({"kind": "train", "step": step} | figures) + "\n"


def test_figures_of_a_finished_run(runs_folder):
    run = summarise(runs_folder / "maskmatch")
    assert (run.name, run.method, run.backbone) == ("maskmatch", "MaskMatch", "transformers/segformer-b0")
    assert (run.steps_done, run.steps_asked, run.finished, run.seed) == (40, 40, True, 0)
    assert (run.seconds, run.cpu_s) == (247.4, 480.0)
    assert run.score("val", "ema").miou == 0.5
    assert run.score("val", "ema").iou == {"background": 0.99, "note head": 0.5, "stem & beam": None}
    assert run.score("val", "student").miou == 0.49


def test_speed_is_that_of_the_whole_method(runs_folder):
    """The helper's burn-in of ten steps runs ten times as fast and must not count."""
    assert summarise(runs_folder / "maskmatch").images_per_s == 10


def test_speed_of_a_run_stopped_in_its_burn_in(write_run, tmp_path):
    assert summarise(write_run(tmp_path / "run", method=FIXMATCH, steps=8, closed=False)).images_per_s == 100


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ({"base": "supervised", "mask": {"keep": None}}, "supervised"),
        ({"base": "supervised", "mask": {"keep": 0.5}}, "supervised + mask"),
        ({"base": "fixmatch", "mask": {"keep": None}}, "FixMatch"),
        ({"base": "fixmatch", "mask": {"keep": 0.3, "weight": 0.0}}, "FixMatch"),
        ({"base": "fixmatch", "mask": {"keep": 0.3, "weight": 1.0}}, "MaskMatch"),
        ({"base": "of_a_later_version", "mask": {"keep": 0.3}}, "of_a_later_version + mask"),
    ],
)
def test_method_names(write_run, tmp_path, method, name):
    assert summarise(write_run(tmp_path / "run", method=method)).method == name


def test_labels_tell_runs_of_one_method_apart(write_run, tmp_path):
    mask = {"keep": 0.3, "mode": "drop"}
    methods = [
        {"base": "fixmatch", "mask": mask, "scales": [1.0]},
        {"base": "fixmatch", "mask": mask | {"mode": "zero"}, "scales": [0.5, 1.0]},
        {"base": "fixmatch", "mask": {"keep": None}, "scales": [1.0]},
    ]
    runs = [summarise(write_run(tmp_path / str(place), method=method)) for place, method in enumerate(methods)]
    assert method_labels(runs) == ["MaskMatch (one scale, drop)", "MaskMatch (2 scales, zero)", "FixMatch"]


def test_labels_tell_how_much_of_the_bases_views_is_seen(write_run, tmp_path):
    strong = [{}, {"strong_view": {"keep": 0.5}}]
    runs = [summarise(write_run(tmp_path / str(n), method=FIXMATCH | view)) for n, view in enumerate(strong)]
    assert method_labels(runs) == ["FixMatch (whole views)", "FixMatch (views at keep 0.5)"]
    assert method_labels(runs[1:]) == ["FixMatch"]


def test_labels_tell_how_many_masked_views_there_are(write_run, tmp_path):
    masks = [{"keep": 0.5}, {"keep": 0.5, "complement": True}]
    runs = [summarise(write_run(tmp_path / str(n), method=FIXMATCH | {"mask": mask})) for n, mask in enumerate(masks)]
    assert method_labels(runs) == ["MaskMatch (one mask)", "MaskMatch (two masks)"]


def test_killed_and_resumed_run(write_run, tmp_path):
    """Half a line, on which the resumed run goes on; then steps again: the later records are the run's."""
    run = write_run(tmp_path / "run", method=FIXMATCH, steps=20, closed=False)
    append(run, '{"kind":"train","st', train_record(14), train_record(15, images_per_s=7.0), train_record(16))
    summary = summarise(run)
    assert (summary.steps_done, summary.finished) == (16, False)
    assert summary.score("dev", "ema").step == 10, "the evaluation at step 20 belongs to the weights that were lost"


def test_half_a_line_at_the_end(write_run, tmp_path):
    run = write_run(tmp_path / "run", method=FIXMATCH, steps=20, closed=False)
    append(run, '{"kind":"train","step":21,"loss":0.')
    assert summarise(run).steps_done == 20


def test_figures_that_are_no_numbers(write_run, tmp_path):
    run = write_run(tmp_path / "run", method=FIXMATCH, scores={("val", "ema"): math.nan})
    append(run, "[1]\n", '{"kind":"train"}\n', train_record(41, images_per_s=None), train_record(42, loss=math.inf))
    summary = summarise(run)
    assert summary.steps_done == 42
    assert summary.score("val", "ema").miou is None
    json.dumps(as_rows([summary]), allow_nan=False)


def test_a_newer_evaluation_during_training_wins_over_an_older_file(write_run, tmp_path):
    run = write_run(tmp_path / "run", method=FIXMATCH, scores={("dev", "ema"): 0.9})
    assert summarise(run).score("dev", "ema").miou == 0.9
    append(run, json.dumps({"kind": "eval", "step": 50, "split": "dev", "weights": "ema", "miou": 0.6}) + "\n")
    assert summarise(run).score("dev", "ema").miou == 0.6


def test_run_that_has_not_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: {base: fixmatch}\n")
    summary = summarise(tmp_path)
    assert (summary.steps_done, summary.finished, summary.scores, summary.images_per_s) == (0, False, (), None)
    assert "FixMatch" in printed([summary])


@pytest.mark.parametrize("folder", ["", "absent"])
def test_folder_that_is_no_run(tmp_path, folder):
    with pytest.raises(ValueError, match="not a run directory") as caught:
        summarise(tmp_path / folder)
    assert str(tmp_path / folder) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [("recipe.yaml", "a: [1"), ("recipe.yaml", "- 1"), ("summary.json", "{"), ("evaluation/val-ema.json", "[]")],
)
def test_broken_file_is_named(runs_folder, file, text):
    path = runs_folder / "fixmatch" / file
    path.write_text(text)
    with pytest.raises(ValueError, match="not ") as caught:
        summarise(runs_folder / "fixmatch")
    assert str(path) in str(caught.value)


def test_order_is_by_backbone_then_from_plain_to_masked(write_run, runs_folder):
    write_run(runs_folder / "vit", method=FIXMATCH, backbone="timm/vit_tiny_patch16_224")
    runs = [summarise(runs_folder / name) for name in ("maskmatch", "vit", "fixmatch", "supervised")]
    assert [run.name for run in in_order(runs)] == ["supervised", "fixmatch", "maskmatch", "vit"]


def test_headline_has_held_out_figures_and_no_empty_column(runs_folder, write_run, tmp_path):
    table = headline([summarise(runs_folder / name) for name in ("supervised", "maskmatch")])
    assert table.columns == (
        *("run", "method", "seed", "steps"),
        *("val mIoU", "val mIoU (student)", "val pixel accuracy", "images/s", "time"),
    )
    assert table.rows[1] == ("maskmatch", "MaskMatch", "0", "40/40", "0.500", "0.490", "0.900", "10.0", "4m07s")
    young = headline([summarise(write_run(tmp_path / "young", method=FIXMATCH, steps=12, closed=False))])
    assert young.columns == ("run", "method", "seed", "steps", "dev mIoU", "dev mIoU (student)",
                             "dev pixel accuracy", "images/s")  # fmt: skip


def test_figures_of_a_gpu(write_run, tmp_path):
    run = write_run(tmp_path / "gpu", method=FIXMATCH, steps=12, steps_asked=15, burn_in=0)
    append(run, *(train_record(step, tokens_per_s=5e4, mfu=0.41, gpu_peak_gb=30.0) for step in (13, 14, 15)))
    closing = json.loads((run / "summary.json").read_text()) | {"gpu_peak_gb": 31.26}
    (run / "summary.json").write_text(json.dumps(closing))
    summary = summarise(run)
    assert (summary.tokens_per_s, summary.mfu, summary.gpu_peak_gb) == (5e4, 0.41, 31.26)
    table = headline([summary])
    assert table.rows[0][table.columns.index("MFU")] == "41%"
    assert table.rows[0][table.columns.index("peak GB of a GPU")] == "31.3"
    assert as_rows([summary])[0]["mfu"] == 0.41


def test_terminal_table_fits_and_loses_no_figure(runs_folder, write_run):
    scores = {("val", "ema"): 0.42, ("val_font", "ema"): 0.31}
    write_run(runs_folder / "[bold]vit", method=FIXMATCH, backbone="timm/vit_tiny_patch16_224", scores=scores)
    text = printed([summarise(path) for path in sorted(runs_folder.iterdir())])
    assert max(map(len, text.splitlines())) <= 80
    for shown in ("0.470", "0.420", "0.310", "val_font", "4m07s", "40/40", "MaskMatch", "[bold]vit", "segformer-b0"):
        assert shown in text
    assert "…" not in text
    assert "One seed" in text


def test_caveat_only_where_methods_are_compared_over_one_seed(write_run, tmp_path):
    def run(seed, base):
        method = {"base": base, "mask": {"keep": None}}
        return summarise(write_run(tmp_path / f"{base}-{seed}", method=method, seed=seed))

    first, again, other, other_again = (
        run(0, "fixmatch"),
        run(1, "fixmatch"),
        run(0, "supervised"),
        run(1, "supervised"),
    )
    assert caveat([first]) is None
    assert "One seed" in caveat([first, other])
    assert caveat([first, again, other, other_again]) is None
    assert method_labels([first, again, other]) == ["FixMatch (seed 0)", "FixMatch (seed 1)", "supervised"]


def test_rows_for_programs(runs_folder):
    rows = as_rows([summarise(Path(runs_folder / name)) for name in ("fixmatch", "supervised")])
    assert [row["run"] for row in rows] == ["supervised", "fixmatch"]
    assert {"split": "val", "miou": 0.51, "cpu_s": 480.0, "seed": 0, "method": "FixMatch"}.items() <= rows[1].items()
    assert [(score["split"], score["weights"]) for score in rows[1]["scores"]] == [
        ("val", "ema"),
        ("val", "student"),
        ("dev", "ema"),
        ("dev", "student"),
    ]
    assert json.loads(json.dumps(rows)) == rows


def test_fetched_gigabytes_of_a_run_that_goes_on_are_those_of_its_records(write_run, tmp_path):
    run = write_run(tmp_path / "run", method={"base": "supervised", "mask": {"keep": None}}, closed=False)
    with (run / "metrics.jsonl").open("a") as lines:
        for step, mb in ((41, 1500), (42, 500)):
            lines.write(json.dumps({"step": step, "kind": "train", "fetched": {"shards": 3, "mb": mb}}) + "\n")
    assert summarise(run).fetched_gb == 2.0
    (run / "summary.json").write_text(json.dumps({"fetched": {"bytes": 7_000_000_000}}))  # of all ranks
    assert summarise(run).fetched_gb == 7.0
