"""Building segmenters: sizes, defaults, weights in and out, and errors that say what to do."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import SegformerConfig, SegformerForImageClassification, SegformerForSemanticSegmentation

from maskmatch_scale.models import build_segmenter, units
from maskmatch_scale.models.weights import to_own_name, to_transformers_name

SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(("size", "millions"), [("b0", 3.7), ("b1", 13.7), ("b2", 27.5)])
def test_official_sizes_have_the_papers_parameters(size, millions):
    segmenter = build_segmenter(f"transformers/segformer-{size}", 150, context=False)
    assert sum(p.numel() for p in segmenter.parameters()) / 1e6 == pytest.approx(millions, abs=0.15)
    assert segmenter.unit_px == 32
    assert segmenter.mean == (0.485, 0.456, 0.406)


def test_same_seed_same_weights_and_context_under_its_own_names():
    states = []
    for context in (True, True, False):
        torch.manual_seed(3)
        segmenter = build_segmenter("timm/vit_tiny_patch16_224", 4, context=context, backbone_options=SMALL_VIT)
        states.append(segmenter.state_dict())
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    assert {n.split(".")[0] for n in states[0]} == {"backbone", "head", "context"}
    exported = {n: v for n, v in states[0].items() if not n.startswith("context.")}
    assert all(value.equal(states[2][name]) for name, value in exported.items())
    segmenter.load_state_dict(exported, strict=True)


@pytest.mark.parametrize(
    ("name", "options", "unit"),
    [("vit_tiny_patch16_224", {}, 32), ("vit_tiny_patch16_224", {"patch_size": 8}, 32),
     ("vit_small_patch14_dinov2", {}, 28), ("vit_base_patch32_224", {}, 32),
     ("vit_tiny_patch16_224", {"patch_size": 40}, 40)],
)  # fmt: skip
def test_default_unit_of_a_vit(name, options, unit):
    options = {**SMALL_VIT, **options}
    segmenter = build_segmenter(f"timm/{name}", 3, image_size=2 * unit, backbone_options=options)
    assert segmenter.unit_px == unit
    assert segmenter.unit_grid(2 * unit, 3 * unit) == (2, 3)


def test_image_size_lays_out_the_position_embedding():
    segmenter = build_segmenter("timm/vit_tiny_patch16_224", 3, image_size=(64, 96), backbone_options=SMALL_VIT)
    assert segmenter.backbone.patch_embed.grid_size == (4, 6)
    assert segmenter(torch.randn(1, 3, 48, 80)).shape == (1, 3, 3, 5)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(segformer_folder):
    folder = segformer_folder()
    torch.manual_seed(1)
    model = SegformerForSemanticSegmentation(SegformerConfig.from_pretrained(folder, num_labels=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return folder, model


@pytest.mark.parametrize("kind", ["folder", "its own folder", "safetensors", "pth", "version 4 names"])
def test_transformers_weights_load_both_ways(published, tmp_path, kind):
    folder, model = published
    images = torch.randn(2, 3, 64, 96)
    saved = tmp_path / "saved"
    pretrained = saved
    if kind == "folder":
        model.save_pretrained(saved)
    elif kind == "its own folder":
        model.save_pretrained(folder)
        pretrained = True
    elif kind == "safetensors":
        pretrained = tmp_path / "weights.safetensors"
        save_file(model.state_dict(), pretrained)
    elif kind == "pth":
        pretrained = str(tmp_path / "weights.pth")
        torch.save(model.state_dict(), pretrained)
    else:  # what the checkpoints on the hub hold
        pretrained = tmp_path / "weights.safetensors"
        renamed = {}
        for name, value in model.state_dict().items():
            name = name.replace("decode_head.linear_projections", "decode_head.linear_c")
            parts = name.split(".")
            if parts[1] == "stages":
                stage, kind_, rest = parts[2], parts[3], ".".join(parts[4:])
                kind_ = {"blocks": "block"}.get(kind_, kind_)
                name = f"segformer.encoder.{kind_}.{stage}.{rest}"
                for new, old in {
                    "attention.q_proj": "attention.self.query", "attention.k_proj": "attention.self.key",
                    "attention.v_proj": "attention.self.value", "attention.o_proj": "attention.output.dense",
                    "attention.sequence_reduction.sequence_reduction": "attention.self.sr",
                    "attention.sequence_reduction.layer_norm": "attention.self.layer_norm",
                    "mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2",
                    "layernorm_before": "layer_norm_1", "layernorm_after": "layer_norm_2",
                }.items():  # fmt: skip
                    name = name.replace(new, old)
            renamed[name] = value
        assert "segformer.encoder.block.0.0.attention.self.sr.weight" in renamed
        save_file(renamed, pretrained)

    segmenter = build_segmenter(f"transformers/{folder}", 5, pretrained=pretrained).eval()
    torch.testing.assert_close(segmenter(images), model(images).logits, rtol=0, atol=1e-5)

    ours = {n: v for n, v in segmenter.state_dict().items() if not n.startswith("context.")}
    assert {to_transformers_name(n) for n in ours} == set(model.state_dict())
    assert all(to_own_name(to_transformers_name(n)) == n for n in ours)
    model.load_state_dict({to_transformers_name(n): v for n, v in ours.items()}, strict=True)


def test_an_imagenet_encoder_loads_and_the_head_stays_random(published, tmp_path):
    folder, _ = published
    encoder = SegformerForImageClassification(SegformerConfig.from_pretrained(folder))
    encoder.save_pretrained(tmp_path / "mit")
    segmenter = build_segmenter(f"transformers/{folder}", 5, pretrained=tmp_path / "mit")
    theirs = encoder.segformer.state_dict()
    assert all(value.equal(theirs[name]) for name, value in segmenter.backbone.state_dict().items())


def test_other_classes_keep_a_random_classifier_alone(published, tmp_path):
    folder, model = published
    model.save_pretrained(tmp_path / "saved")
    segmenter = build_segmenter(f"transformers/{folder}", 9, pretrained=tmp_path / "saved")
    assert segmenter.head.classifier.weight.shape[0] == 9
    assert segmenter.head.linear_fuse.weight.equal(model.decode_head.linear_fuse.weight)


def test_the_librarys_own_weights_are_asked_for_by_their_hub_names(monkeypatch):
    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(SegformerForSemanticSegmentation, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="nvidia/mit-b0"):
        build_segmenter("transformers/segformer-b0", 3, pretrained=True)
    assert asked == ["nvidia/mit-b0"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "folder"])
def test_timm_weights_load_through_timm_which_resamples_positions(tmp_path, suffix):
    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL_VIT)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    elif suffix == "pth":
        torch.save(model.state_dict(), path)
    else:
        path.mkdir()
        save_file(model.state_dict(), path / "model.safetensors")
    segmenter = build_segmenter(
        "timm/vit_tiny_patch16_224", 3, pretrained=path, image_size=96, backbone_options=SMALL_VIT
    )
    assert segmenter.backbone.blocks[1].mlp.fc1.weight.equal(model.blocks[1].mlp.fc1.weight)
    assert segmenter.backbone.pos_embed.shape[1] == 6 * 6 + 1


@pytest.mark.parametrize("backbone", ["segformer", "vit"])
def test_a_segmenters_own_weights_load(build, segformer_folder, tmp_path, backbone):
    segmenter = build(backbone).float().eval()
    save_file(segmenter.state_dict(), tmp_path / "own.safetensors")
    name = "transformers/" + str(segformer_folder(strides=[4, 2, 2, 2]))
    options = {}
    if backbone == "vit":
        name, options = "timm/vit_tiny_patch16_224", {**SMALL_VIT, "depth": 3, "patch_size": 8}
    again = build_segmenter(name, 5, pretrained=tmp_path / "own.safetensors", context=False, backbone_options=options)
    images = torch.randn(1, 3, 64, 64)
    assert again.eval()(images).equal(segmenter(images))


def test_pickles_are_refused(tmp_path, segformer_folder):
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        build_segmenter(f"transformers/{segformer_folder()}", 3, pretrained=tmp_path / "evil.pth")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        ("resnet50", {}, "backbone: 'resnet50' is neither"),
        ("timm/", {}, "backbone: 'timm/' is neither"),
        ("timm/vit_smal_patch16_224", {}, "did you mean vit_small_patch16"),
        ("timm/resnet18", {}, "backbone: timm/resnet18 is no ViT"),
        ("timm/deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
        ("timm/vit_small_r26_s32_224", {}, "would leak"),
        ("timm/vit_tiny_patch16_224", {"backbone_options": {"dept": 3}}, "unknown key.*dept"),
        ("timm/vit_tiny_patch16_224", {"unit_px": 24}, "unit_px: 24 is not a multiple of the 16 px patch; 16, 32, 64"),
        ("timm/vit_tiny_patch16_224", {"unit_px": 0}, "unit_px: 0 is not"),
        ("transformers/segformer-b7", {}, "neither one of segformer-b0"),
        ("transformers/segformer-b0", {"unit_px": 16}, "unit_px: 16 does not fit; a unit of .* is 32 px"),
        ("transformers/segformer-b0", {"backbone_options": {"drop_pth": 0.1}}, "'drop_pth' is not a key"),
        ("transformers/segformer-b0", {"head": "fpn"}, "'fpn' is not one of segformer, linear, pixel_shuffle, dpt"),
        ("timm/vit_tiny_patch16_224", {"head": "dpt", "backbone_options": SMALL_VIT}, "4 depths, .* has 2 blocks"),
        ("transformers/segformer-b0", {"pretrained": "/nowhere.pth"}, "'/nowhere.pth' does not exist"),
        ("transformers/segformer-b0", {"backbone_options": {"strides": [4, 2, 2, 1]}}, r"units of \[32, 32, 32, 16\]"),
        ("transformers/segformer-b0", {"backbone_options": {"patch_sizes": [4, 3, 3, 3]}}, "must be odd"),
    ],
)
def test_errors_name_the_argument_and_what_fits(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_segmenter(backbone, 3, **arguments)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes: 1"):
        build_segmenter("transformers/segformer-b0", 1)


def test_calls_name_what_does_not_fit(build):
    vit, segformer = build("vit"), build("segformer")
    visible = units.sample_visible(1, (1, 1), 1)
    with pytest.raises(ValueError, match=r"images: 60×64 px is not whole patches of 8 px.*64×64"):
        vit(torch.randn(1, 3, 60, 64).double())
    with pytest.raises(ValueError, match=r"48×72 px is not whole units of 32 px.*64×64.*unit_px=24"):
        vit(torch.randn(1, 3, 48, 72).double(), visible)
    with pytest.raises(ValueError, match=r"48×72 px is not whole units of 32 px.*multiples of 32, e.g. 64×64$"):
        segformer.unit_grid(48, 72)
    with pytest.raises(ValueError, match="mode: 'paint' is not one of drop, zero"):
        vit(torch.randn(1, 3, 32, 32).double(), visible, mode="paint")
    with pytest.raises(ValueError, match=r"images: torch\.uint8"):
        vit(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="visible: dtype"):
        segformer(torch.randn(1, 3, 32, 32).double(), visible.int())
