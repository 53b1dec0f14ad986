"""What `maskmatch export` does: a run's model as an export, and what is added to an export."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from maskmatch_scale.errors import UserError
from maskmatch_scale.export.hub import check_push, push
from maskmatch_scale.export.write import export_run
from maskmatch_scale.recipe.values import SEGMENTER_FILE
from maskmatch_scale.runs.data import run_of


def hand_on(
    where: Path,
    out: Path | None,
    weights: str | None = None,
    *,
    onnx: bool = False,
    onnx_size_px: tuple[int, int] | None = None,
    onnx_images: Sequence[Path] = (),
    push_to: str | None = None,
    private: bool = True,
) -> Generator[str, None, None]:
    """Export a run, or take an export, and add what was asked for. Mistakes are found before anything is written.

    Args:
        where: run directory, checkpoint of one, or export.
        out: folder to write; None for an export, which is added to where it is.
        weights: of a run: `ema` or `student`; None: `ema`.
        onnx: whether to add an ONNX graph.
        onnx_size_px: height and width of its images; None: the window of the run's evaluations.
        onnx_images: files and folders to check it on; none: held-out images of the run, or noise.
        push_to: repository of a hub to push the export to, `NAME` or `USER/NAME`.
        private: of a repository that is made for it.

    Yields:
        Lines for the user, as things are done.

    Raises:
        UserError: see `export_run`, `graph.add.plan_for_run` and `hub.push`.
        CommandFailed: the graph cannot be made, or does not give what torch gives, or the hub cannot be reached. The
            export is complete without it.
        OSError: a file cannot be written.
    """
    is_export = (where / SEGMENTER_FILE).is_file()
    if is_export and (out is not None or weights is not None):
        given = f"OUT ({out})" if out is not None else "--weights"
        raise UserError(f"{where}: it is an export already, which is added to where it is; leave out {given}")
    if not is_export and out is None:
        raise UserError(f"{where}: name the folder to write the export to: maskmatch export {where} OUT")
    if is_export and not onnx and push_to is None:
        raise UserError(f"{where}: it is an export already; say what to do with it: --onnx, --push")
    if push_to is not None:
        check_push(push_to)
    folder = where if out is None else out
    plan = None
    if onnx:
        from maskmatch_scale.export.graph import add  # its libraries are an extra

        run = run_of(where)
        if is_export:
            plan = add.plan_for_export(where, onnx_size_px, onnx_images)
        elif run is not None:  # if it is no run, `export_run` says so
            plan = add.plan_for_run(run, onnx_size_px, onnx_images)
    if out is not None:
        call = export_run(where, out, weights or "ema")
        yield str(out)
        yield f"load it: {call}"
    if plan is not None:
        yield from add.add_onnx(folder, plan)
    if push_to is not None:
        yield f"pushed: {push(folder, push_to, private=private)}"
