"""`method.teacher: PATH` in a run, one rank: what labels, what continues, and what is refused.

The labels by the formulas: tests/engine/test_frozen_teacher.py. On two ranks: tests/distributed/test_matrix.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.opening import open_model
from maskmatch_scale.export.write import export_run
from maskmatch_scale.models.cost import encoder_macs
from maskmatch_scale.recipe.learning import uses_unlabelled
from maskmatch_scale.record.summary import method_labels, summarise
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from maskmatch_scale.training import preflight
from maskmatch_scale.training.callbacks import Callback
from tests.conftest import TINY_VIT, ShapesSource, needs_compiler, recipe_maker
from tests.distributed.reference import train_plainly

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "linear"}
ENGINES = {
    "accelerate": {"library": "accelerate", "zero_stage": 0},
    "1": {"zero_stage": 1},
    "1-bf16": {"zero_stage": 1, "precision": "bf16"},
    "3-bf16": {"zero_stage": 3, "precision": "bf16"},
}


def records(run: Path):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == "train"]


def losses(run: Path):
    return [record["loss"] for record in records(run)]


@pytest.fixture(scope="module")
def large(shapes, tmp_path_factory):
    """A run of a SegFormer, with checkpoints of steps 20 and 21."""
    folder = tmp_path_factory.mktemp("teacher")
    run = {"dir": str(folder / "large"), "steps": 21, "checkpoint_every": 20, "evaluate_every": 0}
    make = recipe_maker(shapes, folder)
    return train(make(optim={"lr": 3e-3}, engine={"precision": "fp32"}, method={"ema_decay": 0.0}, run=run))


@pytest.fixture(scope="module")
def export(large):
    export_run(large, large.parent / "export")
    return large.parent / "export"


@pytest.fixture
def student(make_recipe, large, tmp_path):
    """A recipe of a ViT that the SegFormer teaches: `student(folder, teacher=large)`."""

    def make(folder="run", teacher=large, **sections):
        run = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 0, "dir": str(tmp_path / folder)}
        own = {
            "model": VIT,
            "engine": {"precision": "fp32"} | sections.pop("engine", {}),
            "method": {"threshold": 0.4, "teacher": str(teacher)} | sections.pop("method", {}),
            "run": run | sections.pop("run", {}),
        }
        return make_recipe(**(own | sections))

    return make


def test_it_trains_as_plain_pytorch_does(student):
    recipe = student(method={"scales": [0.5, 1.0], "ema_decay": 0.7})
    run = train(recipe)
    reference = train_plainly(recipe, world_size=1)
    assert losses(run) == pytest.approx(reference.losses, rel=1e-4)
    for weights, expected in (("student", reference.student), ("ema", reference.teacher)):
        found = open_run(run, weights)[1].state_dict()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert any(0 < record["coverage"] < 1 for record in records(run))


def test_who_labels_decides_the_losses_and_a_run_and_its_export_label_alike(student, large, export, tmp_path):
    runs = {"run": large, "export": export, "checkpoint": large / "checkpoints" / "best"}
    found = {name: losses(train(student(name, path))) for name, path in runs.items()}
    assert found["run"] == found["export"] == found["checkpoint"]
    export_run(tmp_path / "export", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "labelled by `export`, step 21, another model whose weights were frozen" in card
    found["ema"] = losses(train(student("ema", "ema")))
    summaries = [summarise(tmp_path / name) for name in ("run", "ema")]
    assert method_labels(summaries) == ["MaskMatch (teacher large, step 21)", "MaskMatch (teacher ema)"]
    found["older"] = losses(train(student("older", large / "checkpoints" / "step-00000020")))
    assert found["ema"] != found["run"] != found["older"]
    assert named(tmp_path, "checkpoint", "older") == ["large, step 21", "large, step 20"]
    for name in ("checkpoint", "older"):  # before the first checkpoint
        (tmp_path / name / "checkpoints" / "latest").unlink()
    assert named(tmp_path, "checkpoint", "older") == ["large", "large"]
    assert open_model(export).fingerprint(4096) == open_model(large, checksums=False).fingerprint(4096)


def named(folder, *runs):
    return [summarise(folder / name).teacher for name in runs]


@pytest.mark.parametrize("engine", ENGINES)
def test_it_continues_bit_for_bit(student, tmp_path, engine, export):
    whole = train(student("whole", engine=ENGINES[engine]))
    # From the export of the same model: its weights are what is compared.
    again = train(student("again", export, engine=ENGINES[engine]), resume=str(whole / "checkpoints" / "step-00000002"))
    assert losses(again) == losses(whole)[2:]
    for weights in ("student", "ema"):
        one, other = (open_run(run, weights)[1].state_dict() for run in (whole, again))
        assert all(one[name].equal(other[name]) for name in one)


def test_it_continues_with_the_same_teacher_alone(student, large):
    taught, alone = train(student("taught")), train(student("alone", "ema"))
    with pytest.raises(UserError) as caught:
        train(student("taught", large / "checkpoints" / "step-00000020"), resume=str(taught))
    begin = f"method.teacher={large / 'checkpoints' / 'step-00000020'}: {taught / 'checkpoints' / 'step-00000004'}"
    assert str(caught.value).startswith(f"{begin} was trained with another teacher, {large} (step 21); continue with")
    with pytest.raises(UserError, match=r"^method\.teacher=ema: .* another teacher, .*large \(step 21\); continue"):
        train(student("taught", "ema"), resume="auto")
    with pytest.raises(UserError, match=r"large: .* another teacher, the average of the student \(ema\); continue"):
        train(student("alone"), resume="auto")
    assert train(student("taught", run={"steps": 5}), resume="auto") == taught
    assert train(student("alone", "ema", run={"steps": 5}), resume="auto") == alone


def test_a_teacher_that_went_on_is_said(student, large, tmp_path):
    moved = shutil.copytree(large, tmp_path / "moved")
    (moved / "checkpoints" / "latest").write_text("step-00000020")
    run = train(student(teacher=moved))
    (moved / "checkpoints" / "latest").write_text("step-00000021")
    with pytest.raises(UserError, match=r"another teacher, .*moved \(step 20\), and this is step 21; continue with"):
        train(student(teacher=moved), resume="auto")
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=r"^method\.teacher=.*moved: there is nothing under this path; name a run"):
        train(student(teacher=moved), resume="auto")
    assert open_run(run, "ema")[2] == 4  # which needs no teacher


def renamed(shapes, root, classes):
    """The shards with other names of classes."""
    shutil.copytree(shapes, root)
    index = json.loads((root / "index.json").read_text())
    index |= {"classes": classes, "palette": [[n, n, n] for n, _ in enumerate(classes)]}
    (root / "index.json").write_text(json.dumps(index))
    return str(root)


@pytest.mark.parametrize(
    ("classes", "difference"),
    [
        (["ground", "disc", "square"], "1 is 'square' there and 'disc' here, 2 is 'disc' there and 'square' here"),
        (["ground", "square", "disc", "cross"], "3 is missing there and 'cross' here"),
        (["a", "b", "c", "d"], "0 is 'ground' there and 'a' here, .*, 2 is 'disc' there and 'c' here, and 1 more diff"),
    ],
)
def test_other_classes_are_refused(student, shapes, tmp_path, classes, difference):
    root = renamed(shapes, tmp_path / "other", classes)
    message = rf"^method\.teacher=.*large: its classes are not those of .*other in the same order \({difference}"
    with pytest.raises(UserError, match=message):
        train(student(data={"root": root}))
    assert not (tmp_path / "run").exists()


def test_more_outputs_than_the_student_has_are_refused(make_recipe, student, tmp_path):
    sections = {"model": VIT | {"num_classes": 5}, "run": {"steps": 1, "dir": str(tmp_path / "five")}}
    five = train(make_recipe(**sections))
    with pytest.raises(UserError, match=r"it tells 5 classes apart, and the student 3; set model\.num_classes=5"):
        train(student(teacher=five))
    train(student(teacher=five, model=VIT | {"num_classes": 5}))


def test_fewer_outputs_are_enough_for_labels_but_not_for_probabilities(student, tmp_path):
    wide = {"model": VIT | {"num_classes": 5}}
    message = (
        r"^method\.teacher=.*large with method\.base=mean_teacher: .* tells 3 apart, the student 5; "
        r"set model\.num_classes=3, or use method\.base=fixmatch$"
    )
    with pytest.raises(UserError, match=message):
        train(student(method={"base": "mean_teacher"}, **wide))
    assert not (tmp_path / "run").exists()
    train(student("labels", **wide))
    train(student("probabilities", method={"base": "mean_teacher"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is nothing under this path; name a run, a checkpoint in one, an export, or ema"),
        (lambda path: path.mkdir(), "neither a run nor an export"),
        (lambda path: path.write_text("x"), "neither a run nor an export"),
    ],
)
def test_a_path_without_a_model_is_one_line(student, tmp_path, maskmatch, make, message):
    make(tmp_path / "none")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(student(teacher=tmp_path / "none").to_yaml())
    code, _, err = maskmatch("train", recipe)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"maskmatch: error: method.teacher={tmp_path / 'none'}: {message}"), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["", "checkpoints/step-00000021"])
def test_a_run_is_not_its_own_teacher(student, large, what):
    with pytest.raises(UserError, match=r"that is the directory of this run \(run\.dir\), .*; set another run\.dir"):
        train(student(teacher=large / what, run={"dir": f"{large}/."}))


def test_a_damaged_teacher_is_one_line(student, large, export, tmp_path):
    run = shutil.copytree(large, tmp_path / "cut")
    for part in run.glob("checkpoints/*/*.safetensors"):
        part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^method\.teacher=.*cut: .*bytes instead of"):
        train(student(teacher=run))
    folder = shutil.copytree(export, tmp_path / "export")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^method\.teacher=.*export: not a complete export"):
        train(student(teacher=folder))
    assert not (tmp_path / "run").exists()


def test_without_labels_it_teaches_a_new_student(student, tmp_path):
    """The classes are those of the teacher, where the shards know none."""
    root = tmp_path / "archive"
    source = ShapesSource({"unlabelled": 8}, name="archive", classes=(), palette=())
    write_shards(source, root, workers=1, progress=False)
    run = train(student(data={"root": str(root), "labelled_count": 0}, method={"threshold": 0.0}))
    assert json.loads((run / "data.json").read_text())["classes"] == ["ground", "square", "disc"]
    assert all(record["loss_x"] is None and record["coverage"] == 1 for record in records(run))


def test_where_nothing_is_labelled_it_is_not_opened(student, tmp_path):
    recipe = student(teacher=tmp_path / "none", method={"base": "supervised", "mask": {"keep": None}})
    assert not uses_unlabelled(recipe.method)
    train(recipe)


class Seen(Callback):
    run_seen = None

    def started(self):
        type(self).run_seen = self.run


def test_first_lines_and_work_are_of_the_teacher(student, large):
    train(student(), callbacks=[Seen])
    run = Seen.run_seen
    log = (run.folder.path / "log" / "rank-0.txt").read_text()
    assert f"unlabelled images are labelled by {large}: a SegFormer of 0.21 M parameters, step 21" in log
    assert "frozen; evaluated is the average of the student" in log
    train(student("ema", "ema"), callbacks=[Seen])
    of_average = Seen.run_seen
    images = 2 * 2  # two images, two operations a multiply–add
    own, its = (encoder_macs(model, 64, 64) for model in (of_average.student, run.frozen_teacher.module))
    assert run.work.flops - of_average.work.flops == images * (its - own) != 0
    assert run.work.tokens == of_average.work.tokens
    assert run.burn_in_work == of_average.burn_in_work


def test_ranks_with_other_teachers_are_refused(student, large):
    checked = preflight.check(student(), None)

    class Runtime:
        world_size, rank, device = 2, 0, torch.device("cpu")

        def sum_over_ranks(self, known):
            other = known[0].clone()
            other[-1] += 1
            return torch.stack([known[0], other])

    with pytest.raises(UserError, match=r"^the frozen teacher \(method\.teacher\) of rank 1 differs"):
        preflight.check_agreement(
            Runtime(), checked.recipe, checked.batches, None, deferred=False, frozen=checked.frozen_facts
        )


@pytest.mark.slow  # the compiler takes half a minute
@needs_compiler
def test_its_blocks_are_compiled_with_the_students(make_recipe, student, tmp_path):
    wide = VIT | {"backbone_options": TINY_VIT | {"embed_dim": 48}}
    vit = train(make_recipe(model=wide, method={"ema_decay": 0.0}, run={"steps": 2, "dir": str(tmp_path / "wide")}))
    found = []
    for compiled in (False, True):
        name = "compiled" if compiled else "eager"
        run = train(student(name, vit, engine={"compile": compiled}, method={"threshold": 0.3}), callbacks=[Seen])
        block = Seen.run_seen.frozen_teacher.module.backbone.blocks[0]
        assert ("forward" in vars(block)) == compiled
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
