"""One file on the Hub, read in ranges: strictly, patiently, from where a body broke off.

huggingface_hub has no ranged read that insists on 206, so that a server which ignores `Range`
would send the whole file; and none that goes on in the middle of a body.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

from ..errors import Remedy, SourceChangedError, StoppedError
from ..filemaps import FileMap, Stamp
from .client import asked_wait, explain, is_transient, plain, reason, wait_seconds
from .patience import PATIENCE, Tries

_TIMEOUT = httpx2.Timeout(connect=15.0, read=30.0, write=30.0, pool=120.0)
# A server that ignores ranges, or answers others, seldom learns.
_STUBBORN_TRIES = 4
# A connection that brings less is given up, and the rest asked for anew: a slow line loses a
# round trip every so often, a hanging server no more than this.
LEAST_BYTES_A_SECOND = 10_000
SPEED_WINDOW_S = 20.0


class _TryAgainError(Exception):
    """An answer that is not the range asked for; nothing of it was used."""

    def __init__(self, reason: str, wait: float | None = None, tries: int | None = None) -> None:
        super().__init__(reason)
        self.wait, self.tries = wait, tries


class _Link:
    """The signed link that a file is read by; its threads share it, and one asks for a new one."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.asking = threading.Lock()
        self._refused = 0
        self._not_before = 0.0

    def refuse(self, url: str | None) -> None:
        """Take note that a link does not serve.

        Args:
            url: the link; None for one that was given out just now, which only the thread that
                asks can say.
        """
        if url is not None and self.url != url:
            return  # another thread has seen to it
        self.url = None
        # The first new link is asked for at once; the waits before the next ones grow.
        wait = wait_seconds(self._refused) if self._refused else 0.0
        self._not_before = time.monotonic() + wait
        self._refused += 1

    def wait(self, name: str) -> None:
        """Wait until a new link may be asked for; only for the thread that asks."""
        seconds = self._not_before - time.monotonic()
        if self.url is None and seconds > 0:
            PATIENCE.wait(seconds, f"cannot read {name}: the storage refuses its signed links")

    def serves(self) -> None:
        """Take note that the link serves."""
        self._refused = 0


