"""Engraving: measures of a MusicXML score to a raster that holds the class of every point of ink.

Image and label come from one raster, so that they cannot disagree: verovio lays the music out, every symbol's group is
filled with a colour of its own class, and resvg draws the page without antialiasing at :data:`OVERSAMPLING` times the
page's size. A pixel's darkness is then the share of its points that are ink, its label the class of most of them.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import DataError

CLASSES = (
    "background",
    "staff",
    "black_notehead",
    "hollow_notehead",
    "stem",
    "beam_flag",
    "rest",
    "clef",
    "key_accidental",
    "accidental",
    "slur_tie",
    "barline",
    "other",
)
(BACKGROUND, STAFF, BLACK, HOLLOW, STEM, BEAM, REST, CLEF, KEY, ACCIDENTAL, CURVE, BARLINE, OTHER) = range(13)

OVERSAMPLING = 3
"""Points a pixel along each side."""

INK_THRESHOLD = 3
"""How many of the 9 points of a pixel must be ink for it to be labelled. A staff line between two rows of pixels covers
a third of each row, and must not be missing from the labels of both."""

_CLASS_OF_GROUP = {
    "staff": STAFF,  # its own paths are the five lines; what stands on them has groups of its own
    "ledgerLines": STAFF,
    "stem": STEM,
    "beam": BEAM,
    "flag": BEAM,
    "bTrem": BEAM,
    "fTrem": BEAM,
    "rest": REST,
    "mRest": REST,
    "multiRest": REST,
    "clef": CLEF,
    "keyAccid": KEY,
    "accid": ACCIDENTAL,
    "slur": CURVE,
    "tie": CURVE,
    "lv": CURVE,
    "barLine": BARLINE,
    "system": BARLINE,  # its own path is the line that joins the staves at the left
}
"""Class of the shapes that lie directly in a verovio group; shapes of every other group are `other`."""

_HOLLOW_GLYPHS = ("E0A0", "E0A1", "E0A2", "E0A3")
"""SMuFL code points of the heads of breves, whole and half notes."""

_SHAPES = ("path", "polygon", "polyline", "rect", "ellipse", "circle", "line")
_COLOUR_STEP = 16
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Style:
    """How a page is engraved.

    Attributes:
        font: one of verovio's music fonts.
        staff_space: distance between two lines of a staff, px.
        staff_line, stem, barline: line widths in halves of a staff space.
        staff_spacing: least space between staves of a system, in halves of a staff space.
        note_spacing: how strongly a note's duration widens its place (verovio's `spacingLinear`).
    """

    font: str
    staff_space: float = 9.0
    staff_line: float = 0.2
    stem: float = 0.24
    barline: float = 0.35
    staff_spacing: int = 7
    note_spacing: float = 0.25


@dataclass(frozen=True)
class Sheet:
    """An engraved sheet of music: as wide as a page and twice as tall, or less if the music ends.

    Attributes:
        svg: coloured by class.
        units_per_px: of the drawing's own coordinates.
        width, height: px.
    """

    svg: ET.Element
    units_per_px: float
    width: int
    height: int

    def raster(self, top: float, height: int, margin: int = 0, oversampling: int = OVERSAMPLING) -> NDArray[np.uint8]:
        """Draw a window of the sheet, as wide as the sheet.

        Args:
            top: upper edge of the window on the sheet, px.
            height: px.
            margin: px to draw on every side of the window as well.
            oversampling: points a pixel along each side.

        Returns:
            uint8 (oversampling · (height + 2 · margin), oversampling · (width + 2 · margin)): the class of every point,
            0 where there is no ink.
        """
        import resvg_py

        extent = (-margin, top - margin, self.width + 2 * margin, height + 2 * margin)
        inner = self.svg.find(f"{_SVG}svg")
        assert inner is not None
        inner.set("viewBox", " ".join(str(length * self.units_per_px) for length in extent))
        for name, length in zip(("width", "height"), extent[2:]):
            self.svg.set(name, str(oversampling * length))
        png = resvg_py.svg_to_bytes(
            svg_string=ET.tostring(self.svg, encoding="unicode"),
            background="#000000",
            skip_system_fonts=True,
            shape_rendering="crisp_edges",
        )
        with Image.open(io.BytesIO(bytes(png))) as image:
            red = np.asarray(image.convert("RGB"))[..., 0]
        classes = red // _COLOUR_STEP
        assert not (red % _COLOUR_STEP).any(), "the raster was antialiased"
        return classes


def engrave(musicxml: str, style: Style, size: int) -> Sheet:
    """Lay out the beginning of a score on a sheet `size` px wide and up to 2 · `size` tall.

    Raises:
        DataError: verovio cannot read the score.
    """
    import verovio

    verovio.enableLog(verovio.LOG_OFF)
    # One layout unit is half a staff space; verovio's default unit is 9, so a space is 18 layout pixels at scale 100.
    scale = style.staff_space / 18
    # A toolkit of its own for each page: what it drew before must not change what it draws now.
    toolkit = verovio.toolkit()
    toolkit.setOptions(
        {
            "inputFrom": "xml",
            "font": style.font,
            "scale": round(100 * scale),
            "pageWidth": round(size / (round(100 * scale) / 100)),
            "pageHeight": round(2 * size / (round(100 * scale) / 100)),
            "adjustPageHeight": True,
            **{f"pageMargin{side}": 40 for side in ("Left", "Right", "Top", "Bottom")},
            "header": "none",
            "footer": "none",
            "breaks": "auto",
            "mnumInterval": 1000,
            "xmlIdSeed": 1,
            "staffLineWidth": style.staff_line,
            "stemWidth": style.stem,
            "barLineWidth": style.barline,
            "spacingStaff": style.staff_spacing,
            "spacingLinear": style.note_spacing,
        }
    )
    if not toolkit.loadData(musicxml):
        raise DataError("verovio cannot read this score")
    root = ET.fromstring(toolkit.renderToSVG(1))
    inner = root.find(f"{_SVG}svg")
    if inner is None:
        raise DataError("verovio drew nothing")
    width, height = (float(root.attrib[side].removesuffix("px")) for side in ("width", "height"))
    units = float(inner.attrib["viewBox"].split()[2]) / width
    _colour_by_class(root)
    return Sheet(root, units, size, int(height))


def downsample(points: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """From the classes of points to pixels.

    Args:
        points: uint8 (n · H, n · W) with n = OVERSAMPLING.

    Returns:
        ink float32 (H, W), the share of a pixel that is ink, 0–1; label uint8 (H, W), the class of most of the pixel's
        ink where at least INK_THRESHOLD points are ink, otherwise background.
    """
    n = OVERSAMPLING
    height, width = points.shape[0] // n, points.shape[1] // n
    pixel = np.arange(height * width, dtype=np.intp).reshape(height, 1, width, 1) * len(CLASSES)
    flat = (pixel + points.reshape(height, n, width, n)).ravel()
    counts = np.bincount(flat, minlength=height * width * len(CLASSES)).reshape(height, width, len(CLASSES))
    inked = n * n - counts[..., BACKGROUND]
    label = np.where(inked >= INK_THRESHOLD, 1 + counts[..., 1:].argmax(axis=-1), BACKGROUND)
    return (inked / np.float32(n * n)).astype(np.float32), label.astype(np.uint8)


def _colour_by_class(root: ET.Element) -> None:
    """Give every shape the colour of its class, in place, and drop words, placeholders and all other colours."""
    for element in root.iter():
        for child in list(element):
            hidden = "placeholder" in child.get("class", "").split() or child.get("visibility") == "hidden"
            if hidden or child.tag.removeprefix(_SVG) in ("text", "style", "desc"):
                element.remove(child)
    root.attrib.pop("style", None)
    root.set("shape-rendering", "crispEdges")
    for child in root:
        if child.tag == f"{_SVG}defs":
            for glyph in child.iter():  # a colour in a glyph would override that of its use
                for attribute in ("fill", "stroke", "color", "style"):
                    glyph.attrib.pop(attribute, None)
        else:
            _colour(child, OTHER)


def _colour(element: ET.Element, inherited: int) -> None:
    tag = element.tag.removeprefix(_SVG)
    kind = inherited
    if tag == "g" and (names := element.get("class", "").split()):
        kind = BLACK if names[0] == "notehead" else _CLASS_OF_GROUP.get(names[0], OTHER)
    if tag == "use" and inherited == BLACK and re.match(f"#(?:{'|'.join(_HOLLOW_GLYPHS)})", element.get(_HREF, "")):
        kind = HOLLOW
    colour = f"#{kind * _COLOUR_STEP:02x}0000"
    for attribute in ("color", "style", "opacity", "fill-opacity", "stroke-opacity"):
        element.attrib.pop(attribute, None)
    if tag in (*_SHAPES, "use"):
        if element.get("fill") != "none":
            element.set("fill", colour)
        # verovio's style block strokes every shape (but no glyph) in the current colour.
        if tag != "use" and element.get("stroke") != "none":
            element.set("stroke", colour)
    for child in element:
        _colour(child, kind)
