"""Predicted steps: rooflines, launches, what is hidden; and how predictions depend on settings."""

from dataclasses import replace

import pytest
import torch

from maskmatch_scale.planning import efficiency
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.rates import SheetRates, kind_of
from maskmatch_scale.planning.recorder import Operation
from maskmatch_scale.planning.setting import Link
from maskmatch_scale.planning.step_time import computed, step_time, with_network
from tests.planning.subjects import SEGFORMER, VIT, built_of

H100 = gpu_named("h100")


@pytest.fixture(scope="module")
def planned():
    subject = built_of(VIT, engine={"zero_stage": 2}).subject
    return subject, step_time(subject, cluster_of(16, H100))


def test_an_operation_takes_the_longer_of_products_and_bytes():
    rates = SheetRates(H100)
    product = Operation("aten.mm", 10**12, 10**6, torch.bfloat16, False)
    assert rates.seconds(product) == pytest.approx(1e12 / (989e12 * efficiency.PRODUCTS))
    assert rates.seconds(replace(product, dtype=torch.float32)) == pytest.approx(1e12 / (495e12 * efficiency.PRODUCTS))
    copy = Operation("aten.clone", 0, 10**9, torch.float32, False)
    assert rates.seconds(copy) == pytest.approx(1e9 / (3350e9 * efficiency.MEMORY))
    assert rates.is_product(product)
    assert not rates.is_product(copy)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten.addmm", "product"),
        ("aten._scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten.convolution_backward", "convolution"),
        ("aten.gelu", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_parts_and_shares_add_up(planned):
    _, time = planned
    parts = sum(part.seconds for part in time.parts) + sum(one.exposed_s for one in time.network)
    assert time.seconds == pytest.approx(parts)
    assert sum(time.share_of().values()) == pytest.approx(1)
    assert [part.name for part in time.parts[:5]] == [
        "views drawn",
        "teacher",
        "labelled view",
        "strong views",
        "masked view",
    ]
    assert 0 < time.burn_in_s < time.seconds


def test_a_small_model_waits_for_its_launches(planned):
    shares = planned[1].share_of()
    assert max(shares, key=shares.get) == "launches"


def test_gradients_are_hidden_but_for_the_last_and_a_slow_network_is_not(planned):
    subject, _ = planned
    fast, passes = cluster_of(16, H100), computed(subject, cluster_of(16, H100))
    slow = replace(fast, between=Link("slow", 1e4, 0.0, ""))
    [hidden] = [one for one in with_network(subject, fast, passes).network if one.what == "gradients"]
    [seen] = [one for one in with_network(subject, slow, passes).network if one.what == "gradients"]
    assert hidden.exposed_s == pytest.approx(hidden.seconds / 3)  # three collectives, of a backward pass each
    backward = sum(part.backward.seconds for part in passes.values())
    assert seen.exposed_s == pytest.approx(seen.seconds - backward)


def test_more_ranks_take_no_longer_without_a_network(planned):
    subject, _ = planned
    passes = computed(subject, cluster_of(8, H100))
    free = [
        replace(cluster_of(n, H100), within=Link("", 1e30, 0, ""), between=Link("", 1e30, 0, "")) for n in (8, 64, 512)
    ]
    seconds = [with_network(subject, one, passes).seconds for one in free]
    assert seconds == sorted(seconds, reverse=True)


def test_cuda_graphs_launch_no_views():
    plain, graphed = (
        built_of(VIT, engine={"library": "accelerate", "zero_stage": 0, "cuda_graphs": graphs}).subject
        for graphs in (False, True)
    )
    one = cluster_of(1, H100)
    before, after = step_time(plain, one), step_time(graphed, one)
    assert before.flops == after.flops
    assert after.seconds < before.seconds


@pytest.mark.parametrize("model", [VIT, SEGFORMER], ids=["vit", "segformer"])
def test_a_larger_keep_has_never_fewer_flops(model):
    one = cluster_of(1, H100)
    flops = [
        sum(
            part.flops
            for name, part in computed(
                built_of(model, data={"crop_px": 128}, method={"mask": {"keep": keep}}).subject, one
            ).items()
            if name == "loss_m"
        )
        for keep in (0.25, 0.75)
    ]
    assert flops[0] < flops[1]


def test_activations_that_are_computed_again_take_a_forward_more():
    one = cluster_of(1, H100)
    kept, again = (
        sum(
            part.flops
            for part in computed(built_of(VIT, engine={"activation_checkpointing": on}).subject, one).values()
        )
        for on in (False, True)
    )
    assert 1.1 < again / kept < 1.34
