"""Rates from a measurement: interpolated, kept in a file; and a real measurement of a few operators."""

import json

import pytest
import torch

from maskmatch_scale.errors import UserError
from maskmatch_scale.planning import measure as measuring
from maskmatch_scale.planning.measured import (
    ADAMW,
    COPY,
    MeasuredGpu,
    MeasuredRates,
    Point,
    key_of,
    rates_of,
    read_measurement,
    write_measurement,
)
from maskmatch_scale.planning.recorder import Operation
from maskmatch_scale.planning.setting import Link


def point(name, flops, moved, seconds):
    return Point(name, "float32", flops, moved, seconds)


MACHINE = MeasuredGpu(
    "cpu", 10**10, 1e11, 2e11, 1e10, 1e-6, "measured",
    points=(
        point(COPY, 0, 1000, 1e-6), point(COPY, 0, 10_000, 1e-5),
        point("aten.mm", 10**6, 1000, 1e-5), point("aten.mm", 10**8, 10_000, 1e-3),
        point("aten.convolution thin", 5000, 1000, 2e-6), point(ADAMW, 0, 28_000, 1e-4),
    ),
    within=Link("loopback", 1e9, 1e-4, "measured"),
)  # fmt: skip


def operation(name, flops, moved):
    return Operation(name, flops, moved, torch.float32, False)


def test_seconds_lie_on_lines_between_what_was_measured():
    rates = rates_of(MACHINE)
    assert isinstance(rates, MeasuredRates)
    assert rates.seconds(operation(COPY, 0, 5500)) == pytest.approx(5.5e-6)
    assert rates.seconds(operation(COPY, 0, 10)) == 1e-6  # it never takes less than the smallest
    assert rates.seconds(operation(COPY, 0, 100_000)) == pytest.approx(1e-4)
    assert rates.seconds(operation("aten.mm", 5 * 10**8, 1)) == pytest.approx(5e-3)  # by products, not by bytes
    assert rates.seconds(operation("aten.convolution", 5000, 2000)) == pytest.approx(4e-6)
    assert rates.seconds(operation("aten.unknown", 0, 5500)) == rates.seconds(operation(COPY, 0, 5500))
    assert rates.adamw_s(2000) == pytest.approx(2e-4)
    assert rates.launch_s == 0
    assert not rates.overlaps


def test_depthwise_convolutions_have_seconds_of_their_own():
    assert key_of(operation("aten.convolution", 1000, 1000)) == "aten.convolution thin"
    assert key_of(operation("aten.convolution", 10**6, 1000)) == "aten.convolution"
    assert key_of(operation("aten.mm", 1, 1000)) == "aten.mm"


def test_a_file_gives_it_back(tmp_path):
    write_measurement(MACHINE, tmp_path / "machine.json")
    assert read_measurement(tmp_path / "machine.json") == MACHINE


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', json.dumps({"format": 1, "points": [], "within": None, "name": "cpu"})]
)
def test_another_file_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "machine.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--measured .*machine.json: not a measurement .*--measure"):
        read_measurement(file)


def test_no_file_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"No such file.*write it with --measure"):
        read_measurement(tmp_path / "none.json")


def test_operators_are_really_run(monkeypatch):
    monkeypatch.setattr(measuring, "_SIZES", (2**14,))
    monkeypatch.setattr(measuring, "_ROUND_S", 1e-4)
    monkeypatch.setattr(measuring, "_products", lambda device, dtype: iter(()))
    monkeypatch.setattr(measuring, "_convolutions", lambda device, dtype: iter(()))
    found = measuring.measure(torch.device("cpu"))
    names = {point.name for point in found.points}
    assert {COPY, ADAMW, "aten.gelu_backward", "aten.native_layer_norm", "aten.upsample_bilinear2d_backward"} <= names
    assert all(point.seconds > 0 and point.bytes > 0 for point in found.points)
    assert {"float32", "bfloat16"} <= {point.dtype for point in found.points}
