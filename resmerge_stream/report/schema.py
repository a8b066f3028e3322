"""A report read back: a stranger's text, checked before anything relies on it."""

from typing import Any, NoReturn

from ..documents import load_json
from ..errors import RecipeError, VerificationError, shown
from ..planning.options import Options

MAX_REPORT_BYTES = 256_000_000
_MAX_COUNT = 1 << 63


def parse_report(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the report in some bytes, its files, tensors and options of the right kinds.

    Args:
        data: the content of ``resmerge/report.json``.
        where: what to call it in errors.

    Raises:
        VerificationError: it is not JSON, or not a report.
    """
    try:
        report = load_json(data, max_bytes=MAX_REPORT_BYTES)
    except ValueError as exc:
        raise VerificationError(f"{where} is not a report: {exc}. {_ADVICE}") from exc
    if not isinstance(report, dict):
        _refuse(where, "is not a JSON object")
    for key, check in (("files", _is_file), ("tensors", _is_tensor)):
        rows = report.get(key)
        if not isinstance(rows, list):
            _refuse(where, f"has no list of {key!r}")
        wrong = [row for row in rows if not check(row)]
        if wrong:
            _refuse(where, f"has a row in {key!r} that is not one: {shown(wrong[0])}")
        if len({row["name"] for row in rows}) != len(rows):
            _refuse(where, f"has the same name twice in {key!r}")
    if not isinstance(report.get("summary"), dict):
        _refuse(where, "has no 'summary'")
    options = report.get("options", {})
    if not isinstance(options, dict) or not isinstance(report.get("counted", {}), dict):
        _refuse(where, "has 'options' or 'counted' that is not a mapping")
    try:
        Options.from_dict(options)
    except RecipeError as exc:
        _refuse(where, f"has an option that cannot be used: {exc}")
    return report


def _is_file(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and _is_count(row.get("size"))
        and isinstance(row.get("sha256"), str | None)
    )


def _is_tensor(row: object) -> bool:
    adapter = row.get("adapter") if isinstance(row, dict) else None
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and isinstance(row.get("rule"), str)
        and isinstance(row.get("dtype"), str | None)
        and _is_shape(row.get("shape"))
        and (adapter is None or isinstance(adapter, dict))
        and (adapter is None or isinstance(adapter.get("tensors"), dict))
        and (adapter is None or all(map(_is_shape, adapter["tensors"].values())))
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(_is_count(size) for size in value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _refuse(where: str, problem: str) -> NoReturn:
    raise VerificationError(f"{where} {problem}, so it is not the report of a merge. {_ADVICE}")


_ADVICE = "Give the output of a merge, as the merge left it."
