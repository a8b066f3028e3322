"""One door to the Hub: huggingface_hub's client with time-outs, patience, and errors in our words.

Nothing here keeps a token; messages never hold one, nor the query of a URL (it may be signed).
"""

import errno
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    BucketNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
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

from ..errors import CheckpointNotFoundError, Remedy, ResMergeError, StoppedError
from .answers import StrangeAnswerError, check_answer
from .patience import PATIENCE, Tries

T = TypeVar("T")

# The library's own client waits for ever. Read: between two pieces of an answer, not for all of it.
TIMEOUT = httpx2.Timeout(connect=20.0, read=120.0, write=120.0, pool=300.0)
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_LIMIT_S = 0.5, 8.0, 330.0
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# What a call of the library raises when the network or the Hub fails; hf_xet raises the last four.
FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError)
# What goes wrong on this machine, whatever the network does: the disk, or where the cache lies.
_LOCAL = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.EIO,
    errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG,
})  # fmt: skip
_LIMITS = threading.Lock()
_URL_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")
_TOKEN = re.compile(r"\b(hf|api_org|hf_oauth)_[A-Za-z0-9_\-.]{6,}")


class NoSuchRepositoryError(CheckpointNotFoundError):
    """The Hub knows no such repository, or does not show it to this caller."""


class TokenRefusedError(StoppedError):
    """The Hub does not accept the token: mistyped, or expired or revoked in the middle."""


def client(token: str | bool | None) -> HfApi:
    """Return the library's client for a token.

    None stands for HF_TOKEN or the Hub's login, False for nobody's.
    """
    # What sets no time-out of its own has ours. A new factory closes the client in use: two threads
    # must not both see the old one.
    with _LIMITS:
        session = get_session()
        if session.timeout.read is None:
            hooks = session.event_hooks
            hooks = {**hooks, "response": [*hooks.get("response", ()), check_answer]}
            set_client_factory(
                lambda: httpx2.Client(
                    event_hooks=hooks,
                    follow_redirects=True,
                    timeout=TIMEOUT,
                    limits=httpx2.Limits(max_connections=100, max_keepalive_connections=32),
                )
            )
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "httpx2"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Discreet) for known in logger.filters):
            logger.addFilter(_Discreet())
    if not are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()  # they would be drawn over the merge's own
    return HfApi(token=token, library_name="resmerge-stream")


def cache_folder() -> Path:
    """Return where the library keeps the small files that it downloads."""
    return Path(constants.HF_HUB_CACHE)


def patiently(
    call: Callable[[], T],
    *,
    what: str,
    tries: int | None = None,
    unreachable_tries: int | None = None,
    refused_tries: int = 1,
) -> T:
    """Return what a call to the Hub returns, after waiting out what passes.

    Args:
        call: is made again after a time-out, a lost connection, a rate limit or a server error,
            for as long as `PATIENCE` says.
        what: what is being done, for the message.
        tries: how often at most, however long that takes.
        unreachable_tries: how often at most while there is not even a connection.
        refused_tries: how often at most where the Hub, or a link that it signed, says no.

    Raises:
        ResMergeError: the Hub said no (see `explain`), or kept failing.
    """
    row = Tries()
    while True:
        try:
            return call()
        except FAILURES as exc:
            cut_off = any(isinstance(link, httpx2.ConnectError) for link in chain(exc))
            most = unreachable_tries if cut_off and unreachable_tries else tries
            if not is_transient(exc):
                most = 1 if status_of(exc) == 401 else refused_tries
            if not row.failed(most, wait := wait_seconds(row.failures + 1, exc)):
                raise explain(exc, what) from exc
            row.wait(wait, f"cannot {what}: {reason(exc)}")


