"""The state of a training that goes on for long, on disk, so that a stopped one continues."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class TrainingState:
    """What a training was at some step, in one file.

    Args:
        path: of the file; None keeps nothing.
        every: steps between two writes.
        also: called with the step after each write, to keep more of the training.
    """

    def __init__(
        self, path: Path | None, *, every: int = 10, also: Callable[[int], None] | None = None
    ) -> None:
        self._path, self._every, self._also = path, every, also

    def restore(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Give each part its state, where there is one, and return the plain values kept with it.

        Args:
            parts: by name, whatever has `load_state_dict` or, as a generator, `set_state`.
        """
        if self._path is None or not self._path.is_file():
            return {}
        kept: dict[str, Any] = torch.load(self._path, weights_only=True)
        for name, part in parts.items():
            set_state = getattr(part, "load_state_dict", None) or part.set_state
            set_state(kept[name])
        values: dict[str, Any] = kept["values"]
        return values

    def keep(self, step: int, parts: dict[str, Any], values: dict[str, Any]) -> None:
        """Write the parts' states and plain values, where this step is one to write at."""
        if self._path is None or step % self._every:
            return
        states = {
            name: part.state_dict() if hasattr(part, "state_dict") else part.get_state()
            for name, part in parts.items()
        }
        staged = self._path.with_name(f"{self._path.name}.partial")
        torch.save(states | {"values": values | {"step": step}}, staged)
        os.replace(staged, self._path)
        if self._also is not None:
            self._also(step)

    def of_stage(self, number: int) -> TrainingState:
        """Return the state of a later stage, beside this one; stage 0 is this one."""
        if self._path is None or number == 0:
            return self
        name = f"{self._path.stem}-{number}{self._path.suffix}"
        return TrainingState(self._path.with_name(name), every=self._every)

    def remove(self) -> None:
        """Remove the file, and those of later stages: the training is finished."""
        if self._path is not None:
            for path in self._path.parent.glob(f"{self._path.stem}*{self._path.suffix}"):
                path.unlink()
