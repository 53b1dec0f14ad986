"""`DIR/predict.json`: what the predictions in a folder were made with, so that no two kinds are mixed in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskmatch_scale.errors import UserError
from maskmatch_scale.files import write_whole

SETTINGS_FILE = "predict.json"
NAME = "model"
"""Key of the model's name, which is said and not compared: a run and its export are the same model."""


def claim(out: Path, settings: dict[str, Any], *, overwrite: bool, first_rank: bool) -> int:
    """Make the folder of predictions, or go on in one that was made with the same settings.

    Any rank may be the first to come. What is written to the folder is written after this file, so a folder that has
    other files, but not this one, belongs to somebody else.

    Args:
        out: the folder.
        settings: nested JSON values, equal on all ranks.
        overwrite: whether predictions that are there are made again, whatever their settings.
        first_rank: whether this is rank 0, which writes the file anew where the others may keep it.

    Returns:
        When the file was written, in ns: files that were written before do not count as finished.

    Raises:
        UserError: it is no folder, has other files, or was begun with other settings.
    """
    path = out / SETTINGS_FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: it is a file; name a folder")
    content = json.dumps(settings, indent=1, ensure_ascii=False)
    # Before the file is looked for: see above. Hidden files are those that other ranks are writing at present.
    others = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if path.is_file() and not (overwrite and first_rank):
        if not overwrite:
            _compare(path, json.loads(content))
    else:
        if others and not path.is_file() and not overwrite:
            raise UserError(
                f"--out {out}: it has files, but none of `maskmatch predict` ({SETTINGS_FILE}); name an empty or a new "
                "folder, or give --overwrite"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return path.stat().st_mtime_ns


def _compare(path: Path, settings: dict[str, Any]) -> None:
    """Refuse other settings than those in a file; names the first that differs."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in (settings | before) if key != NAME and before.get(key) != settings.get(key)]
    except (ValueError, AttributeError):
        raise UserError(f"{path}: it cannot be read; name another folder, or give --overwrite") from None
    if different:
        key = different[0]
        raise UserError(
            f"{path}: made with {key} = {_short(before.get(key))}, and now it is {_short(settings.get(key))}; name "
            "another folder, or give --overwrite to make all predictions again"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]} …"
