"""Devices, precisions, and batches that are halved until they fit."""

from __future__ import annotations

import pytest
import torch

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.errors import UserError
from maskmatch_scale.predict.device import FittingBatches, choose_device, choose_precision

CPU = torch.device("cpu")


class Small:
    """A segmenter on a device that has memory for a few images."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("too many")
        return images.mean((2, 3), keepdim=True)


def test_a_batch_is_halved_until_it_fits_and_stays_so(capsys):
    images = torch.randn(10, 3, 4, 4)
    small = Small(3)
    batches = FittingBatches(small, 8, CPU)
    assert torch.equal(batches(images), images.mean((2, 3), keepdim=True))
    assert batches.batch == 2
    assert small.sizes == [8, 4, 2, 2, 2, 2, 2]
    small.sizes.clear()
    assert len(batches(images[:3])) == 3
    assert small.sizes == [2, 1]
    assert "2 windows at a time" in capsys.readouterr().out


def test_a_window_that_does_not_fit_is_one_line():
    with pytest.raises(UserError, match="one window of 4×6 px does not fit"):
        FittingBatches(Small(0), 4, CPU)(torch.randn(2, 3, 4, 6))


def test_each_rank_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = [Place(rank, rank, 3, 3) for rank in range(3)]
    for wanted in (None, "cuda"):
        assert [choose_device(wanted, place).index for place in places] == [0, 1, 0]
    assert choose_device("cuda:1", places[0]).index == 1
    assert choose_device("cpu", places[0]) == CPU
    with pytest.raises(UserError, match="2 GPUs"):
        choose_device("cuda:2", places[0])


def test_precisions_of_a_cpu():
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="needs a GPU"):
        choose_precision("fp16", CPU)
