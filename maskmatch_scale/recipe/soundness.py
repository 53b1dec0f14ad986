"""Refused combinations: keys that are valid one by one, but together train wrongly or not at all.

Each rule is one row: a condition, and a message that names the keys, the reason and the remedy. Rules that need the
backbone are in `models/families.py`, rules that need the built model in `runs/model_checks.py`, and rules that
need the machine in `engine/precision.py`.

Decision: docs/decisions/0025-unsound-combinations-as-rows.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from maskmatch_scale.recipe.bases import has_unlabelled_loss

if TYPE_CHECKING:
    from maskmatch_scale.recipe.sections import Recipe


def unsound(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """The rules on combinations of keys that train wrongly or not at all.

    Yields:
        For every rule whether the recipe breaks it, and the message: the keys, the reason and the remedy.
    """
    yield from _unsound_without_labels(recipe)
    yield (
        recipe.run.epochs is not None and recipe.method.burn_in == 1,
        "run.epochs with method.burn_in=1: nothing unlabelled is ever read; set run.steps",
    )
    mask, method = recipe.method.mask, recipe.method
    yield (
        method.teacher_margin_px > 0 and method.views_of == "labelled",
        f"method.teacher_margin_px={method.teacher_margin_px} with method.views_of=labelled: labelled images have "
        "labels, and the teacher sees none of them; set method.teacher_margin_px=0",
    )
    yield (
        mask.complement and mask.keep is not None and mask.keep > 0.5,
        f"method.mask.complement=true with method.mask.keep={mask.keep}: the second masked view has as many units, of "
        "those that the first one masks; use a keep of at most 0.5",
    )
    yield (
        bool(recipe.run.steps) == (recipe.run.epochs is not None),
        f"run.steps={recipe.run.steps} and run.epochs={json.dumps(recipe.run.epochs)}: a run needs one of "
        "them, and only one",
    )
    run = recipe.run
    yield (
        run.keep_last == run.keep_every == run.keep_best == 0,
        "run.keep_last=0, run.keep_every=0 and run.keep_best=0: no checkpoint would be kept; set one of them",
    )
    yield (
        run.patience is not None and run.evaluate_every == 0,
        f"run.patience={run.patience} with run.evaluate_every=0: nothing is evaluated before the last step; set "
        "run.evaluate_every",
    )
    yield (
        run.patience is not None and run.keep_best == 0,
        f"run.patience={run.patience} with run.keep_best=0: when the run has ended early, its best checkpoint is not "
        "there any more; set run.keep_best to 1 or more",
    )
    engine, accelerate = recipe.engine, recipe.engine.library == "accelerate"
    yield (
        (recipe.data.outage_s or 0) > engine.collective_timeout_s / 2,
        f"data.outage_s={recipe.data.outage_s} with engine.collective_timeout_s={engine.collective_timeout_s}: the "
        "other ranks would end the job before this one gives up; use at most half of it, or null",
    )
    stage, precision = f"engine.zero_stage={engine.zero_stage}", f"engine.precision={engine.precision}"
    yield (
        accelerate and engine.zero_stage > 0,
        f"{stage} with engine.library=accelerate, which shards nothing: set engine.zero_stage=0",
    )
    yield (
        accelerate and engine.precision == "bf16",
        f"{precision} with engine.library=accelerate, which keeps no fp32 masters: use autocast-bf16",
    )
    for key in ("offload_optimizer", "offload_parameters", "deepspeed_json"):
        yield (
            accelerate and bool(getattr(engine, key)),
            f"engine.{key} with engine.library=accelerate: only DeepSpeed has it; use engine.library=deepspeed",
        )
    yield (
        engine.zero_stage == 0 and engine.precision == "bf16",
        f"{stage} with {precision}: DeepSpeed takes a hidden optimizer step with these; use engine.zero_stage=1 or "
        "engine.precision=autocast-bf16",
    )
    yield (
        engine.zero_stage == 0 and engine.precision == "fp16" and not accelerate,
        f"{stage} with {precision}: DeepSpeed then handles master weights in another way, which is not tested here; "
        "use engine.zero_stage=1",
    )
    yield (
        engine.offload_optimizer and engine.zero_stage == 0,
        f"{stage} with engine.offload_optimizer=true: only ZeRO-1 to 3 can offload; use engine.zero_stage=1",
    )
    yield (
        engine.offload_parameters and engine.zero_stage < 3,
        f"{stage} with engine.offload_parameters=true: only ZeRO-3 shards the weights; use engine.zero_stage=3",
    )
    yield (
        engine.compile and engine.zero_stage == 3,
        f"{stage} with engine.compile=true: ZeRO-3 gathers weights in hooks that a compiled block does not run; "
        "use engine.zero_stage=2 or engine.compile=false",
    )
    yield (
        engine.compile and engine.activation_checkpointing,
        "engine.compile=true with engine.activation_checkpointing=true: no test shows that they are right together; "
        "switch one off",
    )

    yield (
        engine.cuda_graphs and not accelerate,
        f"engine.cuda_graphs=true with engine.library={engine.library}: not tried with DeepSpeed's hooks; use "
        "engine.library=accelerate and engine.zero_stage=0",
    )
    yield (
        engine.cuda_graphs and (engine.compile or engine.activation_checkpointing),
        "engine.cuda_graphs=true with engine.compile or engine.activation_checkpointing: no test shows that they are "
        "right together; switch one off",
    )


def _unsound_without_labels(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    none, method = recipe.data.labelled_count == 0, recipe.method
    yield (
        none and not isinstance(recipe.model.pretrained, str) and method.frozen_teacher is None,
        f"data.labelled_count=0 with model.pretrained={json.dumps(recipe.model.pretrained)}: without labels the "
        "teacher must be a trained segmenter from the start; name a run, a checkpoint or an export there, or in "
        "method.teacher",
    )
    yield (
        none and method.burn_in > 0,
        f"data.labelled_count=0 with method.burn_in={method.burn_in}: a burn-in has the labelled loss alone, and "
        "there is none; set method.burn_in=0",
    )
    unlabelled = has_unlabelled_loss(method.base) and method.unlabelled_weight > 0
    yield (
        none and not unlabelled and (method.mask.keep is None or method.mask.weight == 0),
        "data.labelled_count=0 and no unlabelled loss (method.base, method.unlabelled_weight, method.mask): there "
        "is nothing to learn from",
    )
    yield (
        none and method.views_of == "labelled",
        "data.labelled_count=0 with method.views_of=labelled: there is no image to make views of; use unlabelled",
    )
    yield (
        none and bool(recipe.data.labelled),
        "data.labelled_count=0 with sources in data.labelled: leave one of them out",
    )
