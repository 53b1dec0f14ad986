"""GPUs and networks by name."""

from dataclasses import replace

import pytest

from maskmatch_scale.device_peaks import PEAKS
from maskmatch_scale.errors import UserError
from maskmatch_scale.planning.hardware import CARDS, NETWORKS, cluster_of, gpu_named, has_bf16, link_named, within_host


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_the_peaks_of_its_data_sheet(name):
    gpu, peaks = gpu_named(name.upper()), PEAKS[CARDS[name].peaks]
    assert gpu.half_flops == peaks.half * 1e12
    assert gpu.fp32_flops == (peaks.tf32 or peaks.fp32) * 1e12
    assert 16e9 <= gpu.memory_bytes <= 200e9
    assert within_host(gpu).bandwidth < gpu.bandwidth


def test_cards_without_bf16_are_those_without_tf32():
    assert {n for n in CARDS if not has_bf16(gpu_named(n))} == {
        n for n, c in CARDS.items() if PEAKS[c.peaks].tf32 is None
    }


def test_links_of_a_host_are_those_of_all_its_gpus():
    # One direction of NVLink; a bridge joins two cards alone, so those on PCIe have its 16 lanes.
    assert within_host(gpu_named("h100")).bandwidth == 450e9
    assert within_host(gpu_named("h100-nvl")).bandwidth == within_host(gpu_named("h100-pcie")).bandwidth


@pytest.mark.parametrize(
    ("name", "link", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "NVLink 4", True),
        ("NVIDIA H100 PCIe", "PCIe 5", True),
        ("NVIDIA H200", "NVLink 4", True),
        ("NVIDIA A100-SXM4-40GB", "NVLink 3", True),
        ("NVIDIA A100-PCIE-40GB", "PCIe 4", True),
        ("Tesla T4", "PCIe 3", False),
        ("Tesla V100-SXM2-16GB", "NVLink 2", False),
        ("NVIDIA GeForce RTX 4090", "PCIe 4", True),
    ],
)
def test_a_measured_gpu_has_the_link_of_its_card(name, link, bf16):
    gpu = replace(gpu_named("h100"), name=name)
    assert within_host(gpu).name == link
    assert has_bf16(gpu) is bf16


def test_memory_may_be_given():
    assert gpu_named("h100", 64).memory_bytes == 64_000_000_000


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_shared_by_the_ranks_of_a_host_unless_each_has_an_adapter(name):
    one, eight = link_named(name, 1), link_named(name, 8)
    assert one.bandwidth == NETWORKS[name].gbit_s * 1e9 / 8
    assert eight.bandwidth == one.bandwidth / (1 if NETWORKS[name].per_gpu else 8)


def test_a_number_is_gbit_s_of_a_host():
    assert link_named("80", 4).bandwidth == 2.5e9


def test_hosts():
    assert cluster_of(4, gpu_named("a10")).ranks_per_host == 4
    assert cluster_of(32, gpu_named("a10"), gpus_per_host=4).cores_per_host == 64


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpu_named("h10"), r"--gpu h10: .*did you mean h100\?"),
        (lambda: gpu_named("h100", 0), "--gpu-memory 0: it must be above 0"),
        (lambda: link_named("infiniband", 8), "--link infiniband: neither a number of Gbit/s nor one of .*ib-ndr-400"),
        (lambda: link_named("-1", 8), "--link -1: it must be above 0"),
        (lambda: link_named("nan", 8), "--link nan: it must be above 0"),
        (lambda: cluster_of(0, gpu_named("h100")), "--gpus 0"),
        (lambda: cluster_of(12, gpu_named("h100")), "--gpus 12 with --gpus-per-host 8: .*such as 8"),
        (lambda: cluster_of(8, gpu_named("h100"), gpus_per_host=0), "--gpus-per-host 0"),
    ],
)
def test_what_is_wrong_is_one_line(make, said):
    with pytest.raises(UserError, match=said):
        make()
