"""Views as graphs, with a recorder in the place of torch's, which needs a GPU; tests/gpu has the real one."""

import pytest
import torch

from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.graphed import GraphedViews
from tests.conftest import TINY_VIT

KEEP = torch.tensor([[0, 3], [1, 2]])


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded; a recorder runs a pass three times to warm up, as torch's does, and draws."""
    calls = []

    def record(view, samples, *, allow_unused_input):
        assert allow_unused_input  # the context decoder is not used by whole views
        assert view.training  # else torch would run it without its graph
        for _ in range(3):
            view(*samples)
            torch.rand(())
        calls.append([tuple(sample.shape) for sample in samples])
        return view

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return calls


def build():
    torch.manual_seed(0)
    options = TINY_VIT | {"img_size": 64, "drop_path_rate": 0.5}
    head = {"head": "segformer"}  # with BatchNorm
    segmenter = build_segmenter("timm/vit_tiny_patch16_224", 3, backbone_options=options, unit_px=32, **head).train()
    for parameter in segmenter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return segmenter


def seeded(run, *arguments):
    torch.manual_seed(1)
    return run(*arguments)


def test_the_pass_of_the_segmenter_recorded_once_a_shape_and_mode(recorded):
    segmenter, images = build(), torch.rand(2, 3, 64, 64)
    views = GraphedViews(segmenter)
    for _ in range(2):
        for view in ((images,), (images, KEEP), (images, KEEP, "zero")):
            torch.testing.assert_close(seeded(views, *view), seeded(segmenter, *view), rtol=0, atol=0)
    views(images[:1])
    whole = (2, 3, 64, 64)
    assert recorded == [[whole], [whole, (2, 2)], [whole, (2, 2)], [(1, 3, 64, 64)]]


def test_recording_leaves_no_trace(recorded):
    """One pass changes running statistics once, and nothing else of the warm-up is left."""
    plain, graphed, images = build(), build(), torch.rand(2, 3, 64, 64)
    assert any("running_mean" in name for name, _ in plain.named_buffers())
    seeded(plain, images)
    after = torch.rand(3)
    seeded(GraphedViews(graphed), images)
    torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)
    for (name, expected), found in zip(plain.named_buffers(), graphed.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    assert not any(parameter.grad.any() for parameter in graphed.parameters())


def test_what_is_in_eval_mode_is_recorded_in_eval_mode_and_stays_so(recorded):
    segmenter, seen = build(), []
    segmenter.freeze(1)
    segmenter.head.batch_norm.eval()  # as with model.batchnorm=frozen
    before = [module.training for module in segmenter.modules()]
    assert len(set(before)) == 2
    segmenter.head.register_forward_hook(lambda *_: seen.append([module.training for module in segmenter.modules()]))
    GraphedViews(segmenter)(torch.rand(2, 3, 64, 64))
    assert len(seen) == 4
    assert all(modes == before for modes in (*seen, [module.training for module in segmenter.modules()]))


def test_a_trained_parameter_without_a_gradient_is_an_error(recorded):
    """It would get memory of a graph: see tests/training/test_graphs.py."""
    segmenter = build()
    segmenter.freeze(1)
    for parameter in segmenter.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    views = GraphedViews(segmenter)
    views(torch.rand(2, 3, 64, 64))
    segmenter.zero_grad()
    with pytest.raises(RuntimeError, match=r"a parameter without \.grad"):
        views(torch.rand(2, 3, 64, 64))
