"""What a kind of export must define."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from maskmatch_scale.export.description import Description
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe


@dataclass(frozen=True)
class Exported:
    """What is exported."""

    tensors: Mapping[str, Tensor]
    """The checkpoint's whole weights with a segmenter's names of tensors, each read when it is asked for."""
    segmenter: Segmenter
    """The run's model on the meta device: shapes and configuration."""
    recipe: Recipe
    description: Description


class ExportKind(ABC):
    """How backbones of one kind are described, written, loaded and explained."""

    library: ClassVar[str]
    """Name of the backbone's library, as model hubs call it."""

    @abstractmethod
    def name(self, backbone: str) -> str:
        """`Description.backbone` for a recipe's `model.backbone`, without paths of this machine."""

    @abstractmethod
    def options(self, recipe: Recipe) -> dict[str, Any]:
        """`Description.backbone_options`: options that are not in the exported files of the backbone."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The versions of the libraries that write it, by name."""

    def is_whole(self, description: Description) -> bool:
        """Whether the backbone's library has a model for the whole segmenter, with its head."""
        return False

    def write_model(self, exported: Exported, folder: Path) -> None:
        """Write the segmenter as a model of the library; called only if :meth:`is_whole`."""
        raise NotImplementedError

    def whole_call(self, folder: Path) -> str:
        """The call that loads what :meth:`write_model` wrote, for the user."""
        raise NotImplementedError

    @abstractmethod
    def write_backbone(self, exported: Exported, folder: Path) -> None:
        """Write the backbone alone, as the library loads it.

        Raises:
            UserError: the library would build a model with other tensors.
        """

    @abstractmethod
    def backbone_in(self, folder: Path, description: Description) -> str:
        """The name of an export's backbone for `build_segmenter`."""

    @abstractmethod
    def card_section(self, name: str, description: Description) -> str:
        """The section of the model card on loading the export with the library, in Markdown.

        Args:
            name: name of the export's folder.
            description: of the export.
        """
