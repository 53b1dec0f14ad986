"""A view's forward and backward pass as CUDA graphs: launched as two pieces instead of about a thousand operations.

On a fast GPU a masked view of a ViT is computed in less time than its operations are launched in, so dropping units
saves nothing there (`benchmarks/results/gpu/`). A graph is recorded once for each shape of a view, and replayed.

Decision: docs/decisions/0063-views-as-cuda-graphs.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.models.segmenter import MaskMode, Segmenter

_Key = tuple[torch.Size, torch.Size | None, MaskMode, torch.dtype]


class GraphedViews:
    """Runs a segmenter in training through CUDA graphs; each shape of a view has its own.

    Parameters must stay where they are in memory. Every trained one needs a `.grad` at every call. A graph gives its
    gradients in memory of its own, which the next replay overwrites, and in which gradients of two parameters may be
    one. Autograd adds them to a `.grad`, but where there is none it takes this memory for it.

    A call must be followed by its backward pass before the same shape comes again, as activations are overwritten too.

    Args:
        segmenter: on a GPU, in training mode whenever this is called; its frozen parts are frozen already.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._trained = [parameter for parameter in segmenter.parameters() if parameter.requires_grad]
        self._graphs: dict[_Key, _View] = {}

    def __call__(self, images: Tensor, visible: Tensor | None = None, mode: MaskMode = "drop") -> Tensor:
        """As `Segmenter.forward`, without `perturb`.

        Raises:
            RuntimeError: a trained parameter has no `.grad`.
        """
        if any(parameter.grad is None for parameter in self._trained):
            raise RuntimeError("a parameter without .grad: it would get memory that the next replay overwrites")
        key: _Key = (images.shape, None if visible is None else visible.shape, mode, images.dtype)
        view = self._graphs.get(key)
        given = (images,) if visible is None else (images, visible)
        if view is None:
            view = self._graphs[key] = self._recorded(given, mode)
        logits: Tensor = view(*given)
        return logits

    def _recorded(self, given: tuple[Tensor, ...], mode: MaskMode) -> _View:
        """A view whose forward is replaced by graphs; recording runs it several times, which leaves no trace."""
        view = _View(self._segmenter, mode)  # as it is: frozen parts are in eval mode
        before = [buffer.clone() for buffer in self._segmenter.buffers()]
        device = given[0].device
        # Casts of weights that autocast keeps from a pass before would be recorded as constants.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(
                device.type,
                torch.get_autocast_dtype(device.type),
                enabled=torch.is_autocast_enabled(device.type),
                cache_enabled=False,
            ),
        ):
            samples = tuple(tensor.clone() for tensor in given)
            record: Any = torch.cuda.make_graphed_callables
            record(view, samples, allow_unused_input=True)
        with torch.no_grad():
            for buffer, value in zip(self._segmenter.buffers(), before, strict=True):
                buffer.copy_(value)
        return view


class _View(nn.Module):
    """A segmenter's pass over a view of one shape; torch replaces its `forward`."""

    def __init__(self, segmenter: Segmenter, mode: MaskMode) -> None:
        super().__init__()
        self.segmenter = segmenter
        self._mode = mode

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        logits: Tensor = self.segmenter(images, visible, self._mode)
        return logits
