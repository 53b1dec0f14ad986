"""Other channels than RGB: the stem of weights for another number of them, what is said, and what is refused."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import adapt_input_conv

from maskmatch_scale.models import build_segmenter, deferred
from maskmatch_scale.models.channels import statistics_of
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.models.deferred import build_deferred
from tests.conftest import TINY_SEGFORMER, TINY_VIT
from tests.models.test_start_notes import SEGFORMER, VIT, hub_folder

BACKBONES = {SEGFORMER: TINY_SEGFORMER, VIT: TINY_VIT}
STEMS = {SEGFORMER: "backbone.stages.0.patch_embeddings.proj.weight", VIT: "backbone.patch_embed.proj.weight"}
BANDS = ["red", "green", "blue", "nir", "swir"]


def small(backbone, in_channels, pretrained=None):
    torch.manual_seed(7)
    options = BACKBONES[backbone]
    return build_segmenter(backbone, 3, pretrained=pretrained, backbone_options=options, in_channels=in_channels)


def library_weights(backbone, folder):
    """Weights as the library writes them, of RGB; and their stem."""
    if backbone == SEGFORMER:
        model = hub_folder(folder, classes=3)
        return folder, model.state_dict()["segformer.stages.0.patch_embeddings.proj.weight"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    save_file(model.state_dict(), folder / "vit.safetensors")
    return folder / "vit.safetensors", model.state_dict()["patch_embed.proj.weight"]


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_librarys_weights_get_a_stem_by_timms_rule(tmp_path, backbone, channels):
    weights, stem = library_weights(backbone, tmp_path)
    segmenter = small(backbone, channels, weights)
    assert segmenter.state_dict()[STEMS[backbone]].equal(adapt_input_conv(channels, stem))
    line = segmenter.start_notes[0]
    assert line.startswith(f"stem: 3 → {channels} channels: ")
    assert line.endswith(f", as timm does ({STEMS[backbone]})")
    plain = small(backbone, 3, weights)
    assert not any(note.startswith("stem") for note in plain.start_notes)
    rest = {name: value for name, value in plain.state_dict().items() if name.startswith("backbone.")}
    for name, value in rest.items():
        assert name == STEMS[backbone] or segmenter.state_dict()[name].equal(value), name


@pytest.mark.parametrize("stored", [1, 3, 5])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_segmenters_own_weights_are_adapted_likewise(tmp_path, backbone, stored):
    before = small(backbone, stored)
    save_file(before.state_dict(), tmp_path / "own.safetensors")
    for channels in (1, 3, 5):
        segmenter = small(backbone, channels, tmp_path / "own.safetensors")
        expected = adapt_input_conv(channels, before.state_dict()[STEMS[backbone]], base_chans=stored)
        assert segmenter.state_dict()[STEMS[backbone]].equal(expected)
        assert len(segmenter.start_notes) == (stored != channels)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_made_one_at_a_time_are_the_same(tmp_path, monkeypatch, backbone, channels):
    monkeypatch.setattr(deferred, "SMALLEST_BYTES", 64)
    monkeypatch.setattr(deferred, "RESIDENT_BYTES", 2048)
    weights, _ = library_weights(backbone, tmp_path)
    whole = small(backbone, channels, weights)
    save_file(whole.state_dict(), tmp_path / "own.safetensors")
    for source in (weights, tmp_path / "own.safetensors", None):
        whole = small(backbone, channels, source)
        module, made = build_deferred(lambda source=source: small(backbone, channels, source))
        assert made is not None
        assert module.start_notes == whole.start_notes
        for name, value in whole.named_parameters():
            own = made.make(name) if name in made else dict(module.named_parameters())[name]
            assert own.equal(value), name


def test_a_file_for_as_many_channels_is_loaded_as_it_is_and_one_for_others_is_refused(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=5, **TINY_VIT)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    segmenter = small(VIT, 5, tmp_path / "vit.safetensors")
    assert segmenter.start_notes == ("new, at random: the head",)
    assert segmenter.backbone.patch_embed.proj.weight.equal(model.patch_embed.proj.weight)
    for channels in (3, 4):
        with pytest.raises(ValueError, match=r"vit\.safetensors' does not fit .*other channels than RGB") as error:
            small(VIT, channels, tmp_path / "vit.safetensors")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_statistics_are_those_of_the_colours_and_their_mean_for_other_bands(backbone):
    plain, named = small(backbone, 3), small(backbone, ["nir", "blue", "red"])
    assert (plain.channels, plain.in_channels, plain.sees_colours) == (("red", "green", "blue"), 3, True)
    assert (named.channels, named.in_channels, named.sees_colours) == (("nir", "blue", "red"), 3, False)
    for own, colours in ((named.mean, plain.mean), (named.std, plain.std)):
        assert own == (sum(colours) / 3, colours[2], colours[0])
    assert small(backbone, ["red", "green", "blue"]).mean == plain.mean


@given(st.permutations(BANDS), st.tuples(*[st.floats(0, 1)] * 3))
def test_a_colour_keeps_its_statistics_wherever_it_is(names, colours):
    found = dict(zip(names, statistics_of(names, colours), strict=True))
    assert tuple(found[name] for name in ("red", "green", "blue")) == colours
    assert found["nir"] == found["swir"] == sum(colours) / 3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_images_of_other_channels_are_refused(backbone):
    segmenter = small(backbone, BANDS).eval()
    assert segmenter(torch.zeros(1, 5, 64, 64)).shape[1] == 3
    with pytest.raises(ValueError, match=r"must be float \(B, 5, H, W\), normalised, with the channels red, .*, swir"):
        segmenter(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"must be float \(B, 3, H, W\), normalised$"):
        small(backbone, 3)(torch.zeros(1, 5, 64, 64))


@pytest.mark.parametrize("key", ["in_chans", "num_channels"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_options_do_not_say_how_many_channels_there_are(backbone, key):
    with pytest.raises(ValueError, match=rf"^model\.backbone_options\.{key}: the data decide the channels"):
        build_segmenter(backbone, 2, backbone_options={key: 3})


@pytest.mark.parametrize("channels", [0, [], ["red", "red"]])
def test_no_channels_and_two_of_one_name_are_refused(channels):
    with pytest.raises(ValueError, match="in_channels"):
        build_segmenter(VIT, 2, in_channels=channels)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cost_grows_by_the_stem_alone(backbone):
    with torch.device("meta"):
        three, five = small(backbone, 3), small(backbone, 5)
    stem = three.state_dict()[STEMS[backbone]]
    outputs = 64 * 64 // three.encoder.strides[0] ** 2
    more = outputs * stem.numel() * 2 // 3
    assert encoder_macs(five, 64, 64) - encoder_macs(three, 64, 64) == more
    assert encoder_train_macs(five, 64, 64) - encoder_train_macs(three, 64, 64) == 2 * more
