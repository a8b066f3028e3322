"""A checkpoint in a folder: safetensors files, memory-mapped, read in ranges."""

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from itertools import islice
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from ..errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    UnsupportedCheckpointError,
)
from ..filemaps import FileMap, Stamp
from ..recipe import ModelRef
from .assembly import Stored
from .checkpoint import Checkpoint
from .files import (
    INDEX,
    MAX_SMALL_BYTES,
    SMALL_SUFFIXES,
    choose_weights,
    config_file,
    is_small,
    no_model,
)
from .format import (
    MAX_CONFIG_BYTES,
    MAX_JSON_BYTES,
    check_count,
    collect_tensors,
    header_length,
    parse_header,
    parse_index,
    parse_object,
    refuse_pointer,
)
from .store import SourceFile, Store, StoredTensor
from .trainers import Left, Place, config_folder, readable

# Bytes of weights of a model that are hashed when it is opened: a few hundredths of a second.
HASHED_BYTES = 64_000_000
# A pointer of git-lfs is shorter, as its specification says.
_POINTER_BYTES = 1024
# How far below a folder that is no model it is looked for one.
_DEPTH, _MOST_PATHS = 3, 10_000


class Folder(Store):
    """The files of a model folder, memory-mapped.

    Args:
        folder: of the model.
        stamps: of the weight files as they were when their headers were read.
        beside: where the small files are, if not in that folder.
    """

    def __init__(
        self, folder: Path, stamps: Mapping[str, Stamp], beside: Path | None = None
    ) -> None:
        self._folder = beside or folder
        self._maps = {
            file: FileMap(folder / file, f"{folder}/{file}", stamp)
            for file, stamp in stamps.items()
        }

    def read(self, file: str, begin: int, end: int) -> memoryview:
        """Return mapped bytes; no copy is made.

        Raises:
            SourceChangedError: the file is not the one whose header was read.
            CheckpointNotFoundError: it is gone.
        """
        return self._maps[file].view(begin, end)

    def release(self, file: str, begin: int, end: int) -> None:
        """Unmap the pages of a range: pages of a file in memory count as private otherwise."""
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            # The kernel maps up to 16 pages around one that is touched: those go as well.
            around = 16 * mmap.PAGESIZE
            start = max(begin - begin % around - around, 0)
            mapped = self._maps[file].mapped()
            mapped.madvise(mmap.MADV_DONTNEED, start, min(end + around, len(mapped)) - start)

    def done_with(self, file: str, begin: int, end: int) -> None:
        """See that the file is as it was; the kernel takes mapped pages back by itself."""
        self._maps[file].check()

    def check(self) -> None:
        """See that every weight file is the one whose header was read."""
        for file in self._maps.values():
            file.check()

    def read_small(self, name: str) -> bytes:
        """Return the content of one of the files beside the weights."""
        data = _read_bounded(self._folder / name, MAX_SMALL_BYTES, self._folder)
        refuse_pointer(data, where=str(self._folder / name))
        return data

    def close(self) -> None:
        """Forget the maps; each is unmapped when the last view of it is gone."""
        for file in self._maps.values():
            file.close()


