"""Every ZeRO stage × precision × accumulation × offloading × family against plain PyTorch in one process.

Six steps of all three views with a moving learning rate, an evaluation every two steps whose images and windows do not
divide among the ranks, clipping, then weights, losses, and the teacher's *forward*.

At ZeRO-3 every parameter is sharded and none is fetched ahead (`stage3_param_persistence_threshold: 0` in the DeepSpeed
JSON): by default all parameters of so small a model would be kept whole, and nothing would be shown.
"""

import json

import pytest
import torch

from maskmatch_scale.checkpoints.reading import load_weights
from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT, recipe_maker
from tests.distributed.guards import without
from tests.distributed.launching import launch, records
from tests.distributed.reference import train_plainly

pytestmark = pytest.mark.distributed

FAMILIES = {
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "pixel_shuffle"},
    "segformer": {},
}
NO_BATCHNORM = {"head": "linear"}
"""bf16 weights do not go with BatchNorm."""
STEPS = 6
TAUGHT = "taught"
"""Folder of the run whose model is the frozen teacher, beside the runs."""
TOLERANCE = {"fp32": 5e-4, "autocast-bf16": 0.06, "bf16": 0.1}
"""Largest distance of the weights from the reference's, as a share of the way that they have gone.

fp32: sums in another order, over six steps of AdamW (3e-6), and now and then a pixel whose two best classes are equal
to rounding, so that the teacher gives it another label (4e-4). bf16: rounding of 2^-9 in every product, which AdamW's
division by the gradient's own size carries into whole steps wherever a gradient is small.
"""


def _matrix():
    """Name → (family, sections of the recipe)."""
    found = {}
    for family in FAMILIES:
        for precision in TOLERANCE:
            model = NO_BATCHNORM if (family, precision) == ("segformer", "bf16") else {}
            for stage in range(4):
                if stage == 0 and precision == "bf16":
                    continue  # refused
                for accumulation in (1, 2):
                    engine = {"zero_stage": stage, "precision": precision, "accumulation": accumulation}
                    found[f"{family}-{stage}-{precision}-{accumulation}"] = family, {"engine": engine, "model": model}
    for family in FAMILIES:
        for stage in (1, 2, 3):
            engine = {"zero_stage": stage, "offload_optimizer": True}
            found[f"{family}-{stage}-offload"] = family, {"engine": engine}
        engine = engine | {"offload_parameters": True, "accumulation": 2}
        found[f"{family}-3-offload-parameters"] = family, {"engine": engine}
    for stage in (2, 3):
        engine = {"zero_stage": stage, "offload_optimizer": True, "precision": "bf16"}
        found[f"vit-{stage}-offload-bf16"] = "vit", {"engine": engine}
    checkpointing = {"zero_stage": 3, "activation_checkpointing": True}
    found["vit-3-checkpointing"] = "vit", {"engine": checkpointing}
    found["segformer-3-checkpointing"] = "segformer", {"engine": checkpointing}
    # Gradients of a norm above 1, DeepSpeed's own limit.
    loud = {"unlabelled_weight": 50.0}
    found["vit-1-unclipped"] = "vit", {"engine": {"zero_stage": 1}, "optim": {"clip_norm": None}, "method": loud}
    # A teacher without memory is the student.
    for stage, precision in ((2, "bf16"), (3, "bf16"), (3, "fp32")):
        engine = {"zero_stage": stage, "precision": precision}
        found[f"vit-{stage}-{precision}-no-memory"] = "vit", {"engine": engine, "method": {"ema_decay": 0.0}}
    found["vit-3-layer-decay"] = "vit", {"engine": {"zero_stage": 3}, "optim": {"layer_decay": 0.5}}
    found["segformer-2-copied-buffers"] = (
        "segformer",
        {"engine": {"zero_stage": 2}, "method": {"ema_buffers": "copy"}},
    )
    for family, stage, freeze in (("vit", 1, 1), ("vit", 3, 1), ("vit", 3, "backbone"), ("segformer", 3, 2)):
        name = f"{family}-{stage}-freeze-{freeze}"
        found[name] = family, {"engine": {"zero_stage": stage}, "optim": {"freeze": freeze}}
    # Only the base's view uses the context decoder, so it must come first.
    dropped = {"mask": {"keep": 0.5, "mode": "zero"}, "strong_view": {"keep": 0.5}}
    found["vit-3-dropped-strong-view"] = "vit", {"engine": {"zero_stage": 3}, "method": dropped}
    # A SegFormer, whole on every rank, labels for ViTs.
    for stage, precision in ((1, "fp32"), (3, "autocast-bf16")):
        engine = {"zero_stage": stage, "precision": precision}
        found[f"vit-{stage}-{precision}-taught"] = (
            "vit",
            {"engine": engine, "method": {"teacher": TAUGHT, "threshold": 0.4}},
        )
    found["segformer-3-frozen"] = "segformer", {"engine": {"zero_stage": 3}, "model": {"batchnorm": "frozen"}}
    return found


