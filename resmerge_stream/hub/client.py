"""One door to the Hub: huggingface_hub's client with time-outs, patience, and errors in our words.

Nothing here keeps a token; messages never hold one, nor the query of a URL (it may be signed).
"""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    get_session,
    parse_ratelimit_headers,
)

from ..errors import CheckpointNotFoundError, ResMergeError, StoppedError

T = TypeVar("T")

# The library's own client waits for ever. Read: between two pieces of an answer, not for all of it.
TIMEOUT = httpx2.Timeout(connect=20.0, read=120.0, write=120.0, pool=300.0)
TRIES = 6
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_LIMIT_S = 0.5, 8.0, 330.0
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# What a call of the library raises when the network or the Hub fails; hf_xet raises the last four.
FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError)
_LIMITS = threading.Lock()
_URL_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")
_TOKEN = re.compile(r"\b(hf|api_org|hf_oauth)_[A-Za-z0-9_\-.]{6,}")


def client(token: str | bool | None) -> HfApi:
    """Return the library's client for a token.

    None stands for HF_TOKEN or the Hub's login, False for nobody's.
    """
    _give_time_limits()
    _quieten_logs()
    if not are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()  # they would be drawn over the merge's own
    return HfApi(token=token, library_name="resmerge-stream")


def patiently(
    call: Callable[[], T], *, what: str, tries: int = TRIES, unreachable_tries: int | None = None
) -> T:
    """Return what a call to the Hub returns, after waiting out what passes.

    Args:
        call: is made again after a time-out, a lost connection, a rate limit or a server error.
        what: what is being done, for the message.
        tries: how often at most.
        unreachable_tries: how often while there is not even a connection; as `tries` when None.

    Raises:
        ResMergeError: the Hub said no (see `explain`), or kept failing.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except FAILURES as exc:
            cut_off = any(isinstance(link, httpx2.ConnectError) for link in _chain(exc))
            most = min(tries, unreachable_tries or tries) if cut_off else tries
            if number >= most or not is_transient(exc):
                raise explain(exc, what) from exc
            time.sleep(wait_seconds(number, exc))
    raise AssertionError("unreachable")


def is_transient(exc: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    if isinstance(exc, OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    status = status_of(exc)
    if status is not None:
        return status in _TRANSIENT
    if isinstance(exc, HfHubHTTPError):
        return False
    chain = tuple(_chain(exc))
    # hf_xet tells of a refusal in words only.
    if any(re.search(r"\b40[134]\b", str(link)) for link in chain):
        return False
    return any(
        isinstance(link, httpx2.HTTPError | ConnectionError | TimeoutError | RuntimeError)
        for link in chain
    )


def status_of(exc: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes carries."""
    for link in _chain(exc):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def wait_seconds(number: int, exc: BaseException | None = None) -> float:
    """Return how long to wait after failure `number` (from 1), as the Hub's headers say.

    Without headers: half a second, doubled each time, at most eight, with some jitter.
    """
    for link in _chain(exc):
        response = getattr(link, "response", None)
        if response is not None:
            asked = asked_wait(response.headers)
            if asked is not None:
                return asked
    wait = min(_FIRST_WAIT_S * 2.0 ** (number - 1), _LONGEST_WAIT_S)
    return wait * random.uniform(0.75, 1.25)


def asked_wait(headers: httpx2.Headers) -> float | None:
    """Return the seconds that `RateLimit` or `Retry-After` ask for, bounded; None without them."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(limit.reset_in_seconds + 0.1, _LONGEST_LIMIT_S)
    after = headers.get("Retry-After", "").strip()
    return min(float(after), _LONGEST_LIMIT_S) if after.isdigit() else None


def explain(exc: BaseException, what: str) -> ResMergeError:
    """Return a failure of the Hub in our words: what cannot be had, or why the run stopped."""
    for link in _chain(exc):
        if isinstance(link, ResMergeError):
            return link
        if isinstance(link, GatedRepoError):
            page = f"{HfApi().endpoint}/{link.repo_id}" if link.repo_id else "its page on the Hub"
            return CheckpointNotFoundError(
                f"cannot {what}: access to it must be asked for. Visit {page}, accept its terms "
                "with the account of your token, and run this again."
            )
        if isinstance(link, RevisionNotFoundError | RemoteEntryNotFoundError):
            kind = "revision" if isinstance(link, RevisionNotFoundError) else "file"
            return CheckpointNotFoundError(f"cannot {what}: there is no such {kind}.")
        if isinstance(link, RepositoryNotFoundError):
            return CheckpointNotFoundError(
                f"cannot {what}: there is no such repository, or it is private and your token "
                "(HF_TOKEN, or 'hf auth login') may not see it."
            )
    return StoppedError(f"cannot {what}: {_reason(exc)} The same command continues.")


def plain(text: str) -> str:
    """Return text without the queries of URLs and without tokens."""
    return _TOKEN.sub("hf_…", _URL_QUERY.sub(r"\1", text))


def _reason(exc: BaseException) -> str:
    status = status_of(exc)
    said = next(
        (
            str(link.server_message)
            for link in _chain(exc)
            if isinstance(link, HfHubHTTPError) and link.server_message
        ),
        "",
    )
    text = plain(" ".join(said.split()))[:300]
    # hf_xet tells of a refusal in words only; a hash in a message may hold any three digits.
    if status == 401 or (status is None and re.search(r"\b401\b", str(exc))):
        return "the Hub does not accept the token (expired or revoked). Log in again."
    if status == 403:
        return f"the Hub refuses it ({text or 'no permission'})."
    if status == 429:
        return "the Hub's rate limit is used up."
    if status is not None:
        return f"the Hub answers {status} ({text or 'no reason given'})."
    text = plain(" ".join(str(exc).split()))[:200]
    return f"the network or the Hub fails ({type(exc).__name__}: {text or 'no reason given'})."


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while exc is not None and seen < 10:
        yield exc
        exc, seen = exc.__cause__ or exc.__context__, seen + 1


def _give_time_limits() -> None:
    """Let every call of the library that sets no time-out of its own have ours."""
    # A new factory closes the client in use: two threads must not both see the old one.
    with _LIMITS:
        session = get_session()
        if session.timeout.read is None:
            set_client_factory(_factory(session.event_hooks))


def _factory(hooks: Any) -> Callable[[], httpx2.Client]:

    def factory() -> httpx2.Client:
        return httpx2.Client(
            event_hooks=hooks,
            follow_redirects=True,
            timeout=TIMEOUT,
            limits=httpx2.Limits(max_connections=100, max_keepalive_connections=32),
        )

    return factory


class _Discreet(logging.Filter):
    """Strips tokens and the queries of URLs from log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), ()
        return True


def _quieten_logs() -> None:
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "httpx2"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Discreet) for known in logger.filters):
            logger.addFilter(_Discreet())
