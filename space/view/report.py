"""A report for people: its summary, and two reports beside each other."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from resmerge_stream.report.words import COLUMNS, GATES, NAMES
from resmerge_stream.units import format_size

from ..explore import Opened
from ..rows import Row, families, roles
from .figures import heatmap, report_html
from .shares import evaluated, shares_html
from .words import base_of, duration, esc, facts, method_title, table

_UNEVALUATED = (
    '<p class="rm-soft">Nobody has evaluated it, or its report does not say so: '
    "<code>resmerge-stream evaluate</code> asks it and its models the same questions.</p>"
)


def opened_html(opened: Opened) -> str:
    """Return a report: its scores, what it is, and folded what was decided for each tensor."""
    shares = evaluated(opened.report)
    scores = shares_html(shares, next(reversed(shares), "")) or _UNEVALUATED
    return (
        f'<div class="rm"><h3>{esc(opened.name)}</h3>{scores}{_summary(opened)}</div>'
        f"{decided_html(opened)}"
    )


def decided_html(opened: Opened) -> str:
    """Return what was decided for each tensor, in words that fit the method, folded."""
    gated = any("S_H" in row.numbers for row in opened.rows)
    title = "What the gates decided" if gated else "What changed, tensor by tensor"
    inner = f'<div class="rm">{_medians(opened.rows)}</div>{report_html(opened.rows)}'
    return folded(title, inner)


def _summary(opened: Opened) -> str:
    report = opened.report
    summary = report["summary"]
    method = _mapping(report.get("method"))
    has_base, takes_part = base_of(_mapping(report.get("recipe")))
    models = [_mapping(item) for item in _list(report.get("sources"))]
    count = len(models) - (has_base and not takes_part and bool(models))
    pairs = [
        ("Method", method_title(_short(method.get("name")))),
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
    shown = facts([(k, v) for k, v in pairs if v])
    return shown + table(("Part", "Model", "Commit"), sources, "Merged from")


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
    """Return two reports beside each other: scores, settings, and folded what was decided."""
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
                (f"{esc(NAMES[key])}, {esc(name)}", change, _spread(first), _spread(second))
            )
    lines.sort(key=lambda line: line[1] == "–")  # what both have stands first
    head = ("Median", "Difference", esc(left.name), esc(right.name))
    scores = _scores(left, right)
    figures = "".join(
        heatmap(opened.rows, gate, named=True).replace(
            "<figcaption>", f"<figcaption>{esc(opened.name)}<br>", 1
        )
        for gate in GATES[:3]
        for opened in (left, right)
    )
    return (
        f'<div class="rm"><h3>{esc(left.name)} and {esc(right.name)}</h3>{scores}'
        f"{_settings(left, right)}</div>"
        + folded(
            "What was decided in each",
            f"{table(head, lines, 'Two merges beside each other')}{_furthest(left, right)}"
            f'<div class="rm-figures">{figures}</div>',
        )
    )


def _scores(left: Opened, right: Opened) -> str:
    """Return the bars of both merges, where both were asked the same tasks."""
    own = {}
    for opened in (left, right):
        shares = evaluated(opened.report)
        if shares:
            own[opened.name] = shares[next(reversed(shares))]
    if len(own) == 2 and len({tuple(row) for row in own.values()}) == 1:
        return shares_html(own, "")
    return _UNEVALUATED


def _settings(left: Opened, right: Opened) -> str:
    """Return method and parameters of both, what differs first."""
    found = []
    for opened in (left, right):
        report = opened.report
        method = _mapping(report.get("method"))
        own = {"method": method_title(_short(method.get("name")))}
        own |= {str(k)[:60]: str(v)[:60] for k, v in _mapping(method.get("parameters")).items()}
        own["kept after the cast"] = _share(_mapping(report["summary"]).get("kept_cosine"))
        found.append(own)
    first, second = found
    keys = sorted(
        dict.fromkeys([*first, *second]), key=lambda key: first.get(key) == second.get(key)
    )
    rows = [(esc(key), esc(first.get(key, "–")), esc(second.get(key, "–"))) for key in keys]
    return table(("Setting", esc(left.name), esc(right.name)), rows, "Settings, what differs first")


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
