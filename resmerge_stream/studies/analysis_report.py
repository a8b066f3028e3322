"""The analysis as files: every tensor as JSON, families and layers as a table, the figures."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..report.values import median
from ..roles import layer_of
from .analysis_plots import coherence_png, cosines_png, spectra_png

EXPERT_KEYS = (
    "head_energy",
    "stable_rank",
    "stable_rank_residual",
    "effective_rank",
    "effective_rank_residual",
    "unchanged",
)
GROUP_KEYS = ("c_R", "c_R_floor", "s_R", "S_H", "ret_H", "ret_R")


def analysis_files(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of an analysis by name.

    Args:
        report: with ``experts`` and ``tensors`` as `run_analysis` makes them.
    """
    groups = [expert["group"] for expert in report["experts"]]
    tensors = report["tensors"]
    document = {
        **report,
        "families": _summaries(tensors, groups, lambda entry: str(entry["role"])),
        "layers": _summaries(tensors, groups, _layer),
    }
    document = _plain(document)
    return {
        "analysis.json": (json.dumps(document, indent=1) + "\n").encode(),
        "analysis.md": _markdown(document).encode(),
        "spectra.png": spectra_png(document),
        "coherence.png": coherence_png(document),
        "cosines.png": cosines_png(document),
    }


def _layer(entry: Mapping[str, Any]) -> str:
    layer = layer_of(entry["name"])
    return "outside" if layer is None else str(layer)


def _summaries(
    tensors: Iterable[Mapping[str, Any]],
    groups: list[str],
    key_of: Callable[[Mapping[str, Any]], str],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return medians by key and group, and how many tensors each is of."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for entry in tensors:
        cells.setdefault(key_of(entry), []).append(entry)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, entries in cells.items():
        found[key] = {}
        for group in dict.fromkeys(groups):
            members = [i for i, name in enumerate(groups) if name == group]
            row: dict[str, Any] = {"tensors": len(entries)}
            for name in EXPERT_KEYS:
                values = [entry["experts"][i].get(name) for entry in entries for i in members]
                numbers = [value for value in values if value is not None]
                row[name] = median(numbers) if numbers else None
            for name in GROUP_KEYS:
                values = [entry.get("groups", {}).get(group, {}).get(name) for entry in entries]
                numbers = [value for value in values if value is not None]
                row[name] = median(numbers) if numbers else None
            found[key][group] = row
    return found


def _markdown(document: Mapping[str, Any]) -> str:
    lines = [f"Base: `{document['base']}`; head rank k = {document['rank']}. Medians.", ""]
    for number, expert in enumerate(document["experts"], start=1):
        lines.append(f"{number}. `{expert['id']}` ({expert['group']})")
    lines += ["", *advice_lines(document["regime"], document["advice"])]
    titles = (
        "head energy", "stable rank", "… of residual", "effective rank", "… of residual",
        "unchanged", "c_R", "floor", "s_R", "S_H", "Ret_H", "Ret_R",
    )  # fmt: skip
    for heading in ("families", "layers"):
        lines += ["", f"| {heading} | group | tensors | " + " | ".join(titles) + " |"]
        lines.append("|---|---|---|" + "---|" * len(titles))
        for key, by_group in document[heading].items():
            for group, row in by_group.items():
                cells = [_number(row[name]) for name in (*EXPERT_KEYS, *GROUP_KEYS)]
                lines.append(f"| {key} | {group} | {row['tensors']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def advice_lines(regime: Mapping[str, Any], advice: Mapping[str, Any]) -> list[str]:
    """Return what the weights say of the experts as a group, and what to compare, as Markdown.

    Args:
        regime: as `Regime.to_dict`.
        advice: as `Advice.to_dict`.
    """
    lengths = [length for length in regime["lengths"] if length > 0]
    cosines = regime["cosines"]
    lines = [f"- Read: {100 * regime['share']:.0f} % of the weights."]
    if cosines:
        lines += [
            f"- Cosines of the updates: {min(cosines):.2f} to {max(cosines):.2f}; "
            f"the longest is {max(lengths) / min(lengths):.1f} times the shortest.",
            f"- Changed weights: {100 * min(regime['changed']):.0f} to "
            f"{100 * max(regime['changed']):.0f} % an expert; of what one changed, another "
            f"changed {100 * regime['overlap']:.0f} % too.",
        ]
    if regime["kept_cosine"] is not None:
        lines.append(
            f"- Rounded to the output's dtype, the plain mean would keep "
            f"{100 * regime['kept_norm']:.0f} % of its length and {regime['kept_cosine']:.2f} of "
            "its direction (1: all)."
        )
    reason = advice["reason"]
    lines.append(f"- {reason[0].upper()}{reason[1:]}")
    for found in advice["candidates"]:
        lines.append(
            f"  - `{found['method']}`: {found['points']:z.1f} points from the best of each group, "
            f"{found['worst']:z.1f} where it was worst"
        )
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
