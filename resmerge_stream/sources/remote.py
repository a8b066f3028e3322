"""Files on the Hub, read in ranges: what repositories and buckets have in common."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

from ..errors import CheckpointFormatError, CheckpointNotFoundError, Remedy
from ..hub.client import TokenRefusedError
from ..hub.ranges import CachedFile, RemoteFile
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .ahead import PART_BYTES, ByteRange, Fetcher
from .assembly import Source, Stored
from .blocks import Blocks
from .checkpoint import Checkpoint
from .files import (
    INDEX,
    MAX_SMALL_BYTES,
    SMALL_SUFFIXES,
    WEIGHTS,
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

# One request gets the whole header of nearly every file.
_FIRST_BYTES = 100_000
_HEADER_THREADS = 8
# Written anew by a run that goes on.
_STATE = "trainer_state.json"


class FileCheck:
    """The sha256 of one file that is read in order; what is read out of order is left aside.

    Args:
        head: the file's first bytes, which were read while planning.
        size: bytes of the whole file.
        sha256: in hex, as the Hub names it.
    """

    def __init__(self, head: bytes, size: int, sha256: str) -> None:
        self._size, self._sha256 = size, sha256
        self._first = len(head)
        self._head = hashlib.sha256(head)
        self._position, self._hash = self._first, self._head.copy()

    def take(self, begin: int, view: memoryview) -> bool:
        """Take bytes that were read; return whether the file is whole now, and another.

        Args:
            begin: their place in the file. The first byte after the head starts afresh.
            view: the bytes.
        """
        if begin == self._first and self._position != begin:
            self._position, self._hash = self._first, self._head.copy()
        if begin != self._position:
            return False
        self._hash.update(view)
        self._position += len(view)
        return self._position == self._size and self._hash.hexdigest() != self._sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the Hub says of a model beside its files; see `Checkpoint`."""

    identity: dict[str, Any]
    is_private: bool
    revision: str | None = None
    subfolder: str | None = None
    license: str | None = None
    gated: bool = False


