"""A folder as target: temporary names until all is there, then renamed, the index last."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from ..errors import Notice, OutputExistsError, PlanRefusedError, Remedy, StoppedError
from .durable import temporary, write_durably
from .journal import Journal
from .layout import Shard
from .safetensors_file import SafetensorsFile
from .sink import Membership

MARKER = ".resmerge-stream.json"
_HALF_MARKER = temporary(MARKER)
REPORT = "resmerge/report.json"
_PART = ".part"
# How long a network's folder may take to show a file that another machine wrote.
_SEEN_S = 60.0


@dataclass(frozen=True, slots=True)
class TargetState:
    """What stands where a merge wants to write.

    Attributes:
        problem: why the target cannot be used, if it cannot.
        finished: whether it holds the finished result of this very plan.
        bytes_there: bytes of shards that this plan's run already wrote.
    """

    problem: Notice | None = None
    finished: bool = False
    bytes_there: int = 0


def target_state(out: Path, plan_hash: str, *, is_own: bool = False) -> TargetState:
    """Return what stands at an output folder, seen by a plan.

    Args:
        out: the folder, which may not exist.
        plan_hash: of the plan that wants to write there.
        is_own: whether the folder lies in this plan's work folder, so that whatever is marked
            there is this plan's, also where a full disk left the mark empty.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        return TargetState(Notice(f"{str(out)!r} is a file.", Remedy.ANOTHER_FOLDER))
    try:
        names = os.listdir(out) if os.path.isdir(out) else []
    except OSError as exc:
        return TargetState(
            Notice(f"cannot look into {str(out)!r}: {exc.strerror}.", Remedy.ANOTHER_FOLDER)
        )
    if is_own or not set(names) - {_HALF_MARKER} or _is_empty_mark(out, names):
        return TargetState()
    if MARKER in names:
        if _value_in(out / MARKER, "plan_hash") == plan_hash:
            parts = (out / name for name in names if name.endswith(_PART))
            return TargetState(bytes_there=sum(part.stat().st_size for part in parts))
        return TargetState(
            Notice(
                f"{str(out)!r} holds the unfinished output of another merge.",
                Remedy.FINISH_OTHER,
                Remedy.DISCARD_STAGING,
                Remedy.ANOTHER_FOLDER,
            )
        )
    if _value_in(out / REPORT, "plan_hash") == plan_hash:
        if _has_files(out, _document(out / REPORT).get("files")):
            return TargetState(finished=True)
        return TargetState(
            Notice(
                f"{str(out)!r} holds this merge's report, but not each file that it names, so it "
                "is not finished; nothing there is overwritten. Remove it yourself to merge again.",
                Remedy.ANOTHER_FOLDER,
            )
        )
    return TargetState(
        Notice(
            f"{str(out)!r} exists and was not made by this merge; nothing there is overwritten. "
            "Remove it yourself if you do not need it.",
            Remedy.ANOTHER_FOLDER,
        )
    )


def discard(out: Path) -> list[str]:
    """Remove what an unfinished run left in a folder, and return the names.

    Only the marker and ``*.part`` files beside it are removed, then the folder if it is empty.

    Raises:
        OutputExistsError: there is no marker, so nothing there was left by a run.
    """
    if not (out / MARKER).is_file():
        raise OutputExistsError(
            f"{str(out)!r} holds no unfinished merge (no {MARKER}); nothing was removed."
        )
    removed = []
    for path in sorted(out.iterdir()):
        if path.name in (MARKER, _HALF_MARKER) or path.name.endswith(f".safetensors{_PART}"):
            path.unlink()
            removed.append(path.name)
    if not any(out.iterdir()):
        out.rmdir()
    return removed


