"""What can be wrong with data: errors for users, and the reasons why a sample cannot be used.

Decision: docs/decisions/0029-faults-on-the-floor-of-data.md.
"""

from __future__ import annotations

from maskmatch_scale.errors import UserError

REASONS = (
    "shard_unreadable",  # does not exist, cannot be fetched, has wrong bytes, or is no tar
    "unreachable",  # neither its shard nor those of its replacements can be fetched: the run stops
    "wrong_count",  # its shard holds fewer or more samples than an index says
    "truncated",  # the tar ends before the sample does
    "empty",  # a member has no bytes
    "no_image",  # no member of the sample is an image
    "not_an_image",  # corrupt, or of a format that is not read
    "too_large",  # more pixels than data.max_image_px
    "no_label",
    "not_a_label",  # corrupt, or not a PNG of one channel
    "label_size",  # another size than the image
    "label_value",  # a value that is neither a class nor ignore_index
    "duplicate_key",
    "interleaved_keys",  # members of one sample are not adjacent
    "unsafe_name",  # a link, a device, an absolute name, or one with `..`
    "pickled",  # a member that can be read by unpickling only
)
"""Why a sample cannot be used. `metrics.jsonl` counts skipped samples under these keys."""


class DataError(UserError):
    """Something is wrong with the user's data; the message names folder, shard or sample, and says what to do."""


class NotShards(DataError):  # noqa: N818 - named after what it is about
    """A path was given for a shard folder and is none. The message begins with the path."""


class BadSample(DataError):  # noqa: N818 - named after what it is about
    """One sample cannot be used.

    Attributes:
        reason: one of :data:`REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """Loader processes send it by pickle."""
        return type(self), (self.reason, str(self))


class NotFetched(BadSample):
    """The shard of a sample is on another machine and cannot be fetched.

    Attributes:
        may_pass: whether it may be fetched later. If not, the server has said that there is no such file.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__("shard_unreadable", message)
        self.may_pass = may_pass

    def __reduce__(self) -> tuple[object, ...]:
        """See :meth:`BadSample.__reduce__`."""
        return _not_fetched, (str(self), self.may_pass)


def _not_fetched(message: str, may_pass: bool) -> NotFetched:
    return NotFetched(message, may_pass=may_pass)
