"""What can be wrong with data: errors for users, and the reasons for which a sample cannot be used."""

from __future__ import annotations

from maskmatch_scale.errors import UserError

REASONS = (
    "shard_unreadable",  # not there, not fetched, wrong bytes, no tar
    "truncated",  # the tar ends before the sample does
    "empty",  # a member of no bytes
    "no_image",  # no member of the sample is an image
    "not_an_image",  # corrupt, or of a format that is not read
    "too_large",  # more pixels than data.max_image_px
    "no_label",
    "not_a_label",  # corrupt, or no single-channel PNG
    "label_size",  # another size than the image
    "label_value",  # a value that is no class and not ignore_index
    "duplicate_key",
    "interleaved_keys",  # members of one sample do not lie next to each other
    "unsafe_name",  # a link, a device, an absolute name, or one with `..`
    "pickled",  # a member that only unpickling could read
)
"""Why a sample cannot be used: the keys under which `metrics.jsonl` counts skipped samples."""


class DataError(UserError):
    """Something is wrong with the data a user gave; the message names folder, shard or sample and what to do."""


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
        return BadSample, (self.reason, str(self))
