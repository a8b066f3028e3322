"""Drawings of a report as SVG: heatmaps by layer and module, strips by family, tables of both."""

import statistics
from collections.abc import Iterable, Sequence

from resmerge_stream.maths.lazy import np
from resmerge_stream.report.panels import colours_of, limits
from resmerge_stream.report.sheet import painted
from resmerge_stream.report.unusual import NOTHING, by_reason
from resmerge_stream.report.words import CHANGES, GATES, KEPT, Measure

from ..rows import Row, cells, families, modules
from .layers import layers_html
from .words import esc, table

_CELL_H, _LEFT, _PLOT, _TOP, _BOTTOM = 21, 112, 420, 6, 42
_MOST_MODULES, _MOST_LAYERS, _MOST_DOTS = 28, 128, 300
# Colours of a heatmap: what has one is one path, so that it is small.
_STEPS = 40


def live_html(rows: Sequence[Row]) -> str:
    """Return the running picture of a merge."""
    drawn = [heatmap(rows, gate) for gate in GATES[:3]] if rows else []
    drawn = [figure for figure in drawn if figure] or [heatmap(rows, CHANGES[1])] * bool(rows)
    if not any(drawn):
        return ""
    return f'<div class="rm rm-figures">{"".join(drawn)}</div>'


def report_html(rows: Sequence[Row]) -> str:
    """Return every figure of a report, its unusual tensors, and all tensors folded by layer."""
    gates = [figure for gate in GATES if (figure := heatmap(rows, gate, named=True))]
    gates = gates or [f for gate in CHANGES if (f := heatmap(rows, gate, named=True))]
    shown = GATES if any("S_H" in row.numbers for row in rows) else CHANGES
    strips = [figure for gate in shown if (figure := strip(rows, gate))]
    kept = [figure for gate in KEPT if (figure := strip(rows, gate))]
    parts = [
        _section("By layer and module", gates),
        _section("By family", strips),
        _section("What the cast to the output format kept", kept),
        unusual_html(rows),
        layers_html(rows),
    ]
    return f'<div class="rm">{"".join(parts)}</div>'


def _section(title: str, figures: Sequence[str]) -> str:
    if not figures:
        return ""
    return f'<h3>{esc(title)}</h3><div class="rm-figures">{"".join(figures)}</div>'


