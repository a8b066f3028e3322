"""The picture in the card: how every gate decided, layer by layer, from a report.

Matplotlib's Agg canvas only, imported where it draws, so that nothing here costs a plan anything.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

from ..roles import Role, layer_of
from .panels import (
    AXIS,
    DPI,
    ROW,
    TITLE,
    TOP,
    WIDTH,
    Cell,
    Panel,
    cell_values,
    draw_heading,
    draw_heatmap,
    draw_strip,
)
from .values import module_label, module_rank

_MAX_MODULES = 28


_GATES = (
    Panel("S_H", "How far the heads agree", "S_H: 0 unrelated or opposed, 1 the same direction"),
    Panel(
        "above_floor",
        "Residuals aligned beyond chance",
        "c_R − 1/√N: 0 (white) is what unrelated residuals have",
        "centre",
    ),
    Panel(
        "alpha_R",
        "Length given to the merged residual",
        "α_R, as a share of the mean residual's",
        "range",
    ),
    Panel(
        "head_energy",
        "Share of the update in its head",
        "‖head‖² / ‖update‖², mean over experts",
    ),
)
_ANY_METHOD = (
    Panel("update_rms", "Size of the merged update", "root mean square over a tensor's weights"),
    Panel("changed_fraction", "Weights that changed", "share that differs from the base"),
    Panel("kept_cosine", "Direction kept by the cast", "cosine of kept and intended", "range"),
    Panel("kept_norm", "Length kept by the cast", "‖kept‖ / ‖intended‖", "range"),
)


def gates_png(report: Mapping[str, Any]) -> bytes:
    """Return the picture of a report as PNG: the same report gives the same bytes.

    Heatmaps of layers × modules for the gates (or, for methods without gates, for what changed),
    and what the cast kept of each tensor by family. Many tensors of one module in one layer, as
    the experts of an MoE, show as their median.

    Args:
        report: ``report.json`` of any method; missing and null values stay grey.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells, roles = _cells(report["tensors"])
    families = _families(cells, roles)
    panels = _with_values(_GATES, cells) or _with_values(_ANY_METHOD, cells if families else {})
    modules, layers = _axes_of(panels, cells, roles)
    height = ROW * max(len(modules), 3) + TITLE + AXIS
    rows = -(-len(panels) // 2)
    strip = 0.42 * max(len(families), 1) + TITLE + AXIS
    total = TOP + rows * height + (strip if families else 0.5)
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    draw_heading(figure, report, total, bool(families))
    for number, panel in enumerate(panels):
        top = TOP + (number // 2) * height + TITLE
        box = (number % 2, top, height - TITLE - AXIS)
        draw_heatmap(figure, total, box, panel, cells, modules, layers)
    for number, (key, title, symbols) in enumerate(_STRIPS if families else ()):
        box = (number, TOP + rows * height + TITLE, strip - TITLE - AXIS)
        draw_strip(figure, total, box, key, title, symbols, families)
    buffer = BytesIO()
    canvas: Any = FigureCanvasAgg(figure)  # untyped in matplotlib
    # Without its version in the file, matplotlib writes the same bytes every time.
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


_STRIPS = (
    ("kept_cosine", "Direction kept, by family", "cosine; a dot is a module of one layer"),
    ("kept_norm", "Length kept, by family", "‖kept‖ / ‖intended‖; a dot is a module of one layer"),
)


def _cells(
    tensors: Sequence[Mapping[str, Any]],
) -> tuple[dict[Cell, list[Mapping[str, Any]]], dict[str, str]]:
    """Return the tensors of each cell, and the role of each module."""
    cells: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    roles: dict[str, str] = {}
    for entry in tensors:
        label = module_label(entry["name"])
        cells[label, layer_of(entry["name"])].append(entry)
        roles.setdefault(label, entry.get("role") or Role.MATRIX)
    return cells, roles


def _with_values(panels: Iterable[Panel], cells: Mapping[Cell, Any]) -> list[Panel]:
    return [panel for panel in panels if cell_values(cells, panel.key)]


def _axes_of(
    panels: Sequence[Panel], cells: Mapping[Cell, Any], roles: Mapping[str, str]
) -> tuple[list[str], list[int | None]]:
    """Return the modules and the layers that some panel has a value for, in order."""
    shown = {cell for panel in panels for cell in cell_values(cells, panel.key)}
    order = {role.value: number for number, role in enumerate(Role)}
    modules = [module for module in roles if any(cell[0] == module for cell in shown)]
    modules = sorted(modules, key=lambda name: (order.get(roles[name], 99), module_rank(name)))
    layers = sorted({layer for _, layer in shown if layer is not None})
    outside = [None] if any(layer is None for _, layer in shown) else []
    return modules[:_MAX_MODULES], [*layers, *outside]


def _families(
    cells: Mapping[Cell, Any], roles: Mapping[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Return, for each role, the values of each strip."""
    families: dict[str, dict[str, list[float]]] = {}
    for key, _, _ in _STRIPS:
        for (module, _), value in cell_values(cells, key).items():
            families.setdefault(roles[module], {}).setdefault(key, []).append(value)
    order = {role.value: number for number, role in enumerate(Role)}
    return dict(sorted(families.items(), key=lambda item: order.get(item[0], 99)))
