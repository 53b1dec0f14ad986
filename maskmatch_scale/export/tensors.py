"""Copying tensors from the whole weights of a checkpoint into the files of an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from maskmatch_scale.files import writing


def part_of(tensors: Any, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a segmenter, such as `backbone`, without the part in their names."""
    return renamed(tensors, (f"{part}.",), lambda name: name.removeprefix(f"{part}."))


def renamed(tensors: Any, prefixes: tuple[str, ...], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors whose names begin with one of the prefixes, with new names.

    Args:
        tensors: an open safetensors file. Tensors are mapped into memory, and read only when they are written.
        prefixes: beginnings of names.
        rename: gives the new name for a name in the file.
    """
    names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118 - no mapping
    return {rename(name): tensors.get_tensor(name) for name in names}


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. transformers can load it too, because the metadata say `format: pt`."""
    with writing(path):
        save_file(state, path, metadata={"format": "pt"})
