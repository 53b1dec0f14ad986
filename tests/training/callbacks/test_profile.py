"""The trace of `run.profile`: it has the steps that were asked for, and the log says where it is."""

import gzip
import json
import re

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback


def steps_in(trace):
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::convolution" for event in events)
    names = {str(event.get("name")) for event in events}
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step (\d+)", name)))


def test_the_steps_that_were_asked_for(make_recipe, capsys):
    run = train(make_recipe(run={"steps": 4, "profile": [2, 3]}))
    trace = run / "profile" / "rank-0.json.gz"
    assert steps_in(trace) == [2, 3]
    line = f"profile of steps 2 to 3: {trace}; open it at https://ui.perfetto.dev"
    assert line in (run / "log" / "rank-0.txt").read_text()
    assert line in capsys.readouterr().out.replace("\n", "")


def test_a_run_that_ends_within_them_keeps_what_there_is(make_recipe, tmp_path):
    class Stop(Callback):
        def between_steps(self, done):
            if done == 2:
                raise RuntimeError("the end")

    recipe = make_recipe(run={"dir": str(tmp_path / "run"), "steps": 4, "profile": [2, 4]})
    with pytest.raises(RuntimeError, match="the end"):
        train(recipe, callbacks=[Stop])
    assert steps_in(tmp_path / "run" / "profile" / "rank-0.json.gz") == [2]


def test_none_unless_asked_for(make_recipe):
    assert not (train(make_recipe(run={"steps": 1})) / "profile").exists()


@pytest.mark.parametrize(
    ("profile", "part"),
    [([3, 2], "must not be larger"), ([0, 2], "greater than or equal to 1"), ([1, 2, 3], "at most 2")],
)
def test_refused_when_read(make_recipe, profile, part):
    with pytest.raises(RecipeError, match=rf"run\.profile.*{part}"):
        make_recipe(run={"profile": profile})


@pytest.mark.parametrize("length", [{"steps": 3}, {"steps": 0, "epochs": 0.5}])
def test_refused_beyond_the_steps(make_recipe, tmp_path, length):
    run = {"dir": str(tmp_path / "run"), "profile": [3, 9]} | length
    with pytest.raises(UserError, match=r"run\.profile=\[3, 9\]: the run has \d+ steps"):
        train(make_recipe(run=run))
    assert not (tmp_path / "run").exists()
