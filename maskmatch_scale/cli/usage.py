"""Words of a command line that it cannot have: one line with an example, in place of a box of several lines."""

from __future__ import annotations

import re
from typing import Any

import typer

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a missing argument, an unknown option or command, or a value that is none of its kind. Newer
versions of typer have a click of their own, so that it has no other name that is the same in all of them."""


def explain(error: Any) -> str:
    """One line: the command, what is wrong, and how it is called.

    Args:
        error: a :data:`UsageError`.

    Returns:
        The line; empty where the help of a command that was given no arguments has been printed already.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx
    if context is None:
        return message
    words = context.command_path.removeprefix(context.find_root().command_path).split()
    command = f"{' '.join(words)}: " if words else ""
    epilog = " ".join((context.command.epilog or "").split())
    # Of several examples the first one: a sentence begins after it.
    example = re.split(r"\. (?=[A-Z])", epilog.removeprefix("Example: "))[0]
    return f"{command}{message[:1].lower()}{message[1:]} (example: {example})"
