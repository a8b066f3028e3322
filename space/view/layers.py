"""Tables of a report's tensors, one for each layer, closed until somebody opens it."""

from collections.abc import Sequence

from resmerge_stream.report.words import COLUMNS, NAMES

from ..rows import Row
from .words import esc, table

# A model of 7B has 339; a table of all tensors of the largest would stop a browser.
_MOST_ROWS = 1200


def layers_html(rows: Sequence[Row]) -> str:
    """Return what was decided for every tensor, folded by layer.

    Args:
        rows: the tensors, in the order of the report.
    """
    if not rows:
        return ""
    shown = rows[:_MOST_ROWS]
    columns = [key for key in COLUMNS if any(key in row.numbers for row in shown)]
    layers: dict[int | None, list[Row]] = {}
    for row in shown:
        layers.setdefault(row.layer, []).append(row)
    found = sorted(layers.items(), key=lambda item: -1 if item[0] is None else item[0])
    parts = [_layer(layer, of, columns) for layer, of in found]
    more = len(rows) - len(shown)
    rest = f"<p>And {more:,} more tensors, in <code>report.json</code>.</p>" if more else ""
    return f"<h3>Tensor by tensor</h3>{''.join(parts)}{rest}"


def _layer(layer: int | None, rows: Sequence[Row], columns: Sequence[str]) -> str:
    title = "Outside the layers" if layer is None else f"Layer {layer}"
    lines = [
        (f"<code>{esc(row.name)}</code>", esc(row.rule), *(_cell(row, key) for key in columns))
        for row in rows
    ]
    head = ("Tensor", "Rule", *(esc(NAMES[key]) for key in columns))
    count = f"{len(rows)} tensor{'s' * (len(rows) != 1)}"
    return (
        f"<details><summary>{title}, {count}</summary>"
        f"{table(head, lines, f'{title}: what was decided')}</details>"
    )


def _cell(row: Row, key: str) -> str:
    value = row.numbers.get(key)
    return "–" if value is None else f"{round(value, 4) + 0.0:.4g}"
