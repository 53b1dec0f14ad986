"""`maskmatch plan`: what a run needs, before it is started. Large libraries are imported only when it runs."""

from __future__ import annotations

import json
import logging
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskmatch_scale.errors import UserError

if TYPE_CHECKING:
    from maskmatch_scale.planning.setting import Gpu, Link

app = typer.Typer()
_MOST_IMAGES = 10**15


@app.command(
    epilog="Example: maskmatch plan configs/one-view.yaml model.backbone=timm/vit_large_patch14_dinov2 "
    "data.crop_px=504 --gpus 16 --gpu h100 --images 10000000"
)
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file. Its data need not be here.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to change, for example engine.zero_stage=3."),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of the run, over all hosts: one rank on each.")] = 1,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="h100, h200, b200, a100-80, a100-40, l40s, a10, v100, t4, …")
    ] = "h100",
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory of a GPU in 10⁹ bytes.", show_default="its data sheet's")
    ] = None,
    gpus_per_host: Annotated[int, typer.Option(metavar="N", help="GPUs of a host, if there are as many.")] = 8,
    link: Annotated[
        str,
        typer.Option(
            metavar="NAME|GBIT/S",
            help="Between hosts: ib-ndr-400, ib-hdr-200, roce-100, ethernet-100, -25, -10, -1, …; or Gbit/s of a host.",
        ),
    ] = "ib-ndr-400",
    host_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory of a host.", show_default="128 for each of its GPUs")
    ] = None,
    host_cores: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Cores of a host.", show_default="16 for each of its GPUs"),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Length in distinct images, for example 1e9.", show_default="the recipe's steps"
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="Of a GPU for an hour, in any currency.")
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, max=255, help="Of data that are not here.", show_default="the recipe's, or 21"
        ),
    ] = None,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure this machine's GPU or CPU for some minutes, write FILE, plan with it."
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan with such a measurement in place of data sheets.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict memory, time, network and cost of a recipe on GPUs, and choose settings that fit; nothing is started."""
    from maskmatch_scale.recipe import load_recipe

    length = None if images is None else _whole(images)
    loaded = load_recipe(recipe, overrides or ())
    from maskmatch_scale.planning.explain import as_json as plain
    from maskmatch_scale.planning.explain import explain
    from maskmatch_scale.planning.hardware import cluster_of, gpu_named
    from maskmatch_scale.planning.plan import plan as make

    logging.getLogger("maskmatch_scale").setLevel(logging.ERROR)
    device, within = _measured(measure, measured, gpu_memory)
    if price is not None and not price < float("inf"):
        raise UserError(f"--price {price:g}: it must be a number, at least 0")
    cluster = cluster_of(
        gpus,
        device or gpu_named(gpu, gpu_memory),
        gpus_per_host=gpus_per_host,
        link=link,
        within=within,
        cores_per_host=host_cores,
        host_memory_gb=host_memory,
    )
    with Console(stderr=True).status(
        "running the recipe's step without memory …"
    ):  # nothing where there is no terminal
        found = make(loaded, cluster, classes=classes, images=length, price=price)
    if as_json:
        print(json.dumps(plain(found), ensure_ascii=False, allow_nan=False))  # noqa: T201
        return
    table = Table(title=f"{recipe} on {gpus} × {cluster.gpu.name}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for section, rows in explain(found).items():
        table.add_section()
        for number, (name, value) in enumerate(rows):
            if number == 0:
                table.add_row(Text(section, style="bold"), "")
            table.add_row(Text(f"  {name}"), Text(value))
    Console().print(table)


def _whole(images: str) -> int:
    """A count of images as people write it: 100000000, 100_000_000, 100e6."""
    try:
        number = Decimal(images)
    except InvalidOperation:
        number = Decimal(0)
    if not number.is_finite() or not 1 <= number <= _MOST_IMAGES or number != int(number):
        raise UserError(f"--images {images}: it must be a whole number from 1 to 1e15, such as 100_000_000 or 1e9")
    return int(number)


def _measured(measure: Path | None, measured: Path | None, memory_gb: float | None) -> tuple[Gpu | None, Link | None]:
    """The device that is measured now, or was, and the link between the ranks of its machine."""
    from dataclasses import replace

    from maskmatch_scale.planning.hardware import memory_bytes
    from maskmatch_scale.planning.measured import read_measurement, write_measurement

    size = None if memory_gb is None else memory_bytes(memory_gb)
    if measure is not None and measured is not None:
        raise UserError("--measure and --measured: one writes a measurement, the other reads one; take one of them")
    if measure is not None:
        from maskmatch_scale.planning.measure import measure as run

        found = run()
        write_measurement(found, measure)
    elif measured is not None:
        found = read_measurement(measured)
    else:
        return None, None
    return (found if size is None else replace(found, memory_bytes=size)), found.within
