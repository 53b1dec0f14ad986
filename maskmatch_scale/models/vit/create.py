"""Creating timm's models, and refusing those whose tokens cannot be dropped."""

from __future__ import annotations

import difflib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.layers import PatchEmbed
from timm.models import clean_state_dict
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maskmatch_scale.models.channels import adapted_line
from maskmatch_scale.models.vit.masking import KeepVisible
from maskmatch_scale.models.weights import named, read_weights


def create_vit(
    name: str,
    image_size: int | tuple[int, int] | None,
    weights: Path | bool,
    options: dict[str, Any],
    in_channels: int = 3,
) -> tuple[Any, tuple[str, ...]]:
    """Create a timm model that takes any image of whole patches, gives its tokens, and can drop masked ones.

    Args:
        name: a timm model name.
        image_size: side or (height, width) in pixels that the position embedding is laid out for; None: the model's.
        weights: False for timm's own random initialisation, True for timm's pretrained weights, or a local file
            that we read (of pickles only tensors) and timm fits (names converted, position embedding resampled).
        options: further keyword arguments of `timm.create_model`.
        in_channels: channels of images; timm adapts weights for RGB to them.

    Returns:
        A `VisionTransformer` or `Eva`; called on (B, in_channels, H, W) it gives (B, prefix + tokens, C), normalised.
        And lines on an adapted patch embedding, and on what of the file was not loaded.

    Raises:
        ValueError: no such model, one whose tokens cannot be dropped, or weights that do not fit.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"backbone: timm has no model {name!r}{hint}")
    held: dict[str, tuple[int, ...]] = {}
    arguments: dict[str, Any] = {"dynamic_img_size": True, "num_classes": 0, "in_chans": in_channels, **options}
    if image_size is not None:
        arguments["img_size"] = image_size
    if isinstance(weights, Path):
        state = clean_state_dict(read_weights(weights))
        held = {key: tuple(value.shape) for key, value in state.items()}  # timm takes tensors out
        arguments["pretrained_cfg_overlay"] = {"state_dict": state, "custom_load": False}
    try:
        with _loading() as results:
            model = timm.create_model(name, pretrained=bool(weights), **arguments)
    except TypeError as error:  # models that are no ViT do not take dynamic_img_size
        raise ValueError(
            f"backbone: timm/{name} is no ViT that can drop tokens, or backbone_options has an unknown key: {error}"
        ) from error
    except RuntimeError as error:
        if "is inconsistent with input_size" in str(error):  # timm's check of weights for other channels than its own
            raise ValueError(
                f"pretrained: {str(weights)!r} does not fit the backbone: its patch embedding is for other channels "
                f"than RGB and the {in_channels} of this model, and timm adapts those for RGB only"
            ) from error
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        line = str(error).splitlines()[1].strip()
        raise ValueError(
            f"pretrained: {str(weights)!r} does not fit the backbone: {line}; is it another size?"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)
    _refuse_undroppable(name, model)
    # The model gives tokens, not a pooled vector. Pooling parameters would never see a gradient.
    model.global_pool, model.attn_pool = "", None
    model.patch_drop = KeepVisible(model.num_prefix_tokens, returns_indices=isinstance(model, Eva))
    model.patch_drop.hook(model.patch_embed)
    notes = _adapted(model, held, in_channels) if weights else ()
    return model, notes + (_not_loaded(model, weights, list(held), results) if held else ())


@contextmanager
def _loading() -> Generator[list[Any], None, None]:
    """Collect what torch says of the state dicts that timm loads into its ViTs; timm logs it at most.

    timm loads a file of other classes without `strict`, so that a file whose names do not fit leaves random weights.
    """
    results: list[Any] = []
    plain = {kind: kind.__dict__.get("load_state_dict") for kind in (VisionTransformer, Eva)}

    def load_state_dict(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        results.append(nn.Module.load_state_dict(self, *arguments, **options))
        return results[-1]

    for kind in plain:
        kind.load_state_dict = load_state_dict
    try:
        yield results
    finally:
        for kind, own in plain.items():
            if own is None:
                del kind.load_state_dict
            else:
                kind.load_state_dict = own


def _adapted(model: Any, held: dict[str, tuple[int, ...]], in_channels: int) -> tuple[str, ...]:
    """A line on the patch embedding if timm made it of one for other channels.

    Args:
        model: with its weights.
        held: shapes of the tensors of the file that they are of; empty: they are timm's own.
        in_channels: of the model.
    """
    made_for = int((model.pretrained_cfg.get("input_size") or (3,))[0])
    # Of a ViT's tensors only the patch embedding has four dimensions. A file of as many channels is loaded as it is.
    if in_channels == made_for or any(len(shape) == 4 and shape[1] == in_channels for shape in held.values()):
        return ()
    return (adapted_line("backbone.patch_embed.proj.weight", made_for, in_channels),)


def _not_loaded(model: Any, weights: Path | bool, held: list[str], results: list[Any]) -> tuple[str, ...]:
    """A line on the tensors of a file that were not loaded.

    Raises:
        ValueError: the model has a tensor that the file has not, or the file has more blocks.
    """
    own = model.state_dict().keys()
    missing = {name for result in results for name in result.missing_keys} & own
    unused = {name for result in results for name in result.unexpected_keys}
    wrong = sorted(missing) + sorted(name for name in unused if name.startswith("blocks."))
    if wrong:
        raise ValueError(
            f"pretrained: {str(weights)!r} does not fit the backbone, e.g. {wrong[0]}; is it another model or size?"
        )
    # What timm takes out before can be told by the names if it renamed nothing; a classifier always.
    classifier = str(model.pretrained_cfg.get("classifier") or "head")
    renamed = not own <= set(held)
    unused |= {name for name in held if name.startswith(f"{classifier}.") or (not renamed and name not in own)}
    return (f"not loaded, since the model has no such tensor: {named(sorted(unused))}",) if unused else ()


def _refuse_undroppable(name: str, model: Any) -> None:
    """Refuse models that would compute masked tokens all the same, or let masked pixels leak into visible ones."""
    # The exact types: subclasses such as distilled DeiT change what the forward pass gives.
    if type(model) not in (VisionTransformer, Eva):
        raise ValueError(
            f"backbone: timm/{name} is a {type(model).__name__}; tokens can be dropped in timm's VisionTransformer "
            "and Eva models only (vit_*, deit3_*, eva02_* …)"
        )
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or embed.proj.kernel_size != embed.proj.stride:
        raise ValueError(
            f"backbone: timm/{name} embeds overlapping patches, so masked pixels would leak; use a plain ViT"
        )
    if embed.patch_size[0] != embed.patch_size[1] or embed.dynamic_img_pad:
        raise ValueError(f"backbone: timm/{name} needs square patches of {embed.patch_size} px without dynamic_img_pad")