class FolderSink:
    """Writes a merge into a folder, once it is open. See `Sink`.

    Args:
        out: the folder; made when missing.
        plan_hash: what marks this run's files.
        work_dir: where the journal is; one folder a plan and target.
        identity: of the sources, as first seen; a later run must see the same.
        membership: as what this process of the run comes.
        one_machine: whether each machine has such a folder of its own.
    """

    def __init__(
        self,
        out: Path,
        plan_hash: str,
        work_dir: Path,
        identity: Mapping[str, Any],
        membership: Membership | None = None,
        *,
        one_machine: bool = False,
    ) -> None:
        self._member = member = membership or Membership()
        self._out, self._work, self._mark = out, work_dir, member.mark
        self._plan_hash, self._identity, self._one_machine = plan_hash, identity, one_machine
        self._journal = Journal(work_dir / "journal.jsonl")
        self._is_own = out.is_relative_to(work_dir)
        # One process of those that share the folder looks through it; it tells the others.
        self._looks = member.is_main or (one_machine and member.is_first)

    def open(self) -> Self:
        """Make the folder this run's, and see what an earlier start finished in it.

        Raises:
            OutputExistsError: the folder holds something else.
            PlanRefusedError: the sources changed since the run was first started, or a process
                that joins does not see the main one's folder.
            StoppedError: another run of this merge goes on, or the folder cannot be made.
        """
        member, out, work_dir = self._member, self._out, self._work
        if not member.is_main and not self._one_machine:
            self._find_marker()
        with contextlib.ExitStack() as undo:
            try:
                work_dir.mkdir(parents=True, exist_ok=True)
                self._lock: TextIO = undo.enter_context((work_dir / "lock").open("w"))
                # The processes of one run share the lock; the main one first sees that it is free.
                _lock_or_stop(self._lock, out, fcntl.LOCK_EX if member.is_main else fcntl.LOCK_SH)
                with (work_dir / "start").open("w") as start:
                    fcntl.flock(start, fcntl.LOCK_EX)
                    self._start(self._plan_hash, self._identity)
                _lock_or_stop(self._lock, out, fcntl.LOCK_SH)
            except OutputExistsError:
                raise
            except OSError as exc:
                raise StoppedError(
                    f"cannot use {str(out)!r} and {str(work_dir)!r}: {exc.strerror or exc}."
                ) from exc
            undo.pop_all()  # all went well: the lock is held until `close`
        return self

    def finished_shards(self) -> Mapping[str, dict[str, Any]]:
        """Return the entries of shards that the journal lists and whose files are there."""
        return self._finished

    def make_room(self, shard: Shard) -> None:
        """Nothing to wait for: the plan looked at the disk."""

    def settle(self) -> None:
        """Nothing to wait for: a shard stays where it was written."""

    def lost(self, files: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the shards whose files have another size than when they were finished."""
        return [
            str(file["name"])
            for file in files
            if not self.path_of(str(file["name"])).exists()
            or self.path_of(str(file["name"])).stat().st_size != file["size"]
        ]

    def open_shard(self, shard: Shard) -> SafetensorsFile:
        """Start a shard under its temporary name."""
        return SafetensorsFile(self._part(shard.name), shard)

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Append a finished shard to the journal, durably.

        Raises:
            StoppedError: the journal cannot be written.
        """
        self._journal.append({"shard": shard.name, **entry})

    def publish(self, files: Mapping[str, bytes]) -> str:
        """Write the small files, rename the shards, then the index, and forget the journal."""
        try:
            index = "model.safetensors.index.json"
            for name, data in files.items():
                if name != index:
                    path = self._out / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_durably(path, data)
            for part in sorted(self._out.glob(f"*.safetensors{_PART}")):
                os.replace(part, part.with_name(part.name.removesuffix(_PART)))
            if index in files:
                write_durably(self._out / index, files[index])
            (self._out / MARKER).unlink(missing_ok=True)
            _sync_folder(self._out)
            self._journal.forget()
        except OSError as exc:
            raise StoppedError(
                f"cannot finish {str(self._out)!r}: {exc.strerror}. The merged shards are kept.",
                Remedy.CONTINUE,
            ) from exc
        return str(self._out)

    def path_of(self, name: str) -> Path:
        """Return where a finished shard lies before `publish`."""
        part, final = self._part(name), self._out / name
        return part if part.exists() or not final.exists() else final

    def free(self, name: str) -> None:
        """Remove a shard's file, since it is kept elsewhere."""
        self._part(name).unlink(missing_ok=True)

    @property
    def bytes_sent(self) -> int:
        """Nothing: a folder is on this machine."""
        return 0

    @property
    def bytes_to_send(self) -> int:
        """Nothing: a folder is on this machine."""
        return 0

    def abandon(self) -> None:
        """Remove everything of this run: files, journal, and the folder if that empties it."""
        try:
            discard(self._out)
            self._journal.forget()
        except OSError:
            return

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _start(self, plan_hash: str, identity: Mapping[str, Any]) -> None:
        state = target_state(self._out, plan_hash, is_own=self._is_own)
        if state.problem is not None:
            raise OutputExistsError(state.problem)
        if not (self._out / MARKER).exists():
            self._journal.forget()
        self._out.mkdir(parents=True, exist_ok=True)
        self._finished = self._resume(plan_hash, identity)
        if _value_in(self._out / MARKER, "run") != self._mark:
            marker = {"plan_hash": plan_hash, "run": self._mark}
            write_durably(self._out / MARKER, json.dumps(marker).encode())

    def _find_marker(self) -> None:
        """Wait for the main process's marker; a network's folder may show it late."""
        until = time.monotonic() + _SEEN_S
        while _value_in(self._out / MARKER, "run") != self._mark:
            if time.monotonic() > until:
                raise PlanRefusedError(
                    f"this process does not see what the main one wrote into {str(self._out)!r}: "
                    "several machines need a folder that all of them share, or a repository.",
                    Remedy.ANOTHER_FOLDER,
                )
            time.sleep(0.1)

    def _part(self, name: str) -> Path:
        return self._out / f"{name}{_PART}"

    def _resume(self, plan_hash: str, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the journal's shards whose files hold what was written, by name."""
        entries = {
            str(entry.get("shard")): entry for entry in self._journal.start(plan_hash, identity)
        }
        if not self._looks:
            return {}
        finished = {}
        for name, entry in entries.items():
            there = self.path_of(name)
            if not there.exists() or there.stat().st_size != entry.get("size"):
                continue
            # A disk may have lost what it said it had: read it before it is believed.
            if _sha256(there) == entry.get("sha256"):
                finished[name] = entry
        return finished


def _lock_or_stop(lock: TextIO, out: Path, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError as exc:
        raise StoppedError(
            f"another process is merging into {str(out)!r}. Wait for it, or stop it."
        ) from exc


def _is_empty_mark(out: Path, names: list[str]) -> bool:
    """Whether a folder holds nothing but an empty mark: a disk that was full when a run began."""
    return set(names) <= {MARKER, _HALF_MARKER} and (out / MARKER).stat().st_size == 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_files(out: Path, files: object) -> bool:
    """Whether a folder holds the weight files of a report, which anybody may have written."""
    if not isinstance(files, list) or not files:
        return False
    for file in files:
        name = file.get("name") if isinstance(file, dict) else None
        if not isinstance(name, str) or not (out / name).is_file():
            return False
        if (out / name).stat().st_size != file.get("size"):
            return False
    return True


def _value_in(path: Path, key: str) -> str | None:
    value = _document(path).get(key)
    return value if isinstance(value, str) else None


def _document(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where a file is missing or something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
