"""BatchNorm over all ranks: two gloo processes with uneven batches equal one process with all positions."""

import copy
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F

from maskmatch_scale.models import build_segmenter, classify
from maskmatch_scale.models.batchnorm import synchronise_batchnorm
from maskmatch_scale.models.classify import norm_relu_classify
from maskmatch_scale.models.heads import SegformerHead
from maskmatch_scale.models.units import sample_visible
from tests.conftest import TINY_SEGFORMER, TINY_VIT

RANKS = 2
ROWS = {"uneven": (5, 8), "a single row": (1, 6), "no row": (0, 7)}
"""Positions of each rank."""
IMAGES = (1, 2)
"""Images of each rank."""


def share_of(counts, rank, *tensors):
    """What a rank has of tensors over all positions or images."""
    return [tensor.split(counts)[rank].clone() for tensor in tensors]


def head_of(momentum):
    """A SegformerHead in training in float64, its BatchNorm and classifier far from their tame start."""
    torch.manual_seed(0)
    head = SegformerHead([4, 4], 4, 6, 0.0).double().train()
    head.batch_norm.momentum = momentum
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    return head


def rows_of(counts):
    """Rows of all ranks (n, 6), whose mean is far from 0, and the weights (n, 4) of their logits in the loss."""
    torch.manual_seed(1)
    return (
        100 + torch.randn(sum(counts), 6, dtype=torch.float64) * 3,
        torch.randn(sum(counts), 4, dtype=torch.float64),
    )


def train_rows(head, forward, rows, weight):
    """Two steps without an optimizer: logits, gradients of the input and of parameters, buffers."""
    rows.requires_grad_()
    for _ in range(2):  # twice: running statistics go on
        logits = forward(head, rows)
        (logits * weight).sum().backward()
    end = {"batch_norm": head.batch_norm, "classifier": head.classifier}
    gradients = {f"{name}.{n}": p.grad for name, m in end.items() for n, p in m.named_parameters()}
    return {
        "logits": logits.detach(),
        "input": rows.grad,
        "gradients": gradients,
        "buffers": dict(head.named_buffers()),
    }


def segmenter_of():
    torch.manual_seed(0)
    segmenter = build_segmenter("transformers/segformer-b0", 5, backbone_options=TINY_SEGFORMER).double().train()
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return segmenter


