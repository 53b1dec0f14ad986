"""Which shards each of several machines writes, of a data set that is cut into shards as if one wrote it alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from maskmatch_scale.data.writing.shard import Shard
from maskmatch_scale.errors import UserError


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that `i/n` stands for.

        Raises:
            UserError: it is not two numbers, or not 1 ≤ i ≤ n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= part.number <= part.of:
            raise UserError(f"--part {text}: write I/N, with I from 1 to N, such as 1/4 on the first of four machines")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, shards: Sequence[Shard]) -> list[Shard]:
        """Every `of`-th of the shards, of which all streams are spread over all parts."""
        return list(shards[self.number - 1 :: self.of])
