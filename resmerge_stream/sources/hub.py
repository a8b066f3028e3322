"""A checkpoint on the Hub: pinned to a commit, read in ranges, hashed while it streams."""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.hf_api import HfApi, ModelInfo, RepoSibling

from ..errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    PickledWeightsError,
    Remedy,
    ResMergeError,
    StoppedError,
)
from ..hub.client import TokenRefusedError, client, patiently
from ..hub.ranges import CachedFile, RemoteFile
from ..recipe import ModelRef
from .ahead import PART_BYTES, ByteRange, Fetcher
from .assembly import Stored
from .checkpoint import Checkpoint
from .files import (
    INDEX,
    MAX_SMALL_BYTES,
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
from .trainers import Place

# One request gets the whole header of nearly every file.
_FIRST_BYTES = 100_000
_HEADER_THREADS = 8


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


class Repository(Store):
    """The files of a repository, or of a folder in it, at a commit.

    Args:
        ref: names it.
        info: what the Hub says of it.
        api: which asks the Hub.
        max_header_bytes: of index and headers together, at most.
    """

    def __init__(
        self, ref: ModelRef, info: ModelInfo, api: HfApi, max_header_bytes: int | None
    ) -> None:
        self._id, self._revision = ref.id, info.sha
        self._heads: dict[str, bytes] = {}
        self._file_checks: dict[str, FileCheck] = {}
        self._api = api
        self._top = f"{ref.subfolder}/" if ref.subfolder else ""
        self._shown = f"{ref.id}/{self._top}"
        # As it is written, so that a folder's name goes on it.
        at = f"{ref.id}@{ref.revision}" if ref.revision else ref.id
        shown = f"{at}:{ref.subfolder}" if ref.subfolder else at
        self._place = Place(shown, self._below, is_remote=True)
        self._everything = {s.rfilename for s in info.siblings or ()}
        self._listed = {
            s.rfilename.removeprefix(self._top): s
            for s in info.siblings or ()
            if s.rfilename.startswith(self._top)
        }
        self._opened: dict[str, RemoteFile | CachedFile] = {}
        self._header_bytes_left = max_header_bytes
        self._counting = Lock()

    def read(self, file: str, begin: int, end: int) -> memoryview:
        """Return bytes that were read ahead, or are fetched now.

        Raises:
            StoppedError: they cannot be had now.
        """
        opened = self._file(file)
        if isinstance(opened, CachedFile):
            return opened.view(begin, end)
        span = ByteRange(opened, begin, end)
        view = None if self.ahead is None else self.ahead.take(span)
        if view is None and end - begin <= PART_BYTES:
            view = memoryview(opened.read(begin, end))
        elif view is None:
            with contextlib.closing(Fetcher(end - begin)) as fetcher:
                view = fetcher.begin([span]).wait()[0]
        check = self._file_checks.get(file) if self.checks else None
        if check is not None and check.take(begin, view):
            self.damaged |= {file}
        return view

    def forget_links(self) -> None:
        """Read by fresh links from here on."""
        for file in self._opened.values():
            if isinstance(file, RemoteFile):
                file.forget_link()

    def done_with(self, file: str, begin: int, end: int) -> None:
        """Let the bytes go that were read ahead for this range."""
        opened = self._file(file)
        if isinstance(opened, CachedFile):
            opened.check()
        elif self.ahead is not None:
            self.ahead.release(ByteRange(opened, begin, end))

    def check(self) -> None:
        """See that files of the local cache are as they were; a commit never changes."""
        for file in self._opened.values():
            if isinstance(file, CachedFile):
                file.check()

    def span(self, file: str, begin: int, end: int) -> ByteRange | None:
        """Return where a range is on the Hub; None when the local cache has the file."""
        opened = self._file(file)
        return None if isinstance(opened, CachedFile) else ByteRange(opened, begin, end)

    def read_small(self, name: str) -> bytes:
        """Return the content of one of the other files, through the library's cache."""
        data = self._download(name, MAX_SMALL_BYTES)
        refuse_pointer(data, where=f"{self._shown}{name}")
        return data

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content, where that is known for free."""
        sibling = self._listed.get(name)
        return sibling.blob_id if sibling is not None else None

    def close(self) -> None:
        """Forget the files; the library keeps its connections."""
        self._opened.clear()

    def model(self, ref: ModelRef, info: ModelInfo) -> Checkpoint:
        """Return the model, with headers, index and config read; raises as `open_repository`."""
        names = sorted(name for name in self._listed if "/" not in name)
        config_name = config_file(names)
        if config_name not in names:
            raise no_model(self._place, "config.json, so it is no model")
        try:
            weights = choose_weights(self._place, names)
        except PickledWeightsError as exc:  # it may say where they were converted
            found = self._converted()
            if found is None:
                raise
            raise PickledWeightsError(
                f"{self._id!r} has its weights in pickles, which can run code when they are read. "
                f"An open pull request has them as safetensors: give {self._id}@{found}."
            ) from exc
        where = f"{self._shown}{config_name}"
        config = parse_object(self._download(config_name, MAX_CONFIG_BYTES), where=where)
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
                f"{self._id} on the Hub lacks {missing[0]!r}, which its index names."
            )
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            shards = dict(zip(weights, pool.map(self._read_header, weights), strict=True))
        check_count(sum(map(len, shards.values())), where=self._shown)
        tensors, remarks = shards[WEIGHTS if WEIGHTS in shards else weights[0]], tuple[str, ...]()
        if weight_map is not None:
            tensors, remarks = collect_tensors(shards, weight_map, where=where, beside=names)
        files = tuple(
            SourceFile(name, self._size(name), _sha256(self._listed[name])) for name in weights
        )
        self._file_checks = {
            file.name: FileCheck(self._heads.pop(file.name), file.size, file.sha256)
            for file in files
            if file.sha256 is not None
        }
        value = info.card_data.get("license") if info.card_data is not None else None
        return Checkpoint(
            id=ref.id,
            store=self,
            trees={name: Stored(self, tensor) for name, tensor in tensors.items()},
            config=config,
            files=files,
            identity={"commit": info.sha},
            small_files=tuple(
                name for name in sorted(self._listed) if is_small(name) and name not in weights
            ),
            remarks=remarks,
            revision=info.sha,
            subfolder=ref.subfolder,
            license=value if isinstance(value, str) else None,
            gated=bool(info.gated),
            is_private=bool(info.private),
            # What the Hub's local cache holds whole is read from there.
            is_remote=any(isinstance(self._file(name), RemoteFile) for name in weights),
        )

    def _below(self) -> list[str]:
        """Return the paths of all files below this place in the repository."""
        top = self._top
        return [path.removeprefix(top) for path in self._everything if path.startswith(top)]

    def _converted(self) -> str | None:
        """Return the revision of an open pull request that has the weights as safetensors."""

        def look() -> str | None:
            for request in self._api.get_repo_discussions(
                self._id, discussion_type="pull_request", discussion_status="open"
            ):
                revision = f"refs/pr/{request.num}"
                if "safetensors" not in request.title.lower():
                    continue
                info = self._api.model_info(self._id, revision=revision, timeout=30)
                if any(s.rfilename.endswith(".safetensors") for s in info.siblings or ()):
                    return revision
            return None

        with contextlib.suppress(ResMergeError):  # advice alone: without it the error stands
            return patiently(look, what=f"look for pull requests of {self._id}")
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
                        f"{self._id} has more bytes of headers than may be read here. "
                        "Merge it with the command line."
                    )
        file = self._file(name)
        if isinstance(file, CachedFile):
            return file.view(begin, end)
        return memoryview(file.read(begin, end))

    def _file(self, name: str) -> RemoteFile | CachedFile:
        if name in self._opened:
            return self._opened[name]
        path = self._top + name
        shown, size = f"{self._shown}{name}", self._size(name)
        cached = try_to_load_from_cache(self._id, path, revision=self._revision)
        file: RemoteFile | CachedFile
        if isinstance(cached, str) and Path(cached).stat().st_size == size:
            file = CachedFile(shown, Path(cached))
        else:
            url = hf_hub_url(self._id, path, revision=self._revision, endpoint=self._api.endpoint)
            file = RemoteFile(shown, url, self._api._build_hf_headers(), size)
        self._opened[name] = file
        return file

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
                self._id,
                self._top + name,
                revision=self._revision,
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


def open_repository(
    ref: ModelRef,
    *,
    token: str | bool | None = None,
    commit: str | None = None,
    max_header_bytes: int | None = None,
) -> Checkpoint:
    """Read the headers, the index and the config of a repository.

    Args:
        ref: names the repository and perhaps a revision.
        token: the caller's; None stands for HF_TOKEN or the login, False for nobody's.
        commit: what an earlier start of the same run pinned the revision to.
        max_header_bytes: of index and headers together, at most.

    Raises:
        CheckpointNotFoundError: no such repository or revision, no access, or no model there.
        CheckpointFormatError: a header, the index or the config is malformed.
        UnsupportedCheckpointError: the weights are of a kind that is not read.
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
    return Repository(ref, info, api, max_header_bytes).model(ref, info)


def _is_of(sibling: RepoSibling, data: bytes) -> bool:
    """Whether bytes are those of a file as the Hub names it."""
    if sibling.lfs is not None:
        return hashlib.sha256(data).hexdigest() == sibling.lfs.sha256
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return sibling.blob_id in (None, blob.hexdigest())


def _sha256(sibling: RepoSibling) -> str | None:
    return sibling.lfs.sha256 if sibling.lfs is not None else None
