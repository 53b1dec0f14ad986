"""The command line: ``python -m benchmarks.building --out FILE.json``; starts the workers."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.harness import check_out, describe_machine, launch, markdown, say, write_json
from maskmatch_scale.models import build_segmenter

SOURCES = ("benchmarks/building", "benchmarks/harness.py", "maskmatch_scale/engine", "maskmatch_scale/models")
COLUMNS = ("built", "start", "ranks", "parameters", "shard_mb", "states_mb", "block_mb", "model_peak_mb",
           "shard_peak_mb", "engine_peak_mb", "teacher_peak_mb", "held_mb", "limit_mb", "cpu_s")  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.building",
        description="Builds student and teacher at ZeRO-3 on CPU ranks, whole and with weights made one at a time, "
        "from random weights and from a local file, and measures each process's memory above its imports.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md is written beside it")
    add("--backbone", default="timm/vit_large_patch16_224", metavar="NAME", help="default timm/vit_large_patch16_224")
    add("--backbone-options", type=json.loads, default={}, metavar="JSON", help="keyword arguments of the backbone")
    add("--image-size", type=int, default=512, metavar="PX", help="default 512")
    add("--classes", type=int, default=21, help="default 21")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="default fp32")
    add("--ranks", type=int, default=2, help="default 2")
    add("--built", nargs="+", default=["whole", "deferred"], choices=["whole", "deferred"], help="default both")
    options = parser.parse_args(arguments)
    check_out(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all four cases; 1 if a deferred build exceeds its limit."""
    options = parse(arguments)
    common = {
        "backbone": options.backbone,
        "backbone_options": options.backbone_options,
        "image_size": options.image_size,
        "classes": options.classes,
        "precision": options.precision,
        # The same kind of model, small: what it loads and sets up is not counted.
        "small": {
            "backbone": "timm/vit_tiny_patch16_224", "backbone_options": {"depth": 2}, "file": None, "image_size": 64,
        },
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "start.safetensors"
        torch.manual_seed(1)
        whole = build_segmenter(options.backbone, options.classes, backbone_options=options.backbone_options)
        save_file({k: v.contiguous() for k, v in whole.backbone.state_dict().items()}, file)  # another image size
        del whole
        for start in ("random", "file"):
            for built in options.built:
                case = {"deferred": built == "deferred", "file": str(file) if start == "file" else None}
                row = launch("benchmarks.building.worker", {**common, **case}, options.ranks, torch.device("cpu"))
                # The optimizer's states are no weights; the engine makes them, whole or sharded as it always does.
                limit = 2 * row["shard_mb"] + row["block_mb"] + row["states_mb"]
                rows.append(
                    {"built": built, "start": start, "ranks": options.ranks}
                    | {key: round(value, 1) for key, value in row.items()}
                    | {"limit_mb": round(limit, 1)}
                )
                say(json.dumps(rows[-1]))
    machine = describe_machine(torch.device("cpu"), SOURCES)
    write_json(options.out, machine, rows)
    title = f"Host memory of a rank while {options.backbone} is built at ZeRO-3, MB above its imports"
    options.out.with_suffix(".md").write_text(markdown(title, machine, rows, COLUMNS))
    deferred = [row for row in rows if row["built"] == "deferred"]
    return int(any(max(v for k, v in row.items() if k.endswith("peak_mb")) > row["limit_mb"] for row in deferred))


if __name__ == "__main__":
    raise SystemExit(main())
