"""The order of calls that every ZeRO stage takes rightly; all others are refused."""

import pytest

from maskmatch_scale.engine.protocol import StepOrder


def test_the_right_order():
    order = StepOrder(2)
    for _ in range(3):
        assert order.forward() is False
        assert order.backward() is False
        assert order.forward() is True
        assert order.backward() is True
        order.step()
    order.forward()
    order.leave_out()
    order.forward()


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (["forward", "forward"], "ZeRO-3"),
        (["backward"], "ZeRO-1"),
        (["forward", "backward", "backward"], "ZeRO-1"),
        (["forward", "backward", "step"], "1 of 2 backwards"),
        (["forward", "step"], "0 of 2 backwards"),
        (["forward", "backward", "forward", "backward", "forward"], "engine.accumulation=2"),
    ],
)
def test_any_other_order_is_refused(calls, message):
    order = StepOrder(2)
    for call in calls[:-1]:
        getattr(order, call)()
    with pytest.raises(RuntimeError, match=message):
        getattr(order, calls[-1])()
