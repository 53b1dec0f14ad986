"""States that a GPU cannot hold are refused; what it might hold is not."""

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.planning.states import states
from maskmatch_scale.training.memory_check import check_states
from tests.planning.subjects import built_of


@pytest.mark.parametrize("stage", [0, 3])
def test_the_limit_is_what_a_rank_keeps(stage):
    subject = built_of(engine={"zero_stage": stage}).subject
    own, _ = states(subject, 2)
    need = own.kept + own.gradients
    check_states(subject, 2, need, "some GPU")
    with pytest.raises(
        UserError, match=rf"^engine\.zero_stage={stage}: .* GB, and the some GPU has .*--gpus 2"
    ) as refused:
        check_states(subject, 2, need - 1, "some GPU")
    assert "\n" not in str(refused.value)


def test_more_ranks_make_it_fit():
    subject = built_of(engine={"zero_stage": 3}).subject
    own, _ = states(subject, 8)
    enough = own.kept + own.gradients
    check_states(subject, 8, enough, "some GPU")
    with pytest.raises(UserError, match="more GPUs"):
        check_states(subject, 2, enough, "some GPU")
