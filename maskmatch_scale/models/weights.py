"""Reading weights from local files into a segmenter: into its backbone, and into its head where they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from maskmatch_scale.models.channels import adapt_stem
from maskmatch_scale.models.deferred import StoredWeights, read_deferred
from maskmatch_scale.recipe.values import SEGMENTER_FILE

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Under which keys training scripts keep a state dict, an average before what it averages, as timm looks for them."""

MORE_THAN_TENSORS = (
    "holds more than tensors, and nothing else is ever unpickled, because that can run any code; save its state dict "
    "alone, best as .safetensors"
)

# The last is where an export keeps the backbone alone, if its library has no model for the whole segmenter.
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "backbone/model.safetensors")


def find_weights(pretrained: str | Path) -> Path:
    """The weights file that a path names, or that lies in the folder that it names.

    Raises:
        ValueError: there is none.
    """
    path = Path(pretrained)
    candidates = [path / name for name in _FILES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = f"holds none of {', '.join(_FILES)}" if path.is_dir() else "does not exist"
    raise ValueError(f"pretrained: {str(path)!r} {looked}; give a .safetensors or .pth file, or a folder with one")


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a `.safetensors` file or of a torch file, of which only tensors are unpickled.

    During a deferred build the tensors of a `.safetensors` file are read when they are used.

    Raises:
        ValueError: the file cannot be read, or holds no state dict.
    """
    try:
        state: Any = read_deferred(path)
        if state is None:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"pretrained: {str(path)!r} {MORE_THAN_TENSORS}") from None
    except Exception as error:
        raise ValueError(f"pretrained: cannot read {str(path)!r} as weights: {error}") from error
    if isinstance(state, dict):
        state = next((state[name] for name in _NESTED if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"pretrained: {str(path)!r} holds no state dict of tensors")
    return state


def read_own(path: Path | StoredWeights) -> dict[str, Tensor] | None:
    """State dict of an export, of a file saved from a segmenter, or of a segmenter's stored weights.

    None if the tensors have a library's own names.
    """
    if not isinstance(path, Path):
        state = read_deferred(path)
        return {name: path[name] for name in path} if state is None else state
    if path.is_dir():
        return read_export(path) if (path / SEGMENTER_FILE).is_file() else None
    state = read_weights(find_weights(path))
    return state if any(name.startswith("backbone.") for name in state) else None


def read_export(folder: Path) -> dict[str, Tensor]:
    """State dict of a folder that `maskmatch export` wrote, in a segmenter's own names.

    Raises:
        ValueError: a file of it is missing or cannot be read.
    """
    whole = folder / "model.safetensors"  # a SegFormer with its own head, in transformers' names
    if whole.is_file():
        return {to_own_name(name): value for name, value in read_weights(whole).items()}
    parts = {"backbone": folder / "backbone" / "model.safetensors", "head": folder / "head.safetensors"}
    return {f"{part}.{name}": value for part, path in parts.items() for name, value in read_weights(path).items()}


def load_own(
    segmenter: nn.Module, state: Mapping[str, Tensor], source: object, num_classes: int, in_channels: int
) -> list[str]:
    """Load a state dict in a segmenter's own names; a head of another shape or kind stays as it was built.

    Args:
        segmenter: to load into.
        state: tensors by name. One on the meta device, without values, stands for a tensor that is not to be loaded.
        source: what they are of, for the message.
        num_classes: of the segmenter.
        in_channels: of the segmenter. Weights for another number of channels are adapted (`channels.adapt_stem`).

    Returns:
        A line on each part that is adapted, is not loaded, or starts at random; none if everything fits. The context
        decoder, which exports leave out, is not counted.

    Raises:
        ValueError: the backbone's weights do not fit.
    """
    current = segmenter.state_dict()
    state, adapted = adapt_stem(state, current, in_channels)
    fits = {
        name: value
        for name, value in state.items()
        if name in current and current[name].shape == value.shape and not value.is_meta
    }
    # Sorted, since files hold tensors in any order.
    dropped = sorted(name for name in state if name not in current and not name.startswith("context."))
    wrong = [name for name in current if name.startswith("backbone.") and name not in fits]
    wrong += [name for name in dropped if name.startswith("backbone.")]
    if wrong:
        hint = "is it another size?"
        if wrong == ["backbone.pos_embed"]:
            hint = "give its grid with model.backbone_options.img_size (height and width of images in px)"
        raise ValueError(f"pretrained: {str(source)!r} does not fit the backbone, e.g. {wrong[0]}; {hint}")
    segmenter.load_state_dict(fits, strict=False)
    fresh = [name for name in current if name not in fits and not name.startswith("context.")]
    counts = {name: _classes(state[name], current[name], num_classes) for name in fresh if name in state}
    classifier = [name for name, count in counts.items() if count is not None]
    notes = [] if adapted is None else [adapted]
    if classifier:
        notes.append(f"classifier: {counts[classifier[0]]} → {num_classes} classes, new ({named(classifier)})")
    if others := [name for name in fresh if name not in classifier]:
        notes.append(f"new, at random: {named(others)}")
    if dropped:
        notes.append(f"not loaded, since the model has no such tensor: {named(dropped)}")
    return notes


def _classes(stored: Tensor, current: Tensor, num_classes: int) -> int | None:
    """The number of classes of a stored classifier whose tensor differs from the model's in that alone; else None."""
    differs = stored.ndim == current.ndim and stored.shape[1:] == current.shape[1:] and stored.shape != current.shape
    a_class, rest = divmod(len(current), num_classes) if differs else (0, 1)  # several of a `pixel_shuffle` head
    return len(stored) // a_class if not rest and len(stored) % a_class == 0 else None


def named(names: Sequence[str]) -> str:
    """Up to four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def to_own_name(name: str) -> str:
    """Name of a `SegformerForSemanticSegmentation` tensor in a segmenter."""
    return name.replace("segformer.", "backbone.", 1).replace("decode_head.", "head.", 1)


def to_transformers_name(name: str) -> str:
    """Name of a segmenter's tensor in `SegformerForSemanticSegmentation`."""
    return name.replace("backbone.", "segformer.", 1).replace("head.", "decode_head.", 1)
