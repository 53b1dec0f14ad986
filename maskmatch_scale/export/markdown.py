"""Names in Markdown: class names, runs and files may have any characters, and must not become links, HTML or cells."""

from __future__ import annotations

import json
import re


def plain(text: str) -> str:
    """A name as text on one line that Markdown and HTML show as it is, in a paragraph, a heading or a table cell."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def code(text: str, *, cell: bool = False) -> str:
    """A name as inline code on one line.

    Args:
        text: the name.
        cell: whether it stands in a table, where a bar would end the cell even within code.
    """
    text = _one_line(text)
    if cell:
        text = text.replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def string(text: str) -> str:
    """A name as a string of Python, on one line, for the lines of code in a block."""
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def with_section(card: str, title: str, body: str, *, before: str) -> str:
    """A Markdown text with a section, in place of one of the same title.

    Args:
        card: the text.
        title: a line that begins with `## `.
        body: of the section.
        before: title of the section that it is put before; if there is none, it comes last.
    """
    parts = re.split(r"(?m)^(?=## )", card)
    kept = [part for part in parts if part.splitlines()[:1] != [title]]
    place = next((n for n, part in enumerate(kept) if part.splitlines()[:1] == [before]), len(kept))
    kept.insert(place, f"{title}\n\n{body}\n" + ("\n" if place < len(kept) else ""))
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in kept)
