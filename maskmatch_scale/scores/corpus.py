"""The scores that music21 ships: finding them, reading them, and telling which of them are one work.

Only MusicXML files are used (`.mxl` is the same, zipped). They are read from the installed package's folder; music21
itself is never imported, because that takes seconds and nothing of it is needed.
"""

from __future__ import annotations

import importlib.util
import io
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from maskmatch_scale.data.faults import DataError

REPERTORIES: dict[str, tuple[str, ...]] = {
    "chorale": ("bach",),
    "madrigal": ("monteverdi", "lusitano"),
    "medieval": ("trecento", "ciconia", "luca"),
    "instrumental": (),
}
"""Kinds of music by the composer folders that hold them; every other folder counts as the last, `instrumental`
(quartets, piano pieces, songs)."""

NOT_PIECES = ("demos/", "theoryExercises/")
"""Folders of the corpus that hold test files of the software rather than music."""

_MELODY_INTERVALS = 11
"""Melodic steps compared by :func:`_melodies`: about two lines of a chorale tune."""

_WORDS = re.compile(
    r"<(lyric|part-name|part-abbreviation|part-name-display|part-abbreviation-display|credit|harmony|figured-bass)"
    r"[ >].*?</\1>"
    r"|<direction-type[^>]*>\s*<(words|metronome|rehearsal)[ >].*?</direction-type>",
    re.DOTALL,
)
_XML_DECLARATION = re.compile(r"^\s*<\?xml.*?\?>", re.DOTALL)
_PART = re.compile(r"(<part\s[^>]*>)(.*?)(</part>)", re.DOTALL)
_MEASURE = re.compile(r"<measure[ >].*?</measure>", re.DOTALL)
_ATTRIBUTES = re.compile(r"<attributes>.*?</attributes>", re.DOTALL)
_ATTRIBUTE_ORDER = ("divisions", "key", "time", "staves", "clef", "transpose")
_ATTRIBUTE = re.compile(
    rf"(<({'|'.join(_ATTRIBUTE_ORDER)})(?:\s[^>]*?number=\"(\d)\")?[^>]*>.*?</\2>)",
    re.DOTALL,
)
_PITCH = re.compile(r"<step>([A-G])</step>\s*(?:<alter>(-?\d)[^<]*</alter>\s*)?<octave>(\d)</octave>")
_SEMITONE = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11)))
_SYMBOLS = {
    "beam": re.compile(r"<beam[ >]"),
    "rest": re.compile(r"<rest[ />]"),
    "accidental": re.compile(r"<accidental[ >]"),
    "hollow": re.compile(r"<type[^>]*>(?:half|whole|breve)<"),
    "curve": re.compile(r"<(?:slur|tied)[ />]"),
    "flag": re.compile(r"<type[^>]*>(?:eighth|16th)</type>(?:(?!</note>|<beam).)*</note>", re.DOTALL),
}
_KEY = re.compile(r"<fifths>-?[1-7]<")


def corpus_folder() -> Path:
    """The folder of scores inside the installed music21.

    Raises:
        DataError: music21, verovio or resvg_py is not installed.
    """
    for module in ("music21", "verovio", "resvg_py"):
        spec = importlib.util.find_spec(module)
        if spec is None:
            raise DataError(
                f"the `scores` source needs {module}, which is not installed: pip install 'maskmatch_scale[quickstart]'"
            )
        if module == "music21":
            package = Path((spec.submodule_search_locations or [""])[0])
    folder = package / "corpus"
    if not (folder / "bach").is_dir():
        raise DataError(
            f"{folder}: this music21 carries no corpus (some redistributors remove it); install it from PyPI"
        )
    return folder


def read_musicxml(path: Path) -> str:
    """The MusicXML text of a `.mxl`, `.xml` or `.musicxml` file, without words: lyrics, names, tempo, chords.

    Raises:
        DataError: the file is no MusicXML.
    """
    data = path.read_bytes()
    if path.suffix == ".mxl":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            container = archive.read("META-INF/container.xml").decode("utf-8", "replace")
            if not (root := re.search(r'full-path="([^"]+)"', container)):
                raise DataError(f"{path}: META-INF/container.xml names no score")
            data = archive.read(root[1])
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")
    if "<score-partwise" not in text:
        raise DataError(f"{path}: not a part-wise MusicXML score")
    return _WORDS.sub("", _XML_DECLARATION.sub("", text, count=1))


def cut_measures(musicxml: str, first: int, last: int) -> str:
    """The same score with measures `first` to `last` (from 1, both included) alone.

    Clefs, key, time and divisions in force at the cut are stated again in its first measure. (verovio can select
    measures itself, but in 6.4 it then draws some beams and stems across whole systems.)
    """
    return _PART.sub(lambda part: part[1] + _cut_part(part[2], first, last) + part[3], musicxml)


