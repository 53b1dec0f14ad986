"""Evaluating a run that goes on meanwhile, and how its recipe says that held-out images are predicted."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch

from maskmatch_scale.checkpoints.keeping import Keep, Keeper
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import UserError
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.record.report import write_report
from maskmatch_scale.runs.evaluate import evaluate_run, inference_of
from maskmatch_scale.runs.model import build_student
from maskmatch_scale.runs.model_checks import check_model
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT, recipe_maker, rewrite_shard

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A run of one step."""
    make = recipe_maker(shapes, tmp_path_factory.mktemp("trained"))
    return train(make(run={"steps": 1, "evaluate_every": 0}, engine={"precision": "fp32"}))


def pictures_of(run):
    return {str(path.relative_to(run / "pictures")) for path in (run / "pictures").rglob("*")}


def test_pictures_are_those_of_the_last_evaluation(trained):
    evaluate_run(trained, "val", ("ema",), overrides=["evaluation.pictures=3"])
    before = pictures_of(trained)
    evaluate_run(trained, "val", ("student",), overrides=["evaluation.pictures=2"])
    after = pictures_of(trained)
    assert len(before & after) < len(before)
    assert len([name for name in after if name.endswith("image.png")]) == 2
    assert not [name for name in after if "prediction-ema" in name or ".writing" in name]
    evaluate_run(trained, "val", ("ema",), overrides=["evaluation.pictures=0"])
    assert pictures_of(trained) == set()


def test_fp32_is_multiplied_in_tf32_where_the_run_did(trained, monkeypatch):
    """Without a GPU the setting can be seen, but changes nothing."""
    monkeypatch.setattr("maskmatch_scale.runs.evaluate.uses_tf32", lambda device, precision: precision == "fp32")
    seen = []
    try:
        evaluate_run(
            trained, "val", ("ema",), lambda: seen.append(torch.get_float32_matmul_precision()),
            ["evaluation.pictures=0"],
        )  # fmt: skip
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"high"}


def test_one_checkpoint_of_a_run_may_be_named(make_recipe, monkeypatch, maskmatch):
    scores = iter((0.5, 0.4, 0.3))
    with monkeypatch.context() as patched:
        patched.setattr(ConfusionMatrix, "miou", lambda matrix: next(scores))
        run = train(make_recipe(run={"steps": 2, "evaluate_every": 1, "keep_last": 1}, engine={"precision": "fp32"}))
    folder, (newest,) = run / "checkpoints", evaluate_run(run, "val", ("ema",), overrides=["evaluation.pictures=0"])
    assert newest["step"] == 2
    for where in (folder / "best", folder / "step-00000001"):
        code, out, _ = maskmatch("evaluate", where, "evaluation.pictures=0", "--weights", "ema", "--json")
        (record,) = json.loads(out.splitlines()[-1])  # after what training has shown
        assert (code, record["step"]) == (0, 1)
        assert json.loads((run / "evaluation" / "val-ema.json").read_text()) == record
    monkeypatch.chdir(folder)
    assert maskmatch("evaluate", "best", "evaluation.pictures=0", "--weights", "ema")[0] == 0
    assert "val (ema) was evaluated at step 1" in write_report([run]).read_text()
    code, _, err = maskmatch("evaluate", folder.parent.parent, "--weights", "ema")
    assert (code, "not a run directory" in err) == (2, True)


