"""A report for people: its summary, and two reports beside each other."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from resmerge_stream.report.words import COLUMNS, GATES, NAMES
from resmerge_stream.units import format_size

from ..explore import Opened
from ..rows import Row, families, roles
from .figures import heatmap
from .shares import evaluated, shares_html
from .words import base_of, duration, esc, facts, table


def summary_html(opened: Opened) -> str:
    """Return what a report says as a whole: sources, numbers, medians by family."""
    report = opened.report
    summary = report["summary"]
    method = _mapping(report.get("method"))
    has_base, takes_part = base_of(_mapping(report.get("recipe")))
    models = [_mapping(item) for item in _list(report.get("sources"))]
    count = len(models) - (has_base and not takes_part and bool(models))
    pairs = [
        ("Method", _short(method.get("name"))),
        ("Models" if takes_part or not has_base else "Experts", str(count)),
        ("Tensors", f"{len(_list(report.get('tensors')) or opened.rows):,}"),
        ("Merging took", duration(_number(summary.get("seconds")))),
        ("Read", _size(summary.get("bytes_read"))),
        ("Written", _size(summary.get("bytes_written"))),
        ("Memory, at most", _size(summary.get("peak_private_bytes"))),
        ("Kept after the cast", _share(summary.get("kept_cosine"))),
        ("Adapter", _adapter(_mapping(report.get("adapter")))),
    ]
    sources = []
    for number, item in enumerate(models[:40], 0 if has_base else 1):
        part = f"expert {number}" if number else "base"
        commit = _short(item.get("revision"))[:10] or "–"
        sources.append(
            (part, f"<code>{esc(_short(item.get('id')))}</code>", f"<code>{esc(commit)}</code>")
        )
    parts = [facts([(k, v) for k, v in pairs if v])]
    shares = evaluated(report)
    parts.append(shares_html(shares, next(reversed(shares), "")))
    parts.append(table(("Part", "Model", "Commit"), sources, "Merged from"))
    parts.append(_medians(opened.rows))
    return f'<div class="rm"><h3>{esc(opened.name)}</h3>{"".join(parts)}</div>'


def folded(title: str, html: str) -> str:
    """Return something that opens on a click."""
    return f'<details class="rm"><summary>{esc(title)}</summary>{html}</details>'


def _medians(rows: Sequence[Row]) -> str:
    columns = [(key, NAMES[key]) for key in COLUMNS if any(key in row.numbers for row in rows)]
    found = {key: families(rows, key) for key, _ in columns}
    lines = []
    for name in roles(rows):
        count = sum(row.role == name for row in rows)
        cells = [_spread(found[key].get(name, [])) for key, _ in columns]
        lines.append((esc(name), f"{count:,}", *cells))
    head = ("Family", "Tensors", *(label for _, label in columns))
    return table(head, lines, "Medians by family, least and greatest in brackets")


def compared_html(left: Opened, right: Opened) -> str:
    """Return two reports beside each other: medians, the largest differences, heatmaps."""
    lines = []
    for key in COLUMNS:
        if key == "c_R_floor":
            continue  # the same wherever there are as many experts
        a, b = families(left.rows, key), families(right.rows, key)
        for name in dict.fromkeys([*a, *b]):
            first, second = a.get(name, []), b.get(name, [])
            change = (
                f"{statistics.median(second) - statistics.median(first):+.3f}"
                if first and second
                else "–"
            )
            lines.append(
                (f"{esc(NAMES[key])}, {esc(name)}", _spread(first), _spread(second), change)
            )
    lines.sort(key=lambda line: line[-1] == "–")  # what both have stands first
    head = ("Median", esc(left.name), esc(right.name), "Difference")
    figures = "".join(
        figure
        for gate in GATES[:3]
        for opened in (left, right)
        if (figure := _named(opened, heatmap(opened.rows, gate, named=True)))
    )
    return (
        f'<div class="rm"><h3>{esc(left.name)} and {esc(right.name)}</h3>'
        f"{table(head, lines, 'Two merges beside each other')}{_furthest(left, right)}"
        f'<div class="rm-figures">{figures}</div></div>'
    )


def _furthest(left: Opened, right: Opened) -> str:
    """Return the tensors whose gates differ most."""
    other = {row.name: row for row in right.rows}
    found = []
    for row in left.rows:
        match = other.get(row.name)
        if match is None or "S_H" not in row.numbers or "S_H" not in match.numbers:
            continue
        found.append((abs(row.numbers["S_H"] - match.numbers["S_H"]), row, match))
    if not found:
        return ""
    found.sort(key=lambda item: -item[0])
    lines = [
        (f"<code>{esc(row.name)}</code>", f"{row.numbers['S_H']:.3f}", f"{m.numbers['S_H']:.3f}")
        for _, row, m in found[:8]
    ]
    head = ("Tensor", esc(left.name), esc(right.name))
    return table(head, lines, "Where the heads' agreement S_H differs most")


def _named(opened: Opened, figure: str) -> str:
    return figure.replace("<figcaption>", f"<figcaption>{esc(opened.name)}<br>", 1)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    ends = min(values), max(values)
    # Residuals are aligned by a few thousandths beyond chance: three digits would show zeros.
    digits = 3 if max(map(abs, ends)) >= 0.05 else 4
    # Adding 0.0 makes the zero of a rounded negative number positive.
    low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in ends)
    middle = f"{round(statistics.median(values), digits) + 0.0:.{digits}f}"
    return middle if low == high else f'{middle} <span class="rm-range">({low} … {high})</span>'


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e18 else None  # type: ignore[arg-type]


def _size(value: object) -> str:
    number = _number(value)
    return format_size(number) if number is not None and number >= 0 else ""


def _share(value: object) -> str:
    number = _number(value)
    return f"cosine {number:.3f}" if number is not None else ""


def _adapter(adapter: Mapping[str, Any]) -> str:
    """Return what an adapter that was written is, and how much of the update it holds."""
    modules, rank, kept = (_number(adapter.get(key)) for key in ("modules", "rank", "kept"))
    if modules is None or rank is None or kept is None:
        return ""
    return f"{modules:,.0f} modules, rank {rank:,.0f}, holds {kept:.2%} of ‖ΔW‖²"


def _short(value: object) -> str:
    return str(value)[:120] if isinstance(value, str) else ""
