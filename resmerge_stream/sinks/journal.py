"""The journal of a run on this machine: a line for its start, and one for each finished shard."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PlanRefusedError, StoppedError


class Journal:
    """Lines of JSON in a file; the processes of one run append to it together.

    Args:
        path: of the file, which may not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, plan_hash: str, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of finished shards; another plan's journal is replaced.

        Raises:
            PlanRefusedError: the sources are not those of the first start.
            StoppedError: the file cannot be written.
        """
        rows = self._read()
        if not rows or rows[0].get("plan_hash") != plan_hash:
            self.forget()
            self.append({"plan_hash": plan_hash, "identity": identity})
            return []
        if rows[0].get("identity") != json.loads(json.dumps(identity)):
            raise PlanRefusedError(
                "the sources changed since this merge was started (size, time or header differ). "
                "Restore them, or start afresh with --discard-staging."
            )
        return rows[1:]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, durably.

        Raises:
            StoppedError: the file cannot be written.
        """
        try:
            with self._path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise StoppedError(
                f"cannot write the journal {str(self._path)!r}: {exc.strerror}."
            ) from exc

    def forget(self) -> None:
        """Remove the file, if it is there."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        """Return the rows; what a crash left of a last line is cut off the file."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        rows: list[dict[str, Any]] = []
        good = 0
        for line in data.splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(row, dict):
                break
            rows.append(row)
            good += len(line)
        if good < len(data):
            os.truncate(self._path, good)
        return rows
