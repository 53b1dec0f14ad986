"""`maskmatch doctor`: this machine, and what a backbone costs. Large libraries are imported only when it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from maskmatch_scale.errors import UserError

app = typer.Typer()


@app.command(epilog="Example: maskmatch doctor --backbone timm/vit_large_patch16_224 --image-size 768 --keep 0.3")
def doctor(
    backbone: Annotated[
        str | None, typer.Option(help="Examine this backbone instead of the machine: timm/NAME or transformers/NAME.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of a square image. Default: 512, rounded to whole units.")
    ] = None,
    keep: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of units that a masked view sees, in (0, 1].")
    ] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this machine has; or whether a backbone is supported, and how much masking can save at most."""
    if backbone is None and image_size is not None:
        raise UserError(f"--image-size {image_size}: it needs --backbone")
    from maskmatch_scale.doctor import describe_machine, examine, explain

    found = describe_machine() if backbone is None else examine(backbone, image_size, keep)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))  # noqa: T201
        return
    table = Table(title="this machine" if backbone is None else backbone, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (found if backbone is None else explain(found)).items():
        table.add_row(name, value)
    Console().print(table)
