"""The report of a merge: every gate of every tensor, and their summary. Plain data, no torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import Plan

REPORT_VERSION = 1
# The keys of a tensor's row that design.md fixes; those without a meaning for a rule are null.
TENSOR_KEYS = (
    "name", "role", "shape", "rule", "rank", "sigma", "head_energy", "s_R", "c_R", "c_R_floor",
    "score", "beta", "alpha_R", "n_R", "norm_A", "S_H", "norm_C", "ret_H", "ret_R", "branch",
    "update_norm", "kept_norm", "kept_cosine", "changed_fraction", "solver", "warnings",
)  # fmt: skip


def tensor_entry(**values: Any) -> dict[str, Any]:
    """Return a tensor's row: every fixed key, null where not given, NaN-free."""
    entry: dict[str, Any] = dict.fromkeys(TENSOR_KEYS)
    entry["warnings"] = []
    entry.update(values)
    return {key: _plain(value) for key, value in entry.items()}


def combine_slices(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one set of gates for a stack of matrices: medians, and the slices' own.

    Args:
        entries: the gates of each slice, in order.
    """
    combined: dict[str, Any] = {}
    keys = {key for entry in entries for key in entry}
    for key in sorted(keys):
        values = [entry.get(key) for entry in entries]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if numbers and len(numbers) == len(values):
            combined[key] = median(numbers)
        elif key == "branch":
            combined[key] = Counter(str(v) for v in values).most_common(1)[0][0]
    combined["slices"] = [dict(entry) for entry in entries]
    return combined


def build_report(
    plan: Plan,
    entries: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    *,
    environment: Mapping[str, Any],
    seconds: float,
    bytes_read: int,
    bytes_written: int,
    peak_private_bytes: int,
) -> dict[str, Any]:
    """Return ``report.json``.

    Args:
        plan: what was run.
        entries: the tensors' rows.
        files: name, size and sha256 of every weight file.
        environment: versions, device and threads.
        seconds, bytes_read, bytes_written, peak_private_bytes: of this run.
    """
    # The plan counts what it intended; here guards and unchanged tensors have spoken.
    warnings = list(plan.warnings)
    flagged = Counter(text for entry in entries for text in entry["warnings"])
    warnings += [f"{count} tensor(s): {text}" for text, count in flagged.most_common()]
    return {
        "version": REPORT_VERSION,
        "plan_hash": plan.plan_hash,
        "recipe": plan.recipe.to_dict(),
        "method": {
            "name": plan.recipe.method,
            "parameters": plan.method.parameters() if plan.method else {},
        },
        "counted": dict(plan.counted),
        "options": {"rounding": plan.options.rounding, "seed": plan.options.seed},
        "sources": [
            {
                "id": source.id,
                "revision": source.revision,
                "license": source.license,
                "private": source.is_private,
                "files": [
                    {"name": file.name, "size": file.size, "sha256": file.sha256}
                    for file in source.files
                ],
            }
            for source in plan.checkpoints
        ],
        "environment": dict(environment),
        "summary": {
            "tensors": len(entries),
            "by_rule": dict(sorted(Counter(entry["rule"] for entry in entries).items())),
            "seconds": round(seconds, 3),
            "bytes_read": bytes_read,
            "bytes_written": bytes_written,
            "peak_private_bytes": peak_private_bytes,
            **_whole_model_kept(entries),
            "warnings": warnings,
            "left_out": dict(plan.left_out),
        },
        "files": list(files),
        "tensors": list(entries),
    }


def _whole_model_kept(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return kept norm and cosine of the whole update, from those of the tensors."""
    update_sq = kept_sq = inner = 0.0
    for entry in entries:
        norm, kept, cosine = entry["update_norm"], entry["kept_norm"], entry["kept_cosine"]
        if norm and kept is not None and cosine is not None:
            update_sq += norm**2
            kept_sq += (norm * kept) ** 2
            inner += norm * (norm * kept) * cosine
    if update_sq == 0:
        return {"kept_norm": None, "kept_cosine": None}
    cosine = inner / math.sqrt(update_sq * kept_sq) if kept_sq > 0 else 0.0
    return {"kept_norm": math.sqrt(kept_sq / update_sq), "kept_cosine": cosine}


def median(values: Sequence[float]) -> float:
    """Return the median of at least one number."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return (ordered[middle - 1] + ordered[middle]) / 2


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
