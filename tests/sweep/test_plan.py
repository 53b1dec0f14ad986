"""All combinations of values, and the names of their folders."""

import pytest

from maskmatch_scale.recipe import load_recipe
from maskmatch_scale.sweep.plan import plan


def test_all_combinations_with_names_that_fit_a_file_system(recipe_file, tmp_path):
    overrides = ["optim.lr=1e-5,1e-4", "run.steps=7", "method.scales=[1.0],[0.5, 1.0]", "method.mask.keep=null,0.5"]
    trials = plan(recipe_file, overrides, tmp_path / "out")
    assert [trial.name for trial in trials][:3] == [
        "optim.lr=1e-5,method.scales=1.0,method.mask.keep=null",
        "optim.lr=1e-5,method.scales=1.0,method.mask.keep=0.5",
        "optim.lr=1e-5,method.scales=0.5-1.0,method.mask.keep=null",
    ]
    assert len({trial.name for trial in trials}) == 8
    last = trials[-1].recipe
    assert (last.optim.lr, last.method.scales, last.method.mask.keep, last.run.steps) == (1e-4, (0.5, 1.0), 0.5, 7)
    assert trials[-1].folder.path == tmp_path / "out" / trials[-1].name
    assert load_recipe(recipe_file, trials[-1].overrides) == last
    names = ",".join(f"exp{number}/" + "x" * 200 for number in range(2))
    long = plan(recipe_file, [f"record.project={names}"], tmp_path / "out")
    assert len({trial.name for trial in long}) == 2
    assert all(len(trial.name) < 200 and "/" not in trial.name for trial in long)


@pytest.mark.parametrize("values", ["ä,ö", "runs/a-b,runs/a/b", "a b,ab", '"[a]",a', "x #1,x"])
def test_values_that_no_file_name_tells_have_folders_of_their_own(recipe_file, tmp_path, values):
    trials = plan(recipe_file, [f"record.project={values}"], tmp_path / "out")
    assert len({trial.folder.path for trial in trials}) == 2
    assert all(trial.name.isascii() and "/" not in trial.name for trial in trials)


@pytest.mark.parametrize("out", ["x #1", "a: b", "{a", '"a', "ä"])
def test_the_folder_may_be_called_anything(recipe_file, tmp_path, out):
    for trial in plan(recipe_file, ["optim.lr=1,2"], tmp_path / out):
        assert trial.folder.path == tmp_path / out / trial.name
        assert load_recipe(recipe_file, trial.overrides).run.dir == str(trial.folder.path)
