"""The checks of `make test-gpu` on a CPU, with fewer runs and steps, so that they cannot rot."""

from types import SimpleNamespace

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

from maskmatch_scale.engine.zero import ZeroEngine
from tests.conftest import recipe_maker
from tests.gpu.configurations import CONFIGURATIONS, HANDED_ON, recipe_of
from tests.gpu.launched import Launched
from tests.gpu.waiting import FIRST, NoWaiting

NAMES = ("vit-1-bf16", "vit-3-autocast-bf16", "segformer-1-autocast-bf16", "segformer-accelerate")


@pytest.fixture(scope="module")
def launched(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("rehearsal")
    make = recipe_maker(shapes, folder)
    return Launched(make, folder, ranks=1, on_gpu=False, names=NAMES, steps=6, limit_s=600)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_training(launched, name):
    launched.check_training(name)


@pytest.mark.slow
@pytest.mark.distributed
def test_everything_else(launched):
    launched.check_watched("segformer-accelerate")
    launched.check_watched("vit-3-autocast-bf16")
    launched.check_continued("vit-1-bf16")
    for name in HANDED_ON:
        launched.check_export(name)
    launched.check_evaluation("segformer-1-autocast-bf16")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_fails_is_named_and_the_others_are_run(tmp_path, shapes, monkeypatch):
    """The control: the second of two jobs has shards that are not there."""
    make = recipe_maker(shapes, tmp_path)
    plain = recipe_of

    def broken(make, name, folder, *, steps):
        recipe = plain(make, name, folder, steps=steps)
        gone = recipe.data.model_copy(update={"root": str(tmp_path / "gone")})
        return recipe.model_copy(update={"data": gone}) if name == "vit-1-fp32" else recipe

    monkeypatch.setattr("tests.gpu.launched.recipe_of", broken)
    names = ("vit-1-fp32", "vit-1-autocast-bf16")
    found = Launched(make, tmp_path, ranks=1, on_gpu=False, names=names, steps=2, limit_s=600)
    with pytest.raises(pytest.fail.Exception, match="gone"):
        found.run("vit-1-fp32")
    assert found.run("vit-1-autocast-bf16").is_dir()
    with pytest.raises(pytest.fail.Exception, match="was not run"):
        found.run("vit-2-bf16")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_recipe_is_accepted(name, tmp_path, shapes):
    recipe = recipe_of(recipe_maker(shapes, tmp_path), name, tmp_path)
    assert recipe.run.steps == 20


def test_when_a_wait_is_an_error(monkeypatch):
    """DeepSpeed's own waits are counted, all others are errors, and between steps there is no such mode."""
    modes = []
    monkeypatch.setattr(NoWaiting, "set", staticmethod(modes.append))
    assert callable(DeepSpeedEngine.backward)
    assert callable(ZeroEngine.step)
    deepspeed = SimpleNamespace(backward=lambda loss: modes.append("backward"))
    engine = SimpleNamespace(_engine=deepspeed, step=lambda number: modes.append("step"))
    run = SimpleNamespace(
        engine=engine, recipe=SimpleNamespace(engine=SimpleNamespace(library="deepspeed", zero_stage=1))
    )
    callback = NoWaiting(run)
    for step in (FIRST - 1, FIRST):
        callback.before_step(step)
        deepspeed.backward(None)
        engine.step(step)
        callback.after_step(step + 1, None)
    callback.ended()
    first = ["backward", "step", "default"]
    watched = ["error", "warn", "backward", "error", "warn", "step", "error", "default"]
    assert modes == [*first, *watched, "default"]
