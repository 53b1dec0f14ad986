"""Launches of many jobs, followed with lines of progress, and what is checked of what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from maskmatch_scale.checkpoints.reading import load_weights
from maskmatch_scale.export.load import load_export
from maskmatch_scale.runs.model import open_run
from tests.distributed.launching import deepspeed_command, environment, records
from tests.distributed.reference import probe_images
from tests.gpu.configurations import (
    CONFIGURATIONS,
    LOSS_TOLERANCE,
    RESUMED,
    TOLERANCE,
    WATCHED,
    recipe_of,
    reference_of,
)

OF_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""A run in this process sets them; a command that is started must not see them."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


LAUNCHES = 4
"""Launches side by side on a GPU: runs as small as these wait for their host's Python, and do not fill a GPU."""


class Launched:
    """Runs of all configurations on so many ranks.

    Args:
        make: `recipe_maker`.
        folder: for the runs.
        ranks: number of ranks.
        on_gpu: whether each has a GPU; else they are on the CPU.
        names: configurations to train.
        steps: of each run.
        limit_s: seconds after which the launch is ended.
    """

    def __init__(self, make, folder, *, ranks, on_gpu, names=tuple(CONFIGURATIONS), steps=20, limit_s=360):
        self.folder, self.ranks, self.on_gpu, self.steps = folder, ranks, on_gpu, steps
        self.hidden = {} if on_gpu else NO_GPU
        self.recipes = {name: recipe_of(make, name, folder, steps=steps) for name in names}
        for kind in ("continued", "watched"):
            (folder / kind).mkdir()
        lists = [[] for _ in range(min(LAUNCHES, len(names)))] if on_gpu else [[]]
        # DeepSpeed changes its process for good: autocast sets a flag, and after ZeRO-3 later bf16 runs differ in the
        # last bits. So a run that continues another comes right after it, and autocast is last.
        ordered = sorted(names, key=lambda name: self.recipes[name].engine.precision == "autocast-bf16")
        for number, name in enumerate(ordered):
            jobs = lists[number % len(lists)]
            jobs.append(_job(name, self.recipes[name]))
            if name in RESUMED:
                again = recipe_of(make, name, folder / "continued", steps=steps)
                half = folder / name / "checkpoints" / f"step-{steps // 2:08d}"
                jobs.append(_job(f"continued/{name}", again) | {"resume": str(half)})
            if name in WATCHED:
                jobs.append(
                    _job(f"watched/{name}", recipe_of(make, name, folder / "watched", steps=6)) | {"watch": True}
                )
        self.ends, self.tail = {}, ""
        with ThreadPoolExecutor(len(lists)) as pool:
            for ends, tail in pool.map(lambda pair: self._launch(*pair, limit_s), enumerate(lists)):
                self.ends |= ends
                self.tail += tail

    def _launch(self, number, jobs, limit_s):
        """How each job of one launch ended, by name, and the end of the launch's output."""
        file, results, log = (self.folder / f"{number}-{name}" for name in ("jobs.json", "results.jsonl", "launch.log"))
        file.write_text(json.dumps(jobs))
        results.touch()
        script = Path(__file__).with_name("train_jobs.py")
        command = deepspeed_command(script, file, results, ranks=self.ranks, on_gpu=self.on_gpu)
        began = shown = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environment(on_gpu=self.on_gpu), stdout=output, stderr=output, start_new_session=True
            )
            while process.poll() is None and time.monotonic() - began < limit_s:
                time.sleep(0.5)
                if time.monotonic() - shown > 30:
                    shown = time.monotonic()
                    done = len(results.read_text().splitlines())
                    say(f"{done} of {len(jobs)} runs on {self.ranks} ranks after {shown - began:.0f} s")
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        say(f"{len(jobs)} runs on {self.ranks} ranks: {time.monotonic() - began:.0f} s")
        found = {}
        for line in results.read_text().splitlines():
            end = json.loads(line)
            if end["error"] or end["name"] not in found:
                found[end["name"]] = end
        return found, log.read_text()[-2000:]

    def run(self, name):
        """The run directory of a job; fails if the job did."""
        end = self.ends.get(name)
        if end is None:
            pytest.fail(f"{name} was not run: the launch ended before it\n{self.tail}")
        if end["error"]:
            pytest.fail(f"{name}: {end['error']}")
        return self.folder / name

    def check_training(self, name):
        """Weights and losses are those of fp32 on the CPU, within what the precision allows."""
        run, recipe = self.run(name), self.recipes[name]
        reference = reference_of(recipe, self.ranks)
        steps = records(run)
        # Said before anything is asserted: a log that a time limit has cut off shows it too.
        off = [record["loss"] / expected - 1 for record, expected in zip(steps, reference.losses, strict=True)]
        overflows = [record["step"] for record in steps if record.get("overflow")]
        say(f"{name}: losses off by {min(off):+.4f} to {max(off):+.4f}; steps with overflows: {overflows or 'none'}")
        assert not overflows
        assert [r["loss"] for r in steps] == pytest.approx(reference.losses, rel=LOSS_TOLERANCE)
        checkpoint = run / "checkpoints" / f"step-{self.steps:08d}"
        for weights, expected in (("student", reference.student), ("ema", reference.teacher)):
            found = load_weights(checkpoint, weights)
            apart = distance(found, expected, reference.start)
            say(f"{name}, {weights}: {apart:.4f} of the way apart from fp32 on the CPU")
            assert apart < TOLERANCE[recipe.engine.precision], weights
        figures = ("gpu_allocated_gb", "gpu_reserved_gb", "gpu_peak_gb")
        assert all((record[figure] is not None) == self.on_gpu for record in steps for figure in figures)
        assert all(record["tokens_per_s"] > 0 for record in steps)

    def check_continued(self, name):
        """A run that continues from its middle goes on as the whole one does."""
        whole, continued = records(self.run(name)), records(self.run(f"continued/{name}"))
        assert [r["step"] for r in continued] == list(range(self.steps // 2 + 1, self.steps + 1))
        expected, found = ([r["loss"] for r in part] for part in (whole[self.steps // 2 :], continued))
        # The same weights and views. Later steps have gradients whose sums have another order on a GPU.
        assert found[0] == pytest.approx(expected[0], rel=1e-4 if self.on_gpu else 0)
        assert found == pytest.approx(expected, rel=LOSS_TOLERANCE if self.on_gpu else 0)

    def check_watched(self, name):
        """No wait within the parts of a step that are ours; DeepSpeed's own are shown."""
        self.run(f"watched/{name}")
        say(f"{name}: waits of DeepSpeed's own in 3 steps: {self.ends[f'watched/{name}']['waits']}")

    def check_export(self, name):
        """The exported model gives the logits of the run's teacher."""
        run, out = self.run(name), self.folder / f"export-{name}"
        command("export", run, out, **self.hidden)
        device = torch.device("cuda" if self.on_gpu else "cpu")
        images = probe_images().to(device)
        with torch.no_grad():
            own, exported = (model.to(device).eval()(images) for model in (open_run(run, "ema")[1], load_export(out)))
        assert (own - exported).abs().max() <= 1e-3 * own.abs().max()

    def check_evaluation(self, name):
        """`maskmatch evaluate` on this device and on the CPU agree."""
        run = self.run(name)
        here, cpu = (
            json.loads(command("evaluate", run, "--split", "val", "--json", **more)) for more in (self.hidden, NO_GPU)
        )
        for one, other in zip(here, cpu, strict=True):
            assert one["weights"] == other["weights"]
            for figure in ("miou", "pixel_accuracy"):
                assert one[figure] == pytest.approx(other[figure], abs=0.02 if self.on_gpu else 0)


def _job(name, recipe):
    return {"name": name, "recipe": recipe.model_dump(mode="json")}


def command(*arguments, **more):
    """Output of `maskmatch` in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    done = subprocess.run(
        [sys.executable, "-m", "maskmatch_scale", *map(str, arguments)],
        env=plain | more, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def distance(found, reference, start):
    """‖found - reference‖ / ‖reference - start‖ over all floating tensors."""
    names = [name for name, value in start.items() if value.is_floating_point()]
    apart = sum((found[name].double() - reference[name]).square().sum() for name in names)
    gone = sum((reference[name].double() - start[name]).square().sum() for name in names)
    return float((apart / gone).sqrt())


def say(line):
    """A line of progress; `make test-gpu` shows it at once."""
    print(f"test-gpu: {line}", flush=True)  # noqa: T201
