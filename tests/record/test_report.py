"""The report as a browser parses it."""

import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.record import pictures
from maskmatch_scale.record.curves import MOST_POINTS, Curve, chart, running_mean, thinned
from maskmatch_scale.record.report import write_report

VOID = {"meta", "img", "br", "input"}
FIXMATCH = {"base": "fixmatch", "mask": {"keep": None}}


class Page(HTMLParser):
    """A parsed page: every element with its attributes, the text, and the cells of each table."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.tables, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == [], "unbalanced tags"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append((dict(attributes), []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += text
        if any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][1][-1][-1] += text

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, **wanted):
        return next(rows for attributes, rows in self.tables if wanted.items() <= attributes.items())

    def captions(self):
        return [attributes["alt"] for attributes in self.all("img") if attributes["alt"]]


def report(*runs, **options):
    return Page(write_report(runs, **options).read_text(encoding="utf-8"))


def named(folder, *names):
    return [folder / name for name in names]


@pytest.fixture
def page(runs_folder):
    return report(*named(runs_folder, "supervised", "fixmatch", "maskmatch"))


def test_default_places(runs_folder, write_run):
    inner = write_run(runs_folder / "more" / "inner", method=FIXMATCH)
    assert write_report([inner]) == inner / "report.html"
    assert write_report(named(runs_folder, "fixmatch", "maskmatch")) == runs_folder / "report.html"
    assert write_report([runs_folder / "fixmatch", inner]) == runs_folder / "report.html"
    assert write_report([inner], runs_folder / "new" / "page.html") == runs_folder / "new" / "page.html"


def test_nothing_is_left_beside_the_page(runs_folder, monkeypatch):
    before = write_report([runs_folder / "fixmatch"]).read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report([runs_folder / "fixmatch"])
    assert (runs_folder / "fixmatch" / "report.html").read_text() == before
    assert not list((runs_folder / "fixmatch").glob(".*"))


def test_same_runs_give_the_same_page(runs_folder):
    first = write_report([runs_folder / "maskmatch"], runs_folder / "a.html").read_bytes()
    assert write_report([runs_folder / "maskmatch"], runs_folder / "b.html").read_bytes() == first


def test_page_is_self_contained(page):
    links = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    links = [link for link in links if not link.startswith(("data:", "#"))]
    assert links == []
    assert not page.all("link")
    assert len(page.all("script")) == 1


def test_headline(page, runs_folder):
    rows = page.table(id="headline")
    assert rows[0][:5] == ["run", "method", "seed", "steps", "val mIoU"]
    assert rows[1] == ["transformers/segformer-b0"]
    assert [row[:5] for row in rows[2:]] == [
        ["supervised", "supervised", "0", "40/40", "0.470"],
        ["fixmatch", "FixMatch", "0", "40/40", "0.510"],
        ["maskmatch", "MaskMatch", "0", "40/40", "0.500"],
    ]
    assert "One seed for each method" in page.text
    assert f"3 runs in {runs_folder.name}" in page.text
    assert "What is missing" not in page.text


def test_differing_settings_without_the_folder(page):
    rows = page.table(id="differing")
    assert rows == [
        ["key", "supervised", "fixmatch", "maskmatch"],
        ["method.scales", "[1.0]", "[1.0]", "[0.5, 1.0, 1.5]"],
        ["method.base", "supervised", "fixmatch", "fixmatch"],
        ["method.mask.keep", "null", "null", "0.3"],
    ]


def test_setting_that_only_one_run_has(runs_folder):
    recipe = runs_folder / "fixmatch" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "old_section:\n  gone: true\n")
    rows = report(*named(runs_folder, "supervised", "fixmatch")).table(id="differing")
    assert ["old_section.gone", "", "true"] in rows


def test_charts_have_titles_ends_and_own_ids(page):
    """L_m is recorded by no run here, so it has no chart."""
    charts = [attributes for attributes in page.all("svg") if attributes["role"] == "img"]
    assert len(charts) == 5
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in charts:
        assert set(attributes["aria-labelledby"].split()) <= set(ids)
    assert "Masked loss" not in page.text
    assert "MaskMatch, ema ends at 0.4; MaskMatch, student ends at 0.2" in page.text


def test_references_inside_charts_resolve(page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    used = [value for _, attributes in page.elements for value in attributes.values() if value]
    used = {target for value in used for target in re.findall(r"url\(#(.+?)\)|^#(.+)", value)}
    assert used
    assert {first or second for first, second in used} <= ids


def test_classes(page):
    rows = page.table(**{"class": "classes"})
    assert rows[0][1:] == ["supervisedsegformer-b0", "FixMatchsegformer-b0", "MaskMatchsegformer-b0"]
    assert rows[1:] == [
        ["background", "0.990", "0.990", "0.990"],
        ["note head", "0.470", "0.510", "0.500"],
        ["stem & beam", "–", "–", "–"],
        ["mIoU", "0.470", "0.510", "0.500"],
    ]


def test_pictures_side_by_side(page):
    first = [alt for alt in page.captions() if alt.startswith("0000-bach")]
    assert first == [
        "0000-bach-bwv66.6: image",
        "0000-bach-bwv66.6: label map",
        "0000-bach-bwv66.6: prediction of supervised",
        "0000-bach-bwv66.6: prediction of fixmatch",
        "0000-bach-bwv66.6: prediction of maskmatch",
        "0000-bach-bwv66.6: units visible to maskmatch",
        "0000-bach-bwv66.6: prediction of maskmatch from the visible units alone",
    ]
    assert "MaskMatch: visible units (30%)" in page.text
    assert "stem & beam" in page.text
    swatches = [attributes.get("style") for attributes in page.all("span")]
    assert "background: rgb(200 30 30)" in swatches


def test_label_maps_keep_their_pixels_and_colours(page, runs_folder):
    maps = [attributes for attributes in page.all("img") if attributes.get("class") == "label-map"]
    shown = Image.open(io.BytesIO(b64decode(maps[0]["src"].partition(",")[2])))
    kept = Image.open(runs_folder / "supervised/pictures/val/0000-bach-bwv66.6/label.png")
    assert shown.mode == "P"
    assert np.array_equal(shown.convert("RGB"), kept.convert("RGB"))


def test_large_pictures_are_shrunk_without_new_colours(runs_folder):
    path = runs_folder / "fixmatch/pictures/val/0000-bach-bwv66.6/label.png"
    label_map = Image.fromarray((np.indices((900, 1800)).sum(0) % 3).astype(np.uint8))
    label_map.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    label_map.save(path)
    page = report(runs_folder / "fixmatch")
    address = next(a["src"] for a in page.all("img") if a["alt"] == "0000-bach-bwv66.6: label map")
    shown = Image.open(io.BytesIO(b64decode(address.partition(",")[2])))
    assert shown.size == (768, 384)
    assert {colour for _, colour in shown.convert("RGB").getcolors()} == {(0, 0, 0), (255, 0, 0), (0, 0, 255)}


def test_samples_beyond_the_budget_are_counted(runs_folder, monkeypatch):
    runs = named(runs_folder, "supervised", "maskmatch")
    first = sum(len(a["src"]) for a in report(*runs).all("img") if a["alt"].startswith("0000-bach"))
    monkeypatch.setattr(pictures, "PICTURE_BUDGET", first)
    page = report(*runs)
    assert any(alt.startswith("0000-bach") for alt in page.captions())
    assert not any(alt.startswith("0001-haydn") for alt in page.captions())
    assert "1 more in the run folders" in page.text


def test_held_out_splits_come_first(write_run, tmp_path):
    run = write_run(tmp_path / "run", method=FIXMATCH, pictures=["dev", "val_font", "val"])
    splits = re.findall(r"<summary>(\w+)</summary>", write_report([run]).read_text())
    assert splits[:3] == ["val", "val_font", "dev"]


def test_students_prediction_stands_in_and_says_so(runs_folder):
    for path in (runs_folder / "fixmatch").rglob("prediction-ema.png"):
        path.unlink()
    assert "FixMatch, student" in report(runs_folder / "fixmatch").text


def test_pictures_of_an_evaluation_that_was_killed_are_left_out(runs_folder):
    pictures = runs_folder / "fixmatch" / "pictures"
    (pictures / "val").rename(pictures / ".val.writing")
    page = report(runs_folder / "fixmatch").text
    assert ".val.writing" not in page
    assert "no pictures of held-out samples" in page


def test_half_written_picture_is_left_out(runs_folder):
    path = runs_folder / "fixmatch/pictures/val/0000-bach-bwv66.6/prediction-ema.png"
    path.write_bytes(path.read_bytes()[:-30])
    (path.parent / "prediction-student.png").write_bytes(b"no picture")
    assert "0000-bach-bwv66.6: prediction of fixmatch" not in report(runs_folder / "fixmatch").captions()


def test_backbones_are_groups(runs_folder, write_run):
    write_run(
        runs_folder / "vit", method=FIXMATCH, backbone="timm/vit_tiny_patch16_224", scores={("val", "ema"): 0.4},
        pictures=["val"],
    )  # fmt: skip
    page = report(*named(runs_folder, "vit", "supervised", "fixmatch"))
    assert [row[0] for row in page.table(id="headline")[1:]] == [
        "timm/vit_tiny_patch16_224",
        "vit",
        "transformers/segformer-b0",
        "supervised",
        "fixmatch",
    ]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {"loss_x-0-title", "loss_x-1-title"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert page.captions().count("0000-bach-bwv66.6: image") == 1


def test_unfinished_run_without_anything(write_run, tmp_path):
    run = write_run(tmp_path / "run", method=FIXMATCH, steps=0, closed=False)
    page = report(run)
    assert "run: training is at step 0 of 40; not evaluated on held-out samples" in page.text
    assert "no pictures of held-out samples" in page.text
    assert "Nothing was recorded yet." in page.text
    assert "One seed" not in page.text
    (run / "metrics.jsonl").unlink()
    assert report(run).text == page.text


def test_old_evaluation_is_named(write_run, tmp_path):
    run = write_run(tmp_path / "run", method=FIXMATCH, steps=20, scores={("val", "ema"): 0.4})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 40, "loss_x": 1.0}) + '\n{"kind":"tr')
    assert "val (ema) was evaluated at step 20" in report(run).text


def test_names_are_escaped(write_run, tmp_path):
    folder = tmp_path / "<b>&amp; 'runs'"
    backbone = "timm/<script>alert(1)</script>"
    runs = [
        write_run(
            folder / name, method={"base": "<i>"}, backbone=backbone, scores={("val", "ema"): 0.1}, pictures=["val"]
        )
        for name in ('"><img src=x>', "other")
    ]
    page = report(*runs)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert not page.all("i")
    assert backbone in page.text
    assert '0001-haydn <opus> 74: prediction of "><img src=x>' in page.captions()
    assert all(attributes.get("src", "data:").startswith("data:") for attributes in page.all("img"))


EVIL = "<script>alert(1)</script>\"'`|\n{{ 7 * 7 }}"


def test_names_of_classes_splits_and_samples_are_escaped(runs_folder, tmp_path):
    run = runs_folder / "maskmatch"
    pictures = run / "pictures" / "val"
    classes = json.loads((pictures / "classes.json").read_text())
    (pictures / "classes.json").write_text(json.dumps(classes | {"classes": [EVIL, EVIL, EVIL]}))
    sample = next(path for path in pictures.iterdir() if path.is_dir())
    sample.rename(pictures / EVIL.replace("/", "∕"))
    record = {"split": EVIL, "weights": "ema", "step": 40, "miou": 0.5, "pixel_accuracy": 0.9, "iou": {EVIL: 0.5}}
    (run / "evaluation" / "val-ema.json").write_text(json.dumps(record))
    renamed = run.rename(tmp_path / EVIL.replace("/", "∕"))
    html = write_report([renamed, runs_folder / "fixmatch"]).read_text()
    page = Page(html)
    assert len(page.all("script")) == 1, "the page's own"
    assert EVIL in page.text
    assert "49" not in re.findall(r"\|\s*(\S+)", page.text)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_passwords_and_tokens_are_left_out(runs_folder):
    recipe = runs_folder / "maskmatch" / "recipe.yaml"
    address = "https://me:hunter2@host/scores?sig=hunter2"
    recipe.write_text(recipe.read_text().replace("root: data/scores", f"root: {address}"))
    assert address in recipe.read_text()
    html = write_report([runs_folder / "maskmatch", runs_folder / "fixmatch"]).read_text()
    assert "hunter2" not in html
    assert html.count("https://host/scores") == 2, "in the settings that differ, and in all settings"


def test_only_pngs_are_opened(runs_folder):
    """Pillow starts a program to read PostScript, and a run may be a stranger's."""
    picture = runs_folder / "maskmatch" / "pictures" / "val" / "0000-bach-bwv66.6" / "image.png"
    Image.new("RGB", (48, 32)).save(picture.with_suffix(".eps"))
    picture.with_suffix(".eps").rename(picture)
    page = Page(write_report([runs_folder / "maskmatch"]).read_text())
    assert "0000-bach-bwv66.6: image" not in [attributes["alt"] for attributes in page.all("img")]