def open_folder(folder: Path, ref: ModelRef, *, hashes: bool = False) -> Checkpoint:
    """Read the headers, the index and the config of a model folder.

    Args:
        folder: of the model.
        ref: what the user calls it.
        hashes: whether weight files are hashed even if that takes long.

    Raises:
        CheckpointNotFoundError: the folder holds no weights or no config.
        CheckpointFormatError: a header, the index or the config is malformed.
        UnsupportedCheckpointError: the weights are of a kind that is not read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as exc:
        raise CheckpointNotFoundError(
            f"cannot read the folder {str(folder)!r}: {exc.strerror}."
        ) from exc
    for name in names:
        # It would be copied into the output. Weights may lie elsewhere: what is not safetensors is
        # not read as such.
        if name.endswith(SMALL_SUFFIXES) and (folder / name).is_symlink():
            _check_link(folder / name, folder)
    place = Place(str(folder), lambda: _paths_below(folder))
    if (left := readable(place, names)) is not None:
        return _open_left(folder, ref, left, hashes=hashes)
    weight_files = choose_weights(place, names)
    path = folder / config_file(names)
    if path.name not in names:
        raise no_model(place, "config.json, so it is no model")
    config = parse_object(_read_bounded(path, MAX_CONFIG_BYTES), where=str(path))
    weight_map = None
    if weight_files is None:
        where = str(folder / INDEX)
        weight_map = parse_index(_read_bounded(folder / INDEX, MAX_JSON_BYTES), where=where)
        weight_files = sorted(set(weight_map.values()))
    shards, stamps = {}, {}
    identity: dict[str, Any] = {}
    for file in weight_files:
        shards[file], stamps[file], identity[file] = _read_header(folder / file, file)
        check_count(sum(map(len, shards.values())), where=str(folder))
    if hashes or sum(stamp.size for stamp in stamps.values()) <= HASHED_BYTES:
        for file in weight_files:
            # Its content tells more than its time, which a copy may not have.
            del identity[file]["mtime_ns"]
            identity[file]["sha256"] = _sha256(folder / file)
    files = tuple(
        SourceFile(file, stamps[file].size, identity[file].get("sha256")) for file in weight_files
    )
    if "peft_type" in config:  # the scale of an adapter stands there
        identity[config_file(names)] = hashlib.sha256(
            json.dumps(config, sort_keys=True).encode()
        ).hexdigest()
    tensors, remarks = shards[weight_files[0]], tuple[str, ...]()
    if weight_map is not None:
        tensors, remarks = collect_tensors(shards, weight_map, where=where, beside=names)
    store = Folder(folder, stamps)
    return Checkpoint(
        id=ref.id,
        store=store,
        trees={name: Stored(store, tensor) for name, tensor in tensors.items()},
        config=config,
        files=files,
        identity=identity,
        small_files=_small_files(folder, {file.name for file in files}),
        remarks=remarks,
        folder=str(folder),
        license=_card_license(folder),
    )


def open_file(path: Path, ref: ModelRef, *, hashes: bool = False) -> Checkpoint:
    """Read a model that is one file, such as a GGUF; args and errors are those of `open_folder`."""
    left = readable(Place(str(path.parent), lambda: [path.name]), [path.name])
    if left is None:
        raise UnsupportedCheckpointError(f"{str(path)!r} is no model that is read from one file.")
    return _open_left(path.parent, ref, left, hashes=hashes)


def _open_left(folder: Path, ref: ModelRef, left: Left, *, hashes: bool) -> Checkpoint:
    """Read what a trainer left in a folder, or in one below it; raises as `open_folder`."""
    stamps: dict[str, Stamp] = {}
    for file in left.files:
        try:
            stamps[file] = Stamp.of((folder / file).stat())
        except OSError as exc:
            raise CheckpointNotFoundError(f"cannot read {folder / file}: {exc.strerror}.") from exc
    beside = config_folder(folder / left.at, Path.is_file)
    store = Folder(folder, stamps, beside)
    sizes = {file: stamp.size for file, stamp in stamps.items()}
    trees = left.trees(store, sizes)
    identity: dict[str, Any] = {
        file: {"size": stamp.size, "mtime_ns": stamp.mtime_ns} for file, stamp in stamps.items()
    }
    if hashes or sum(sizes.values()) <= HASHED_BYTES:
        identity = {
            file: {"size": size, "sha256": _sha256(folder / file)} for file, size in sizes.items()
        }
    config = {}
    if (beside / "config.json").is_file():
        path = beside / "config.json"
        config = parse_object(_read_bounded(path, MAX_CONFIG_BYTES), where=str(path))
    return Checkpoint(
        id=ref.id,
        store=store,
        trees=trees,
        config=config,
        files=tuple(
            SourceFile(file, size, identity[file].get("sha256")) for file, size in sizes.items()
        ),
        identity=identity,
        small_files=tuple(
            sorted(one.name for one in beside.glob("*") if one.name.endswith(SMALL_SUFFIXES))
        ),
        remarks=(f"it holds {left.row.what}, {left.row.says}",),
        folder=str(folder),
        license=_card_license(folder),
    )


def _read_header(path: Path, file: str) -> tuple[dict[str, StoredTensor], Stamp, dict[str, Any]]:
    where = str(path)
    try:
        with path.open("rb") as handle:
            status = os.fstat(handle.fileno())
            prefix = handle.read(8)
            length = header_length(prefix, status.st_size, where=where)
            header = handle.read(length)
    except FileNotFoundError as exc:
        raise CheckpointNotFoundError(
            f"{where} is missing, but the index names it. Download the model again."
        ) from exc
    except OSError as exc:
        raise CheckpointNotFoundError(f"cannot read {where}: {exc.strerror}.") from exc
    tensors = parse_header(header, status.st_size, file=file, where=where)
    identity = {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "header_sha256": hashlib.sha256(prefix + header).hexdigest(),
    }
    return tensors, Stamp.of(status), identity


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as exc:
        raise CheckpointNotFoundError(f"cannot read {str(path)!r}: {exc.strerror}.") from exc


def _paths_below(folder: Path) -> list[str]:
    """Return paths of files in a folder and below it: those of a run, not of a whole disk.

    What cannot be looked at is left out: it may be another user's, or a process that has ended.
    """
    found: list[str] = []
    level = [str(folder)]
    for _ in range(_DEPTH):
        below: list[str] = []
        for place in level:
            with contextlib.suppress(OSError):
                below += [entry.path for entry in islice(os.scandir(place), _MOST_PATHS)]
            if len(found) + len(below) >= _MOST_PATHS:
                break
        found += [Path(path).relative_to(folder).as_posix() for path in below if isfile(path)]
        level = [path for path in below if isdir(path)]
    return found[:_MOST_PATHS]


def _check_link(path: Path, folder: Path) -> None:
    """Raise where a link leads out of a model's folder, or out of its part of the Hub's cache."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise UnsupportedCheckpointError(
            f"{str(path)!r} is a link that leads out of the model's folder. What it leads to would "
            "be copied into the output; put the file itself there, or remove the link."
        )


