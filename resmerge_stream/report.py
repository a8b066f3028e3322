"""The report of a merge: every gate of every tensor, and their summary. Plain data, no torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import Plan
from .roles import module_of

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


# The order of the forward pass; other modules come after, as the files name them.
_MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def value_of(entry: Mapping[str, Any], key: str) -> float | None:
    """Return one number of a tensor's row, or None where it has none.

    Args:
        entry: a row of the report. A stack of matrices that has no value of its own gives the
            median of its slices'.
        key: a key of the report, or ``head_share`` (‖C‖/‖A‖), ``above_floor`` (c_R − 1/√N),
            ``update_rms``; ``head_energy`` is the mean over experts.
    """
    own = _own_value(entry, key)
    if own is not None or not entry.get("slices"):
        return own
    values = [v for part in entry["slices"] if (v := _own_value(part, key)) is not None]
    return median(values) if values else None


def module_label(name: str) -> str:
    """Return the row of a tensor in tables and pictures: ``q_proj``, ``q_proj bias``."""
    return module_of(name) + (" bias" if name.endswith(".bias") else "")


def module_rank(label: str) -> int:
    """Return where a module stands among those of its family."""
    return _MODULE_ORDER.index(label) if label in _MODULE_ORDER else len(_MODULE_ORDER)


def _own_value(gates: Mapping[str, Any], key: str) -> float | None:
    if key == "head_energy":
        energies = [v for item in gates.get(key) or () if (v := _number(item)) is not None]
        return sum(energies) / len(energies) if energies else None
    if key in ("head_share", "above_floor", "update_rms"):
        return _derived(gates, key)
    return _number(gates.get(key))


def _derived(gates: Mapping[str, Any], key: str) -> float | None:
    if key == "update_rms":
        norm, size = _number(gates.get("update_norm")), math.prod(gates.get("shape") or ())
        return norm / math.sqrt(size) if norm is not None and size else None
    names = ("norm_C", "norm_A") if key == "head_share" else ("c_R", "c_R_floor")
    left, right = (_number(gates.get(name)) for name in names)
    if left is None or right is None:
        return None
    if key == "above_floor":
        return left - right
    return left / right if right > 0 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
