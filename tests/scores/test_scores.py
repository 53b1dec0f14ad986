"""Score pages: the split, what a page and its label hold, and that rendering is reproducible."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.tools.verify import verify
from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.scores import corpus as scores_corpus
from maskmatch_scale.scores.ageing import MARGIN, bend
from maskmatch_scale.scores.corpus import cut_measures, find_pieces
from maskmatch_scale.scores.engraving import CLASSES, INK_THRESHOLD, OVERSAMPLING, downsample
from maskmatch_scale.scores.page import Page, render_page
from maskmatch_scale.scores.source import ScoresSource
from maskmatch_scale.scores.split import FONTS, HELD_OUT_FONT

PACKAGES = ("music21", "verovio", "resvg_py")
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES), reason="needs the quickstart extra"
)

SIZES = {"labelled": 16, "dev": 16, "val": 32, "val_font": 16, "unlabelled": 290}


@lru_cache(maxsize=4)
def pages(seed: int = 0) -> dict[str, list[Page]]:
    return {name: list(stream.items) for name, stream in ScoresSource(seed=seed).streams.items()}


def decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode in ("L", "RGB")
        return np.asarray(image.convert("L"))


@needs_extra
@pytest.mark.parametrize("seed", [0, 1])
def test_no_work_is_on_two_sides(seed: int) -> None:
    works = {name: {page.work for page in stream} for name, stream in pages(seed).items()}
    pieces = {name: {page.piece for page in stream} for name, stream in pages(seed).items()}
    for sides in (works, pieces):
        assert sum(map(len, sides.values())) == len(set.union(*sides.values()))


@needs_extra
def test_streams_have_the_pages_asked_for_each_once() -> None:
    assert {name: len(stream) for name, stream in pages().items()} == SIZES
    everything = [page for stream in pages().values() for page in stream]
    assert len({page.key for page in everything}) == len(everything)
    assert len({(page.piece, page.first) for page in everything}) == len(everything)


@needs_extra
def test_fonts_of_the_streams() -> None:
    fonts = {name: {page.font for page in stream} for name, stream in pages().items()}
    assert fonts["labelled"] == {"Leipzig"}
    assert fonts["val_font"] == {HELD_OUT_FONT}
    for name in ("unlabelled", "dev", "val"):
        assert fonts[name] == set(FONTS)


@needs_extra
def test_streams_mix_repertories() -> None:
    for name, stream in pages().items():
        composers = {page.piece.split("/")[0] for page in stream}
        assert len(composers) >= 4, name
        assert len({page.work for page in stream}) >= len(stream) // 3, name


@needs_extra
def test_another_seed_deals_other_works() -> None:
    assert {page.work for page in pages(0)["val"]} != {page.work for page in pages(1)["val"]}


@needs_extra
def test_versions_movements_and_shared_tunes_are_one_work() -> None:
    work = {piece.path: piece.work for piece in find_pieces(scores_corpus.corpus_folder())}
    for one, other in (
        ("monteverdi/madrigal.3.1.mxl", "monteverdi/madrigal.3.1_old.mxl"),
        ("mozart/k458/movement1.mxl", "mozart/k458/movement4.mxl"),
        ("schumann_robert/dichterliebe_no2.xml", "schumann_robert/opus48no2.mxl"),
        ("bach/bwv10.7.mxl", "bach/bwv324.mxl"),  # Meine Seele erhebet den Herren, twice
        ("bach/bwv80.8.mxl", "bach/bwv302.mxl"),  # Ein feste Burg, twice
        ("trecento/PMFC_12_4-Gloria Rvat 1419.xml", "trecento/PMFC_12_4-Gloria Rvat 1419_bak.xml"),
    ):
        assert work[one] == work[other]
    assert work["beethoven/opus18no3.mxl"] != work["beethoven/opus18no4.mxl"]


@needs_extra
def test_written_shards_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = ScoresSource(labelled=2, unlabelled=2, dev=0, val=0, val_font=1, size=256)
    for workers in (1, 2):
        write_shards(source, tmp_path / str(workers), workers=workers, progress=False)
    files = (path for path in (tmp_path / "1").rglob("*") if path.is_file())
    names = sorted(str(path.relative_to(tmp_path / "1")) for path in files)
    assert [name for name in names if name.startswith("dev")] == []
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert list(verify(tmp_path / "1")) == []
    unlabelled, labelled = (ShardStream(tmp_path / "1", name) for name in ("unlabelled", "labelled"))
    assert [unlabelled[n].label for n in range(2)] == [None, None]
    label = labelled[0].label
    assert label is not None
    assert decode(label).shape == decode(labelled[0].image).shape == (256, 256)
    assert decode(label).max() < len(CLASSES)


@needs_extra
@pytest.mark.parametrize("stream", ["labelled", "val", "val_font"])
def test_ink_is_labelled_and_nothing_else_is(stream: str) -> None:
    page = replace(pages()[stream][0], aged=False)
    sample = render_page(page)
    assert sample.label is not None
    image, label = decode(sample.image), decode(sample.label)
    ink = np.rint((255 - image.astype(np.float64)) / 255 * OVERSAMPLING**2)
    assert ((ink >= INK_THRESHOLD) == (label > 0)).all()
    assert 0.08 < (label > 0).mean() < 0.6  # full of music


@needs_extra
def test_ageing_moves_image_and_label_alike() -> None:
    page = pages()["labelled"][1]
    aged = render_page(page)
    assert aged.extension == "jpg"
    assert aged.label is not None
    image, label = decode(aged.image).astype(np.float64), decode(aged.label)
    symbols = label > 1
    contrast = image[label == 0].mean() - image[symbols].mean()
    assert contrast > 40
    for shift in (-4, 4):  # a label that is 4 px off fits far worse
        moved = np.roll(symbols, shift, axis=0) & (np.roll(label, shift, axis=0) != label)
        assert image[moved & (label == 0)].mean() - image[symbols].mean() > 0.7 * contrast


@needs_extra
def test_a_labelled_page_shows_most_classes() -> None:
    seen = set()
    for page in pages()["labelled"][:3]:
        label = render_page(page).label
        assert label is not None
        seen |= set(np.unique(decode(label)))
    assert len(seen) >= len(CLASSES) - 2


def test_downsampling_takes_the_class_of_most_ink() -> None:
    n = OVERSAMPLING
    points = np.zeros((n, 4 * n), np.uint8)
    points[:, :n] = 2  # all of one class
    points[: n - 1, n : 2 * n], points[n - 1, n : 2 * n] = 4, 1  # two thirds 4, one third 1
    points[0, 2 * n : 3 * n] = 1  # a staff line at the edge of a pixel: a third
    points[0, 3 * n] = 5  # a single point: too little
    ink, label = downsample(points)
    assert label.tolist() == [[2, 4, 1, 0]]
    assert np.allclose(ink, [[1, 1, 1 / 3, 1 / 9]])


def test_bending_keeps_within_the_margin() -> None:
    size = 512
    side = OVERSAMPLING * (size + 2 * MARGIN)
    inside = np.zeros((side, side), np.uint8)
    inside[1:-1, 1:-1] = 1
    for seed in range(8):
        bent = bend(inside, size, MARGIN, np.random.default_rng(seed))
        assert bent.shape == (OVERSAMPLING * size, OVERSAMPLING * size)
        assert bent.all()


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_extra_is_one_clear_error(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec("json"))
    with pytest.raises(DataError, match=rf"{missing}.*pip install 'maskmatch_scale\[quickstart\]'"):
        write_shards(ScoresSource(), tmp_path / "out", workers=1, progress=False)
    assert not (tmp_path / "out").exists()


@needs_extra
def test_more_pages_than_the_corpus_has() -> None:
    with pytest.raises(DataError, match="unlabelled=100000: the corpus has only"):
        _ = ScoresSource(unlabelled=100_000).streams


def test_a_cut_score_states_what_is_in_force() -> None:
    clef = '<clef number="2"><sign>F</sign><line>4</line></clef>'
    score = (
        '<score-partwise><part id="P1">'
        "<measure number='1'><attributes><divisions>4</divisions><key><fifths>2</fifths></key><time><beats>3</beats>"
        f'</time><staves>2</staves><clef number="1"><sign>G</sign></clef>{clef}</attributes><note>a</note></measure>'
        "<measure number='2'><attributes><key><fifths>-1</fifths></key></attributes><note>b</note></measure>"
        "<measure number='3'><attributes><time><beats>4</beats></time></attributes><note>c</note>"
        "<attributes><clef><sign>C</sign></clef></attributes></measure>"
        "<measure number='4'><note>d</note></measure>"
        "</part></score-partwise>"
    )
    cut = cut_measures(score, 3, 3)
    assert cut == (
        "<score-partwise><part id=\"P1\"><measure number='3'><attributes><divisions>4</divisions>"
        "<key><fifths>-1</fifths></key><time><beats>4</beats></time><staves>2</staves>"
        f'<clef number="1"><sign>G</sign></clef>{clef}</attributes><note>c</note>'
        "<attributes><clef><sign>C</sign></clef></attributes></measure></part></score-partwise>"
    )
    fourth = cut_measures(score, 4, 9)
    assert f"<clef><sign>C</sign></clef>{clef}</attributes><note>d</note>" in fourth
