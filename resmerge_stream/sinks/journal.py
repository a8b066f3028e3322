"""The journal of a run on this machine: a line for its start, and one for each finished shard."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..device import default_work_dir
from ..errors import PlanRefusedError, Remedy, StoppedError
from .publication import Publication


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
                "Restore them, or start afresh without what it left.",
                Remedy.DISCARD_STAGING,
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


def work_folder(
    plan_hash: str,
    out: Path | None,
    publication: Publication | None,
    work_dir: str | Path | None,
) -> Path:
    """Return the folder of one plan and target on this machine: journal, lock, unsent shards.

    Args:
        plan_hash: of the plan.
        out: the output folder, where there is one.
        publication: the repository, where there is one.
        work_dir: where such folders are kept; the user's cache folder when None.
    """
    root = Path(os.path.expanduser(work_dir)) if work_dir is not None else default_work_dir()
    target = str(out.resolve()) if out is not None else ""
    if publication is not None:
        target += f" {os.environ.get('HF_ENDPOINT', '')} {publication.repo_id}"
    return root / f"{plan_hash}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"


def discard_work(folder: Path) -> list[str]:
    """Remove what earlier runs of any plan kept on this machine for a target.

    Args:
        folder: of one plan and the target, from `work_folder`; those of other plans lie beside it.

    Returns:
        What was removed.

    Raises:
        StoppedError: a run that goes on uses one of them, or a file cannot be removed.
    """
    removed = []
    for found in sorted(folder.parent.glob(f"*-{folder.name.rpartition('-')[2]}")):
        if not (found / "lock").is_file():
            continue
        try:
            with (found / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                removed += [f"{found.name}/{name}" for name in sorted(os.listdir(found))]
                shutil.rmtree(found)
        except BlockingIOError as exc:
            raise StoppedError(
                "another process is merging there. Wait for it, or stop it."
            ) from exc
        except OSError as exc:
            raise StoppedError(f"cannot remove {str(found)!r}: {exc.strerror}.") from exc
    return removed


def known_commits(folder: Path, plan_hash: str) -> list[str | None]:
    """Return what an earlier start of this plan pinned its sources to, from the local journal.

    Returns:
        One commit a source, None for a folder; empty when there was no start.
    """
    try:
        with (folder / "journal.jsonl").open(encoding="utf-8") as journal:
            head = json.loads(journal.readline())
    except (OSError, ValueError):
        return []
    if not isinstance(head, dict) or head.get("plan_hash") != plan_hash:
        return []
    identity = head.get("identity")
    if not isinstance(identity, dict) or not all(str(key).isdigit() for key in identity):
        return []
    return [identity[key].get("commit") for key in sorted(identity, key=int)]
