"""An engine is one class of `protocol.Engine` and one line of `recipe/engines.py`; nothing else has to change."""

import json
from contextlib import nullcontext

import torch

from maskmatch_scale.engine.ema import ReplicatedTeacher
from maskmatch_scale.engine.optim import parameter_groups
from maskmatch_scale.engine.parts import (
    adamw_steps,
    buffer_pieces,
    part_pieces,
    restore_adamw,
    restore_buffers,
    restore_parts,
    whole_parts,
)
from maskmatch_scale.engine.protocol import StepOrder
from maskmatch_scale.engine.schedule import GroupSettings
from maskmatch_scale.recipe.engines import ENGINES
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT


class PlainEngine:
    """One process, torch's AdamW, no library."""

    name = "plain torch"
    every_gradient_first = False

    def __init__(self, module, student, recipe, runtime):
        self.recipe, self.runtime, self.student, self.module = recipe, runtime, student, module
        self.grad_norm, self.skipped = None, False
        self.order = StepOrder()
        groups = parameter_groups(student, recipe.optim)
        self.groups = GroupSettings(groups, recipe, runtime.world_size)
        self.base_lr = self.groups.base_lr
        self.optimizer = torch.optim.AdamW(groups, lr=self.base_lr, betas=recipe.optim.betas)

    @staticmethod
    def check_settings(recipe, world_size):
        pass

    def accumulate(self, *arguments, last):
        self.order.accumulate(last=last)
        loss, figures = self.module(*arguments)
        loss.backward()
        return figures

    def step(self, number):
        self.order.step()
        self.groups.set_lr(self.optimizer.param_groups, number)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def lr(self, number):
        return self.groups.lr(number)

    def arithmetic(self):
        return nullcontext()

    def store_teacher(self, average):
        return ReplicatedTeacher(average, self)

    def averager(self, averages):
        students = list(self.student.parameters())
        return lambda decay: torch._foreach_lerp_(list(averages), [p.detach() for p in students], 1 - decay)

    def pieces(self):
        yield from part_pieces("student", whole_parts(self.student.named_parameters()), self.optimizer.state)
        yield from buffer_pieces("student", self.student, self.recipe, self.runtime)

    def progress(self):
        return {"optimizer_step": adamw_steps(self.optimizer)}

    def restore(self, stored, progress):
        parts = list(whole_parts(self.student.named_parameters()))
        restore_parts("student", parts, stored)
        restore_adamw(self.optimizer, parts, stored, progress["optimizer_step"])
        restore_buffers("student", self.student, stored, self.recipe, self.runtime)


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_further_engine_trains_resumes_and_equals_the_others(make_recipe, tmp_path, monkeypatch):
    sections = {
        "model": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT},
        "engine": {"library": "accelerate", "zero_stage": 0, "accumulation": 2},
    }
    settings = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 2}
    known = train(make_recipe(**sections, run=settings | {"dir": str(tmp_path / "known")}))
    monkeypatch.setitem(ENGINES, "plain", f"{__name__}:PlainEngine")
    sections["engine"]["library"] = "plain"
    whole = train(make_recipe(**sections, run=settings | {"dir": str(tmp_path / "whole")}))
    assert "plain torch" in (whole / "log" / "rank-0.txt").read_text()
    assert losses(whole) == losses(known)
    part = make_recipe(**sections, run=settings | {"dir": str(tmp_path / "part")})
    continued = train(part, resume=str(whole / "checkpoints" / "step-00000002"))
    assert losses(continued) == losses(whole)[2:]
