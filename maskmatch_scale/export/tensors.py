"""Tensors of a checkpoint's whole weights, on their way into the files of an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def part_of(tensors: Any, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a segmenter, such as `backbone`, by their names within it."""
    return renamed(tensors, (f"{part}.",), lambda name: name.removeprefix(f"{part}."))


def renamed(tensors: Any, prefixes: tuple[str, ...], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors whose names begin with one of the prefixes, by new names.

    Args:
        tensors: an open safetensors file. Tensors are mapped from it, and read only when they are written.
        prefixes: beginnings of names.
        rename: from the name in the file to the new one.
    """
    names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118 - no mapping
    return {rename(name): tensors.get_tensor(name) for name in names}


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that transformers loads too, which asks for the format in its metadata."""
    save_file(state, path, metadata={"format": "pt"})
