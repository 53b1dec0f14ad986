"""Weights of other classes, kinds and sizes: what is loaded, what is new, and a line for all that is not loaded."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import SegformerConfig, SegformerForImageClassification, SegformerForSemanticSegmentation

from maskmatch_scale.models import build_segmenter, deferred
from maskmatch_scale.models.deferred import build_deferred
from tests.conftest import TINY_SEGFORMER, TINY_VIT

SEGFORMER, VIT = "transformers/segformer-b0", "timm/vit_tiny_patch16_224"
CLASSIFIER = ("head.classifier.weight", "head.classifier.bias")


def hub_folder(folder, classes=150, kind=SegformerForSemanticSegmentation, **overrides):
    """A SegFormer as on the hub, with random weights and running statistics."""
    torch.manual_seed(1)
    model = kind(SegformerConfig(num_labels=classes, **(TINY_SEGFORMER | overrides)))
    with torch.no_grad():
        for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            value.add_(torch.rand_like(value), alpha=0.1)
    model.save_pretrained(folder)
    return model


def segformer(pretrained, classes=12, **arguments):
    torch.manual_seed(7)
    return build_segmenter(SEGFORMER, classes, pretrained=pretrained, backbone_options=TINY_SEGFORMER, **arguments)


def vit(pretrained, classes=3, **options):
    torch.manual_seed(7)
    return build_segmenter(VIT, classes, pretrained=pretrained, backbone_options=TINY_VIT | options)


def test_a_segformer_of_the_hub_with_other_classes_gives_all_but_its_classifier(tmp_path, capfd):
    model = hub_folder(tmp_path)
    capfd.readouterr()
    segmenter = segformer(tmp_path)
    assert segmenter.start_notes == (f"classifier: 150 → 12 classes, new ({', '.join(CLASSIFIER)})",)
    theirs, plain = model.state_dict(), segformer(None).state_dict()
    for name, value in segmenter.state_dict().items():
        if name in CLASSIFIER or name.startswith("context."):
            assert value.equal(plain[name]), name  # drawn from the seed
        else:
            key = name.replace("backbone.", "segformer.").replace("head.", "decode_head.")
            assert value.equal(theirs[key]), name
    assert capfd.readouterr() == ("", "")  # and no table of transformers


def test_nothing_is_said_where_everything_fits(tmp_path):
    hub_folder(tmp_path, classes=12)
    assert segformer(tmp_path).start_notes == ()
    assert segformer(None).start_notes == ()


@pytest.mark.parametrize("head", ["segformer", "linear", "pixel_shuffle"])
def test_weights_made_one_at_a_time_are_the_same(tmp_path, monkeypatch, head):
    monkeypatch.setattr(deferred, "SMALLEST_BYTES", 64)
    monkeypatch.setattr(deferred, "RESIDENT_BYTES", 2048)
    hub_folder(tmp_path)
    whole = segformer(tmp_path, head=head)
    module, weights = build_deferred(lambda: segformer(tmp_path, head=head))
    assert weights is not None
    assert module.start_notes == whole.start_notes != ()
    for name, value in whole.named_parameters():
        made = weights.make(name) if name in weights else dict(module.named_parameters())[name]
        assert made.equal(value), name


def test_an_own_file_with_other_classes_and_another_head(tmp_path):
    save_file(segformer(None, classes=5).state_dict(), tmp_path / "own.safetensors")
    segmenter = segformer(tmp_path / "own.safetensors")
    assert segmenter.start_notes == (f"classifier: 5 → 12 classes, new ({', '.join(CLASSIFIER)})",)
    new, unused = segformer(tmp_path / "own.safetensors", head="linear").start_notes
    assert new.startswith("new, at random: head.classifiers.0.weight, ")
    assert unused.startswith("not loaded, since the model has no such tensor: head.batch_norm.bias, ")
    assert unused.endswith(" more")
    # Several values a cell: the number of classes is that of the model that the file is of.
    save_file(segformer(None, classes=5, head="pixel_shuffle").state_dict(), tmp_path / "own.safetensors")
    (line,) = segformer(tmp_path / "own.safetensors", head="pixel_shuffle").start_notes
    assert line.startswith("classifier: 5 → 12 classes, new (head.classifier.weight")


def test_an_imagenet_encoder_says_that_the_head_is_new(tmp_path):
    hub_folder(tmp_path, kind=SegformerForImageClassification)
    new, unused = segformer(tmp_path).start_notes
    assert new.startswith("new, at random: head.")
    assert unused == "not loaded, since the model has no such tensor: classifier.bias, classifier.weight"


@pytest.mark.parametrize("classes", [10, 1000])  # timm takes out the classifier itself
def test_a_vit_with_a_classification_head(tmp_path, classes):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **TINY_VIT)
    save_file(model.state_dict() | {"mask_token": torch.zeros(1, 24)}, tmp_path / "vit.safetensors")
    segmenter = vit(tmp_path / "vit.safetensors")
    unused, new = segmenter.start_notes
    assert unused.startswith("not loaded, since the model has no such tensor: ")
    assert sorted(unused.split(": ")[1].split(", ")) == ["head.bias", "head.weight", "mask_token"]
    assert new == "new, at random: the head"
    theirs = model.state_dict()
    assert all(value.equal(theirs[name]) for name, value in segmenter.backbone.state_dict().items())
    # timm's classes are as they were.
    assert "load_state_dict" not in vars(timm.models.vision_transformer.VisionTransformer)


def vit_file(file, change=lambda state: state, **options):
    save_file(change(timm.create_model("vit_tiny_patch16_224", **(TINY_VIT | options)).state_dict()), file)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda file: vit_file(file, embed_dim=48), "size mismatch for cls_token"),
        (lambda file: vit_file(file, depth=3), "e.g. blocks.2."),
        (lambda file: vit_file(file, depth=1), "e.g. blocks.1."),
        # Names of another library: timm would leave every weight at random.
        (lambda file: vit_file(file, lambda state: {f"trunk.{n}": v for n, v in state.items()}), "e.g. blocks.0."),
    ],
)
def test_a_vit_of_another_size_or_with_other_names_is_refused(tmp_path, spoil, part):
    spoil(tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"pretrained: .*vit\.safetensors' does not fit the backbone") as error:
        vit(tmp_path / "vit.safetensors")
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not fit the backbone"):
        build_deferred(lambda: vit(tmp_path / "vit.safetensors"))


@pytest.mark.parametrize("overrides", [{"depths": [1, 2, 1, 1]}, {"hidden_sizes": [16, 16, 16, 24]}])
def test_a_segformer_of_another_size_is_refused(tmp_path, overrides):
    hub_folder(tmp_path, **overrides)
    with pytest.raises(ValueError, match=r"does not fit the backbone, e\.g\. .*; is it another size\?$"):
        segformer(tmp_path)
