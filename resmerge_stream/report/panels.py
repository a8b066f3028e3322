"""One panel of a picture: heatmaps by layer and module, strips by family."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..roles import Role
from ..units import printable
from .values import median, value_of
from .words import Measure

WIDTH, _LEFT, _PANEL, _BAR, _SECOND = 13.6, 2.25, 4.35, 0.14, 7.9  # inches
ROW, TITLE, AXIS, TOP = 0.3, 0.68, 0.58, 0.6  # inches
_GREY, _INK, _SOFT = "#dcdcdc", "#222222", "#666666"


# A cell of the picture: module and layer, or None outside the blocks.
Cell = tuple[str, int | None]


DPI = 100


_ANNOTATED_LAYERS = 4


_FAMILY_COLOURS: dict[str, str] = {
    Role.ATTENTION: "#3b6fb6",
    Role.FFN: "#d9822b",
    Role.ROUTER: "#8e5ea8",
    Role.MATRIX: "#4d9a57",
    Role.EMBEDDING: "#b64a4a",
    Role.HEAD: "#8a6d3b",
}


def draw_heading(figure: Any, report: Mapping[str, Any], total: float, changed: bool) -> None:
    """Write the picture's title line; `total` is the figure's height in inches."""
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
    rect = (left / WIDTH, 1 - (top + height) / total, _PANEL / WIDTH, height / total)
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


def draw_heatmap(
    figure: Any,
    total: float,
    box: tuple[int, float, float],
    panel: Measure,
    cells: Mapping[Cell, Any],
    modules: Sequence[str],
    layers: Sequence[int | None],
) -> None:
    """Draw one heatmap of modules by layers; `box` is column, top and height in inches."""
    import numpy as np
    from matplotlib import colormaps

    values = cell_values(cells, panel.key)
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
    rect = (x / WIDTH, axes.get_position().y0, _BAR / WIDTH, axes.get_position().height)
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


def draw_strip(
    figure: Any,
    total: float,
    box: tuple[int, float, float],
    measure: Measure,
    families: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Draw one strip of dots a family, with its median."""
    key = measure.key
    axes = _add_axes(figure, total, box)
    _titles(
        axes, f"{measure.title}, by family", f"{measure.symbols}; a dot is a module of one layer"
    )
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
    plain = printable(text, "?").encode("ascii", "replace").decode()
    plain = plain if len(plain) <= limit else plain[: limit - 3] + "..."
    return plain.replace("$", r"\$")


def cell_values(cells: Mapping[Cell, Sequence[Mapping[str, Any]]], key: str) -> dict[Cell, float]:
    """Return the median of each cell that has a value."""
    found = {}
    for cell, rows in cells.items():
        values = [v for row in rows if (v := value_of(row, key)) is not None]
        if values:
            found[cell] = median(values)
    return found