class RemoteFile:
    """A file of a repository at a commit, or of a bucket as long as it is the same.

    Args:
        name: what to call it in messages, such as ``org/name/model.safetensors``.
        url: where the Hub resolves it.
        headers: the library's, with the token.
        size: bytes of the whole file.
        xet_hash: what Xet calls its content, where another may come under the same URL.
    """

    def __init__(
        self,
        name: str,
        url: str,
        headers: dict[str, str],
        size: int,
        *,
        xet_hash: str | None = None,
    ) -> None:
        self.name, self.size = name, size
        self._url, self._headers, self._xet_hash = url, headers, xet_hash
        self._link = _Link()

    def read(self, begin: int, end: int) -> bytearray:
        """Return the bytes [begin, end).

        Raises:
            StoppedError: they cannot be had now.
        """
        data = bytearray(end - begin)
        self.read_into(begin, memoryview(data))
        return data

    def forget_link(self) -> None:
        """Ask for a new link before the next request."""
        self._link.url = None

    def read_into(self, begin: int, view: memoryview) -> None:
        """Fill a buffer with the bytes from `begin` on; safe to call from several threads.

        Raises:
            CheckpointNotFoundError: access is refused, or the file is gone.
            SourceChangedError: another content came under its URL.
            StoppedError: the network or the Hub kept failing.
        """
        done, tries = 0, Tries()
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
            if done > before:
                tries.went_on()  # what came is kept: the next request starts where it broke off
            self._wait(tries, failed)

    def _wait(self, tries: Tries, failed: Exception | None) -> None:
        """Wait before the next request, or give up."""
        again = failed if isinstance(failed, _TryAgainError) else None
        is_answer = isinstance(failed, HfHubHTTPError | OSError)
        if failed is not None and is_answer and not is_transient(failed):
            raise explain(failed, f"read {self.name}") from failed
        wait = again.wait if again is not None else None
        wait = wait_seconds(tries.failures + 1, failed) if wait is None else wait
        if not tries.failed(again.tries if again is not None else None, wait):
            raise StoppedError(
                f"cannot read {self.name} from the Hub: {_words(failed)}, every time.",
                Remedy.CONTINUE,
            ) from failed
        tries.wait(wait, f"cannot read {self.name}: {_words(failed)}")

    def _stream(self, begin: int, view: memoryview) -> Iterator[int]:
        """Yield how many more bytes of one request's body arrived in the buffer."""
        end = begin + len(view)
        position, window_began, window_bytes = 0, time.monotonic(), 0
        with self._answer(begin, end) as response:
            for chunk in response.iter_raw():
                stop = position + len(chunk)
                if stop > len(view):
                    raise _TryAgainError("more bytes than were asked for")
                view[position:stop] = chunk
                yield stop - position
                position = stop
                window_bytes += len(chunk)
                passed = time.monotonic() - window_began
                if passed >= SPEED_WINDOW_S:
                    if window_bytes < LEAST_BYTES_A_SECOND * passed and position < len(view):
                        raise _TryAgainError("the body trickles", wait=0.0)
                    window_began, window_bytes = time.monotonic(), 0

    @contextmanager
    def _answer(self, begin: int, end: int) -> Iterator[httpx2.Response]:
        """Ask for a range; of the threads that have no link, one asks and the others wait."""
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        link, asks = self._link, self._link.url is None
        if asks:
            link.asking.acquire()
        try:
            if asks:
                link.wait(self.name)
            signed = link.url
            if signed is None:
                headers |= self._headers
            request = get_session().stream(
                "GET", signed or self._url, headers=headers, timeout=_TIMEOUT
            )
            with request as response:
                self._check(response, begin, end, signed)
                link.serves()
                if response.history:
                    link.url = str(response.url)
                if asks:
                    link.asking.release()
                    asks = False
                yield response
        finally:
            if asks:
                link.asking.release()

    def _check(self, response: httpx2.Response, begin: int, end: int, signed: str | None) -> None:
        status, link = response.status_code, self._link
        if signed is None and self._xet_hash is not None:
            # A signed link leads to one content, whatever is put under the URL later.
            answers = [*response.history, response]
            told = [a.headers["X-Xet-Hash"] for a in answers if "X-Xet-Hash" in a.headers]
            if told and told[0] != self._xet_hash:
                raise replaced(self.name)
        if status == 206:
            said = response.headers.get("Content-Range", "").replace("bytes ", "")
            if said != f"{begin}-{end - 1}/{self.size}":
                link.url = None
                raise _TryAgainError("another range than asked for", tries=_STUBBORN_TRIES)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _TryAgainError("an encoded body", tries=_STUBBORN_TRIES)
            return
        if (signed or response.history) and status in (400, 401, 403, 404, 410):
            link.refuse(signed)
            raise _TryAgainError(f"the storage refuses its signed link ({status})", wait=0.0)
        if status < 400 or status == 416:
            link.url = None
            raise _TryAgainError(f"status {status} instead of the range", tries=_STUBBORN_TRIES)
        if status in (408, 425, 429) or status >= 500:
            words = "the Hub's rate limit is used up" if status == 429 else f"status {status}"
            raise _TryAgainError(words, asked_wait(response.headers))
        hf_raise_for_status(response)


def replaced(name: str) -> SourceChangedError:
    """Return the error that another content is under a file's name than was there before."""
    return SourceChangedError(
        f"{name} was replaced since this command first looked at it, so what was read of it may be "
        "of two models. Run it again when nobody writes there."
    )


def _words(exc: BaseException | None) -> str:
    if exc is None:
        return "the body ends early"
    if isinstance(exc, _TryAgainError):
        return str(exc)
    return plain(reason(exc)).rstrip(".")


class CachedFile(FileMap):
    """A file that the Hub's local cache holds whole, memory-mapped."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(path, f"{name} in the Hub's cache", Stamp.of(path.stat()))
        self.name = name
