"""What was lost of a run: compared, from its notes, records and checkpoints, with a run that nothing happened to.

The steps that count are those that the final weights come from. If a run goes on from step r, the steps after r that
an earlier session took do not count. So step s counts in the last session that began before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.drill.job import Job, Note

Sample = tuple[str, int, str]
"""Source, epoch, key."""


@dataclass(frozen=True)
class Samples:
    """What became of the samples."""

    lost: int
    """Of the epochs that are over, samples that were in no step that counts; and those of steps of which no reading is
    known."""
    repeated: int
    """How often a sample was in such a step although it had been in one of the same epoch before."""
    moved_steps: int
    """Steps whose samples are not those that the other run had in that step."""


def samples_of_steps(job: Job, steps: int) -> list[Counter[Sample] | None]:
    """The samples of each step that counts; None for a step of which not every rank's readings are known."""
    starts = {note["session"]: note for note in job.notes("begins") if note["rank"] == 0}
    taken = {(note["session"], note["step"]) for note in job.notes("step")}
    read: dict[tuple[int, int, int], Note] = {}
    for note in job.notes("read"):
        read[note["session"], note["rank"], note["number"]] = note
    result: list[Counter[Sample] | None] = []
    for step in range(1, steps + 1):
        begun_before = [session for session, start in starts.items() if start["start"] < step]
        session = max(begun_before, default=-1)
        if (session, step) not in taken:
            result.append(None)
            continue
        start = starts[session]
        accumulation: int = start["accumulation"]
        notes = [
            read.get((session, rank, number))
            for rank in range(start["world_size"])
            for number in range((step - 1) * accumulation, step * accumulation)
        ]
        if any(note is None for note in notes):
            result.append(None)
        else:
            result.append(Counter((s, e, k) for note in notes if note is not None for s, e, k in note["samples"]))
    return result


def compare_samples(job: Job, other: Job, steps: int, sizes: Mapping[str, int]) -> Samples:
    """Find samples that were lost or repeated.

    Args:
        job: with its notes.
        other: the run that nothing happened to.
        steps: that both have taken.
        sizes: samples of an epoch of each source.
    """
    ours, theirs = samples_of_steps(job, steps), samples_of_steps(other, steps)
    seen: Counter[Sample] = Counter()
    for samples in ours:
        seen.update(samples or {})
    last: dict[str, int] = {}
    for source, epoch, _ in seen:
        last[source] = max(epoch, last.get(source, 0))
    lost = sum(
        sizes[source] - sum((source, epoch) == sample[:2] for sample in seen)
        for source in last
        for epoch in range(last[source])
    )
    unknown = sum(samples is None for samples in ours)
    moved = sum(mine != right for mine, right in zip(ours, theirs, strict=True))
    return Samples(lost + unknown, sum(times - 1 for times in seen.values()), moved)


def steps_again(job: Job) -> int:
    """How many of the steps that rank 0 took it had taken before."""
    steps = [note["step"] for note in job.notes("step") if note["rank"] == 0]
    return len(steps) - len(set(steps))