def images_of(segmenter):
    """Images of all ranks, their visible units, and the weights of their logits in the loss."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(sum(IMAGES), 3, 96, 64, dtype=torch.float64, generator=generator)
    visible = sample_visible(len(images), segmenter.unit_grid(96, 64), 2, generator)
    return images, visible, torch.randn(len(images), 5, 24, 16, dtype=torch.float64, generator=generator)


def train_images(segmenter, images, visible, weight):
    """A whole and a masked view in one backward, as in a step of training."""

    def buffers():
        return copy.deepcopy(dict(segmenter.named_buffers()))

    images.requires_grad_()
    found = {"before": buffers(), "logits": segmenter(images), "buffers": buffers()}
    found |= {"masked": segmenter(images, visible), "after masked": buffers()}
    ((found["logits"] + found["masked"].square()) * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in segmenter.named_parameters()}
    return found | {"input": images.grad, "gradients": gradients}


def on_a_rank(rank, folder):
    """Everything that needs two ranks; what this one finds lies in FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    # A collective that one rank leaves out is an error within a minute.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(minutes=1)
    )

    def sum_over_ranks(values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    def end_of(head, rows):
        return norm_relu_classify(rows, head.batch_norm, head.dropout, head.classifier)

    found = {}
    segmenter = segmenter_of()
    assert synchronise_batchnorm(segmenter, sum_over_ranks) == 1
    found["images"] = train_images(segmenter, *share_of(IMAGES, rank, *images_of(segmenter)))
    classify.chunk_length = lambda *_: 3  # several chunks, not equally many on both ranks
    for name, counts in ROWS.items():
        for momentum in (0.1, None):
            head = head_of(momentum)
            synchronise_batchnorm(head, sum_over_ranks)
            found[name, momentum] = train_rows(head, end_of, *share_of(counts, rank, *rows_of(counts)))
    with pytest.raises(ValueError, match="1 position"):  # both ranks, and none waits for the other
        end_of(head, torch.ones(rank, 6, dtype=torch.float64))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-ranks")
    multiprocessing.spawn(on_a_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def assert_same(found, expected):
    """Results of all ranks are those of one process: values joined, gradients of parameters added up."""
    for key in ("logits", "masked", "input"):
        if key in expected:
            joined = torch.cat([one[key] for one in found])
            torch.testing.assert_close(joined, expected[key], rtol=1e-9, atol=1e-9)
    for name, gradient in expected["gradients"].items():
        total = sum(one["gradients"][name] for one in found)
        torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-9)
    for one in found:
        assert one["buffers"].keys() == expected["buffers"].keys()
        for name, buffer in expected["buffers"].items():
            torch.testing.assert_close(one["buffers"][name], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_equal_torchs_own_modules_on_all_rows(two_ranks, name, momentum):
    def modules(head, rows):
        maps = head.batch_norm(rows.T[None, :, :, None])
        return head.classifier(F.relu(maps))[0, :, :, 0].T

    expected = train_rows(head_of(momentum), modules, *rows_of(ROWS[name]))
    assert expected["buffers"]["batch_norm.num_batches_tracked"] == 2
    assert_same([rank[name, momentum] for rank in two_ranks], expected)


def test_two_ranks_equal_one_on_whole_and_masked_images(two_ranks):
    segmenter = segmenter_of()
    expected = train_images(segmenter, *images_of(segmenter))
    found = [rank["images"] for rank in two_ranks]
    assert_same(found, expected)
    # Each rank by its own batch would be something else.
    images, *_ = share_of(IMAGES, 0, *images_of(segmenter))
    assert (segmenter_of()(images) - found[0]["logits"]).abs().max() > 1e-2


def test_masked_views_leave_running_statistics_alone_on_two_ranks(two_ranks):
    """Teacher, evaluation and export run on whole images by these statistics.

    A masked view's features are partly guesses of the context decoder, distributed otherwise. Were they averaged in,
    whole images would be normalised by statistics that are those of no image.
    """
    for rank in two_ranks:
        found = rank["images"]
        for name, buffer in found["buffers"].items():
            assert not buffer.equal(found["before"][name]), name  # the whole view moves them,
            assert buffer.equal(found["after masked"][name]), name  # the masked one does not


def test_one_rank_alone_is_an_ordinary_batchnorm():
    calls = []

    def sum_over_ranks(values):
        calls.append(tuple(values.shape))
        return values.clone()

    heads = head_of(0.1), head_of(0.1)
    assert synchronise_batchnorm(heads[0], sum_over_ranks) == 1
    rows, weight = rows_of((13,))
    results = []
    for head in heads:
        logits = norm_relu_classify(rows.requires_grad_(), head.batch_norm, head.dropout, head.classifier)
        results.append([logits, *torch.autograd.grad((logits * weight).sum(), [rows, *head.batch_norm.parameters()])])
    for own, plain in zip(*results):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)
    assert calls == [(7,), (6,), (2, 6)]  # Σ x and the count; Σ (x − mean)²; Σ dy and Σ dy · (x − mean)


def test_eval_mode_sends_nothing():
    def refuse(values):
        raise AssertionError("a collective in eval mode: ranks evaluate different numbers of images")

    segmenter = segmenter_of()
    images, visible, _ = images_of(segmenter)
    synchronise_batchnorm(segmenter, refuse)
    segmenter.eval()
    expected = segmenter_of().eval()
    assert segmenter(images).equal(expected(images))
    segmenter(images, visible).sum().backward()  # frozen: trained in eval mode
    with pytest.raises(AssertionError, match="collective"):
        segmenter.train()(images)


@pytest.mark.parametrize("buffers", [torch.bfloat16, torch.float32])  # DeepSpeed leaves buffers in float32
@pytest.mark.parametrize("synchronised", [True, False])
def test_statistics_of_bfloat16_parameters_are_those_of_float32(monkeypatch, synchronised, buffers):
    # 2000 chunks: a sum in bfloat16 stands still at 256 times a summand, long before the last.
    monkeypatch.setattr(classify, "chunk_length", lambda *_: 50)
    torch.manual_seed(0)
    rows = (2 + torch.randn(100_000, 6)).bfloat16()
    sent = []

    def sum_over_ranks(values):
        sent.append(values.dtype)
        return values.clone()

    head = SegformerHead([4, 4], 4, 6, 0.0).bfloat16().train()
    head.batch_norm.momentum = 1.0  # running statistics are the batch's own
    for running in (head.batch_norm.running_mean, head.batch_norm.running_var):
        running.data = running.data.to(buffers)
    if synchronised:
        synchronise_batchnorm(head, sum_over_ranks)
    inputs = rows.clone().requires_grad_()
    logits = norm_relu_classify(inputs, head.batch_norm, head.dropout, head.classifier)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    assert sent == [torch.float32] * (3 * synchronised)
    rounding = 2**-8 if buffers == torch.bfloat16 else 1e-5
    variance, mean = torch.var_mean(rows.double(), 0)
    for found, exact in ((head.batch_norm.running_mean, mean), (head.batch_norm.running_var, variance)):
        assert found.dtype == buffers
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=0)

    exact = copy.deepcopy(head).float()
    exact.zero_grad()
    exact.batch_norm.__class__ = nn.BatchNorm2d
    same = rows.float().requires_grad_()
    expected = exact.classifier(F.relu(exact.batch_norm(same.T[None, :, :, None])))[0, :, :, 0].T
    (expected * weight.float()).sum().backward()
    found = [logits, inputs.grad, *(p.grad for p in (*head.batch_norm.parameters(), *head.classifier.parameters()))]
    wanted = [expected, same.grad, *(p.grad for p in (*exact.batch_norm.parameters(), *exact.classifier.parameters()))]
    for own, want in zip(found, wanted, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.float() - want).norm() < 1e-2 * want.norm()

    features = [torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)] * 2
    assert head.eval()(features).dtype == torch.bfloat16  # running statistics of either dtype will do


