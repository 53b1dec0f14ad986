"""`maskmatch predict`. Large libraries are imported only when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from maskmatch_scale.errors import UserError

app = typer.Typer()

_IMAGES_FAILED = 1
"""Exit code if some images could not be read and the others were predicted."""


@app.command(
    epilog="Example: maskmatch predict runs/mine photos 'more/*.jpg' --out predictions. On all GPUs of this machine: "
    "torchrun --nproc-per-node=8 --no-python maskmatch predict runs/mine photos --out predictions"
)
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|EXPORT", help="Run directory, one of its checkpoint folders, or an export.")
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT…",
            help="Images, folders, patterns, lists (.txt, a path a line), shards (.tar, or a folder with an "
            "index.json), URLs of images, of shards and of an index.json; and keys of `evaluation` to change, for "
            "example evaluation.mode=whole.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the predictions.")],
    overlay: Annotated[bool, typer.Option(help="Write pictures of classes over images, with a legend.")] = True,
    confidence: Annotated[bool, typer.Option(help="Write the probability of each pixel's class.")] = True,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probabilities of all classes, as float16 in an npz.")
    ] = False,
    polygons: Annotated[
        list[str] | None,
        typer.Option(metavar="coco|geojson", help="Write regions, in this format. Can be given twice."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="ema|student", help="Of a run: ema (the teacher, the default) or student.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda|cuda:N", help="Default: a GPU if there is one, for each rank its own."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(metavar="auto|fp32|bf16|fp16", help="Of products. auto: bf16 on a GPU that has it, else fp32."),
    ] = "auto",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Windows in a forward pass. Default: 2 on a CPU; on a GPU 32, halved until they fit.",
        ),
    ] = None,
    overlay_px: Annotated[
        int, typer.Option(min=16, metavar="PX", help="Longest side of an overlay; larger images are shrunk for it.")
    ] = 4096,
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="What the bands of your files are, in their order, by the names of the model's channels; - for one "
            "that is not used. For example red,green,blue,nir,-.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make predictions again that are in DIR, whatever their settings.")
    ] = False,
) -> None:
    """Predict images of your own, of any size. Started again, it goes on with the images that are not finished.

    Writes DIR/ids/NAME.png (classes, with a palette), DIR/overlay/NAME.jpg and DIR/confidence/NAME.png; of a TIFF ids
    and confidence as TIFFs that keep its georeference. Images that cannot be read are listed in DIR/failed.jsonl, and
    the exit code is 1 then. Started by torchrun, deepspeed, srun or mpirun, the ranks share the images.
    """
    kinds = dict.fromkeys(polygons or ())
    for kind in kinds:
        if kind not in ("coco", "geojson"):
            raise UserError(f"--polygons {kind}: it must be coco or geojson")
    overrides = [word for word in words if word.startswith("evaluation.") and "=" in word]
    inputs = [word for word in words if word not in overrides]
    if not inputs:
        raise UserError("no INPUT: name images, folders, patterns, lists, shards or URLs")
    from maskmatch_scale.runs.first_checks import run_of_model

    run_of_model(model)  # before torch is imported
    from maskmatch_scale.predict.outputs import Wanted
    from maskmatch_scale.predict.run import Options
    from maskmatch_scale.predict.run import predict as run_predict

    options = Options(
        Wanted(overlay, confidence, probabilities, tuple(kinds)),  # type: ignore[arg-type]
        overlay_px,
        weights,
        device,
        precision,
        batch,
        overwrite,
        None if bands is None else tuple(name.strip() for name in bands.split(",")),
    )
    done = run_predict(model, inputs, out, options, overrides)
    if done.failed:
        print(  # noqa: T201
            f"maskmatch: {done.failed} of {done.failed + done.predicted + done.skipped} images could not be predicted: "
            f"{done.failures}",
            file=sys.stderr,
            flush=True,
        )
    if done.say_by_exit_code:
        raise typer.Exit(_IMAGES_FAILED)
