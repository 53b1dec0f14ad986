"""Copying tensors from the whole weights of a checkpoint into the files of an export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from maskmatch_scale.files import writing


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one part of a segmenter, such as `backbone`, without the part in their names."""
    return renamed(tensors, (f"{part}.",), lambda name: name.removeprefix(f"{part}."))


def renamed(
    tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """The tensors whose names begin with one of the prefixes, with new names.

    Args:
        tensors: of a checkpoint; only those that are wanted are read.
        prefixes: beginnings of names.
        rename: gives the new name for a name in the file.
    """
    return {rename(name): tensors[name] for name in tensors if name.startswith(prefixes)}


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. transformers can load it too, because the metadata say `format: pt`."""
    with writing(path):
        path.touch()
        usual = path.stat().st_mode  # by the umask; safetensors lets the owner alone read what it writes
        save_file(state, path, metadata={"format": "pt"})
        path.chmod(usual)
