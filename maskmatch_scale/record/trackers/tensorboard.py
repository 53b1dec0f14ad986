"""TensorBoard: event files in RUN/tensorboard, so that `tensorboard --logdir runs` shows all runs below it."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.record.trackers.protocol import Outcome, TrackedRun


class TensorBoard:
    """Writes scalars, and the recipe as text.

    A start that continues the run writes a file of its own. It tells TensorBoard to leave out what earlier files have
    of the steps that are taken again.
    """

    def __init__(self, run: TrackedRun) -> None:
        folder = RunFolder(run.folder).tensorboard
        self.known_as = folder.name
        self._writer = SummaryWriter(str(folder), purge_step=run.start + 1 if run.known_as else None)
        recipe = OmegaConf.to_yaml(OmegaConf.create(dict(run.recipe)))
        self._writer.add_text("recipe", f"```yaml\n{recipe}```", run.start)

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        """Add each figure as a scalar."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what was added to the file."""
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """Close the file."""
        self._writer.close()