def heatmap(rows: Sequence[Row], gate: Measure, *, named: bool = False) -> str:
    """Return one heatmap, layers across and modules down; empty where nothing has the value.

    Args:
        rows: the tensors.
        gate: what to show.
        named: whether each cell tells its value to a pointer.
    """
    found = cells(rows, gate.key)
    if not found:
        return ""
    labels = modules(rows, gate.key)[:_MOST_MODULES]
    layers = sorted({layer for _, layer in found if layer is not None})
    layers = layers[:: max(1, -(-len(layers) // _MOST_LAYERS))]
    columns: list[int | None] = [*layers, *([None] if any(c[1] is None for c in found) else [])]
    low, high = limits(gate.scale, list(found.values()))
    # Right of the longest label; labels take half at most.
    left = min(max(_LEFT, 12 + 9 * max(map(len, labels))), _PLOT // 2)
    width = (_LEFT + _PLOT - left) / len(columns)
    paths: dict[str, list[str]] = {}
    painted_cells = zip(found.items(), _colours(gate, found.values(), low, high), strict=True)
    for ((label, layer), value), colour in painted_cells:
        if label not in labels or layer not in columns:
            continue
        x = left + columns.index(layer) * width
        y = _TOP + labels.index(label) * _CELL_H
        where = "outside the layers" if layer is None else f"layer {layer}"
        hint = f"<title>{esc(label)}, {where}: {value:.4g}</title>" if named else ""
        shape = f"M{x:.1f} {y}h{width:.1f}v{_CELL_H}h-{width:.1f}z"
        paths.setdefault(colour, []).append(f'<path d="{shape}">{hint}</path>' if named else shape)
    fills = "".join(
        f'<g fill="{colour}">{"".join(shapes)}</g>'
        if named
        else f'<path fill="{colour}" d="{"".join(shapes)}"/>'
        for colour, shapes in paths.items()
    )
    height = _TOP + len(labels) * _CELL_H
    names = "".join(
        f'<text x="{left - 6}" y="{_TOP + i * _CELL_H + 15}" text-anchor="end">{esc(label)}</text>'
        for i, label in enumerate(labels)
    )
    axis = _layer_axis(columns, left, width, height)
    said = f"{gate.title}: median {statistics.median(found.values()):.3g} over {len(found)} cells"
    svg = _svg(height + _BOTTOM, said, f"{fills}{names}{axis}")
    scale = (
        f'<div class="rm-scale"><span>{low:.3g}</span>'
        f'<i style="background:linear-gradient(90deg,{",".join(colours_of(gate.scale))})"></i>'
        f"<span>{high:.3g}</span></div>"
    )
    return _figure(gate, svg, scale)


def _layer_axis(columns: Sequence[int | None], left: int, width: float, height: int) -> str:
    step = max(1, -(-len(columns) // 12))
    ticks = "".join(
        f'<text x="{left + (i + 0.5) * width:.1f}" y="{height + 16}" text-anchor="middle">'
        f"{'–' if layer is None else layer}</text>"
        for i, layer in enumerate(columns)
        if i % step == 0 or layer is None
    )
    middle = left + len(columns) * width / 2
    return f'{ticks}<text x="{middle}" y="{height + 35}" text-anchor="middle">layer</text>'


def strip(rows: Sequence[Row], gate: Measure) -> str:
    """Return one strip of dots a family, with its median; empty where nothing has the value."""
    found = families(rows, gate.key)
    if not found:
        return ""
    everything = [value for values in found.values() for value in values]
    low, high = limits(gate.scale, [*everything, *([1.0] if gate in KEPT else [])])
    span, plot = high - low, _PLOT - 84
    parts = []
    for number, (family, values) in enumerate(found.items()):
        y = _TOP + number * 34 + 17
        step = max(1, -(-len(values) // _MOST_DOTS))
        dots = "".join(
            f'<circle cx="{_LEFT + (v - low) / span * plot:.1f}" '
            f'cy="{y + ((i * 0.618034) % 1 - 0.5) * 20:.1f}" r="2.4"/>'
            for i, v in enumerate(sorted(values)[::step])
        )
        middle = statistics.median(values)
        x = _LEFT + (middle - low) / span * plot
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 5}" text-anchor="end">{esc(family)}</text>'
            f'<g class="rm-dots">{dots}</g><path class="rm-median" d="M{x:.1f} {y - 13}v26"/>'
            f'<text x="{_LEFT + plot + 10}" y="{y + 5}">{middle:.3g}</text>'
        )
    height = _TOP + len(found) * 34
    ends = (
        f'<text x="{_LEFT}" y="{height + 16}">{low:.3g}</text>'
        f'<text x="{_LEFT + plot}" y="{height + 16}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT + plot + 10}" y="{height + 16}">median</text>'
    )
    said = "; ".join(f"{f}: median {statistics.median(v):.3g}" for f, v in found.items())
    return _figure(gate, _svg(height + 22, f"{gate.title}. {said}", "".join(parts) + ends), "")


def unusual_html(rows: Iterable[Row]) -> str:
    """Return the tensors that something unusual happened to."""
    found = by_reason((row.name, row.unusual) for row in rows)
    title = "<h3>Unusual tensors</h3>"
    if not found:
        return f"{title}<p>{esc(NOTHING)}</p>"
    lines = []
    for reason, names in found[:20]:
        shown = ", ".join(f"<code>{esc(name)}</code>" for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append((esc(reason), str(len(names)), shown + more))
    return title + table(("What", "Tensors", "Such as"), lines, "Unusual tensors")


def _colours(gate: Measure, values: Iterable[float], low: float, high: float) -> list[str]:
    """Return the colour of each value, one of `_STEPS`."""
    shares = np.clip((np.array(list(values)) - low) / (high - low), 0, 1)
    colours = painted(np.round(shares * _STEPS), 0, _STEPS, colours_of(gate.scale), "#ffffff")
    return ["#" + bytes(colour).hex() for colour in colours]


def _svg(height: float, said: str, inner: str) -> str:
    return (
        f'<svg viewBox="0 0 {_LEFT + _PLOT + 8} {height}" role="img" aria-label="{esc(said)}">'
        f"{inner}</svg>"
    )


def _figure(gate: Measure, svg: str, scale: str) -> str:
    return (
        f"<figure><figcaption><b>{esc(gate.title)}</b><br>{esc(gate.symbols)}</figcaption>"
        f"{svg}{scale}</figure>"
    )
