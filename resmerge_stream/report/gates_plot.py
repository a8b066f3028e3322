"""The picture in the card: how every gate decided, layer by layer, from a report.

What draws is imported where it does, so that nothing here costs a plan anything.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..roles import Role, layer_of
from .panels import (
    AXIS,
    ROW,
    TITLE,
    TOP,
    WIDTH,
    Cell,
    cell_values,
    draw_heading,
    draw_heatmap,
    draw_strip,
)
from .sheet import Sheet
from .values import family_rank, module_label, module_rank
from .words import CHANGES, GATES, KEPT, Measure

_MAX_MODULES = 28


def gates_png(report: Mapping[str, Any]) -> bytes:
    """Return the picture of a report as PNG: the same report gives the same bytes.

    Heatmaps of layers × modules for the gates (or, for methods without gates, for what changed),
    and what the cast kept of each tensor by family. Many tensors of one module in one layer, as
    the experts of an MoE, show as their median.

    Args:
        report: ``report.json`` of any method; missing and null values stay grey.
    """
    cells: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    roles: dict[str, str] = {}
    for row in report["tensors"]:
        label = module_label(row["name"])
        cells[label, layer_of(row["name"])].append(row)
        roles.setdefault(label, row.get("role") or Role.MATRIX)
    families = _families(cells, roles)
    gates = _with_values(GATES, cells)
    others = _with_values((*CHANGES, *KEPT), cells if families else {})
    # Two stand side by side, and no place stays empty.
    panels = [*gates, *others[: len(gates) % 2]] if gates else others[: len(others) // 2 * 2]
    modules, layers = _axes_of(gates or panels, cells, roles)
    height = ROW * max(len(modules), 3) + TITLE + AXIS
    rows = -(-len(panels) // 2)
    strip = 42 * max(len(families), 1) + TITLE + AXIS
    total = TOP + rows * height + (strip if families else 50)
    sheet = Sheet(WIDTH, total)
    draw_heading(sheet, report, bool(families))
    for number, panel in enumerate(panels):
        top = TOP + (number // 2) * height + TITLE
        box = (number % 2, top, height - TITLE - AXIS)
        draw_heatmap(sheet, box, panel, cells, modules, layers)
    for number, measure in enumerate(KEPT if families else ()):
        box = (number, TOP + rows * height + TITLE, strip - TITLE - AXIS)
        draw_strip(sheet, box, measure, families)
    return sheet.png()


def _with_values(panels: Iterable[Measure], cells: Mapping[Cell, Any]) -> list[Measure]:
    return [panel for panel in panels if cell_values(cells, panel.key)]


def _axes_of(
    panels: Sequence[Measure], cells: Mapping[Cell, Any], roles: Mapping[str, str]
) -> tuple[list[str], list[int | None]]:
    """Return the modules and the layers that some panel has a value for, in order."""
    shown = {cell for panel in panels for cell in cell_values(cells, panel.key)}
    modules = [module for module in roles if any(cell[0] == module for cell in shown)]
    modules = sorted(modules, key=lambda name: (family_rank(roles[name]), module_rank(name)))
    layers = sorted({layer for _, layer in shown if layer is not None})
    outside = [None] if any(layer is None for _, layer in shown) else []
    return modules[:_MAX_MODULES], [*layers, *outside]


def _families(
    cells: Mapping[Cell, Any], roles: Mapping[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Return, for each role, the values of each strip."""
    families: dict[str, dict[str, list[float]]] = {}
    for measure in KEPT:
        for (module, _), value in cell_values(cells, measure.key).items():
            families.setdefault(roles[module], {}).setdefault(measure.key, []).append(value)
    return dict(sorted(families.items(), key=lambda item: family_rank(item[0])))