MATRIX = _matrix()
WITHOUT = {
    # Guard → the run of the matrix that it is taken away from.
    "clipping-default": "vit-1-unclipped",
    "unmanaged": "vit-1-fp32-1",
    "masked-view-first": "vit-3-fp32-1",
    "teacher-released": "vit-3-fp32-1",
    "average-of-masters": "vit-2-bf16-no-memory",
    "average-in-fp32": "vit-1-fp32-1",
    "refusal": "vit-0-bf16-1",
}


def _comes_later(name):
    """Whether a run is left to `make test-all`.

    Of each stage and precision one accumulation is run always, in fp32 of both families, else of one in turns.
    """
    family, stage, *rest = name.split("-")
    if "freeze" in rest or name in WITHOUT.values():
        return False
    of_vit = family == "vit"
    whose_turn = of_vit == int(stage) % 2
    if rest == ["offload"]:
        return not whose_turn
    if rest[-1] not in ("1", "2"):
        return False
    return rest[-1] == "21"[(int(stage) + of_vit) % 2] or (rest[0] != "fp32" and not whose_turn)


FROZEN = [name for name in MATRIX if "-freeze-" in name]
LATER = [name for name in MATRIX if _comes_later(name)]
ALWAYS = [name for name in MATRIX if name not in LATER]


REFUSED = {"vit-0-bf16-1": ("vit", {"engine": {"zero_stage": 0, "precision": "bf16"}})}


def recipe_of(make, name, folder, stage3_json):
    family, sections = (MATRIX | REFUSED)[name]
    model = FAMILIES[family] | sections.get("model", {})
    engine = {"micro_batch": 2, "precision": "fp32"} | sections["engine"]
    if engine["zero_stage"] == 3:
        engine["deepspeed_json"] = str(stage3_json)
    method = {"scales": [1.0], "threshold": 0.3, "ema_decay": 0.7} | sections.get("method", {})
    if "teacher" in method:
        method["teacher"] = str(folder / TAUGHT)
    return make(
        model=model,
        engine=engine,
        optim={"lr": 1e-3, "clip_norm": 0.5, "warmup_steps": 2} | sections.get("optim", {}),
        method=method,
        evaluation={"window_batch": 4},
        run={"dir": str(folder / name), "steps": STEPS, "evaluate_every": 2, "checkpoint_every": 0},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shapes):
    """The folder with the runs of `ALWAYS` on two ranks and those without their guards, and the recipes."""
    return run_all(tmp_path_factory.mktemp("matrix"), shapes, ALWAYS, WITHOUT)


@pytest.fixture(scope="module")
def later_runs(tmp_path_factory, shapes):
    """The same for `LATER`."""
    return run_all(tmp_path_factory.mktemp("matrix-later"), shapes, LATER, {})


def run_all(folder, shapes, names, guards):
    stage3_json = folder / "stage3.json"
    zero = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 20000}
    stage3_json.write_text(json.dumps({"zero_optimization": zero}))
    make = recipe_maker(shapes, folder)
    if any(name.endswith(TAUGHT) for name in names):
        run = {"dir": str(folder / TAUGHT), "steps": 20}
        train(make(optim={"lr": 3e-3}, engine={"precision": "fp32"}, method={"ema_decay": 0.0}, run=run))
    recipes = {name: recipe_of(make, name, folder, stage3_json) for name in names}
    jobs = [
        {"recipe": recipe.model_dump(mode="json"), "probe": str(folder / f"{name}.pt")}
        for name, recipe in recipes.items()
    ]
    for guard, name in guards.items():
        with without(guard):
            recipe = recipe_of(make, name, folder / guard, stage3_json)
        recipes.setdefault(name, recipe)
        probe = str(folder / guard / f"{name}.pt")
        jobs.append({"recipe": recipe.model_dump(mode="json"), "probe": probe, "without": guard})
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, recipes


