"""How long a process may wait for shards that do not come, before the network is taken for lost.

While one rank waits for its batch, the others wait for it in a collective, which has a limit of its own
(`engine.collective_timeout_s`). So a rank must give up long before, and say so while all of them can still write a
checkpoint.
"""

from __future__ import annotations

import math

_SHARE = 0.5
"""Each shard may take this share of the time that is left: one dead shard alone leaves time for others."""
_LEAST = 1 / 64
"""The network is taken for lost when less than this share of the time is left."""


class Patience:
    """The seconds that may be spent on shards that do not come, until some shard comes. All sources share one object.

    Args:
        limit_s: the limit in seconds (`data.outage_s`); without one, `data.fetch_attempts` alone ends a fetch.
    """

    def __init__(self, limit_s: float = math.inf) -> None:
        self._limit_s = self._left_s = limit_s
        self.is_lost = False
        """Whether the network is taken for lost. Then no shard is waited for, until one comes in the background."""

    @property
    def for_a_shard_s(self) -> float:
        """Seconds that the next shard may stay silent; 0 if it is not to be fetched."""
        return 0.0 if self.is_lost else self._left_s * _SHARE

    def waited(self, seconds: float) -> None:
        """Note how long a shard was waited for that did not come."""
        self._left_s -= seconds
        self.is_lost = self.is_lost or (self._limit_s < math.inf and self._left_s < self._limit_s * _LEAST)

    def give_up(self) -> None:
        """Take the network for lost."""
        self.is_lost = True

    def recover(self) -> None:
        """A shard has come."""
        self._left_s, self.is_lost = self._limit_s, False
