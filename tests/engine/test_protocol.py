"""The order of calls that every ZeRO stage takes rightly; all others are refused."""

import pytest

from maskmatch_scale.engine.protocol import StepOrder


def test_the_right_order():
    order = StepOrder()
    for views in (1, 3, 6):
        for view in range(views):
            order.accumulate(last=view + 1 == views)
        order.step()


def test_any_other_order_is_refused():
    order = StepOrder()
    with pytest.raises(RuntimeError, match="before its last gradients"):
        order.step()
    order.accumulate(last=False)
    with pytest.raises(RuntimeError, match="before its last gradients"):
        order.step()
    order.accumulate(last=True)
    with pytest.raises(RuntimeError, match="after the last of this step"):
        order.accumulate(last=False)
