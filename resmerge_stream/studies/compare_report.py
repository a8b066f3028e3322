"""The table of a comparison: the methods' reports side by side, as JSON, Markdown and a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StoppedError
from ..maths.passes import gram
from ..report.values import median
from ..report.words import NAMES
from ..sinks.durable import write_durably
from .analysis_plots import comparison_png


class Similarity:
    """Running Gram matrix of the methods' updates and the experts' task vectors.

    Args:
        labels: of the methods.
        experts: N.
    """

    def __init__(self, labels: Sequence[str], experts: int) -> None:
        self._labels = list(labels)
        self._gram = torch.zeros(len(labels) + experts, len(labels) + experts, dtype=torch.float64)
        self._complete = True

    def products(self, updates: Mapping[str, Tensor], stack: Tensor) -> Tensor | None:
        """Return the products of a row block's ΔW and Δ, safe in any thread.

        None if some methods saw this tensor in another cut.
        """
        if list(updates) != self._labels:
            return None
        return gram([*updates.values(), *stack])

    def add(self, products: Tensor | None, experts: Sequence[int]) -> None:
        """Add the products of a row block in file order; and which experts take part there."""
        if products is None:
            self._complete = False
            return
        count = len(self._labels)
        own = torch.tensor([*range(count), *(count + i for i in experts)])
        self._gram[own[:, None], own[None, :]] += products

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as plain data, for the journal of a shard."""
        gram = self._gram.tolist() if self._complete else None
        return {"labels": self._labels, "gram": gram}

    def include(self, other: Mapping[str, Any] | None) -> None:
        """Add the sums of a shard, of this run or of the one that it continues."""
        if not other or other["labels"] != self._labels or other["gram"] is None:
            self._complete = False
        else:
            self._gram += torch.tensor(other["gram"], dtype=torch.float64)

    def table(self) -> dict[str, Any] | None:
        """Return norms and cosines, or None where not all updates were seen together."""
        if not self._complete:
            return None
        norms = self._gram.diagonal().clamp_min(0).sqrt()
        cosines = self._gram / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
        count = len(self._labels)
        experts = norms[count:].tolist()
        return {
            "mean_expert_norm": sum(experts) / len(experts),
            "between_methods": [row[:count] for row in cosines[:count].tolist()],
            "with_experts": [row[count:] for row in cosines[:count].tolist()],
        }


def comparison_files(
    reports: Mapping[str, Mapping[str, Any]],
    similarity: dict[str, Any] | None,
    *,
    peak: int,
    choice: str = "",
) -> dict[str, bytes]:
    """Return ``comparison.json``, ``comparison.md`` and ``comparison.png``.

    Args:
        reports: by label, in the user's order.
        similarity: from `Similarity.table`, where there is one.
        peak: what the plan said that the run may take, in bytes.
        choice: a line that says which is best, if they were asked.
    """
    table = {
        "version": 1,
        "planned_peak_memory_bytes": peak,
        "methods": [_row(label, report, similarity) for label, report in reports.items()],
        "similarity": similarity,
        "families": {label: _families(report) for label, report in reports.items()},
    }
    return {
        "comparison.json": (json.dumps(table, indent=1) + "\n").encode(),
        "comparison.md": (_markdown(table) + (f"\n{choice}\n" if choice else "")).encode(),
        "comparison.png": comparison_png(table),
    }


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the table and the picture; earlier ones of a comparison are replaced.

    Raises:
        StoppedError: they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_durably(out / name, data)
    except OSError as exc:
        raise StoppedError(f"cannot write into {str(out)!r}: {exc.strerror}.") from exc


def _row(
    label: str, report: Mapping[str, Any], similarity: Mapping[str, Any] | None
) -> dict[str, Any]:
    summary = report["summary"]
    rows = report["tensors"]
    norm = math.sqrt(sum((row["update_norm"] or 0.0) ** 2 for row in rows))
    sizes = [(math.prod(row["shape"]), row["changed_fraction"]) for row in rows]
    changed = sum(size * (share or 0.0) for size, share in sizes)
    expert = similarity["mean_expert_norm"] if similarity else 0.0
    return {
        "label": label,
        "method": report["method"],
        "update_norm": norm,
        "relative_norm": norm / expert if expert > 0 else None,
        "kept_norm": summary["kept_norm"],
        "kept_cosine": summary["kept_cosine"],
        "changed_fraction": changed / max(sum(size for size, _ in sizes), 1),
        "seconds": summary["seconds"],
        "by_rule": summary["by_rule"],
        "warnings": len(summary["warnings"]),
    }


def _families(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return medians by role of what every method reports."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["tensors"]:
        groups.setdefault(str(row["role"]), []).append(row)
    keys = ("update_norm", "kept_norm", "kept_cosine", "changed_fraction")
    found = {}
    for role, rows in sorted(groups.items()):
        values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
        found[role] = {key: median(numbers) for key, numbers in values.items() if numbers}
    return found


def _markdown(table: Mapping[str, Any]) -> str:
    titles = {**NAMES, "relative_norm": "of an expert's", "seconds": "seconds"}
    keys = (
        "update_norm", "relative_norm", "kept_norm", "kept_cosine", "changed_fraction", "seconds",
    )  # fmt: skip
    columns = [(key, titles[key]) for key in keys]
    lines = [
        "| method | " + " | ".join(title for _, title in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in table["methods"]:
        cells = [f"{row[key]:.3g}" if row[key] is not None else "–" for key, _ in columns]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    similarity = table["similarity"]
    if similarity:
        experts = len(similarity["with_experts"][0])
        lines += ["", "Cosines of the updates with each expert's, over the whole model:", ""]
        lines.append("| method | " + " | ".join(f"expert {i + 1}" for i in range(experts)) + " |")
        lines.append("|---|" + "---|" * experts)
        for row, cosines in zip(table["methods"], similarity["with_experts"], strict=True):
            shown = " | ".join(f"{value:.3f}" for value in cosines)
            lines.append(f"| {row['label']} | {shown} |")
    return "\n".join(lines) + "\n"
