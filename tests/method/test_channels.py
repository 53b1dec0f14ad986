"""Coins made on the device: fair, independent, and of (seed, stream, place) alone."""

import torch

from maskmatch_scale.method.channels import coins, times_channels


def test_coins_are_fair_and_independent():
    seeds = torch.tensor([0, 1, 2, 2**31 - 1])
    tossed = torch.cat([coins(seeds, stream, 2**14) for stream in (0, 1, 4095)]).double()
    n = tossed.shape[1]
    assert (tossed.mean(1) - 0.5).abs().max() < 4 * 0.5 / n**0.5
    assert (torch.corrcoef(tossed) - torch.eye(len(tossed))).abs().max() < 4.5 / n**0.5
    for shift in (1, 2, 16):  # neighbours
        other = (tossed - 0.5) * (tossed.roll(shift, 1) - 0.5)
        assert other.mean(1).abs().max() < 4.5 * 0.25 / n**0.5


def test_coins_depend_on_nothing_else():
    whole = coins(torch.tensor([3, 8, 9]), 2, 100)
    assert whole[1:2].equal(coins(torch.tensor([8]), 2, 100))
    assert whole[:, :40].equal(coins(torch.tensor([3, 8, 9]), 2, 40))


def test_each_channel_times_its_factor():
    factors = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    maps = torch.ones(2, 3, 4, 5, dtype=torch.bfloat16)
    times = times_channels(maps, factors)
    assert times.dtype == torch.bfloat16
    assert times.float().equal(factors[:, :, None, None].expand(2, 3, 4, 5))
    assert maps.eq(1).all()
