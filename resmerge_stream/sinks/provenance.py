"""Of which sources a finished result is: as its report says, and as they are now."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Known(NamedTuple):
    """A source as it is now.

    Attributes:
        name: what the user calls it.
        revision: its commit, or None for a folder.
        digest: of its identity.
    """

    name: str
    revision: str | None
    digest: str


def digest_of(identity: Mapping[str, Any]) -> str:
    """Return 16 hex digits of what tells a source from another under the same name."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def changed(report: Mapping[str, Any], now: Sequence[Known]) -> list[str]:
    """Return which sources are not those of a report, in words: ``org/a@123, which is at 456``.

    Args:
        report: of a result; anybody may have written it. One that says nothing of its sources'
            identities is believed.
        now: the sources, in the order of the plan.
    """
    told, rows = report.get("identity"), report.get("sources")
    if not isinstance(told, list):
        return []
    rows = rows if isinstance(rows, list) else []
    words = []
    for number, source in enumerate(now):
        if number < len(told) and told[number] == source.digest:
            continue
        row = rows[number] if number < len(rows) else None
        before = row.get("revision") if isinstance(row, dict) else None
        if source.revision is None or not isinstance(before, str):
            words.append(f"{source.name} as it was before its files changed")
        else:
            words.append(f"{source.name}@{before[:12]}, which is at {source.revision[:12]} now")
    return words
