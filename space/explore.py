"""Reports of merges: of a job, or of any repository, whose text is a stranger's."""

from dataclasses import dataclass
from typing import Any

from resmerge_stream.errors import Remedy, VerificationError
from resmerge_stream.recipe import ModelRef
from resmerge_stream.report.schema import parse_report
from resmerge_stream.sinks.folder import REPORT

from .asked import check_id
from .rows import Row, row_of

# A 7B model's report has half a megabyte; one of 20,000 tensors, which this Space may have merged
# itself, 30. What is read takes many times its size in memory: see jobs/planner.py.
STRANGERS_BYTES, OWN_BYTES = 4_000_000, 32_000_000
# Numbers, words, lists and mappings of a stranger's report: a real one has 33 bytes for each.
MAX_VALUES = 250_000
# So many tensors are looked at; of more, every second, third, …
MAX_ROWS = 20_000


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


def report_in(data: bytes, *, name: str, max_bytes: int) -> dict[str, Any]:
    """Return the report in some bytes, of its tensors at most `MAX_ROWS`.

    Args:
        data: JSON.
        name: what to call it in errors.
        max_bytes: that it may have.

    Raises:
        VerificationError: it is too large, or no report.
    """
    if len(data) > max_bytes:
        raise VerificationError(
            f"{name} has a report of more than {max_bytes} bytes, which is more than is opened "
            "here. Download it, and open it on your machine."
        )
    report = parse_report(data, where=name)
    if max_bytes <= STRANGERS_BYTES and _values(report) > MAX_VALUES:
        raise VerificationError(f"{name} has a report of more than {MAX_VALUES} values.")
    tensors = report["tensors"]
    report["tensors"] = tensors[:: max(1, -(-len(tensors) // MAX_ROWS))]
    return report


def _values(data: object) -> int:
    """Return how many values there are in plain data."""
    waiting, count = [data], 0
    while waiting and count <= MAX_VALUES:
        part = waiting.pop()
        count += 1
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return count


def opened(report: dict[str, Any], *, name: str) -> Opened:
    """Return a report that `report_in` let through, to look at."""
    return Opened(name, report, [row_of(row) for row in report["tensors"]])


def read_report(repo: str, token: str | bool) -> bytes:
    """Return the report in a repository, as bytes.

    Args:
        repo: ``namespace/name``, perhaps with ``@revision``; checked before anything is asked.
        token: that reads; False: nobody's.

    Raises:
        RecipeError: it is no repository id.
        VerificationError: the repository has no report, or too large a one.
        StoppedError: the network or the Hub kept failing.
    """
    from resmerge_stream.hub.client import client
    from resmerge_stream.hub.repo import HubRepo, listed

    ref = ModelRef.parse(repo)
    check_id(ref)
    target = HubRepo(client(token), ref.id)
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
    if not file.size or file.size > STRANGERS_BYTES:
        raise VerificationError(
            f"{ref} has a report of {file.size} bytes; at most {STRANGERS_BYTES} are opened here."
        )
    return target.read(REPORT, info)


def pinned_recipe(report: dict[str, Any]) -> str:
    """Return the recipe of a report with the commits that were read, as YAML."""
    import yaml

    names = [
        f"{source['id']}@{source['revision']}" if source.get("revision") else str(source["id"])
        for source in report["sources"]
    ]
    recipe = dict(report["recipe"])
    if recipe.get("base_model") is not None:
        recipe["base_model"], *names = [*names, names[0]]  # last where it is listed as well
    recipe["models"] = [
        {**model, "model": name} for model, name in zip(recipe["models"], names, strict=False)
    ]
    text: str = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return text
