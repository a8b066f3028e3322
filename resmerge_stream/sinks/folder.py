"""A folder as target: temporary names until all is there, then renamed, the index last."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..documents import load_json
from ..errors import Notice, OutputExistsError, PlanRefusedError, Remedy, StoppedError
from .durable import temporary, write_durably
from .journal import PARTS, Journal
from .layout import Shard
from .locks import HeldError, Lock, locked
from .provenance import Known, changed
from .safetensors_file import SafetensorsFile
from .sink import Membership, Sink

MARKER = ".resmerge-stream.json"
_HALF_MARKER = temporary(MARKER).removesuffix(".tmp")  # and perhaps who writes it
LOCK = ".resmerge-stream.lock"
REPORT = "resmerge/report.json"
_PART = ".part"
# How long a network's folder may take to show a file that another machine wrote.
_SEEN_S = 60.0
_POLL_S = 0.1


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


def target_state(
    out: Path,
    plan_hash: str,
    *,
    is_own: bool = False,
    now: Sequence[Known] = (),
    update: bool = False,
) -> TargetState:
    """Return what stands at an output folder, seen by a plan.

    Args:
        out: the folder, which may not exist.
        plan_hash: of the plan that wants to write there.
        is_own: whether the folder lies in this plan's work folder, so that whatever is marked
            there is this plan's, also where a full disk left the mark empty.
        now: the plan's sources as they are; a finished result of others is a problem.
        update: whether such a result may be replaced.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        return TargetState(Notice(f"{str(out)!r} is a file.", Remedy.ANOTHER_FOLDER))
    try:
        names = os.listdir(out) if os.path.isdir(out) else []
    except OSError as exc:
        return TargetState(
            Notice(f"cannot look into {str(out)!r}: {exc.strerror}.", Remedy.ANOTHER_FOLDER)
        )
    others = _others(names)
    if is_own or not others:
        return TargetState()
    # An empty mark alone: a disk that was full when a run began.
    if others == {MARKER} and (out / MARKER).stat().st_size == 0:
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
    if plan_hash_of(out) == plan_hash:
        sources = changed(_document(out / REPORT), now)
        if sources and update:
            return TargetState()
        if sources:
            return TargetState(
                Notice(f"{str(out)!r} holds the result of {'; of '.join(sources)}.", Remedy.REPLACE)
            )
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


def plan_hash_of(out: Path) -> str | None:
    """Return of which plan a folder holds the result, as its report says; None: it says nothing."""
    return _value_in(out / REPORT, "plan_hash")


def discard(out: Path) -> list[str]:
    """Remove what an unfinished run left in a folder, and return the names.

    Only the marker and ``*.part`` files beside it are removed, then the folder if it is empty.

    Raises:
        OutputExistsError: there is no marker, so nothing there was left by a run.
        StoppedError: a run that goes on writes there, on this machine or another.
    """
    if not (out / MARKER).is_file():
        raise OutputExistsError(
            f"{str(out)!r} holds no unfinished merge (no {MARKER}); nothing was removed."
        )
    lock = Lock(out / LOCK, repr(str(out)))
    try:
        lock.take(alone=True)
        return _discard(out)
    finally:
        lock.close()


def _discard(out: Path) -> list[str]:
    removed = []
    for path in sorted(out.iterdir()):
        is_half = path.name.startswith(_HALF_MARKER)
        if path.name == MARKER or is_half or path.name.endswith(f".safetensors{_PART}"):
            path.unlink()
            removed.append(path.name)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    (out / LOCK).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
    return removed


