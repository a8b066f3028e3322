"""The picture in the card: how every gate decided, layer by layer, from a report.

Heatmaps by layer and module, strips by family. Places are in pixels.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..maths.lazy import np
from ..roles import Role, layer_of
from ..units import printable
from .sheet import Box, Sheet, painted
from .values import family_rank, median, module_label, module_rank, value_of
from .words import CHANGES, GATES, KEPT, Measure

_WIDTH, _LEFT, _PANEL, _BAR, _SECOND = 1360, 225, 435, 14, 790
_ROW, _TITLE, _AXIS, _TOP = 30, 68, 58, 60
_MAX_MODULES = 28
_GREY, _INK, _SOFT, _LINE = "#dcdcdc", "#222222", "#666666", "#bbbbbb"
# Heights of letters.
_HEADING, _NAME, _LABEL, _SMALL = 21, 18, 14, 12.5
# A mark at an axis, and how far its number is from it.
_MARK, _GAP = 3, 7
# Of a colour bar's and of a strip's numbers, at most.
_NUMBERS = 8

# Viridis, and Brewer's RdBu reversed, at equal steps.
VIRIDIS = (
    "#440154", "#48186a", "#472d7b", "#424086", "#3b528b", "#33638d", "#2c728e", "#26828e",
    "#21918c", "#1f9f88", "#27ad81", "#3dbc74", "#5cc863", "#81d34d", "#aadc32", "#d5e21a",
    "#fde725",
)  # fmt: skip
CENTRED = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582",
    "#d6604d", "#b2182b", "#67001f",
)  # fmt: skip

# A cell of the picture: module and layer, or None outside the blocks.
_Cell = tuple[str, int | None]
_ANNOTATED_LAYERS = 4
_FAMILY_COLOURS: dict[str, str] = {
    Role.ATTENTION: "#3b6fb6",
    Role.FFN: "#d9822b",
    Role.ROUTER: "#8e5ea8",
    Role.MATRIX: "#4d9a57",
    Role.EMBEDDING: "#b64a4a",
    Role.HEAD: "#8a6d3b",
}


def gates_png(report: Mapping[str, Any]) -> bytes:
    """Return the picture of a report as PNG: the same report gives the same bytes.

    Heatmaps of layers × modules for the gates (or, for methods without gates, for what changed),
    and what the cast kept of each tensor by family. Many tensors of one module in one layer, as
    the experts of an MoE, show as their median.

    Args:
        report: ``report.json`` of any method; missing and null values stay grey.
    """
    rows: dict[_Cell, list[Mapping[str, Any]]] = defaultdict(list)
    roles: dict[str, str] = {}
    for row in report["tensors"]:
        label = module_label(row["name"])
        rows[label, layer_of(row["name"])].append(row)
        roles.setdefault(label, row.get("role") or Role.MATRIX)
    cells: dict[str, dict[_Cell, float]] = {}  # the medians of each measure that has any value
    for measure in (*GATES, *CHANGES, *KEPT):
        for cell, own in rows.items():
            values = [v for row in own if (v := value_of(row, measure.key)) is not None]
            if values:
                cells.setdefault(measure.key, {})[cell] = median(values)
    by_family: dict[str, dict[str, list[float]]] = {}  # and by role the values of each strip
    for measure in KEPT:
        for (module, _), value in cells.get(measure.key, {}).items():
            by_family.setdefault(roles[module], {}).setdefault(measure.key, []).append(value)
    families = dict(sorted(by_family.items(), key=lambda item: family_rank(item[0])))
    gates = [measure for measure in GATES if measure.key in cells]
    others = [it for it in (*CHANGES, *KEPT) if families and it.key in cells]
    # Two stand side by side, and no place stays empty.
    panels = [*gates, *others[: len(gates) % 2]] if gates else others[: len(others) // 2 * 2]
    # The modules and the layers that some panel has a value for.
    shown = {cell for panel in gates or panels for cell in cells[panel.key]}
    modules = [module for module in roles if any(cell[0] == module for cell in shown)]
    modules.sort(key=lambda name: (family_rank(roles[name]), module_rank(name)))
    modules = modules[:_MAX_MODULES]
    layers: list[int | None] = [*sorted({layer for _, layer in shown if layer is not None})]
    layers += [None] if any(layer is None for _, layer in shown) else []
    height = _ROW * max(len(modules), 3) + _TITLE + _AXIS
    above = _TOP + -(-len(panels) // 2) * height
    strip = 42 * max(len(families), 1) + _TITLE + _AXIS
    sheet = Sheet(_WIDTH, above + (strip if families else 50))
    method = (report.get("method") or {}).get("name") or "merge"
    experts = max(len(report.get("sources") or ()) - 1, 0)
    count = len(report["tensors"])
    text = f"{method}, {experts} expert{'s' * (experts != 1)}, {count} tensors"
    note = "grey: nothing to show" if families else "no tensor was changed"
    sheet.text((0.02 * _WIDTH, 28), _safe(text, 60), _HEADING, _INK, "lm", bold=True)
    sheet.text((0.98 * _WIDTH, 28), note, _LABEL, _SOFT, "rm")
    for number, panel in enumerate(panels):
        top = _TOP + (number // 2) * height + _TITLE
        box = (number % 2, top, height - _TITLE - _AXIS)
        _draw_heatmap(sheet, box, panel, cells[panel.key], modules, layers)
    for number, measure in enumerate(KEPT if families else ()):
        _draw_strip(sheet, (number, above + _TITLE, strip - _TITLE - _AXIS), measure, families)
    return sheet.png()


def _titles(sheet: Sheet, left: float, top: float, title: str, symbols: str) -> None:
    sheet.text((left, top - 30), title, _NAME, _INK, "ls", bold=True)
    sheet.text((left, top - 9), symbols, _LABEL, _SOFT, "ls")


def _area(box: tuple[int, float, float]) -> Box:
    """Return the edges of a panel in the left (0) or right (1) column, from its top and height."""
    column, top, height = box
    left = _SECOND if column else _LEFT
    return left, top, left + _PANEL, top + height


def _draw_heatmap(
    sheet: Sheet,
    box: tuple[int, float, float],
    panel: Measure,
    values: Mapping[_Cell, float],
    modules: Sequence[str],
    layers: Sequence[int | None],
) -> None:
    """Draw one heatmap of modules by layers; `box` is column, top and height."""
    data = np.array([[values.get((m, layer), math.nan) for layer in layers] for m in modules])
    low, high = limits(panel.scale, data[np.isfinite(data)].tolist())
    scale = colours_of(panel.scale)
    area = left, top, right, bottom = _area(box)
    _titles(sheet, left, top, panel.title, panel.symbols)
    colours = painted(data, low, high, scale, _GREY)
    sheet.cells(area, colours)
    if len(layers) <= _ANNOTATED_LAYERS:
        _annotate(sheet, area, data, colours)
    sheet.frame(area, _LINE)
    for row, module in enumerate(modules):
        y = top + (row + 0.5) * (bottom - top) / len(modules)
        sheet.fill((left - _MARK, y, left, y + 1), _INK)
        if box[0] == 0:
            sheet.text((left - _GAP, y), _safe(module, 26), _LABEL, _INK, "rm")
    step = max(1, math.ceil(len(layers) / 13))
    for column, layer in enumerate(layers):
        if layer is not None and column % step:
            continue
        x = left + (column + 0.5) * (right - left) / len(layers)
        sheet.fill((x, bottom + 1, x + 1, bottom + 1 + _MARK), _INK)
        sheet.text((x, bottom + 18), "–" if layer is None else str(layer), _LABEL, _INK, "ms")
    outside = "  (–: outside the layers)" if None in layers else ""
    sheet.text(((left + right) / 2, bottom + 35), f"layer{outside}", _LABEL, _SOFT, "ms")
    bar = right + 10, top, right + 10 + _BAR, bottom
    sheet.cells(bar, painted(np.linspace(high, low, 256)[:, None], low, high, scale, _GREY))
    for value, text in numbers_of(low, high):
        y = bottom - (value - low) / (high - low) * (bottom - top)
        sheet.fill((bar[2], y, bar[2] + _MARK, y + 1), _INK)
        sheet.text((bar[2] + _GAP, y), text, _SMALL, _INK, "lm")


def colours_of(scale: str) -> tuple[str, ...]:
    """Return the colours of a `Measure`'s scale, from its low to its high end."""
    return CENTRED if scale == "centre" else VIRIDIS


