"""Writing a segmenter as an ONNX graph, by `torch.onnx.export` on the graph of `torch.export`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.errors import CommandFailed
from maskmatch_scale.files import writing
from maskmatch_scale.models import Segmenter

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "logits"
"""Names in the graph. images: float32 (B, channels, H, W), normalised. logits: float32 (B, classes, h, w)."""
OPSET = 18
"""Of 2022, which all runtimes have by now; torch writes for it without converting."""

INLINE_BYTES = 1_500_000_000
"""Graphs with more weights have them in a file beside them: a file of protobuf holds 2 GB at most."""


class _WholeImages(nn.Module):
    """The call of a segmenter that is exported: of whole images, under the names of the graph."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.segmenter(images)
        return logits


def write_graph(segmenter: Segmenter, path: Path, size_px: tuple[int, int], *, any_batch: bool) -> None:
    """Write the graph of a segmenter's call on whole images.

    Args:
        segmenter: in eval mode, on the CPU, for images of ``size_px`` (`Encoder.fix_size`).
        path: a file `.onnx`. Weights of more than :data:`INLINE_BYTES` are in ``path`` with `.data` behind its name,
            which the graph refers to by this name: the two belong in one folder, and cannot be renamed.
        size_px: height and width of images.
        any_batch: whether images come in batches of any size; else one at a time.

    Raises:
        CommandFailed: torch cannot export this segmenter.
        OSError: the file cannot be written.
    """
    model = _WholeImages(segmenter).eval()
    # Two images: torch takes a batch of one for a constant.
    images = torch.zeros(2 if any_batch else 1, segmenter.in_channels, *size_px)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}} if any_batch else None,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter raises: it is a library that this model is new to
        reason = str(error.__cause__ or error).strip().splitlines()  # torch's own message is on how to report it
        raise CommandFailed(
            f"torch cannot export this model as ONNX: {reason[0] if reason else type(error).__name__}"
        ) from error
    assert program is not None
    _forget_origin(program.model.graph)
    weights = sum(value.numel() * value.element_size() for value in segmenter.state_dict().values())
    with writing(path):
        program.save(path, external_data=weights > INLINE_BYTES)


def _forget_origin(graph: Any) -> None:
    """Leave out what torch notes of each operation and value, such as the lines of this machine's files it is from."""
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep what the exporter's optimiser says of single operations from the user."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
