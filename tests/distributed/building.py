"""How a run of `train_recipes.py` builds its model at ZeRO-3: whole, or with weights that are made one at a time."""

import contextlib
from unittest import mock

from maskmatch_scale.models import deferred
from maskmatch_scale.training import preflight


@contextlib.contextmanager
def built(how):
    """`whole`, as below ZeRO-3; `deferred`, with limits so small that nearly every weight is freed at once."""
    plain, make = preflight.build_student, deferred.DeferredWeights.make
    if how == "whole":
        with mock.patch.object(preflight, "build_student", lambda recipe, index, deferred: plain(recipe, index)):
            yield
        return
    made = []

    def counted(self, name):
        made.append(name)
        return make(self, name)

    with (
        mock.patch.object(deferred, "SMALLEST_BYTES", 64),
        mock.patch.object(deferred, "RESIDENT_BYTES", 2048),
        mock.patch.object(deferred.DeferredWeights, "make", counted),
    ):
        yield
    assert len(made) > 20, "the model was built whole"
    assert all(made.count(name) == 2 for name in made), "each weight is made once for student and once for teacher"
