"""The figures of an analysis (after the paper's 4, 5 and 7) and of a comparison.

Matplotlib's Agg canvas only, imported where it draws.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

_COLOURS = {"RL": "#3b6fb6", "SFT": "#d9822b"}
_HEAD, _RESIDUAL, _GREY = "#b64a4a", "#3b6fb6", "#888888"


def spectra_png(document: Mapping[str, Any]) -> bytes:
    """Return figure 4: head energy by expert and by layer, ranks before and after the head."""
    figure = _figure(15, 4.2)
    energy, layers, ranks = (figure.add_subplot(1, 3, i) for i in (1, 2, 3))
    experts = document["experts"]
    for i, expert in enumerate(experts):
        values = _of_expert(document, i, "head_energy")
        if values:
            body = energy.violinplot([values], [i], widths=0.8, showmedians=True)
            for part in body["bodies"]:
                part.set_facecolor(_COLOURS[expert["group"]])
            for name in ("cbars", "cmins", "cmaxes", "cmedians"):
                body[name].set_color(_COLOURS[expert["group"]])
    energy.set_xticks(
        range(len(experts)),
        [e["id"].rstrip("/").rsplit("/", 1)[-1][:24].replace("$", r"\$") for e in experts],
        rotation=20,
    )
    energy.set_title("Share of energy in the head")
    energy.set_ylabel("share of the squared norm")
    for group in dict.fromkeys(e["group"] for e in experts):
        points = [
            (int(layer), rows[group]["head_energy"])
            for layer, rows in document["layers"].items()
            if layer.isdigit() and rows[group]["head_energy"] is not None
        ]
        points.sort()
        layers.plot(*_columns(points), marker=".", color=_COLOURS[group], label=group)
    layers.set_title("Head energy by layer (median)")
    _by_layer(layers)
    layers.set_ylabel("share of the squared norm")
    layers.legend()
    _ranks(ranks, document)
    return _png(figure)


def coherence_png(document: Mapping[str, Any]) -> bytes:
    """Return figure 5: residual coherence, head agreement and retention, layer by layer."""
    figure = _figure(15, 4.2)
    axes = [figure.add_subplot(1, 3, i) for i in (1, 2, 3)]
    panels = (
        ("Residual coherence and head agreement", (("c_R", _RESIDUAL), ("S_H", _HEAD))),
        ("Retention of the mean", (("ret_R", _RESIDUAL), ("ret_H", _HEAD))),
        ("Mean pair cosine of residuals", (("s_R", _RESIDUAL),)),
    )
    groups = list(dict.fromkeys(e["group"] for e in document["experts"]))
    for ax, (title, series) in zip(axes, panels, strict=True):
        for style, group in zip(("-", "--"), groups, strict=False):
            for key, colour in series:
                points = sorted(
                    (int(layer), rows[group][key])
                    for layer, rows in document["layers"].items()
                    if layer.isdigit() and rows[group][key] is not None
                )
                if points:
                    label = f"{key} ({group})"
                    ax.plot(*_columns(points), style, marker=".", color=colour, label=label)
        ax.set_title(title)
        _by_layer(ax)
        ax.set_ylabel("median over matrices")
    floors = {rows[g]["c_R_floor"] for rows in document["layers"].values() for g in groups}
    for floor in sorted(f for f in floors if f is not None):
        axes[0].axhline(floor, color=_GREY, linestyle=":", label="1/√N: unrelated residuals")
    axes[2].axhline(0.0, color=_GREY, linestyle=":")
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    return _png(figure)


def cosines_png(document: Mapping[str, Any]) -> bytes:
    """Return figure 7: pairwise cosines of heads and of residuals, over all matrices."""
    groups = list(dict.fromkeys(e["group"] for e in document["experts"]))
    figure = _figure(6.5 * len(groups), 4.2)
    for number, group in enumerate(groups, start=1):
        ax = figure.add_subplot(1, len(groups), number)
        found = {
            key: [
                cosine
                for entry in document["tensors"]
                for cosine in entry.get("groups", {}).get(group, {}).get(key) or []
            ]
            for key in ("pair_cosines_H", "pair_cosines_R")
        }
        reach = max((abs(cosine) for values in found.values() for cosine in values), default=1.0)
        sides = (-max(reach, 0.05), max(reach, 0.05))
        for (name, colour), values in zip(
            (("heads", _HEAD), ("residuals", _RESIDUAL)), found.values(), strict=True
        ):
            if values:
                mean = sum(values) / len(values)
                label = f"{name}: mean {mean:.3f}"
                ax.hist(values, bins=40, range=sides, color=colour, alpha=0.6, label=label)
                ax.axvline(mean, color=colour)
        ax.set_title(f"Pairwise cosines, {group} experts")
        ax.set_xlabel("cosine")
        ax.set_ylabel("pairs of matrices")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    return _png(figure)


def comparison_png(table: Mapping[str, Any]) -> bytes:
    """Return the picture of a comparison: size, what the cast kept, likeness of the updates."""
    rows = table["methods"]
    labels = [row["label"] for row in rows]
    figure = _figure(15, 1.6 + 0.5 * max(len(rows), 4))
    panels = (
        ("Size of the update", "update_norm", "‖ΔW‖"),
        ("Left after the cast", "kept_cosine", "cosine with what was meant"),
    )
    for number, (title, key, unit) in enumerate(panels, start=1):
        ax = figure.add_subplot(1, 3, number)
        values = [row[key] or 0.0 for row in rows]
        ax.barh(range(len(rows)), values, color=_RESIDUAL)
        ax.set_yticks(range(len(rows)), labels)
        ax.invert_yaxis()
        ax.set_title(title)
        ax.set_xlabel(unit)
    similarity = table["similarity"]
    if similarity:
        ax = figure.add_subplot(1, 3, 3)
        together = [
            a + b
            for a, b in zip(similarity["between_methods"], similarity["with_experts"], strict=True)
        ]
        experts = [f"expert {i + 1}" for i in range(len(similarity["with_experts"][0]))]
        image = ax.imshow(together, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
        ax.set_xticks(range(len(labels) + len(experts)), labels + experts, rotation=40, ha="right")
        ax.set_yticks(range(len(rows)), labels)
        ax.set_title("Cosine between updates")
        for y, line in enumerate(together):
            for x, value in enumerate(line):
                ink = "white" if abs(value) > 0.7 else "black"
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
        figure.colorbar(image, ax=ax)
    return _png(figure)


def _by_layer(ax: Any) -> None:
    """Number the horizontal axis by layers."""
    ax.set_xlabel("layer")
    ax.xaxis.get_major_locator().set_params(integer=True)


def _ranks(ax: Any, document: Mapping[str, Any]) -> None:
    """Draw the medians of stable and effective rank, with and without the head."""
    from matplotlib.ticker import ScalarFormatter

    groups = list(dict.fromkeys(e["group"] for e in document["experts"]))
    kinds = ("stable_rank", "effective_rank")
    ticks, place = [], 0
    for kind in kinds:
        for group in groups:
            members = [i for i, e in enumerate(document["experts"]) if e["group"] == group]
            for offset, suffix, alpha in ((0.0, "", 0.5), (0.4, "_residual", 1.0)):
                values = [v for i in members for v in _of_expert(document, i, kind + suffix)]
                if values:
                    middle = sorted(values)[len(values) // 2]
                    ax.bar(place + offset, middle, 0.38, color=_COLOURS[group], alpha=alpha)
            ticks.append((place + 0.2, f"{kind.split('_')[0]}\n{group}"))
            place += 1
    ax.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    ax.set_yscale("log")
    for axis_ticks in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis_ticks(ScalarFormatter())
    ax.set_ylabel("median rank")
    ax.set_title("Rank with the head (pale) and without")


def _of_expert(document: Mapping[str, Any], i: int, key: str) -> list[float]:
    values = [entry["experts"][i].get(key) for entry in document["tensors"]]
    return [value for value in values if value is not None]


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