class Remote(Store):
    """The files in a folder on the Hub, and the model that they are.

    Args:
        at: what a file's path is put behind in messages, such as ``org/name``.
        written: the same as a recipe writes it, such as ``org/name@main``.
        folder: path of the model's folder, or of its one GGUF file; empty for the top.
        sizes: bytes of all files by path; None where the Hub does not say.
        max_header_bytes: of index and headers together, at most.
    """

    def __init__(
        self,
        at: str,
        written: str,
        folder: str,
        sizes: Mapping[str, int | None],
        max_header_bytes: int | None,
    ) -> None:
        self._at, self._sizes = at, sizes
        self._heads: dict[str, bytes] = {}
        self._file_checks: dict[str, FileCheck] = {}
        # One of several GGUF files is named as a folder is.
        self._only = folder if folder.endswith(".gguf") and folder in sizes else None
        if self._only:
            folder = folder.rpartition("/")[0]
        self._top = self._beside = f"{folder}/" if folder else ""
        self._shown = f"{at}/{self._top}"
        # As it is written, so that a folder's name goes on it.
        top = Place(written, self._below, is_remote=True)
        self._place = Place(top.inside(folder) if folder else written, self._below, is_remote=True)
        self._blocks: Blocks | None = None
        self._opened: dict[str, RemoteFile | CachedFile] = {}
        self._header_bytes_left = max_header_bytes
        self._counting = Lock()

    @abstractmethod
    def _open(self, path: str) -> RemoteFile | CachedFile:
        """Return a file to be read in ranges."""

    @abstractmethod
    def _download(self, path: str, limit: int) -> bytes:
        """Return the whole content of a small file."""

    @abstractmethod
    def _facts(self, files: Iterable[str]) -> Facts:
        """Return what the Hub says of the model that is made of some files, by their paths."""

    def _sha256(self, path: str) -> str | None:
        """Return the sha256 of a weight file, where the Hub tells it."""
        return None

    def read(self, file: str, begin: int, end: int) -> memoryview:
        """Return bytes that were read ahead, or are fetched now.

        Raises:
            StoppedError: they cannot be had now.
        """
        opened = self._file(file)
        if isinstance(opened, CachedFile):
            return opened.view(begin, end)
        if self._blocks is not None:
            return self._blocks.read(file, begin, end)
        view = self._fetched(opened, begin, end)
        check = self._file_checks.get(file) if self.checks else None
        if check is not None and check.take(begin, view):
            self.damaged |= {file}
        return view

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Fetch these together when the first of them is read."""
        if self._blocks is not None:
            self._blocks.expect(ranges)

    def forget_links(self) -> None:
        """Read by fresh links from here on."""
        for file in self._opened.values():
            if isinstance(file, RemoteFile):
                file.forget_link()

    def _fetched(self, file: RemoteFile, begin: int, end: int) -> memoryview:
        if self.ahead is not None:
            view = self.ahead.take(ByteRange(file, begin, end))
            if view is not None:
                return view
        if end - begin <= PART_BYTES:
            return memoryview(file.read(begin, end))
        fetcher = Fetcher(end - begin)
        try:
            return fetcher.begin([ByteRange(file, begin, end)]).wait()[0]
        finally:
            fetcher.close()

    def done_with(self, file: str, begin: int, end: int) -> None:
        """Let the bytes go that were read ahead for this range."""
        opened = self._file(file)
        if isinstance(opened, CachedFile):
            opened.check()
        elif self.ahead is not None:
            self.ahead.release(ByteRange(opened, begin, end))

    def check(self) -> None:
        """See that files of the local cache are as they were."""
        for file in self._opened.values():
            if isinstance(file, CachedFile):
                file.check()

    def span(self, file: str, begin: int, end: int) -> ByteRange | None:
        """Return where a range is on the Hub; None when the local cache has the file."""
        opened = self._file(file)
        return None if isinstance(opened, CachedFile) else ByteRange(opened, begin, end)

    def read_small(self, name: str) -> bytes:
        """Return the content of one of the other files."""
        data = self._download(self._beside + name, MAX_SMALL_BYTES)
        refuse_pointer(data, where=f"{self._at}/{self._beside}{name}")
        return data

    def close(self) -> None:
        """Forget the files; the library keeps its connections."""
        self._opened.clear()

    def model(self, ref_id: str) -> Checkpoint:
        """Return the model, with headers, index and config read.

        Args:
            ref_id: what the user calls it.

        Raises:
            CheckpointNotFoundError: there is no model.
            CheckpointFormatError: a header, the index or the config is malformed.
            UnsupportedCheckpointError: the weights are of a kind that is not read.
            StoppedError: the network or the Hub kept failing.
        """
        names = sorted(name for name in self._below() if "/" not in name)
        if (left := readable(self._place, names)) is not None:
            return self._left(ref_id, left)
        config_name = config_file(names)
        if config_name not in names:
            raise no_model(self._place, "config.json, so it is no model")
        weights = self._weights(names)
        where = f"{self._shown}{config_name}"
        config = parse_object(
            self._download(self._top + config_name, MAX_CONFIG_BYTES), where=where
        )
        weight_map = None
        if weights is None:
            where = f"{self._shown}{INDEX}"
            size = self._size(INDEX)
            if size > MAX_JSON_BYTES:
                raise CheckpointFormatError(f"{where} is larger than {MAX_JSON_BYTES} bytes.")
            weight_map = parse_index(bytes(self._read_range(INDEX, 0, size)), where=where)
            weights = sorted(set(weight_map.values()))
        missing = [name for name in weights if self._top + name not in self._sizes]
        if missing:
            raise CheckpointNotFoundError(
                f"{self._at} on the Hub lacks {missing[0]!r}, which its index names."
            )
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            shards = dict(zip(weights, pool.map(self._read_header, weights), strict=True))
        check_count(sum(map(len, shards.values())), where=self._shown)
        tensors, remarks = shards[WEIGHTS if WEIGHTS in shards else weights[0]], tuple[str, ...]()
        if weight_map is not None:
            tensors, remarks = collect_tensors(shards, weight_map, where=where, beside=names)
        files = tuple(
            SourceFile(name, self._size(name), self._sha256(self._top + name)) for name in weights
        )
        self._file_checks = {
            file.name: FileCheck(self._heads.pop(file.name), file.size, file.sha256)
            for file in files
            if file.sha256 is not None
        }
        self._heads.clear()
        below = sorted(self._below())
        small = (name for name in below if is_small(name) and name not in weights)
        trees = {name: Stored(self, tensor) for name, tensor in tensors.items()}
        return self._checkpoint(ref_id, trees, config, files, tuple(small), remarks)

    def _left(self, ref_id: str, left: Left) -> Checkpoint:
        """Return the model in what a trainer left, with what says where its tensors lie read."""
        sizes = {file: self._size(file) for file in left.files}
        self._blocks = Blocks(self._read_range, sizes)
        try:
            trees = left.trees(self, sizes)
        finally:
            self._blocks = None
        own = PurePosixPath(self._top + left.at)
        beside = config_folder(own, lambda path: str(path) in self._sizes)
        self._beside = "" if beside == PurePosixPath() else f"{beside}/"
        config = {}
        if (path := f"{self._beside}config.json") in self._sizes:
            data = self._download(path, MAX_CONFIG_BYTES)
            config = parse_object(data, where=f"{self._at}/{path}")
        below = (path.removeprefix(self._beside) for path in sorted(self._sizes)
                 if path.startswith(self._beside))  # fmt: skip
        return self._checkpoint(
            ref_id,
            trees,
            config,
            tuple(SourceFile(file, sizes[file], self._sha256(self._top + file)) for file in sizes),
            tuple(name for name in below if "/" not in name and name.endswith(SMALL_SUFFIXES)),
            (f"it holds {left.row.what}, {left.row.says}",),
        )

    def _checkpoint(
        self,
        ref_id: str,
        trees: Mapping[str, Source],
        config: dict[str, Any],
        files: tuple[SourceFile, ...],
        small_files: tuple[str, ...],
        remarks: tuple[str, ...],
    ) -> Checkpoint:
        # What a run that goes on writes there is not the model's: logs, state, later checkpoints.
        along = {n for n in small_files if "/" not in n and n.endswith(SMALL_SUFFIXES)}
        along |= {"config.json", ADAPTER_CONFIG, INDEX}
        said = {self._beside + name for name in along - {_STATE}}
        weights = {self._top + file.name for file in files}
        facts = self._facts(sorted(weights | (said & self._sizes.keys())))
        return Checkpoint(
            id=ref_id,
            store=self,
            trees=trees,
            config=config,
            files=files,
            identity=facts.identity,
            small_files=small_files,
            remarks=remarks,
            revision=facts.revision,
            subfolder=facts.subfolder,
            license=facts.license,
            gated=facts.gated,
            is_private=facts.is_private,
            # What the Hub's local cache holds whole is read from there.
            is_remote=any(isinstance(self._file(file.name), RemoteFile) for file in files),
        )

    def _below(self) -> list[str]:
        """Return the paths of all files below this place."""
        return [
            path.removeprefix(self._top)
            for path in self._sizes
            if path.startswith(self._top) and self._only in (None, path)
        ]

    def _weights(self, names: list[str]) -> list[str] | None:
        """Return what `choose_weights` does."""
        return choose_weights(self._place, names)

    def _read_header(self, name: str) -> dict[str, StoredTensor]:
        size, where = self._size(name), f"{self._shown}{name}"
        first = bytes(self._read_range(name, 0, min(_FIRST_BYTES, size)))
        length = header_length(first[:8], size, where=where)
        if 8 + length > len(first):
            first += bytes(self._read_range(name, len(first), 8 + length))
        self._heads[name] = first[: 8 + length]
        return parse_header(first[8 : 8 + length], size, file=name, where=where)

    def _read_range(self, name: str, begin: int, end: int) -> memoryview:
        with self._counting:
            if self._header_bytes_left is not None:
                self._header_bytes_left -= end - begin
                if self._header_bytes_left < 0:
                    raise CheckpointFormatError(
                        f"{self._at} has more bytes of headers than may be read here. "
                        "Merge it with the command line."
                    )
        file = self._file(name)
        if isinstance(file, CachedFile):
            return file.view(begin, end)
        return memoryview(file.read(begin, end))

    def _file(self, name: str) -> RemoteFile | CachedFile:
        file = self._opened.get(name)
        if file is None:
            file = self._opened[name] = self._open(self._top + name)
        return file

    def _size(self, name: str) -> int:
        size = self._sizes[self._top + name]
        if size is None:
            raise CheckpointFormatError(f"the Hub does not tell the size of {self._shown}{name}.")
        return size


@contextmanager
def unbegun(name: str) -> Iterator[None]:
    """Raise that the Hub refuses the token as what is wrong, and not as a stop: nothing has begun.

    Args:
        name: of the model that is read.
    """
    try:
        yield
    except TokenRefusedError as exc:
        raise CheckpointNotFoundError(
            f"cannot read {name} on the Hub: it does not accept the token (mistyped, expired "
            "or revoked).",
            Remedy.SIGN_IN_AGAIN,
            kind="bad-token",
        ) from exc