def limits(scale: str, values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a `Measure`'s scale for some values; the second is the larger."""
    low, high = min(values), max(values)
    if scale == "centre":
        reach = max(abs(low), abs(high), 1e-3)
        return -reach, reach
    if scale == "zero":
        return min(low, 0.0), max(high, 1e-9)
    # A spread narrower than this is noise, not a pattern to paint in full colours.
    spare = max(0.0, 0.02 - (high - low)) / 2
    return low - spare, high + spare


def numbers_of(low: float, high: float) -> list[tuple[float, str]]:
    """Return round numbers of a range, and how they are written; none where it is no range."""
    rough = (high - low) / _NUMBERS
    if not math.isfinite(rough) or rough <= 1e-12 * max(abs(low), abs(high)):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # As many digits as the step has, which is 25 of some power at the most.
    digits = max(0, 1 - math.floor(math.log10(step)) - (step / power != 2.5))
    form = f".{digits}f" if 1e-3 <= max(abs(low), abs(high)) < 1e6 else ".1e"
    return [(i * step, f"{i * step:{form}}") for i in range(first, last + 1)]


def _annotate(sheet: Sheet, area: Box, data: Any, colours: Any) -> None:
    """Write the number into every cell, dark on light and light on dark."""
    left, top, right, bottom = area
    rows, columns = data.shape
    for row, line in enumerate(data.tolist()):
        for column, value in enumerate(line):
            if math.isfinite(value):
                red, green, blue = colours[row, column] / 255
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
                x = left + (column + 0.5) * (right - left) / columns
                y = top + (row + 0.5) * (bottom - top) / rows
                text = f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.0e}"
                sheet.text((x, y), text, _SMALL, _INK if light else "white", "mm")


