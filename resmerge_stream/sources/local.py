"""A checkpoint in a folder: safetensors files, memory-mapped, read in ranges."""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    UnsupportedCheckpointError,
)
from ..recipe import ModelRef
from .checkpoint import SourceFile, StoredTensor
from .files import INDEX, MAX_SMALL_BYTES, SMALL_SUFFIXES, choose_weights, config_file
from .format import (
    MAX_CONFIG_BYTES,
    MAX_JSON_BYTES,
    collect_tensors,
    header_length,
    parse_config,
    parse_header,
    parse_index,
)


class LocalCheckpoint:
    """A model folder. See `resmerge_stream.sources.Checkpoint` for the attributes."""

    def __init__(
        self,
        folder: Path,
        ref: ModelRef,
        tensors: Mapping[str, StoredTensor],
        files: tuple[SourceFile, ...],
        identity: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        self.id = ref.id
        self.revision: str | None = None
        self.subfolder: str | None = None
        self.tensors = tensors
        self.files = files
        self.identity = identity
        self.config = config
        self.folder: str | None = str(folder)
        self.small_files = _small_files(folder, {file.name for file in files})
        self.license = _card_license(folder)
        self.gated = False
        self.is_private = True
        self.is_remote = False
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path, ref: ModelRef) -> "LocalCheckpoint":
        """Read the headers, the index and the config of a model folder.

        Raises:
            CheckpointNotFoundError: the folder holds no weights or no config.
            CheckpointFormatError: a header, the index or the config is malformed.
            UnsupportedCheckpointError: the weights are pickled or GGUF.
        """
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        except OSError as exc:
            raise CheckpointNotFoundError(
                f"cannot read the folder {str(folder)!r}: {exc.strerror}."
            ) from exc
        _refuse_outward_links(folder, names)
        weight_files = choose_weights(str(folder), names)
        config = _read_config(folder, names)
        weight_map = None
        if weight_files is None:
            where = str(folder / INDEX)
            weight_map = parse_index(_read_bounded(folder / INDEX, MAX_JSON_BYTES), where=where)
            weight_files = sorted(set(weight_map.values()))
        shards, files = {}, []
        identity: dict[str, Any] = {}
        for file in weight_files:
            shards[file], source, identity[file] = _read_header(folder / file, file)
            files.append(source)
        if "peft_type" in config:  # the scale of an adapter stands there
            identity[config_file(names)] = _digest(config)
        if weight_map is None:
            tensors = dict(shards[weight_files[0]])
        else:
            tensors = collect_tensors(shards, weight_map, where=str(folder / INDEX))
        return cls(folder, ref, tensors, tuple(files), identity, config)

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None) -> memoryview:
        """Return mapped bytes of a tensor or of some of its rows; no copy is made.

        Raises:
            CheckpointFormatError: the file is shorter than when its header was read.
        """
        tensor = self.tensors[name]
        begin, end = tensor.byte_range(start_row, stop_row)
        if begin == end:
            return memoryview(bytearray())
        mapped = self._map(tensor.file)
        if end > len(mapped):
            raise CheckpointFormatError(
                f"{self.folder}/{tensor.file} became shorter while it was read; restore it."
            )
        return memoryview(mapped)[begin:end]

    def read_cost(self, name: str, start_row: int = 0, stop_row: int | None = None) -> int:
        """Return how many stored bytes `read` takes for the same rows."""
        begin, end = self.tensors[name].byte_range(start_row, stop_row)
        return end - begin

    def release(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Unmap the pages of some rows: pages of a file in memory count as private otherwise."""
        tensor = self.tensors[name]
        begin, end = tensor.byte_range(start_row, stop_row)
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            # The kernel maps up to 16 pages around one that is touched: those go as well.
            around = 16 * mmap.PAGESIZE
            start = max(begin - begin % around - around, 0)
            mapped = self._map(tensor.file)
            mapped.madvise(mmap.MADV_DONTNEED, start, min(end + around, len(mapped)) - start)

    def done_with(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Do nothing: the kernel takes mapped pages back by itself."""

    def read_small(self, name: str) -> bytes:
        """Return the content of one of `small_files`."""
        return _read_bounded(self._folder / name, MAX_SMALL_BYTES)

    def small_oid(self, name: str) -> str | None:
        """Return None: nobody has hashed the files of a folder."""
        return None

    def close(self) -> None:
        """Forget the maps; each is unmapped when the last view of it is gone."""
        self._maps.clear()

    def _map(self, file: str) -> mmap.mmap:
        mapped = self._maps.get(file)
        if mapped is None:
            try:
                with (self._folder / file).open("rb") as handle:
                    # Copy-on-write, so that torch takes the buffer as writable; never written.
                    mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as exc:
                raise CheckpointFormatError(
                    f"cannot map {str(self._folder / file)!r}: {exc}. Was it moved or emptied?"
                ) from exc
            self._maps[file] = mapped
        return mapped


def _read_header(
    path: Path, file: str
) -> tuple[dict[str, StoredTensor], SourceFile, dict[str, Any]]:
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
    return tensors, SourceFile(file, status.st_size), identity


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _read_config(folder: Path, names: list[str]) -> dict[str, Any]:
    name = config_file(names)
    if name not in names:
        raise CheckpointNotFoundError(
            f"{str(folder)!r} has no config.json, so it is not a model folder. "
            "Give the folder that transformers would load."
        )
    path = folder / name
    return parse_config(_read_bounded(path, MAX_CONFIG_BYTES), where=str(path))


def _refuse_outward_links(folder: Path, names: list[str]) -> None:
    """Refuse files that would be copied into the output from outside of the model's folder.

    Weights may lie elsewhere: what is not safetensors is not read as such.
    """
    for name in names:
        if name.endswith(SMALL_SUFFIXES) and (folder / name).is_symlink():
            _check_link(folder / name)


def _check_link(path: Path) -> None:
    """Raise where a link leads out of a model's folder, or out of its part of the Hub's cache."""
    root = path.parent.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise UnsupportedCheckpointError(
            f"{str(path)!r} is a link that leads out of the model's folder. What it leads to would "
            "be copied into the output; put the file itself there, or remove the link."
        )


def _read_bounded(path: Path, limit: int) -> bytes:
    _check_link(path)  # again: it may have been put there since the folder was looked through
    try:
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except OSError as exc:
        raise CheckpointNotFoundError(f"cannot read {str(path)!r}: {exc.strerror}.") from exc
    if len(data) > limit:
        raise CheckpointFormatError(f"{str(path)!r} is larger than {limit} bytes.")
    return data


def _small_files(folder: Path, weights: set[str]) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    return tuple(name for name in names if name.endswith(SMALL_SUFFIXES) and name not in weights)


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