def is_transient(exc: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    if isinstance(exc, OfflineModeIsEnabled | LocalTokenNotFoundError | HFValidationError):
        return False
    links = tuple(chain(exc))
    if any(isinstance(link, json.JSONDecodeError | StrangeAnswerError) for link in links):
        return True  # a page for people, or something else, from something on the way
    if _on_this_machine(exc) is not None:
        return False
    status = status_of(exc)
    if status is not None:
        return status in _TRANSIENT
    if isinstance(exc, HfHubHTTPError | httpx2.LocalProtocolError):
        return False
    # hf_xet tells of a refusal in words only.
    if any(re.search(r"\b40[134]\b", str(link)) for link in links):
        return False
    return any(
        isinstance(link, httpx2.HTTPError | ConnectionError | TimeoutError | RuntimeError)
        for link in links
    )


def status_of(exc: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes carries."""
    for link in chain(exc):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def is_link_refused(exc: BaseException) -> bool:
    """Whether it was a signed link, or the check of an upload, that was refused: not the call."""
    for link in chain(exc):
        response = getattr(link, "response", None)
        if response is not None and response.status_code in (400, 403, 404, 410):
            path = response.request.url.path
            return not path.startswith("/api/") and not path.endswith("/objects/batch")
    return False


def wait_seconds(number: int, exc: BaseException | None = None) -> float:
    """Return how long to wait after failure `number` (from 1), as the Hub's headers say.

    Without headers: half a second, doubled each time, at most eight, with some jitter.
    """
    for link in chain(exc):
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
    for link in chain(exc):
        if isinstance(link, ResMergeError):
            return link
        if isinstance(link, GatedRepoError):
            page = f"{HfApi().endpoint}/{link.repo_id}" if link.repo_id else "its page on the Hub"
            return CheckpointNotFoundError(
                f"cannot {what}: access to it must be asked for. Visit {page} and accept its terms "
                "with the account of your token; then try again.",
                kind="gated",
                page=page,
            )
        if isinstance(link, RevisionNotFoundError | RemoteEntryNotFoundError):
            kind = "revision" if isinstance(link, RevisionNotFoundError) else "file"
            return CheckpointNotFoundError(f"cannot {what}: there is no such {kind}.")
        if isinstance(link, RepositoryNotFoundError | BucketNotFoundError):
            kind = "bucket" if isinstance(link, BucketNotFoundError) else "repository"
            return NoSuchRepositoryError(
                f"cannot {what}: there is no such {kind}, or it is private and you may not "
                "see it. Check the name.",
                Remedy.SIGN_IN_TO_SEE,
                kind="no-repository",
            )
        if isinstance(link, HFValidationError):
            return CheckpointNotFoundError(f"cannot {what}: {plain(str(link))}")
    text = f"cannot {what}: {reason(exc)}"
    if _is_token_refused(exc):
        return TokenRefusedError(text, Remedy.SIGN_IN_AGAIN, kind="bad-token")
    return StoppedError(text, Remedy.CONTINUE, kind="hub")


def plain(text: str) -> str:
    """Return text without the queries of URLs and without tokens."""
    return _TOKEN.sub("hf_…", _URL_QUERY.sub(r"\1", text))


def reason(exc: BaseException) -> str:
    """Return why a call failed, in a sentence."""
    status, local = status_of(exc), _on_this_machine(exc)
    if local is not None:
        where = f" ({local.filename})" if local.filename else ""
        return f"this machine fails, not the Hub: {local.strerror}{where}."
    strange = next((link for link in chain(exc) if isinstance(link, StrangeAnswerError)), None)
    if strange is not None:
        return f"the answer is not the Hub's ({strange}): a proxy is on the way."
    if any(isinstance(link, json.JSONDecodeError) for link in chain(exc)):
        return "the answer is not the Hub's (no JSON): a proxy or a login page is on the way."
    said = next(
        (
            str(link.server_message)
            for link in chain(exc)
            if isinstance(link, HfHubHTTPError) and link.server_message
        ),
        "",
    )
    text = plain(" ".join(said.split()))[:300]
    if _is_token_refused(exc):
        return "the Hub does not accept the token (mistyped, expired or revoked)."
    if status == 403:
        return f"the Hub refuses it ({text or 'no permission'})."
    if status == 429:
        return "the Hub's rate limit is used up."
    if status is not None:
        return f"the Hub answers {status} ({text or 'no reason given'})."
    text = plain(" ".join(str(exc).split()))[:200]
    return f"the network or the Hub fails ({type(exc).__name__}: {text or 'no reason given'})."


def _is_token_refused(exc: BaseException) -> bool:
    """Whether the Hub does not accept the token, or it cannot even be sent."""
    for link in chain(exc):
        unsendable = isinstance(link, httpx2.LocalProtocolError) and "header" in str(link)
        if unsendable or isinstance(link, UnicodeEncodeError):
            return True
    status = status_of(exc)
    # hf_xet tells of a refusal in words only; a hash in a message may hold any three digits.
    return status == 401 or (status is None and re.search(r"\b401\b", str(exc)) is not None)


def _on_this_machine(exc: BaseException) -> OSError | None:
    """Return the failure of this machine's disk behind an error, if that is what it is."""
    for link in chain(exc):
        if isinstance(link, httpx2.HTTPError | ConnectionError):
            return None
        if isinstance(link, OSError) and link.errno in _LOCAL:
            return link
    return None


def chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    seen = 0
    while exc is not None and seen < 10:
        yield exc
        exc, seen = exc.__cause__ or exc.__context__, seen + 1


class _Discreet(logging.Filter):
    """Strips tokens and the queries of URLs from log records; the client's waits become ours."""

    _WAITS = re.compile(r"(Rate limited)?.*?(?:Waiting|Retrying in) ([\d.]+)s", re.DOTALL)
    _FAILED = re.compile(r"HTTP Error (\d+) thrown|thrown while requesting")

    def __init__(self) -> None:
        super().__init__()
        self._failed = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        text = plain(record.getMessage())
        record.msg, record.args = text, ()
        if found := self._FAILED.search(text):
            self._failed.why = f"the Hub answers {found[1]}" if found[1] else "no connection"
            return False
        found = self._WAITS.match(text)
        if found is None:
            return True
        why = "the Hub's rate limit is used up" if found[1] else "the Hub fails"
        PATIENCE.client_waits(float(found[2]), getattr(self._failed, "why", why))
        return False
