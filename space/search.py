"""Model ids to suggest: those that match what somebody types, and a visitor's own."""

import re
import threading
import time
from itertools import islice
from typing import Any

from resmerge_stream.report.card import TAG
from resmerge_stream.sources import REPO_ID

from .identity import Visitor

_TEXT = re.compile(r"[\w.\-/ ]{2,96}", re.ASCII)
_LIMIT, _KEPT, _KEPT_S = 8, 256, 120.0
_OWN, _OWN_S = 20, 300.0
# How long the keys rest before the Hub is asked.
_REST_S = 0.25


class Search:
    """Looks for ids, and remembers what was found for two minutes; public ones only.

    A visitor's own are remembered for five, by account.
    """

    def __init__(self) -> None:
        self._own: dict[tuple[str, str], tuple[float, str, list[str]]] = {}
        self._found: dict[str, tuple[float, list[str]]] = {}
        self._typed: dict[str, int] = {}
        self._lock = threading.Lock()

    def is_last(self, session: str) -> bool:
        """Return, after a moment, whether the same page typed nothing more in it."""
        with self._lock:
            number = self._typed.get(session, 0) + 1
            self._typed[session] = number
        time.sleep(_REST_S)
        with self._lock:
            is_last = self._typed.get(session) == number
            if is_last:
                del self._typed[session]
        return is_last

    def own(self, visitor: Visitor, *, merges: bool = False, last: str = "") -> list[str]:
        """Return the models of an account, the last modified first; none without an account.

        Args:
            visitor: whose token asks, for twenty at most.
            merges: only those whose card says that this tool made them.
            last: what the account published last; where that is new, the Hub is asked again.
        """
        if not visitor.name:
            return []
        tag = TAG if merges else ""
        now, key = time.monotonic(), (visitor.name, tag)
        with self._lock:
            known = self._own.get(key)
        if known is not None and now - known[0] < _OWN_S and known[1] == last:
            return known[2]
        wanted = {"author": visitor.name, "sort": "last_modified", "filter": tag or None}
        found = _ask(visitor, limit=_OWN, **wanted)
        with self._lock:
            while len(self._own) >= _KEPT:
                del self._own[next(iter(self._own))]
            self._own[key] = (now, last, found)
        return found

    def ids(self, text: str, visitor: Visitor) -> list[str]:
        """Return up to eight ids; none where the text is too short or the Hub cannot be asked."""
        text = text.strip()
        if not _TEXT.fullmatch(text):
            return []
        # A private Space's token finds more; that must not be kept for others.
        key = "" if visitor.token or visitor.reading else text.lower()
        now = time.monotonic()
        with self._lock:
            known = self._found.get(key) if key else None
        if known is not None and now - known[0] < _KEPT_S:
            return known[1]
        found = _ask(visitor, search=text, limit=_LIMIT)
        if key:
            with self._lock:
                while len(self._found) >= _KEPT:
                    del self._found[next(iter(self._found))]
                self._found[key] = (now, found)
        return found


def _ask(visitor: Visitor, *, limit: int, **wanted: Any) -> list[str]:
    from resmerge_stream.hub.client import FAILURES, client

    try:
        models = client(visitor.token_or_nobody).list_models(limit=limit, **wanted)
        return [model.id for model in islice(models, limit) if REPO_ID.fullmatch(model.id)]
    except FAILURES:
        return []  # suggestions are a help, not a need