def _cut_part(part: str, first: int, last: int) -> str:
    measures = _MEASURE.findall(part)
    kept = measures[first - 1 : last]
    if not kept:
        return part
    opening, body = re.fullmatch(r"(<measure[^>]*>)(.*)", kept[0], re.DOTALL).groups()  # type: ignore[union-attr]
    before_notes = _ATTRIBUTES.search(body, 0, body.find("<note") if "<note" in body else len(body))
    if before_notes:
        body = body.replace(before_notes[0], "", 1)
    in_force: dict[str, str] = {}
    for attributes in [*_ATTRIBUTES.findall("".join(measures[: first - 1])), before_notes[0] if before_notes else ""]:
        for element, tag, number in _ATTRIBUTE.findall(attributes):
            in_force[f"{tag} {number or 1}" if tag == "clef" else tag] = element
    # MusicXML prescribes the order of the elements; sorting is stable, so clefs stay in the order of their staves.
    stated = sorted(sorted(in_force.items()), key=lambda item: _ATTRIBUTE_ORDER.index(item[0].split()[0]))
    return f"{opening}<attributes>{''.join(element for _, element in stated)}</attributes>{body}{''.join(kept[1:])}"


@dataclass(frozen=True)
class Piece:
    """One file of the corpus.

    Attributes:
        folder: the corpus folder.
        path: relative to the corpus folder, with `/`.
        work: identity for splitting; equal for movements, versions and duplicates of one work.
        repertory: a key of :data:`REPERTORIES`.
    """

    folder: Path
    path: str
    work: str
    repertory: str

    @cached_property
    def parts(self) -> list[list[str]]:
        """The MusicXML of every measure of every part."""
        return [_MEASURE.findall(part[2]) for part in _PART.finditer(read_musicxml(self.folder / self.path))]

    @cached_property
    def measures(self) -> int:
        """Number of measures."""
        return max(map(len, self.parts), default=0)

    def symbols(self, first: int, last: int) -> frozenset[str]:
        """Kinds of symbols in measures `first` to `last` (from 1, both included) of any part."""
        text = "".join(measure for part in self.parts for measure in part[first - 1 : last])
        found = {kind for kind, pattern in _SYMBOLS.items() if pattern.search(text)}
        if any(_KEY.search(part[0]) for part in self.parts if part):
            found.add("key")
        return frozenset(found)


def find_pieces(folder: Path) -> list[Piece]:
    """Every piece of the corpus, sorted by path, with its work.

    Two files are one work when the rules for file names say so (:func:`_work_by_name`) or when any part of one begins
    with the melody of any part of the other, in whatever key (:func:`_melodies`). The second rule finds
    the same chorale tune under two numbers, old versions of an encoding, and one song under two titles; it also joins
    different harmonisations of one tune, which is intended, because they look alike.
    """
    found = [
        Piece(folder, name, "", _repertory(name))
        for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
        if name.endswith((".mxl", ".xml", ".musicxml")) and not name.startswith(NOT_PIECES)
    ]
    names = [_work_by_name(piece.path) for piece in found]
    joined = _Groups(names)
    first_with: dict[tuple[str, tuple[int, ...]], str] = {}
    for piece, name in zip(found, names):
        for melody in _melodies(piece.parts):
            joined.join(name, first_with.setdefault((piece.repertory, melody), name))
    return [replace(piece, work=joined.find(name)) for piece, name in zip(found, names)]


def _repertory(path: str) -> str:
    composer = path.split("/")[0]
    if path.startswith("bach/bwv846"):  # a prelude for keyboard among 409 chorales
        return "instrumental"
    return next((name for name, folders in REPERTORIES.items() if composer in folders), "instrumental")


def _work_by_name(path: str) -> str:
    """`composer/work` of a corpus path: a folder is a work, so is a BWV number; suffixes of versions are cut off."""
    composer, _, rest = path.partition("/")
    name = rest.split("/")[0] if "/" in rest else rest.rpartition(".")[0]
    if composer == "bach":
        name = re.sub(r"^(bwv\d+).*", r"\1", name)
    name = re.sub(r"_(old|bak)$", "", name)
    if numbered := re.match(r"(PMFC_\d+_(?:\w+-)?\d+)[ab]-", name):  # versions a and b of one mass movement
        name = numbered[1]
    return f"{composer}/{name}"


def _melodies(parts: Iterable[list[str]]) -> set[tuple[int, ...]]:
    """The first melodic steps of each part in semitones, repeated notes collapsed: the same in every key and rhythm."""
    found = set()
    for part in parts:
        heights: list[int] = []
        for step, alter, octave in (match for measure in part[:40] for match in _PITCH.findall(measure)):
            height = 12 * int(octave) + _SEMITONE[step] + int(alter or 0)
            if not heights or heights[-1] != height:
                heights.append(height)
            if len(heights) > _MELODY_INTERVALS:
                found.add(tuple(b - a for a, b in pairwise(heights)))
                break
    return found


class _Groups:
    """Disjoint sets of names; a set is called by its first name in sorted order."""

    def __init__(self, names: Iterable[str]) -> None:
        self._parent = {name: name for name in names}

    def find(self, name: str) -> str:
        while self._parent[name] != name:
            name = self._parent[name]
        return name

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first
