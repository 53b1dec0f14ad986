"""Values of a key that are the names in a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OneOf:
    """A check of a key's value. The table may grow after the recipe's types were made.

    Args:
        table: its keys are the names.
    """

    table: Mapping[str, Any]

    def __call__(self, value: object) -> object:
        """Give the value back.

        Raises:
            ValueError: it is not in the table; the message lists the names that are.
        """
        if isinstance(value, str) and value in self.table:
            return value
        *others, last = (repr(name) for name in self.table)
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
