"""The picture in the card: how every gate decided, layer by layer, from a report.

Matplotlib's Agg canvas only, imported where it draws, so that nothing here costs a plan anything.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from .report import median, module_label, module_rank, value_of
from .roles import Role, layer_of

# A cell of the picture: module and layer, or None outside the blocks.
Cell = tuple[str, int | None]

_DPI = 100
_MAX_MODULES = 28
_ANNOTATED_LAYERS = 4
_WIDTH, _LEFT, _PANEL, _BAR, _SECOND = 13.6, 2.25, 4.35, 0.14, 7.9  # inches
_ROW, _TITLE, _AXIS, _TOP = 0.3, 0.68, 0.58, 0.6  # inches
_GREY, _INK, _SOFT = "#dcdcdc", "#222222", "#666666"
_FAMILY_COLOURS: dict[str, str] = {
    Role.ATTENTION: "#3b6fb6",
    Role.FFN: "#d9822b",
    Role.ROUTER: "#8e5ea8",
    Role.MATRIX: "#4d9a57",
    Role.EMBEDDING: "#b64a4a",
    Role.HEAD: "#8a6d3b",
}


@dataclass(frozen=True, slots=True)
class _Panel:
    """One heatmap.

    Attributes:
        key: as `value_of` takes it.
        title, symbols: in plain words, and in the paper's.
        scale: ``zero`` starts colours at 0, ``range`` at the least value, ``centre`` puts 0 in
            the middle.
    """

    key: str
    title: str
    symbols: str
    scale: str = "zero"


_GATES = (
    _Panel("S_H", "How far the heads agree", "S_H: 0 unrelated or opposed, 1 the same direction"),
    _Panel(
        "above_floor",
        "Residuals aligned beyond chance",
        "c_R − 1/√N: 0 (white) is what unrelated residuals have",
        "centre",
    ),
    _Panel(
        "alpha_R",
        "Length given to the merged residual",
        "α_R, as a share of the mean residual's",
        "range",
    ),
    _Panel(
        "head_energy",
        "Share of the update in its head",
        "‖head‖² / ‖update‖², mean over experts",
    ),
)
_ANY_METHOD = (
    _Panel("update_rms", "Size of the merged update", "root mean square over a tensor's weights"),
    _Panel("changed_fraction", "Weights that changed", "share that differs from the base"),
    _Panel("kept_cosine", "Direction kept by the cast", "cosine of kept and intended", "range"),
    _Panel("kept_norm", "Length kept by the cast", "‖kept‖ / ‖intended‖", "range"),
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
    height = _ROW * max(len(modules), 3) + _TITLE + _AXIS
    rows = -(-len(panels) // 2)
    strip = 0.42 * max(len(families), 1) + _TITLE + _AXIS
    total = _TOP + rows * height + (strip if families else 0.5)
    figure = Figure(figsize=(_WIDTH, total), dpi=_DPI, facecolor="white")
    _heading(figure, report, total, bool(families))
    for number, panel in enumerate(panels):
        top = _TOP + (number // 2) * height + _TITLE
        box = (number % 2, top, height - _TITLE - _AXIS)
        _heatmap(figure, total, box, panel, cells, modules, layers)
    for number, (key, title, symbols) in enumerate(_STRIPS if families else ()):
        box = (number, _TOP + rows * height + _TITLE, strip - _TITLE - _AXIS)
        _strip(figure, total, box, key, title, symbols, families)
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


def _cell_values(cells: Mapping[Cell, Sequence[Mapping[str, Any]]], key: str) -> dict[Cell, float]:
    """Return the median of each cell that has a value."""
    found = {}
    for cell, entries in cells.items():
        values = [v for entry in entries if (v := value_of(entry, key)) is not None]
        if values:
            found[cell] = median(values)
    return found


def _with_values(panels: Iterable[_Panel], cells: Mapping[Cell, Any]) -> list[_Panel]:
    return [panel for panel in panels if _cell_values(cells, panel.key)]


def _axes_of(
    panels: Sequence[_Panel], cells: Mapping[Cell, Any], roles: Mapping[str, str]
) -> tuple[list[str], list[int | None]]:
    """Return the modules and the layers that some panel has a value for, in order."""
    shown = {cell for panel in panels for cell in _cell_values(cells, panel.key)}
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
        for (module, _), value in _cell_values(cells, key).items():
            families.setdefault(roles[module], {}).setdefault(key, []).append(value)
    order = {role.value: number for number, role in enumerate(Role)}
    return dict(sorted(families.items(), key=lambda item: order.get(item[0], 99)))


def _heading(figure: Any, report: Mapping[str, Any], total: float, changed: bool) -> None:
    method = (report.get("method") or {}).get("name") or "merge"
    experts = max(len(report.get("sources") or ()) - 1, 0)
    count = len(report["tensors"])
    text = f"{method}, {experts} expert{'s' * (experts != 1)}, {count} tensors"
    note = "grey: nothing to show" if changed else "no tensor was changed"
    y = 1 - 0.28 / total
    figure.text(0.02, y, _safe(text, 60), fontsize=15, weight="bold", color=_INK, va="center")
    figure.text(0.98, y, note, fontsize=10, color=_SOFT, va="center", ha="right")


def _add_axes(figure: Any, total: float, box: tuple[int, float, float]) -> Any:
    """Return axes in the left (0) or right (1) column, `top` inches from the top."""
    column, top, height = box
    left = _SECOND if column else _LEFT
    rect = (left / _WIDTH, 1 - (top + height) / total, _PANEL / _WIDTH, height / total)
    axes = figure.add_axes(rect)
    axes.tick_params(labelsize=10, length=2, colors=_INK)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
    return axes


def _titles(axes: Any, title: str, symbols: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, weight="bold", color=_INK, pad=22)
    axes.annotate(
        symbols, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=10, color=_SOFT
    )


def _heatmap(
    figure: Any,
    total: float,
    box: tuple[int, float, float],
    panel: _Panel,
    cells: Mapping[Cell, Any],
    modules: Sequence[str],
    layers: Sequence[int | None],
) -> None:
    import numpy as np
    from matplotlib import colormaps

    values = _cell_values(cells, panel.key)
    data = np.array([[values.get((m, layer), math.nan) for layer in layers] for m in modules])
    low, high = _limits(panel.scale, data[np.isfinite(data)].tolist())
    colours = colormaps["RdBu_r" if panel.scale == "centre" else "viridis"].with_extremes(bad=_GREY)
    axes = _add_axes(figure, total, box)
    image = axes.imshow(
        np.ma.masked_invalid(data),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=low,
        vmax=high,
    )
    _titles(axes, panel.title, panel.symbols)
    _label_cells(axes, modules if box[0] == 0 else [""] * len(modules), layers)
    if len(layers) <= _ANNOTATED_LAYERS:
        _annotate(axes, image, data)
    x = (_SECOND if box[0] else _LEFT) + _PANEL + 0.1
    rect = (x / _WIDTH, axes.get_position().y0, _BAR / _WIDTH, axes.get_position().height)
    bar = figure.colorbar(image, cax=figure.add_axes(rect))
    bar.ax.tick_params(labelsize=9, length=2, colors=_INK)
    bar.outline.set_visible(False)
    if high < 1e-3:
        bar.formatter = lambda value, _: f"{value:.1e}"


def _limits(scale: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if scale == "centre":
        reach = max(abs(low), abs(high), 1e-3)
        return -reach, reach
    if scale == "zero":
        return min(low, 0.0), max(high, 1e-9)
    # A spread narrower than this is noise, not a pattern to paint in full colours.
    spare = max(0.0, 0.02 - (high - low)) / 2
    return low - spare, high + spare


def _label_cells(axes: Any, modules: Sequence[str], layers: Sequence[int | None]) -> None:
    step = max(1, math.ceil(len(layers) / 13))
    ticks = [i for i, layer in enumerate(layers) if layer is not None and i % step == 0]
    ticks += [i for i, layer in enumerate(layers) if layer is None]
    names = ["–" if layers[i] is None else str(layers[i]) for i in ticks]
    axes.set_xticks(ticks, labels=names)
    outside = "  (–: outside the layers)" if None in layers else ""
    axes.set_xlabel(f"layer{outside}", fontsize=10, color=_SOFT, labelpad=2)
    axes.set_yticks(range(len(modules)), labels=[_safe(module, 26) for module in modules])


def _annotate(axes: Any, image: Any, data: Any) -> None:
    """Write the number into every cell, dark on light and light on dark."""
    for row, line in enumerate(data.tolist()):
        for column, value in enumerate(line):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
                axes.text(
                    column,
                    row,
                    f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.0e}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=_INK if light else "white",
                )


def _strip(
    figure: Any,
    total: float,
    box: tuple[int, float, float],
    key: str,
    title: str,
    symbols: str,
    families: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    axes = _add_axes(figure, total, box)
    _titles(axes, title, symbols)
    everything = [v for strips in families.values() for v in strips.get(key, ())]
    low, high = min([0.9, *everything]), max([1.0, *everything])
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_ylim(len(families) - 0.5, -0.5)
    axes.axvline(1, color="#aaaaaa", linewidth=1, zorder=0)
    for row, (family, strips) in enumerate(families.items()):
        values = strips.get(key) or ()
        if not values:
            continue
        # Golden-ratio steps spread the dots evenly, and the same way every time.
        spread = [row + ((i * 0.618034) % 1 - 0.5) * 0.6 for i in range(len(values))]
        colour = _FAMILY_COLOURS.get(family, _SOFT)
        axes.scatter(values, spread, s=14, alpha=0.55, linewidths=0, c=colour, zorder=3)
        middle = median(values)
        axes.plot([middle, middle], [row - 0.36, row + 0.36], color=_INK, linewidth=2)
        axes.annotate(
            f"median {middle:.3f}",
            (1, row),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            va="center",
            fontsize=9,
            color=_INK,
        )
    names = [_safe(family, 26) for family in families] if box[0] == 0 else []
    axes.set_yticks(range(len(families)) if names else [], labels=names)


def _safe(text: str, limit: int) -> str:
    """Return text that the font can draw and that is not taken for TeX."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    plain = plain if len(plain) <= limit else plain[: limit - 3] + "..."
    return plain.replace("$", r"\$")