def test_runs_of_one_name_are_told_apart(write_run, tmp_path):
    runs = [write_run(tmp_path / parent / "run", method=FIXMATCH) for parent in "ab"]
    assert [row[0] for row in report(*runs).table(id="headline")[2:]] == ["a/run", "b/run"]


def test_a_run_given_twice_is_shown_once(runs_folder):
    run = runs_folder / "fixmatch"
    assert write_report([run, run / ".." / "fixmatch"]) == run.resolve() / "report.html"


def test_bad_calls(runs_folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="no run directory given"):
        write_report([])
    with pytest.raises(ValueError, match=re.escape(f"{empty}: not a run directory")):
        write_report([runs_folder / "fixmatch", empty])
    with pytest.raises(ValueError, match="is a folder"):
        write_report([runs_folder / "fixmatch"], empty)
    (runs_folder / "fixmatch/pictures/val/classes.json").write_text('{"classes": ["a"]}')
    with pytest.raises(ValueError, match=r"classes\.json"):
        write_report([runs_folder / "fixmatch"])
    assert not list(runs_folder.glob("**/report.html"))


def test_running_mean_is_a_mean_of_the_finite_values_around():
    values = np.array([np.nan] * 40 + [1.0] * 20 + [3.0] * 60)
    mean = running_mean(values)
    assert np.isnan(mean[:40]).all()
    assert mean[40] == 1
    assert mean[60] == pytest.approx(np.mean(values[57:64]))
    assert mean[-1] == 3


def test_thinning_keeps_the_mean_and_the_gaps():
    steps = np.arange(1, 100_001)
    values = np.where(steps <= 50_000, np.nan, steps.astype(float))
    thin_steps, thin_values = thinned(steps, values)
    assert thin_steps.shape == thin_values.shape == (MOST_POINTS,)
    assert thin_steps.mean() == pytest.approx(steps.mean())
    assert np.isnan(thin_values[: MOST_POINTS // 2]).all()
    assert np.nanmean(thin_values) == pytest.approx(np.nanmean(values))


def test_chart_of_a_long_run_is_small():
    steps = np.arange(1, 200_001)
    values = np.random.default_rng(0).exponential(size=steps.size)
    assert len(chart("long", "Loss", [Curve("a", "#000000", steps, values)], smooth=True)) < 100_000


def test_chart_of_nothing_is_nothing():
    steps = np.arange(3)
    assert chart("none", "Loss", [Curve("a", "#000000", steps, np.full(3, np.nan))]) == ""
