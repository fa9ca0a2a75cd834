"""The best weights of a run so far, beside its checkpoints."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow.files import disk_errors
from regrow.training.checkpoints import kept_records

_NAME = re.compile(r"^best-(\d+)\.safetensors$")


class BestWeights:
    """Trained weights of the steps that were the best when they were measured.

    A file is only dropped once no checkpoint that a resume could start from names its step.

    Args:
        work_dir: the run's work folder.
        writes: whether this process writes (the first one does).
    """

    def __init__(self, work_dir: Path, writes: bool) -> None:
        self._work_dir, self._writes = work_dir, writes

    def path(self, step: int) -> Path:
        """Where the weights of a step lie."""
        return self._work_dir / f"best-{step}.safetensors"

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Store the weights of a step; the file is whole or absent."""
        if not self._writes:
            return
        partial = self._work_dir / f".best-{step}.partial"
        with disk_errors(self._work_dir):
            save_file(dict(state), partial)
            os.replace(partial, self.path(step))

    def load(self, step: int) -> dict[str, Tensor]:
        """The weights of a step that was the best when it was measured."""
        return load_file(self.path(step))

    def forget_unused(self) -> None:
        """Drop the files that no kept checkpoint refers to."""
        needed = {record.get("best_step") for record in kept_records(self._work_dir)}
        for file in self._work_dir.iterdir():
            match = _NAME.match(file.name)
            if match and int(match[1]) not in needed:
                file.unlink()
