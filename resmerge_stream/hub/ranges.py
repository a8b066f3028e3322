"""One file on the Hub, read in ranges: strictly, patiently, from where a body broke off.

huggingface_hub has no ranged read that insists on 206, so that a server which ignores `Range`
would send the whole file; and none that goes on in the middle of a body.
"""

import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

from ..errors import CheckpointFormatError, StoppedError
from .client import asked_wait, explain, is_transient, plain, wait_seconds

_TIMEOUT = httpx2.Timeout(connect=15.0, read=30.0, write=30.0, pool=120.0)
_TRIES = 8
# A server that ignores ranges, or answers others, seldom learns.
_STUBBORN_TRIES = 4


class _TryAgainError(Exception):
    """An answer that is not the range asked for; nothing of it was used."""

    def __init__(self, reason: str, wait: float | None = None, tries: int = _TRIES) -> None:
        super().__init__(reason)
        self.wait, self.tries = wait, tries


class RemoteFile:
    """A file of a repository at a commit.

    Args:
        name: what to call it in messages, such as ``org/name/model.safetensors``.
        url: where the Hub resolves it.
        headers: the library's, with the token.
        size: bytes of the whole file.
    """

    def __init__(self, name: str, url: str, headers: dict[str, str], size: int) -> None:
        self.name, self.size = name, size
        self._url, self._headers = url, headers
        self._signed: str | None = None

    def read(self, begin: int, end: int) -> bytearray:
        """Return the bytes [begin, end).

        Raises:
            StoppedError: they cannot be had now.
        """
        data = bytearray(end - begin)
        self.read_into(begin, memoryview(data))
        return data

    def read_into(self, begin: int, view: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on; safe to call from several threads.

        Raises:
            CheckpointNotFoundError: access is refused, or the file is gone.
            StoppedError: the network or the Hub kept failing.
        """
        done, failures = 0, 0
        while done < len(view):
            before, failed = done, None
            try:
                for received in self._stream(begin + done, view[done:]):
                    done += received
                if done == before:
                    raise _TryAgainError("an empty body")
            except (_TryAgainError, HfHubHTTPError, httpx2.HTTPError, OSError) as exc:
                failed = exc
            if failed is None and done == len(view):
                return
            # What arrived is kept: the next request starts where this one broke off.
            failures = 1 if done > before else failures + 1
            is_answer = isinstance(failed, HfHubHTTPError | OSError)
            if failed is not None and is_answer and not is_transient(failed):
                raise explain(failed, f"read {self.name}") from failed
            tries = failed.tries if isinstance(failed, _TryAgainError) else _TRIES
            if failures >= tries:
                raise self._stopped(failed) from failed
            wait = failed.wait if isinstance(failed, _TryAgainError) else None
            time.sleep(wait if wait is not None else wait_seconds(failures, failed))

    def _stream(self, begin: int, view: memoryview) -> Iterator[int]:
        """Yield how many more bytes of one request's body arrived in the buffer."""
        signed = self._signed
        end = begin + len(view)
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if signed is None:
            headers |= self._headers
        position = 0
        with get_session().stream(
            "GET", signed or self._url, headers=headers, timeout=_TIMEOUT
        ) as response:
            self._check(response, begin, end, is_signed=bool(signed or response.history))
            if response.history:
                self._signed = str(response.url)
            for chunk in response.iter_raw():
                stop = position + len(chunk)
                if stop > len(view):
                    raise _TryAgainError("more bytes than were asked for")
                view[position:stop] = chunk
                yield stop - position
                position = stop

    def _check(self, response: httpx2.Response, begin: int, end: int, *, is_signed: bool) -> None:
        status = response.status_code
        if status == 206:
            said = response.headers.get("Content-Range", "").replace("bytes ", "")
            if said != f"{begin}-{end - 1}/{self.size}":
                self._signed = None
                raise _TryAgainError("another range than asked for", tries=_STUBBORN_TRIES)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _TryAgainError("an encoded body")
            return
        if is_signed and status in (400, 401, 403, 404, 410):
            # An expired link: the Hub gives out a new one.
            self._signed = None
            raise _TryAgainError(f"an expired link ({status})", wait=0.0 if status == 403 else None)
        if status < 400 or status == 416:
            self._signed = None
            raise _TryAgainError(f"status {status} instead of the range", tries=_STUBBORN_TRIES)
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgainError(f"status {status}", asked_wait(response.headers))
        hf_raise_for_status(response)

    def _stopped(self, exc: BaseException | None) -> StoppedError:
        reason = plain(" ".join(str(exc).split()))[:200] if exc else "the body ends early"
        kind = "" if isinstance(exc, _TryAgainError | None) else f"{type(exc).__name__}: "
        return StoppedError(
            f"cannot read {self.name} from the Hub: {kind}{reason or 'no reason given'}, "
            "every time. Finished shards are kept; the same command continues."
        )


class CachedFile:
    """A file that the Hub's local cache holds whole, memory-mapped."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._map: mmap.mmap | None = None

    def view(self, begin: int, end: int) -> memoryview:
        """Return the bytes [begin, end) without copying them.

        Raises:
            CheckpointFormatError: the file was emptied or removed since it was found.
        """
        if begin == end:
            return memoryview(bytearray())
        try:
            if self._map is None:
                with self._path.open("rb") as handle:
                    # Copy-on-write, so that torch takes the buffer as writable; never written.
                    self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as exc:
            raise CheckpointFormatError(
                f"cannot map {self.name} in the Hub's cache: {exc}. Was the cache cleaned?"
            ) from exc
        return memoryview(self._map)[begin:end]
