"""`maskmatch doctor`: this machine, other hosts, what a backbone costs. Nothing large is imported before it runs."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from maskmatch_scale.errors import UserError

if TYPE_CHECKING:
    from maskmatch_scale.hosts.by_ssh import Survey

app = typer.Typer()


@app.command(
    epilog="Example: maskmatch doctor --backbone timm/vit_large_patch16_224 --image-size 768 --keep 0.3. Before a job "
    "on several hosts: maskmatch doctor --hosts hostfile configs/quickstart-segformer.yaml"
)
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="With --hosts: look at its data and run.dir, too.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Keys of the recipe to change.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Examine this backbone instead of the machine: timm/NAME or transformers/NAME.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of a square image. Default: 512, rounded to whole units.")
    ] = None,
    keep: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of units that a masked view sees, in (0, 1].")
    ] = 0.3,
    hosts: Annotated[
        Path | None,
        typer.Option(
            metavar="HOSTFILE",
            help="Ask the hosts of a hostfile of the deepspeed launcher over ssh, and compare them (docs/hosts.md).",
        ),
    ] = None,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="With --hosts: measure the links between hosts, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    as_host: Annotated[str | None, typer.Option(hidden=True)] = None,
    as_rank: Annotated[bool, typer.Option("--as-rank", hidden=True)] = False,
) -> None:
    """Show what this machine has, or whether the hosts of a job fit together; or whether a backbone is supported, and
    how much masking can save at most.
    """
    if backbone is None and image_size is not None:
        raise UserError(f"--image-size {image_size}: it needs --backbone")
    if hosts is not None and backbone is not None:
        raise UserError(f"--backbone {backbone}: it is not about hosts; leave out --hosts")
    if hosts is None and as_host is None and (recipe is not None or bandwidth):
        what = f"a recipe ({recipe})" if recipe is not None else "--bandwidth"
        raise UserError(f"{what} needs --hosts HOSTFILE")
    if as_host is not None or as_rank:
        _answer(recipe, overrides or [], as_host)
    elif hosts is not None:
        _survey(hosts, recipe, overrides or [], bandwidth=bandwidth, as_json=as_json)
    else:
        _describe(backbone, image_size, keep, as_json=as_json)


def _describe(backbone: str | None, image_size: int | None, keep: float, *, as_json: bool) -> None:
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


def _answer(recipe: Path | None, overrides: list[str], asked: str | None) -> None:
    """Answer a `doctor --hosts` of another host, in the last line of stdout."""
    from maskmatch_scale.hosts import answering
    from maskmatch_scale.recipe import load_recipe

    if asked is None:
        found = answering.links()
    else:
        found = answering.report(None if recipe is None else load_recipe(recipe, overrides), **json.loads(asked))
    print(json.dumps(found, ensure_ascii=False))  # noqa: T201


def _survey(hostfile: Path, recipe: Path | None, overrides: list[str], *, bandwidth: bool, as_json: bool) -> None:
    from maskmatch_scale.hosts.by_ssh import survey
    from maskmatch_scale.hosts.hostfile import read_hostfile
    from maskmatch_scale.hosts.job import token_written
    from maskmatch_scale.recipe import load_recipe

    slots = read_hostfile(hostfile)
    arguments: list[str] = []
    with ExitStack() as stack:
        token = ""
        if recipe is not None:
            loaded = load_recipe(recipe, overrides)
            arguments = [str(recipe), *overrides]
            token = stack.enter_context(token_written(Path(loaded.run.dir)))
        found = survey(slots, arguments, token, with_links=bandwidth)
    if as_json:
        print(json.dumps(found.values(), ensure_ascii=False))  # noqa: T201
    else:
        _show(found, str(hostfile))
    stops = sum(finding.stops for finding in found.findings)
    if stops:
        raise UserError(
            f"--hosts {hostfile}: a run would not start, or be wrong, for {stops} reason{'s' if stops > 1 else ''}, "
            "listed on stdout"
        )


def _show(found: Survey, title: str) -> None:
    from maskmatch_scale.hosts.compare import gpus_of
    from maskmatch_scale.hosts.facts import Facts

    table = Table(title=title, title_justify="left")
    for name in ("host", "slots", "GPUs", "cores", "memory", "torch", "maskmatch_scale", "address", "clock"):
        table.add_column(name, overflow="fold")
    for answer in found.answers:
        row = ["no answer", *[""] * 6]
        if answer.values is not None:
            facts = Facts.from_values(answer.values["facts"])
            version = f"{facts.versions['maskmatch_scale']} ({facts.source[:8]})"
            row = [gpus_of(facts), str(facts.cores), f"{facts.memory_gib:.0f} GiB", facts.versions["torch"], version]
            row += [facts.addresses.get("own", "unknown"), f"{answer.values['clock']:+.1f} s"]
        table.add_row(answer.host, str(found.slots[answer.host]), *row)
    console = Console()
    console.print(table)
    for finding in found.findings:
        line = f"{'error' if finding.stops else 'warning'}: {finding.line}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if not found.findings:
        console.print("the hosts fit together")
    if found.links:
        console.print(found.links, soft_wrap=True, highlight=False, markup=False)
