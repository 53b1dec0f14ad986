"""Libraries that only some outputs and inputs need: extras of setup.cfg."""

from __future__ import annotations

import importlib
from types import ModuleType

from maskmatch_scale.errors import UserError


def needs(module: str, extra: str, wanted_for: str) -> ModuleType:
    """Import a library that may not be installed.

    Args:
        module: its name.
        extra: of setup.cfg, which has it.
        wanted_for: what cannot be done without it, for the message.

    Raises:
        UserError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{wanted_for}: {module} is needed and not installed; pip install 'maskmatch_scale[{extra}]'"
        ) from None