def test_a_batchnorm_that_is_not_the_heads_is_refused():
    segmenter = segmenter_of()
    segmenter.backbone.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"backbone\.stem\.1 \(BatchNorm1d\) cannot be synchronised"):
        synchronise_batchnorm(segmenter, torch.clone)
    assert type(segmenter.head.batch_norm) is nn.BatchNorm2d  # nothing is half done
    segmenter.backbone.stem = nn.Identity()
    assert synchronise_batchnorm(segmenter, torch.clone) == 1
    # Who calls it as a module would normalise by this rank alone.
    with pytest.raises(RuntimeError, match="by itself"):
        segmenter.head.batch_norm(torch.randn(2, 16, 3, 3, dtype=torch.float64))


def test_a_model_without_batchnorm_has_none_to_synchronise():
    vit = build_segmenter("timm/vit_tiny_patch16_224", 3, backbone_options=TINY_VIT)
    assert synchronise_batchnorm(vit, torch.clone) == 0


def test_copies_are_synchronised_and_names_stay():
    class Group:
        """As a process group, it cannot be copied."""

        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

        def sum_over_ranks(self, values):
            calls.append(values)
            return values.clone()

    calls = []
    plain, segmenter = segmenter_of(), segmenter_of()
    synchronise_batchnorm(segmenter, Group().sum_over_ranks)
    assert list(segmenter.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in segmenter.named_parameters()] == [n for n, _ in plain.named_parameters()]
    teacher = copy.deepcopy(segmenter)
    images, *_ = images_of(segmenter)
    with torch.no_grad():
        teacher(images)
    assert len(calls) == 2
    norms = [model.head.batch_norm for model in (segmenter, teacher)]
    assert not norms[0].running_mean.equal(norms[1].running_mean)  # buffers of its own
    plain.load_state_dict(teacher.state_dict(), strict=True)
    # Once more, with another callable: it takes the place of the first.
    assert synchronise_batchnorm(segmenter, torch.clone) == 1
    segmenter(images)
    assert len(calls) == 2