class FolderSink(Sink):
    """Writes a merge into a folder, once it is open. See `Sink`.

    Args:
        out: the folder; made when missing.
        plan_hash: what marks this run's files.
        work_dir: where the journal is; one folder a plan and target.
        identity: of the sources, as first seen; a later run must see the same.
        membership: as what this process of the run comes.
        one_machine: whether each machine has such a folder of its own.
        now, update: as for `target_state`.
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
        now: Sequence[Known] = (),
        update: bool = False,
    ) -> None:
        self._now, self._update = now, update
        self._member = member = membership or Membership()
        self._out, self._work, self._mark = out, work_dir, member.mark or uuid.uuid4().hex
        self._plan_hash, self._identity, self._one_machine = plan_hash, identity, one_machine
        self._journal = Journal(work_dir / "journal")
        self._is_own = out.is_relative_to(work_dir)
        # One in the work folder, for the journal; one with the output, for other machines.
        shown = repr(str(out))
        self._locks = [Lock(work_dir / "lock", shown)]
        self._locks += [] if self._is_own else [Lock(out / LOCK, shown)]
        self._is_part, self._writer = member.own is not None, uuid.uuid4().hex
        self._made: set[str] = set()  # shards of this process
        self._read: set[str] = set()  # these, and those whose hash was compared
        self._sizes: dict[str, int] = {}  # of the finished shards
        self._earlier: tuple[str, ...] = ()
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
        if self._is_part:
            self._join()
            return self
        until = time.monotonic() + _SEEN_S  # a network's folder may show the main one's mark late
        waits = not member.is_main and not self._one_machine
        while waits and _value_in(out / MARKER, "run") != self._mark:
            if time.monotonic() > until:
                raise PlanRefusedError(
                    f"this process does not see what the main one wrote into {str(out)!r}: "
                    "several machines need a folder that all of them share, or a repository.",
                    Remedy.ANOTHER_FOLDER,
                )
            time.sleep(_POLL_S)
        with contextlib.ExitStack() as undo:
            try:
                work_dir.mkdir(parents=True, exist_ok=True)
                undo.callback(self.close)
                # The processes of one run share the locks; the main one first sees that they are
                # free.
                self._locks[0].take(alone=member.is_main)
                with (work_dir / "start").open("w") as start:
                    locked(start, fcntl.LOCK_EX)
                    state = target_state(
                        out,
                        self._plan_hash,
                        is_own=self._is_own,
                        now=self._now,
                        update=self._update,
                    )
                    if state.problem is not None:
                        raise OutputExistsError(state.problem)
                    out.mkdir(parents=True, exist_ok=True)
                    for lock in self._locks[1:]:
                        lock.take(alone=member.is_main)
                    if not (out / MARKER).exists():
                        self._journal.forget()
                    self._earlier = self._weights_of_others()
                    self._finished = self._resume()
                    self._write_marker()
                for lock in self._locks:
                    lock.take(alone=False)
            except OutputExistsError:
                raise
            except OSError as exc:
                raise StoppedError(
                    f"cannot use {str(out)!r} and {str(work_dir)!r}: {exc.strerror or exc}."
                ) from exc
            undo.pop_all()  # all went well: the locks are held until `close`
        return self

    def finished_shards(self) -> Mapping[str, dict[str, Any]]:
        """Return the entries of shards that the journal lists and whose files are there."""
        return self._finished

    def by_now(self) -> Mapping[str, dict[str, Any]]:
        """Return the same of all parts, by their files' sizes.

        Raises:
            StoppedError: the folder is not this run's any more.
        """
        self._check_mark()
        return {name: entry for name, entry in self._rows().items() if self._is_there(name, entry)}

    def lost(self, files: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the shards whose files are not as they were when they were finished.

        Their sizes tell; what other parts made is read, and compared with its hash.
        """
        every = list(files)
        self._sizes = {str(file["name"]): int(file["size"]) for file in every}
        names = []
        for file in every:
            name = str(file["name"])
            path = self.path_of(name)
            is_whole = _size(path) == file["size"]
            if is_whole and self._is_part and name not in self._read:
                is_whole = _sha256(path) == file["sha256"]
                self._read |= {name} if is_whole else set()
            if not is_whole:
                names.append(name)
                if self._is_part:
                    self._journal.drop(name)
        return names

    def open_shard(self, shard: Shard) -> SafetensorsFile:
        """Start a shard under its temporary name; of a part, one that no twin of it writes to."""
        return SafetensorsFile(self._half(shard.name), shard)

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Write a finished shard's row of the journal, durably.

        Where a twin of this part was first, its shard stays, and this one is dropped.

        Raises:
            StoppedError: the journal cannot be written, or another run writes here now.
        """
        if not self._is_part:
            self._check_mark()
            self._journal.keep({"shard": shard.name, **entry})
            return
        half = self._half(shard.name)
        with self._alone():
            first = self._journal.row(shard.name)
            is_ours = shard.name in self._made  # and is made again
            if first is not None and not is_ours and self._is_there(shard.name, first):
                half.unlink(missing_ok=True)
                return
            os.replace(half, self._part(shard.name))
            self._journal.keep({"shard": shard.name, **entry})
            self._read.add(shard.name)
            self._made.add(shard.name)

    def publish(self, files: Mapping[str, bytes]) -> str:
        """Write the small files, rename the shards, then the index, and forget the journal.

        Raises:
            StoppedError: a file cannot be written, or another run wrote here since `lost` looked.
        """
        if self._is_part:
            with self._alone():  # no twin keeps a shard meanwhile
                return self._publish(files)
        return self._publish(files)

    def _publish(self, files: Mapping[str, bytes]) -> str:
        self._check_mark()
        self._check_sizes()
        try:
            index = "model.safetensors.index.json"
            for name in self._earlier:  # what is replaced: no mixture of both is ever seen
                (self._out / name).unlink(missing_ok=True)
            self._earlier = ()
            for name, data in files.items():
                if name != index:
                    path = self._out / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_durably(path, data)
            self._check_mark()
            for part in sorted(self._out.glob(f"*.safetensors{_PART}")):
                os.replace(part, part.with_name(part.name.removesuffix(_PART)))
            self._check_sizes()
            if index in files:
                write_durably(self._out / index, files[index])
            (self._out / MARKER).unlink(missing_ok=True)
            shutil.rmtree(self._out / PARTS, ignore_errors=True)
            for part in self._out.glob(f"*.safetensors{_PART}"):  # of a twin, a moment ago
                part.unlink(missing_ok=True)
            for lock in self._locks[1:]:
                lock.remove()
            handle = os.open(self._out, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
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
        is_final = final.exists() and name not in self._earlier and not part.exists()
        return final if is_final else part

    def free(self, name: str) -> None:
        """Remove a shard's file, since it is kept elsewhere."""
        self._part(name).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove everything of this run: files, journal, and the folder if that empties it."""
        try:
            if (self._out / MARKER).is_file():
                _discard(self._out)
            self._journal.forget()
        except OSError:
            return

    def close(self) -> None:
        """Release the locks."""
        for lock in self._locks:
            lock.close()

    def _check_mark(self) -> None:
        """See that the folder is still this run's: where no locks are kept, another may take it.

        Raises:
            StoppedError: it is not.
        """
        mark = _value_in(self._out / MARKER, "run")
        if mark is None and self._is_part:
            raise StoppedError(
                f"{str(self._out)!r} is not being merged any more: another part finished it, or "
                "somebody removed what was there.",
                Remedy.CONTINUE,
            )
        if mark is not None and mark != self._mark:
            raise StoppedError(
                f"another run of this merge writes into {str(self._out)!r} now, whose file system "
                "keeps no locks that would have refused it. Wait for it, or stop it."
            )

    def _check_sizes(self) -> None:
        """See that every shard is whole, under whichever name.

        Raises:
            StoppedError: somebody wrote one anew.
        """
        for name, size in self._sizes.items():
            if (there := _size(self.path_of(name))) != size:
                raise StoppedError(
                    f"{str(self.path_of(name))!r} has {there or 0} of {size} bytes: somebody else "
                    "wrote it since it was finished, so the merge is not done.",
                    Remedy.CONTINUE,
                )

    def _join(self) -> None:
        """Open the folder as one of several parts: whoever comes first makes it theirs.

        Raises:
            OutputExistsError: the folder holds something else.
            PlanRefusedError: the sources are not those of the first part.
            StoppedError: a run of the whole merge goes on, or it is finished by now, or the folder
                cannot be made.
        """
        (lock,) = self._locks[1:]
        with contextlib.ExitStack() as undo:
            try:
                self._check_state()  # before anything is made there
                self._work.mkdir(parents=True, exist_ok=True)
                undo.callback(self.close)
                while True:
                    with contextlib.suppress(HeldError):
                        lock.take(alone=True)  # nobody writes: whatever is there is continued
                        self._check_state()
                        self._work.mkdir(exist_ok=True)
                        self._write_marker()
                    lock.take(alone=False, waits=True)
                    mark = _value_in(self._out / MARKER, "run")
                    if mark == self._mark:
                        break
                    if mark is not None:
                        raise HeldError(
                            f"another process is merging all of it into {str(self._out)!r}. Wait "
                            "for it, or stop it."
                        )
                    self._check_state()
                    time.sleep(_POLL_S)
                self._earlier = self._weights_of_others()
                self._finished = self._resume()
            except OutputExistsError:
                raise
            except OSError as exc:
                raise StoppedError(
                    f"cannot use {str(self._out)!r}: {exc.strerror or exc}."
                ) from exc
            undo.pop_all()

    def _check_state(self) -> None:
        """See that the folder is this merge's, or nobody's.

        Raises:
            OutputExistsError: it holds something else.
            StoppedError: it holds this merge, finished.
        """
        state = target_state(self._out, self._plan_hash, now=self._now, update=self._update)
        if state.problem is not None:
            raise OutputExistsError(state.problem)
        if state.finished:
            for lock in self._locks[1:]:
                lock.remove()
            shutil.rmtree(self._out / PARTS, ignore_errors=True)
            raise StoppedError(
                f"{str(self._out)!r} was finished by another part meanwhile.", Remedy.CONTINUE
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other parts from writing into the folder for a moment.

        Raises:
            StoppedError: the folder is not theirs any more, or the disk fails.
        """
        lock = Lock(self._work / "keeping", repr(str(self._out)))
        try:
            lock.take(alone=True, waits=True)
            self._check_mark()
            yield
        except OSError as exc:
            self._check_mark()  # it was finished, and what was half made is gone with it
            raise StoppedError(
                f"cannot write into {str(self._out)!r}: {exc.strerror or exc}. Finished shards "
                "are kept.",
                Remedy.CONTINUE,
            ) from exc
        finally:
            lock.close()

    def _write_marker(self) -> None:
        """Mark the folder as this run's."""
        if _value_in(self._out / MARKER, "run") != self._mark:
            now = [source.digest for source in self._now]
            marker = {"plan_hash": self._plan_hash, "run": self._mark, "identity": now}
            data = json.dumps(marker).encode()
            write_durably(self._out / MARKER, data, by=self._writer if self._is_part else "")

    def _weights_of_others(self) -> tuple[str, ...]:
        """Return the weight files and the index of a result of other sources, if one is there."""
        report = _document(self._out / REPORT)
        if report.get("plan_hash") != self._plan_hash or not changed(report, self._now):
            return ()
        told = report.get("files")
        names = [file.get("name") for file in told if isinstance(file, dict)] if told else []
        index = "model.safetensors.index.json"
        # Of this folder alone: anybody may have written the report.
        return (index, *(n for n in names if isinstance(n, str) and Path(n).name == n))

    def _part(self, name: str) -> Path:
        return self._out / f"{name}{_PART}"

    def _resume(self) -> dict[str, dict[str, Any]]:
        """Return the journal's shards whose files hold what was written, by name.

        Of those that other parts made, the size has to do: they, and who publishes, read them.
        """
        self._journal.start(self._plan_hash, self._identity)
        if not self._looks:
            return {}
        finished = {}
        for name, entry in self._rows().items():
            if not self._is_there(name, entry):
                continue
            # A disk may have lost what it said it had: read it before it is believed.
            if self._member.own is not None and name not in self._member.own:
                finished[name] = entry
            elif _sha256(self.path_of(name)) == entry.get("sha256"):
                finished[name] = entry
                self._read.add(name)
            elif self._is_part:
                self._journal.drop(name)
        return finished

    def _rows(self) -> dict[str, dict[str, Any]]:
        return {str(entry.get("shard")): entry for entry in self._journal.rows()}

    def _is_there(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether the file of a row has the size that it had."""
        return (size := _size(self.path_of(name))) is not None and size == entry.get("size")

    def _half(self, name: str) -> Path:
        """Return where a shard lies while it is written."""
        return self._work / f"{name}.{self._writer}" if self._is_part else self._part(name)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _others(names: Iterable[str]) -> set[str]:
    """Return the names of what is more than traces of a run that had hardly begun."""
    return {name for name in names if not name.startswith((_HALF_MARKER, LOCK, PARTS))}


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
        document = load_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
