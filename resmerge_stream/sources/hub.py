"""A checkpoint on the Hub: pinned to a commit, headers and tensors read in ranges."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.hf_api import HfApi, ModelInfo, RepoSibling

from ..errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    PickledWeightsError,
    Remedy,
    ResMergeError,
    StoppedError,
    listed,
)
from ..hub.client import TokenRefusedError, client, patiently
from ..hub.ranges import CachedFile, RemoteFile
from ..recipe import ModelRef
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .ahead import Ahead
from .checking import FileCheck
from .checkpoint import SourceFile, StoredTensor
from .fetch import PART_BYTES, Fetcher, Span
from .files import INDEX, MAX_SMALL_BYTES, SMALL_SUFFIXES, WEIGHTS, choose_weights, config_file
from .format import (
    MAX_CONFIG_BYTES,
    MAX_JSON_BYTES,
    collect_tensors,
    header_length,
    parse_config,
    parse_header,
    parse_index,
)

# One request gets the whole header of nearly every file.
_FIRST_BYTES = 100_000
_HEADER_THREADS = 8


class HubCheckpoint:
    """A repository at a commit. See `resmerge_stream.sources.Checkpoint` for the attributes."""

    def __init__(self, ref: ModelRef, info: ModelInfo, api: HfApi) -> None:
        self.id = ref.id
        self.revision: str | None = info.sha
        self.folder: str | None = None
        self.gated = bool(info.gated)
        self.is_private = bool(info.private)
        self.license = _license(info)
        self.identity: dict[str, Any] = {"commit": info.sha}
        self.config: dict[str, Any] = {}
        self.tensors: Mapping[str, StoredTensor] = {}
        self.files: tuple[SourceFile, ...] = ()
        self.small_files: tuple[str, ...] = ()
        self.is_remote = True
        self.ahead: Ahead | None = None
        self.checks = False
        self.damaged: set[str] = set()
        self._heads: dict[str, bytes] = {}
        self._file_checks: dict[str, FileCheck] = {}
        self._api = api
        self.subfolder = ref.subfolder
        self._asked = ref.revision
        self._top = f"{ref.subfolder}/" if ref.subfolder else ""
        self._shown = f"{ref.id}/{self._top}"
        self._everything = {s.rfilename for s in info.siblings or ()}
        self._listed = {
            name: s
            for s in info.siblings or ()
            if s.rfilename.startswith(self._top)
            and "/" not in (name := s.rfilename.removeprefix(self._top))
        }
        self._opened: dict[str, RemoteFile | CachedFile] = {}
        self._header_bytes_left: int | None = None
        self._counting = Lock()

    @classmethod
    def open(
        cls,
        ref: ModelRef,
        *,
        token: str | bool | None = None,
        commit: str | None = None,
        max_header_bytes: int | None = None,
    ) -> "HubCheckpoint":
        """Read the headers, the index and the config of a repository.

        Args:
            ref: names the repository and perhaps a revision.
            token: the caller's; None stands for HF_TOKEN or the login, False for nobody's.
            commit: what an earlier start of the same run pinned the revision to.
            max_header_bytes: of index and headers together, at most.

        Raises:
            CheckpointNotFoundError: no such repository or revision, no access, or no model there.
            CheckpointFormatError: a header, the index or the config is malformed.
            UnsupportedCheckpointError: the weights are pickled or GGUF.
            StoppedError: the network or the Hub kept failing.
        """
        api = client(token)
        name = str(ref) if commit is None else f"{ref.id}@{commit}"
        try:
            info = patiently(
                lambda: api.model_info(
                    ref.id, revision=commit or ref.revision, files_metadata=True, timeout=30
                ),
                what=f"read {name} on the Hub",
                unreachable_tries=3,
            )
        except TokenRefusedError as exc:
            # Nothing has begun, so it is not a stop.
            raise CheckpointNotFoundError(
                f"cannot read {name} on the Hub: it does not accept the token (mistyped, expired "
                "or revoked).",
                Remedy.SIGN_IN_AGAIN,
                kind="bad-token",
            ) from exc
        checkpoint = cls(ref, info, api)
        checkpoint._header_bytes_left = max_header_bytes
        checkpoint._read_model()
        return checkpoint

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None) -> memoryview:
        """Return bytes of a tensor or of some of its rows, fetched now.

        Raises:
            StoppedError: they cannot be had now.
        """
        tensor = self.tensors[name]
        begin, end = tensor.byte_range(start_row, stop_row)
        file = self._file(tensor.file)
        if isinstance(file, CachedFile):
            return file.view(begin, end)
        view = self._fetched(file, begin, end)
        check = self._file_checks.get(tensor.file) if self.checks else None
        if check is not None and check.take(begin, view):
            self.damaged.add(tensor.file)
        return view

    def forget_links(self) -> None:
        """Read by fresh links from here on."""
        for file in self._opened.values():
            if isinstance(file, RemoteFile):
                file.forget_link()

    def _fetched(self, file: RemoteFile, begin: int, end: int) -> memoryview:
        if self.ahead is not None:
            view = self.ahead.take(Span(file, begin, end))
            if view is not None:
                return view
        if end - begin <= PART_BYTES:
            return memoryview(file.read(begin, end))
        fetcher = Fetcher(end - begin)
        try:
            return fetcher.begin([Span(file, begin, end)]).wait()[0]
        finally:
            fetcher.close()

    def read_cost(self, name: str, start_row: int = 0, stop_row: int | None = None) -> int:
        """Return how many stored bytes `read` takes for the same rows."""
        begin, end = self.tensors[name].byte_range(start_row, stop_row)
        return end - begin

    def release(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Do nothing: fetching some rows again would cost more than their memory."""

    def done_with(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Let the bytes go that were read ahead for these rows."""
        for span in self.spans(name, start_row, stop_row):
            if self.ahead is not None:
                self.ahead.release(span)

    def spans(self, name: str, start_row: int = 0, stop_row: int | None = None) -> Iterator[Span]:
        """Yield where some rows are on the Hub; nothing when the local cache has the file."""
        tensor = self.tensors[name]
        file = self._file(tensor.file)
        if not isinstance(file, CachedFile):
            yield Span(file, *tensor.byte_range(start_row, stop_row))

    def read_small(self, name: str) -> bytes:
        """Return the content of one of `small_files`, through the library's cache."""
        return self._download(name, MAX_SMALL_BYTES)

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content, where that is known for free."""
        sibling = self._listed.get(name)
        return sibling.blob_id if sibling is not None else None

    def close(self) -> None:
        """Forget the files; the library keeps its connections."""
        self._opened.clear()

    def _read_model(self) -> None:
        names = sorted(self._listed)
        config = config_file(names)
        if config not in names:
            raise CheckpointNotFoundError(
                f"{self._shown.rstrip('/')!r} on the Hub has no config.json, so it is not a model "
                f"that can be merged. {self._models_below()}"
            )
        weights = self._weights(names)
        where = f"{self._shown}{config}"
        self.config = parse_config(self._download(config, MAX_CONFIG_BYTES), where=where)
        weight_map = None
        if weights is None:
            where = f"{self._shown}{INDEX}"
            size = self._size(INDEX)
            if size > MAX_JSON_BYTES:
                raise CheckpointFormatError(f"{where} is larger than {MAX_JSON_BYTES} bytes.")
            weight_map = parse_index(bytes(self._read_range(INDEX, 0, size)), where=where)
            weights = sorted(set(weight_map.values()))
        missing = [name for name in weights if name not in self._listed]
        if missing:
            raise CheckpointNotFoundError(
                f"{self.id} on the Hub lacks {missing[0]!r}, which its index names."
            )
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            shards = dict(zip(weights, pool.map(self._read_header, weights), strict=True))
        if weight_map is None:
            self.tensors = dict(shards[WEIGHTS if WEIGHTS in shards else weights[0]])
        else:
            self.tensors = collect_tensors(shards, weight_map, where=where)
        self.files = tuple(
            SourceFile(name, self._size(name), _sha256(self._listed[name])) for name in weights
        )
        self._file_checks = {
            file.name: FileCheck(self._heads.pop(file.name), file.size, file.sha256)
            for file in self.files
            if file.sha256 is not None
        }
        # What the Hub's local cache holds whole is read from there.
        self.is_remote = any(isinstance(self._file(name), RemoteFile) for name in weights)
        self.small_files = tuple(
            name for name in names if name.endswith(SMALL_SUFFIXES) and name not in weights
        )

    def _models_below(self) -> str:
        """Say where in the repository models are, where this place has none."""
        endings = ("/config.json", f"/{ADAPTER_CONFIG}")
        folders = sorted({p.rpartition("/")[0] for p in self._everything if p.endswith(endings)})
        if not folders:
            return "Give the repository that transformers would load."
        at = f"{self.id}@{self._asked}" if self._asked else self.id
        return f"There are models in its folders {listed(folders)}; write {at}:{folders[0]}."

    def _weights(self, names: list[str]) -> list[str] | None:
        """Return what `choose_weights` does; of pickles, say where they were converted."""
        try:
            return choose_weights(self.id, names)
        except PickledWeightsError as exc:
            found = self._converted()
            if found is None:
                raise
            raise PickledWeightsError(
                f"{self.id!r} has its weights in pickles, which can run code when they are read. "
                f"An open pull request has them as safetensors: give {self.id}@{found}."
            ) from exc

    def _converted(self) -> str | None:
        """Return the revision of an open pull request that has the weights as safetensors."""

        def look() -> str | None:
            for request in self._api.get_repo_discussions(
                self.id, discussion_type="pull_request", discussion_status="open"
            ):
                revision = f"refs/pr/{request.num}"
                if "safetensors" not in request.title.lower():
                    continue
                info = self._api.model_info(self.id, revision=revision, timeout=30)
                if any(s.rfilename.endswith(".safetensors") for s in info.siblings or ()):
                    return revision
            return None

        with contextlib.suppress(ResMergeError):  # advice alone: without it the error stands
            return patiently(look, what=f"look for pull requests of {self.id}")
        return None

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
                        f"{self.id} has more bytes of headers than may be read here. "
                        "Merge it with the command line."
                    )
        file = self._file(name)
        if isinstance(file, CachedFile):
            return file.view(begin, end)
        return memoryview(file.read(begin, end))

    def _file(self, name: str) -> RemoteFile | CachedFile:
        file = self._opened.get(name)
        if file is None:
            file = self._opened[name] = self._open_file(name)
        return file

    def _open_file(self, name: str) -> RemoteFile | CachedFile:
        path = self._top + name
        shown, size = f"{self._shown}{name}", self._size(name)
        cached = try_to_load_from_cache(self.id, path, revision=self.revision)
        if isinstance(cached, str) and Path(cached).stat().st_size == size:
            return CachedFile(shown, Path(cached))
        url = hf_hub_url(self.id, path, revision=self.revision, endpoint=self._api.endpoint)
        return RemoteFile(shown, url, self._api._build_hf_headers(), size)

    def _download(self, name: str, limit: int) -> bytes:
        if self._size(name) > limit:
            raise CheckpointFormatError(f"{self._shown}{name} is larger than {limit} bytes.")
        data = self._downloaded(name, afresh=False)
        if not _is_of(self._listed[name], data):
            data = self._downloaded(name, afresh=True)
            if not _is_of(self._listed[name], data):
                raise StoppedError(
                    f"{self._shown}{name}: downloaded twice, and twice its bytes are not those "
                    "that the Hub names.",
                    Remedy.CONTINUE,
                )
        return data

    def _downloaded(self, name: str, *, afresh: bool) -> bytes:
        path = patiently(
            lambda: hf_hub_download(
                self.id,
                self._top + name,
                revision=self.revision,
                token=self._api.token,
                endpoint=self._api.endpoint,
                library_name="resmerge-stream",
                force_download=afresh,
            ),
            what=f"read {self._shown}{name} on the Hub",
        )
        return Path(path).read_bytes()

    def _size(self, name: str) -> int:
        size = self._listed[name].size
        if size is None:
            raise CheckpointFormatError(f"the Hub does not tell the size of {self._shown}{name}.")
        return size


def _is_of(sibling: RepoSibling, data: bytes) -> bool:
    """Whether bytes are those of a file as the Hub names it."""
    if sibling.lfs is not None:
        return hashlib.sha256(data).hexdigest() == sibling.lfs.sha256
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return sibling.blob_id in (None, blob.hexdigest())


def _sha256(sibling: RepoSibling) -> str | None:
    return sibling.lfs.sha256 if sibling.lfs is not None else None


def _license(info: ModelInfo) -> str | None:
    value = info.card_data.get("license") if info.card_data is not None else None
    return value if isinstance(value, str) else None