def test_a_mean_over_one_class_is_said(make_recipe, shapes, tmp_path, maskmatch, capfd):
    """As of binary masks that were taken for ignored: in training, and by `evaluate`."""
    root = shutil.copytree(shapes, tmp_path / "shapes")
    for split in ("labelled", "dev", "val"):
        index = ShardIndex.load(root)
        for shard in index.streams[split].shards:
            ground = encode_label(np.zeros((96, 128), np.uint8))
            with tarfile.open(root / shard.file) as tar:
                names = [name for name in tar.getnames() if name.endswith(".png")]
            rewrite_shard(root, shard.file, dict.fromkeys(names, ground))
    content = json.loads((root / "index.json").read_text())
    content["streams"]["labelled"]["class_pixels"] = [8 * 96 * 128, 0, 0, 9 * 96 * 128]
    (root / "index.json").write_text(json.dumps(content))
    keys = {"steps": 12, "evaluate_every": 6}
    run = train(make_recipe(data={"root": str(root)}, run=keys, optim={"lr": 0.05}, method={"base": "supervised"}))
    shown = capfd.readouterr().out
    assert "warning: labelled samples: no pixel of classes 'square', 'disc'" in shown
    assert "warning: labelled samples: 52.9% of the pixels are ignored" in shown
    warned = "warning: dev: no pixel of classes 'square', 'disc'; their IoU says nothing"
    assert shown.count(warned) == 1  # of three evaluations
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert (last["classes"], last["classes_in_mean"], last["miou"]) == (3, 1, 1.0)
    assert "dev mIoU 1.0000 (1 of 3 classes)" in shown
    assert "warning: dev: labels and predictions have one class alone" in shown
    code, out, err = maskmatch("evaluate", run, "evaluation.pictures=0", "--weights", "student")
    assert (code, "1 of 3" in out) == (0, True)
    assert "warning: val: labels and predictions have one class alone; its mean IoU of 1 says nothing" in err
    record = json.loads((run / "evaluation" / "val-student.json").read_text())
    assert record["classes_without_pixels"] == ["square", "disc"]


def test_thresholds_by_class_go_by_the_names_of_the_run(make_recipe, shapes, tmp_path):
    """The index of the data may name no classes, or others by now."""
    root = shutil.copytree(shapes, tmp_path / "shapes")
    run = train(
        make_recipe(
            data={"root": str(root)},
            method={"threshold": {"default": 0.0, "disc": 0.5}},
            run={"steps": 1, "evaluate_every": 0},
            engine={"precision": "fp32"},
        )
    )
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(index | {"classes": ["a", "b", "c"]}))
    (record,) = evaluate_run(run, "val", ("ema",), overrides=["evaluation.pictures=0"], locality=True)
    assert record["locality"]["pseudo_labels"]["threshold"] == {"default": 0.0, "disc": 0.5}
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("disc: 0.5", "disk: 0.5"))
    with pytest.raises(UserError, match=r"recipe\.yaml: method\.threshold: the data have no class 'disk'"):
        evaluate_run(run, "val", ("ema",), locality=True)


def test_windows_are_the_training_crop_or_have_a_size_of_their_own(make_recipe):
    for keys, size in (({}, (64, 64)), ({"window_px": 96}, (96, 96)), ({"window_px": [80, 112]}, (80, 112))):
        recipe = make_recipe(model=VIT, evaluation=keys)
        student = build_student(recipe, ShardIndex.load(recipe.data.root))
        how = inference_of(recipe, student, torch.device("cpu"))
        assert (how.window_px, how.patch_px) == (size, 16)
        check_model(recipe, student)


def test_a_window_that_the_model_does_not_take_is_refused_before_the_run(make_recipe):
    recipe = make_recipe(model=VIT, evaluation={"window_px": [80, 100]})
    student = build_student(recipe, ShardIndex.load(recipe.data.root))
    with pytest.raises(UserError, match=r"evaluation\.window_px=\[80, 100\]: .* 80×96"):
        check_model(recipe, student)
    smaller = make_recipe(model=VIT, evaluation={"scales": [0.25, 1.0]})
    with pytest.raises(UserError, match=r"evaluation\.scales=\[0\.25, 1\.0\] with windows of 64×64 px"):
        check_model(smaller, student)


def test_both_models_are_those_of_one_checkpoint(make_recipe):
    """The run writes a newer one, and would delete the old one, while the teacher is evaluated."""
    run = train(make_recipe(run={"steps": 1, "evaluate_every": 0}))
    folder = run / "checkpoints"
    keeper = Keeper(folder, Keep(1, 0, 0), 1)

    def goes_on():
        if not (folder / "step-00000002").exists():
            shutil.copytree(folder / "step-00000001", folder / "step-00000002")
            (folder / "step-00000002" / "state.json").write_text('{"step": 2}')
            (folder / "latest").write_text("step-00000002")
            keeper.tidy(2)

    found = evaluate_run(run, "val", ("ema", "student"), goes_on)
    assert [(record["weights"], record["step"]) for record in found] == [("ema", 1), ("student", 1)]
    keeper.tidy(2)
    assert not (folder / "step-00000001").exists()
