"""Which records stop a run."""

from types import SimpleNamespace

import pytest

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.training.callbacks.nonfinite import NonFinite


def run_that_allows(steps, **resumed):
    recipe = SimpleNamespace(run=SimpleNamespace(max_nonfinite_steps=steps))
    return SimpleNamespace(last_checkpoint=None, recipe=recipe, resumed=resumed)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": float("nan"), "grad_norm": None, "overflow": True}, "the loss is not finite"),
        ({"loss": 1.0, "grad_norm": float("inf")}, "the gradient is not finite .*grad_norm=inf"),
        ({"loss": 1.0, "grad_norm": float("inf"), "overflow": True}, None),
    ],
)
def test_an_overflow_excuses_the_gradient_alone(record, message):
    policy = NonFinite(run_that_allows(0))
    if message is None:
        policy.records_read([{"step": 7} | record])
    else:
        with pytest.raises(TrainingStopped, match=message):
            policy.records_read([{"step": 7} | record])


@pytest.mark.parametrize(
    "record", [{"left_out": True, "grad_norm": None}, {"overflow": True, "grad_norm": float("inf")}]
)
def test_one_step_more_than_allowed_stops_the_run(record):
    policy = NonFinite(run_that_allows(2))
    for number in range(3):
        policy.after_step(number, SimpleNamespace(left_out=record.get("left_out", False)))
        if number < 2:
            policy.records_read([{"step": number, "loss": float("nan")} | record])
    with pytest.raises(TrainingStopped, match="step 2: the loss is not finite"):
        policy.records_read([{"step": 2, "loss": float("nan")} | record])
    assert policy.summary() == {"steps_left_out": 3}


def test_steps_before_a_stop_count_after_it():
    policy = NonFinite(run_that_allows(2, steps_left_out=2))
    policy.after_step(5, SimpleNamespace(left_out=True))
    assert policy.state() == {"steps_left_out": 3}
    with pytest.raises(TrainingStopped):
        policy.records_read([{"step": 5, "loss": float("nan"), "left_out": True, "grad_norm": None}])
