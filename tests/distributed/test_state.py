"""The state of engines and teachers as pieces of two ranks: to one rank and back, and to other stages and engines.

One rank, every precision and offloading, bit for bit: tests/engine/test_parts.py.
"""

import json
import math

import pytest

from tests.conftest import recipe_maker
from tests.distributed.launching import deepspeed
from tests.distributed.state_jobs import run, stored_in
from tests.engine.state import apart

pytestmark = pytest.mark.distributed

CUT = {"stage3_param_persistence_threshold": 0}
ACCELERATE = {"library": "accelerate", "zero_stage": 0}
EXACT = {
    "accelerate": ACCELERATE,
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "2-round-robin": {"zero_stage": 2, "deepspeed_json": {"round_robin_gradients": True}},
    "3": {"zero_stage": 3},
    "3-cut": {"zero_stage": 3, "deepspeed_json": CUT},
    **{f"{stage}-bf16": {"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
    **{f"{stage}-offload": {"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
}
CHAINS = {
    # Every segment continues the one before it, after so many steps.
    "turned": (("1", 3), ("3-cut", 0), ("1", 0), ("2", 0), ("0", 3)),
    "trained": (("1", 2), ("3-cut", 1), ("1", 1), ("2", 1), ("0", 1)),
    "engines": (("1", 2), ("accelerate", 2), ("3", 1), ("accelerate", 1)),
    "widened": (("2-bf16", 3), ("1", 0), ("3-bf16", 0), ("3-offload", 0)),
}
STEPS = 6


def segment(make, folder, name, engine, steps, after=None, **more):
    engine = {"precision": "fp32"} | EXACT[engine]
    if "deepspeed_json" in engine:
        file = folder / f"zero-{engine['zero_stage']}.json"
        file.write_text(json.dumps({"zero_optimization": engine["deepspeed_json"]}))
        engine["deepspeed_json"] = str(file)
    optim = {"lr": 1e-2, "clip_norm": 0.5, "weight_decay": 0.1}
    recipe = make(engine=engine, optim=optim, method={"burn_in": 0.25}, run={"steps": 8}, **more.pop("sections", {}))
    made = {"name": name, "recipe": recipe.model_dump(mode="json"), "steps": steps} | more
    return made | ({"after": after} if after else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shapes):
    """Every segment, those of one rank in this process and those of two ranks in one launch between them."""
    folder = tmp_path_factory.mktemp("state")
    make = recipe_maker(shapes, folder)
    run([segment(make, folder, "one", "1", 2, more=STEPS - 2)], folder)
    jobs = [segment(make, folder, "two", "3-cut", 2, "one"), segment(make, folder, "whole", "1", STEPS)]
    per_rank = {"model": {"batchnorm": "per_rank"}}
    for name in EXACT:
        jobs.append(segment(make, folder, f"{name} stopped", name, 3, more=2, sections=per_rank))
        used = int(name == "3")
        jobs.append(segment(make, folder, f"{name} again", name, 2, f"{name} stopped", sections=per_rank, used=used))
    for chain, links in CHAINS.items():
        after = None
        for number, (engine, steps) in enumerate(links):
            jobs.append(segment(make, folder, f"{chain} {number}", engine, steps, after))
            after = f"{chain} {number}"
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = deepspeed(__file__.replace("test_state", "state_jobs"), folder / "jobs.json", folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run([segment(make, folder, "one again", "2", 2, "two")], folder)
    return folder


def seen(folder, name, rank=0):
    return json.loads((folder / name / f"seen-{rank}.json").read_text())


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_continue_bit_for_bit(folder, name):
    stopped, again = folder / f"{name} stopped", folder / f"{name} again"
    assert not apart(stored_in(again, "start").whole, stored_in(stopped, "end").whole)
    assert not apart(stored_in(again, "end").whole, stored_in(stopped, "more").whole)
    for rank in range(2):
        one, other = seen(folder, stopped.name, rank), seen(folder, again.name, rank)
        assert other["losses"] == one["more_losses"]
        assert other["logits"] == one["logits"]


@pytest.mark.parametrize("name", [name for name in EXACT if name[0] in "123"])
def test_it_is_what_deepspeed_says(folder, name):
    for rank in range(2):
        assert seen(folder, f"{name} stopped", rank)["not_as_deepspeed"] == []


def test_each_rank_has_buffers_of_its_own(folder):
    """What makes the test above one of `rank-R` pieces."""
    found = stored_in(folder / "1 stopped", "end").whole
    assert not found["rank-0/student/mean"].equal(found["rank-1/student/mean"])
    assert not found["rank-0/ema/mean"].equal(found["rank-1/ema/mean"])


def test_one_rank_two_and_one_again(folder):
    assert not apart(stored_in(folder / "two", "start").whole, stored_in(folder / "one", "end").whole)
    assert not apart(stored_in(folder / "one again", "start").whole, stored_in(folder / "two", "end").whole)
    losses = [loss for name in ("one", "two", "one again") for loss in seen(folder, name)["losses"]]
    expected = seen(folder, "one")["losses"] + seen(folder, "one")["more_losses"]
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chain", CHAINS)
def test_other_stages_engines_and_precisions_take_the_same_state(folder, chain):
    for number in range(1, len(CHAINS[chain])):
        before, after = folder / f"{chain} {number - 1}", folder / f"{chain} {number}"
        assert not apart(stored_in(after, "start").whole, stored_in(before, "end").whole)
        if not CHAINS[chain][number][1]:
            assert (after / "progress.json").read_text() == (before / "progress.json").read_text()
    if chain != "widened":
        losses = [x for number in range(len(CHAINS[chain])) for x in seen(folder, f"{chain} {number}")["losses"]]
        assert losses == pytest.approx(seen(folder, "whole")["losses"], rel=1e-6)


@pytest.mark.parametrize(("name", "held"), [("3-cut again", 1), ("1 again", 1), ("2-bf16 again", 1), ("0 again", 2)])
def test_a_rank_reads_what_it_holds(folder, name, held):
    """Each moment and master once by all ranks together where they are sharded, else once by each rank."""
    read = [seen(folder, name, rank)["read"] for rank in range(2)]
    stored = stored_in(folder / name.replace("again", "stopped"), "end").whole
    kinds = {"student", "exp_avg", "exp_avg_sq"}
    trained = {n for n in stored if f"exp_avg/{n.partition('/')[2]}" in stored and n.partition("/")[0] in kinds}
    assert len(trained) > 10
    for tensor in trained:
        assert sum(one.get(tensor, 0) for one in read) == held * math.prod(stored[tensor].shape), tensor
    average = sum(one.get("ema/head.weight", 0) for one in read)
    assert average == stored["ema/head.weight"].numel() * (1 if name.startswith("3") else 2)
