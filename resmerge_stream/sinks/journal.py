"""The journal of a run: a file for its start, and one for each finished shard.

A file each, so that runs on several machines keep one journal without waiting for each other.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..device import default_work_dir
from ..documents import load_json
from ..errors import PlanRefusedError, Remedy, StoppedError
from .durable import write_durably
from .locks import locked
from .publication import Publication

_HEAD = "head.json"
# The work folder of a run that is one part of several: within the output, so that all see it.
PARTS = ".resmerge-stream.parts"


class Journal:
    """Rows of JSON in a folder; the processes and parts of one merge write it together.

    Args:
        path: of the folder, which may not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._writer = path, uuid.uuid4().hex

    def start(self, plan_hash: str, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of finished shards; another plan's journal is replaced.

        Raises:
            PlanRefusedError: the sources are not those of the first start.
            StoppedError: it cannot be written.
        """
        head = _document(self._path / _HEAD)
        if head is None or head.get("plan_hash") != plan_hash:
            self.forget()
            self._write(_HEAD, {"plan_hash": plan_hash, "identity": identity})
            return []
        if head.get("identity") != json.loads(json.dumps(identity)):
            raise PlanRefusedError(
                "the sources changed since this merge was started (size, time or header differ). "
                "Restore them, or start afresh without what it left.",
                Remedy.DISCARD_STAGING,
            )
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the shards that are finished by now."""
        found = (_document(path) for path in sorted(self._path.glob("*.safetensors.json")))
        return [row for row in found if row is not None]

    def row(self, shard: str) -> dict[str, Any] | None:
        """Return the row of a shard, or None where it has none."""
        return _document(self._path / f"{shard}.json")

    def keep(self, row: Mapping[str, Any]) -> None:
        """Write a shard's row, durably; ``shard`` is its name.

        Raises:
            StoppedError: it cannot be written.
        """
        self._write(f"{row['shard']}.json", row)

    def drop(self, shard: str) -> None:
        """Remove a shard's row, if it has one: it has to be made again."""
        (self._path / f"{shard}.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove everything, if it is there."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        try:
            self._path.mkdir(exist_ok=True)
            write_durably(self._path / name, json.dumps(document).encode(), by=self._writer)
        except OSError as exc:
            raise StoppedError(
                f"cannot write the journal {str(self._path)!r}: {exc.strerror}."
            ) from exc


def _document(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None where there is no file, or something else in it."""
    try:
        document = load_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def work_folder(
    plan_hash: str,
    out: Path | None,
    publication: Publication | None,
    work_dir: str | Path | None,
    *,
    shared: bool = False,
) -> Path:
    """Return the folder of one plan and target: journal, lock, unsent shards.

    It is this machine's own, but for an output folder that is filled, or was, by parts of a merge:
    there it lies within.

    Args:
        plan_hash: of the plan.
        out: the output folder, where there is one.
        publication: the repository, where there is one.
        work_dir: where such folders are kept; the user's cache folder when None.
        shared: whether this run is one part of a merge.
    """
    if out is not None and publication is None and (shared or (out / PARTS).is_dir()):
        return out / PARTS
    return machine_folder(plan_hash, out, publication, work_dir)


def machine_folder(
    plan_hash: str, out: Path | None, publication: Publication | None, work_dir: str | Path | None
) -> Path:
    """Return such a folder on this machine; the arguments are those of `work_folder`."""
    root = Path(os.path.expanduser(work_dir)) if work_dir is not None else default_work_dir()
    target = str(out.resolve()) if out is not None else ""
    if publication is not None:
        target += f" {os.environ.get('HF_ENDPOINT', '')} {publication.repo_id}"
    return root / f"{plan_hash}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"


def discard_work(folder: Path) -> list[str]:
    """Remove what earlier runs of any plan kept on this machine for a target.

    Args:
        folder: of one plan and the target, from `machine_folder`; those of other plans lie
            beside it.

    Returns:
        What was removed.

    Raises:
        StoppedError: a run that goes on uses one of them, or a file cannot be removed.
    """
    removed = []
    for found in sorted(folder.parent.glob(f"*-{folder.name.rpartition('-')[2]}")):
        paths = [path for path in (found / "lock", *found.glob("*/lock")) if path.is_file()]
        if not paths:
            continue
        try:
            with contextlib.ExitStack() as stack:
                for path in paths:  # several where parts of a merge ran here
                    lock = stack.enter_context(path.open("w"))
                    locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        head = _document(folder / "journal" / _HEAD)
    except OSError:
        return []
    if head is None or head.get("plan_hash") != plan_hash:
        return []
    identity = head.get("identity")
    if not isinstance(identity, dict) or not all(str(key).isdigit() for key in identity):
        return []
    return [identity[key].get("commit") for key in sorted(identity, key=int)]
