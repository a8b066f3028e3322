"""Reports of merges: of a job, or of any repository, whose text is a stranger's."""

import threading
from dataclasses import dataclass
from typing import Any

from resmerge_stream.errors import Remedy, VerificationError
from resmerge_stream.recipe import ModelRef
from resmerge_stream.report.schema import parse_report
from resmerge_stream.sinks.folder import REPORT

from .asked import check_id
from .identity import Visitor
from .rows import Row, row_of

# A 7B model's report has half a megabyte, one of 20,000 tensors 30.
MAX_BYTES = 32_000_000
# So many tensors are looked at; of more, every second, third, …
MAX_ROWS = 20_000
# A large report takes ten times its size in memory while it is read.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class Opened:
    """A report to look at.

    Attributes:
        name: what to call it.
        report: as it was read, its schema checked.
        rows: its tensors, safe to draw.
    """

    name: str
    report: dict[str, Any]
    rows: list[Row]


def open_report(data: bytes, *, name: str) -> Opened:
    """Return the report in some bytes.

    Raises:
        VerificationError: it is too large, or no report.
    """
    if len(data) > MAX_BYTES:
        raise VerificationError(f"{name} has a report of more than {MAX_BYTES} bytes.")
    with _ONE_AT_A_TIME:
        report = parse_report(data, where=name)
        tensors = report["tensors"]
        step = max(1, -(-len(tensors) // MAX_ROWS))
        return Opened(name, report, [row_of(row) for row in tensors[::step]])


def read_report(repo: str, visitor: Visitor) -> bytes:
    """Return the report in a repository, as bytes.

    Args:
        repo: ``namespace/name``, perhaps with ``@revision``; checked before anything is asked.
        visitor: whose token reads.

    Raises:
        RecipeError: it is no repository id.
        VerificationError: the repository has no report, or too large a one.
        StoppedError: the network or the Hub kept failing.
    """
    from resmerge_stream.hub.client import client
    from resmerge_stream.hub.repo import HubRepo, listed

    ref = ModelRef.parse(repo)
    check_id(ref)
    target = HubRepo(client(visitor.token_or_nobody), ref.id)
    info = target.info(ref.revision or "main")
    if info is None:
        raise VerificationError(
            f"there is no repository {ref} that you may see. Check the name.", Remedy.SIGN_IN_TO_SEE
        )
    file = listed(info).get(REPORT)
    if file is None:
        raise VerificationError(
            f"{ref} has no {REPORT}: it was not made by this tool, or is not finished."
        )
    if not file.size or file.size > MAX_BYTES:
        raise VerificationError(f"{ref} has a report of {file.size} bytes; at most {MAX_BYTES}.")
    return target.read(REPORT, info)