def _read_bounded(path: Path, limit: int, folder: Path | None = None) -> bytes:
    # Again: it may have been put there since the folder was looked through.
    _check_link(path, folder or path.parent)
    try:
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except OSError as exc:
        raise CheckpointNotFoundError(f"cannot read {str(path)!r}: {exc.strerror}.") from exc
    if len(data) > limit:
        raise CheckpointFormatError(f"{str(path)!r} is larger than {limit} bytes.")
    return data


def _small_files(folder: Path, weights: set[str]) -> tuple[str, ...]:
    entries = list(os.scandir(folder))
    names = [entry.name for entry in entries if entry.is_file()]
    for name in names:
        at = folder / name
        if name.endswith(SMALL_SUFFIXES) and at.stat().st_size < _POINTER_BYTES:
            refuse_pointer(at.read_bytes(), where=str(at))
    for below in (entry for entry in entries if entry.is_dir() and is_small(f"{entry.name}/x")):
        with contextlib.suppress(PermissionError):  # what may not be looked into goes nowhere
            names += [f"{below.name}/{e.name}" for e in os.scandir(below) if e.is_file()]
    return tuple(sorted(name for name in names if is_small(name) and name not in weights))


def _card_license(folder: Path) -> str | None:
    """Return the licence in the front matter of the folder's README, where it has one."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            lines = file.read(20_000).splitlines()
    except OSError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key.strip() == "license" and value.strip():
            return value.strip().strip("\"'")
    return None
