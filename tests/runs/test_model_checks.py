"""What is refused once the student is built, before a run writes anything."""

from pathlib import Path

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.runs.model_checks import check_graphs
from maskmatch_scale.train import train
from maskmatch_scale.training import preflight
from tests.conftest import TINY_VIT, recipe_maker

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}
GRAPHS = {"library": "accelerate", "zero_stage": 0, "cuda_graphs": True, "precision": "fp32"}


@pytest.mark.parametrize(
    ("gpu", "model", "message"),
    [
        (False, VIT, "there is no GPU here; set engine.cuda_graphs=false"),
        (True, {}, "dropout of a SegFormer draws seeds on the host, which a graph would repeat; set engine.cuda_gra"),
        (
            True,
            VIT | {"head": "segformer"},
            "dropout of model.head=segformer draws seeds on the host, which a graph would repeat; use model.head="
            "linear or dpt, or set engine.cuda_graphs=false",
        ),
    ],
)
def test_cuda_graphs_need_a_gpu_and_a_model_without_draws_on_the_host(make_recipe, monkeypatch, gpu, model, message):
    recipe = make_recipe(engine=GRAPHS, **({"model": model} if model else {}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    with pytest.raises(UserError) as caught:
        train(recipe)
    assert str(caught.value).startswith(f"engine.cuda_graphs=true: {message}")
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize("head", ["linear", "dpt", "pixel_shuffle"])
def test_cuda_graphs_are_for_one_rank(make_recipe, monkeypatch, head):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    recipe = make_recipe(engine=GRAPHS, model=VIT | {"head": head})
    options = TINY_VIT | {"depth": 4}
    student = build_segmenter(VIT["backbone"], 3, backbone_options=options, head=head, image_size=64)
    check_graphs(recipe, student, 1)
    with pytest.raises(UserError, match=r"^engine\.cuda_graphs=true: it was not tried on several ranks, .* 2; set eng"):
        check_graphs(recipe, student, 2)


@pytest.fixture(scope="module")
def large(shapes, tmp_path_factory):
    """A trained SegFormer, whose head has BatchNorm."""
    folder = tmp_path_factory.mktemp("teacher")
    run = {"dir": str(folder / "large"), "steps": 2, "evaluate_every": 0}
    return train(recipe_maker(shapes, folder)(engine={"precision": "fp32"}, run=run))


DROPPED = {"base": "fixmatch", "strong_view": {"keep": 0.5}}
MASKED = {"base": "supervised", "mask": {"keep": 0.5, "mode": "zero"}}


@pytest.fixture
def taught(make_recipe, large):
    """A recipe without labels whose teacher is frozen."""

    def make(method, stage=1, **model):
        return make_recipe(
            data={"labelled_count": 0},
            method={"teacher": str(large), "threshold": 0.0} | method,
            model=model,
            engine={"precision": "fp32", "zero_stage": stage},
            run={"steps": 1, "evaluate_every": 0},
        )

    return make


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("method", "named"), [(DROPPED, r"method\.strong_view\.keep=0\.5"), (MASKED, r"method\.base=supervised")]
)
def test_statistics_that_no_view_moves_are_refused(taught, method, named, stage):
    recipe = taught(method, stage=stage)
    with pytest.raises(
        UserError, match=rf"^data\.labelled_count=0 with {named}: the student sees no whole image"
    ) as no:
        train(recipe)
    assert "\n" not in str(no.value)
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize("method", [DROPPED, MASKED])
def test_trained_statistics_frozen_ones_and_heads_without_are_not_refused(taught, large, method):
    for more in ({"pretrained": str(large)}, {"batchnorm": "frozen"}, {"head": "linear"}):
        preflight.check(taught(method, **more), None)


def test_a_whole_view_moves_them(taught, make_recipe):
    preflight.check(taught({"base": "fixmatch", "mask": {"keep": 0.5}}), None)
    preflight.check(make_recipe(method=DROPPED, engine={"precision": "fp32"}), None)  # with labels