def _draw_strip(
    sheet: Sheet,
    box: tuple[int, float, float],
    measure: Measure,
    families: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Draw one strip of dots a family, with its median."""
    key = measure.key
    area = left, top, right, bottom = _area(box)
    symbols = f"{measure.symbols}; a dot is a module of one layer"
    _titles(sheet, left, top, f"{measure.title}, by family", symbols)
    everything = [v for strips in families.values() for v in strips.get(key, ())]
    low, high = min([0.9, *everything]), max([1.0, *everything])
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    sheet.fill((x_of(1), top, x_of(1) + 1, bottom), "#aaaaaa")
    row_height = (bottom - top) / len(families)
    for row, (family, strips) in enumerate(families.items()):
        middle_y = top + (row + 0.5) * row_height
        if box[0] == 0:
            sheet.fill((left - _MARK, middle_y, left, middle_y + 1), _INK)
            sheet.text((left - _GAP, middle_y), _safe(family, 26), _LABEL, _INK, "rm")
        values = strips.get(key) or ()
        if not values:
            continue
        # Golden-ratio steps spread the dots evenly, and the same way every time.
        spread = [((i * 0.618034) % 1 - 0.5) * 0.6 for i in range(len(values))]
        dots = [(x_of(v), middle_y + s * row_height) for v, s in zip(values, spread, strict=True)]
        sheet.dots(dots, 6, _FAMILY_COLOURS.get(family, _SOFT), 0.55)
        x, half = x_of(median(values)), 0.36 * row_height
        sheet.fill((x - 1, middle_y - half, x + 1, middle_y + half), _INK)
        sheet.text((right + 8, middle_y), f"median {median(values):.3f}", _SMALL, _INK, "lm")
    sheet.frame(area, _LINE)
    for value, text in numbers_of(low, high):
        x = x_of(value)
        sheet.fill((x, bottom + 1, x + 1, bottom + 1 + _MARK), _INK)
        sheet.text((x, bottom + 18), text, _LABEL, _INK, "ms")


def _safe(text: str, limit: int) -> str:
    """Return text that the font can draw."""
    plain = printable(text, "?").encode("ascii", "replace").decode()
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."
