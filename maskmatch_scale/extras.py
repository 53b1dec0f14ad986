"""Libraries that only some commands and keys need: the extras of setup.cfg."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

from maskmatch_scale.errors import UserError


def require(modules: Sequence[str], extra: str, wanted_for: str) -> None:
    """Refuse to go on without some libraries; none is imported.

    Args:
        modules: their names.
        extra: of setup.cfg, which has them.
        wanted_for: the option or key that cannot be had without them, for the message.

    Raises:
        UserError: names those that are not installed, and the command that installs them.
    """
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{wanted_for}: {', '.join(missing)} {verb} not installed; pip install 'maskmatch_scale[{extra}]'"
        )


def _is_installed(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # without an origin: a mere folder of this name


def needs(library: str, module: str, extra: str, wanted_for: str) -> ModuleType:
    """Import a module of a library that may not be installed, or not whole; arguments as for :func:`require`.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    require([library], extra, wanted_for)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{wanted_for}: {module} cannot be imported ({error}); pip install 'maskmatch_scale[{extra}]'"
        ) from None
