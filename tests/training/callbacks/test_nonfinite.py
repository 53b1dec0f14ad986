"""Which records stop a run."""

from types import SimpleNamespace

import pytest

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.training.callbacks.nonfinite import NonFinite


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": float("nan"), "grad_norm": None, "overflow": True}, "the loss is not finite"),
        ({"loss": 1.0, "grad_norm": float("inf")}, "the gradient is not finite .*grad_norm=inf"),
        ({"loss": 1.0, "grad_norm": float("inf"), "overflow": True}, None),
        ({"loss": float("nan"), "grad_norm": None, "left_out": True}, None),
    ],
)
def test_an_overflow_excuses_the_gradient_alone(record, message):
    run = SimpleNamespace(last_checkpoint=None)
    policy = NonFinite(run)
    if message is None:
        policy.records_read([{"step": 7} | record])
    else:
        with pytest.raises(TrainingStopped, match=message):
            policy.records_read([{"step": 7} | record])
