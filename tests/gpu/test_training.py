"""What only a GPU can show: `make test-gpu`. On one rank and, where there are two GPUs, on two ranks with NCCL."""

import pytest
import torch

from tests.conftest import recipe_maker
from tests.gpu.configurations import CONFIGURATIONS, HANDED_ON, RESUMED, WATCHED, runnable_on
from tests.gpu.launched import Launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="make test-gpu: there is no GPU here"),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def launched(request, tmp_path_factory, shapes):
    """All runs on one rank, or on two."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"make test-gpu: {request.param} ranks need as many GPUs, and there is one")
    folder = tmp_path_factory.mktemp("gpu")
    names = runnable_on(request.param)
    return Launched(recipe_maker(shapes, folder), folder, ranks=request.param, on_gpu=True, names=names)


def skip_unless_run(launched, name):
    if name not in launched.recipes:
        pytest.skip(f"engine.cuda_graphs is refused on {launched.ranks} ranks")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_twenty_steps_as_in_fp32_on_the_cpu(launched, name):
    skip_unless_run(launched, name)
    launched.check_training(name)


@pytest.mark.parametrize("name", WATCHED)
def test_nothing_of_ours_in_a_step_waits_for_the_gpu(launched, name):
    skip_unless_run(launched, name)
    launched.check_watched(name)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_where_it_was(launched, name):
    launched.check_continued(name)


@pytest.mark.parametrize("name", HANDED_ON)
def test_export(launched, name):
    launched.check_export(name)


@pytest.mark.parametrize("name", HANDED_ON)
def test_evaluate(launched, name):
    launched.check_evaluation(name)