_references = {}


def reference_of(recipe):
    """The plain run; stage, offloading and checkpointing mean nothing to it."""
    engine = recipe.engine.model_dump(mode="json") | {
        "zero_stage": 1,  # any: it is not looked at
        "offload_optimizer": False,
        "offload_parameters": False,
        "activation_checkpointing": False,
        "deepspeed_json": None,
    }
    content = recipe.model_dump(mode="json") | {"engine": engine}
    content["run"]["dir"] = "reference"
    key = json.dumps(content, sort_keys=True)
    if key not in _references:
        torch.set_num_threads(1)
        _references[key] = train_plainly(parse_recipe(content), world_size=2)
    return _references[key]


def found_state(run, weights):
    return dict(load_weights(run / "checkpoints" / f"step-{STEPS:08d}", weights))


def distance(found, reference, start):
    """‖found - reference‖ / ‖reference - start‖ over all floating tensors."""
    names = [k for k, value in start.items() if value.is_floating_point()]
    apart = sum((found[k].double() - reference[k]).square().sum() for k in names)
    gone = sum((reference[k].double() - start[k]).square().sum() for k in names)
    return float((apart / gone).sqrt())


def distances(run, logits_file, reference):
    """How far a run on two ranks is from the plain one: student, teacher, and the teacher's forward."""
    return {
        "student": distance(found_state(run, "student"), reference.student, reference.start),
        "teacher": distance(found_state(run, "ema"), reference.teacher, reference.start),
        "forward": float((torch.load(logits_file) - reference.teacher_logits).norm() / reference.teacher_logits.norm()),
    }


@pytest.mark.parametrize("name", ALWAYS)
def test_it_trains_as_plain_pytorch_does(runs, name):
    check_run(*runs, name)


@pytest.mark.slow  # more minutes
@pytest.mark.parametrize("name", LATER)
def test_it_does_in_every_other_combination(later_runs, name):
    check_run(*later_runs, name)


def check_run(folder, recipes, name):
    recipe = recipes[name]
    reference = reference_of(recipe)
    tolerance = TOLERANCE[recipe.engine.precision]
    found = distances(folder / name, folder / f"{name}.pt", reference)
    assert all(value < tolerance for value in found.values()), found
    steps = records(folder / name)
    assert [r["loss"] for r in steps] == pytest.approx(reference.losses, rel=tolerance)
    assert [r["grad_norm"] for r in steps] == pytest.approx(reference.grad_norms, rel=tolerance)
    evaluated = [(r["step"], r["weights"]) for r in records(folder / name, "eval")]
    assert evaluated == [(2, "ema"), (4, "ema"), (6, "ema"), (6, "student")]


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_stays_bit_for_bit(runs, name):
    folder, recipes = runs
    start, own = reference_of(recipes[name]).start, found_state(folder / name, "student")
    same = {key for key, value in start.items() if own[key].equal(value)}
    teacher = found_state(folder / name, "ema")
    assert same == {key for key, value in start.items() if teacher[key].equal(value)}
    assert same
    assert all(key.startswith("backbone.") for key in same if not key.endswith("proj.bias"))
    first = {"vit": "backbone.patch_embed.proj.weight", "segformer": "backbone.stages.0.patch_embeddings.proj.weight"}
    assert first[name.partition("-")[0]] in same


def test_frozen_parts_train_alike_at_every_stage(runs):
    folder, _ = runs
    losses = [[r["loss"] for r in records(folder / f"vit-{stage}-freeze-1")] for stage in (1, 3)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in MATRIX if name.endswith("no-memory")])
def test_a_teacher_without_memory_is_the_students_masters(runs, name):
    folder, _ = runs
    assert follows(folder / name)


def follows(run):
    """Whether the teacher is the student bit for bit."""
    student, teacher = found_state(run, "student"), found_state(run, "ema")
    return all(teacher[key].equal(student[key]) for key in student)


@pytest.mark.parametrize("guard", WITHOUT)
def test_without_its_guard_a_run_goes_wrong(runs, guard):
    folder, recipes = runs
    name = WITHOUT[guard]
    if name.endswith("no-memory"):
        assert not follows(folder / guard / name)
        return
    found = distances(folder / guard / name, folder / guard / f"{name}.pt", reference_of(recipes[name]))
    assert max(found.values()) > 1.5 * TOLERANCE[recipes[name].engine.precision], found
