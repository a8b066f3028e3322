"""The report of a merge: every gate of every tensor, and their summary. Plain data, no torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..planning.plan import Plan
from .values import groups_of, together

REPORT_VERSION = 1
ALL_OF_BASE = "every value that is merged is the base's, and it still counts as one of the experts"


def build_report(
    plan: Plan,
    counted: Mapping[str, Any],
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
        counted: what the method's counting passes found.
        entries: the tensors' rows.
        files: name, size and sha256 of every weight file.
        environment: versions, device and threads.
        seconds, bytes_read, bytes_written, peak_private_bytes: of this run.
    """
    # The plan counts what it intended; here guards and unchanged tensors have spoken.
    warnings = [warning.text for warning in plan.warnings]
    flagged = Counter(text for entry in entries for text in entry["warnings"])
    warnings += [f"{count} tensor(s): {text}" for text, count in flagged.most_common()]
    # Experts that have the base's values in every tensor, and those that have the same values in
    # every tensor that any of them has.
    merged = [(plan.tensors[row["name"]], row) for row in entries if row["name"] in plan.tensors]
    unmoved = [
        number
        for number in range(plan.base is None, len(plan.experts))
        if any(number in tensor.experts for tensor, _ in merged)
        and all(number in (row.get("unmoved") or ()) for t, row in merged if number in t.experts)
    ]
    every = set(range(len(plan.experts)))
    groups = groups_of([every])
    for tensor, row in merged:
        lacking = every.difference(tensor.experts)
        groups = together(groups, groups_of([*(row.get("alike") or ()), lacking]))
    idle = [plan.experts[number].id for number in unmoved]
    alike = {
        plan.experts[number].id: plan.experts[group[0]].id
        for group in groups
        for number in group[1:]
        if number not in unmoved
    }
    warnings += told_of_experts({"change_nothing": idle, "change_alike": alike})
    return {
        "version": REPORT_VERSION,
        "plan_hash": plan.plan_hash,
        "recipe": plan.recipe.to_dict(),
        "method": {
            "name": plan.recipe.method,
            "parameters": plan.method.parameters() if plan.method else {},
        },
        "counted": dict(counted),
        "options": plan.options.to_dict("values"),
        "sources": [
            {
                "id": source.id,
                "revision": source.revision,
                "subfolder": source.subfolder,
                "license": source.license,
                "private": source.is_private,
                "files": [
                    {"name": file.name, "size": file.size, "sha256": file.sha256}
                    for file in source.files
                ],
            }
            for source in plan.checkpoints
        ],
        "identity": [source.digest for source in plan.known],
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
            "change_nothing": idle,
            "change_alike": alike,
            "left_out": dict(plan.left_out),
        },
        "matched": [
            {name: list(stored) for name, stored in renamed.items()} for renamed in plan.matched
        ],
        "adapter": _adapter(entries) if plan.options.output == "adapter" else None,
        "files": list(files),
        "tensors": list(entries),
    }


def told_of_experts(summary: Mapping[str, Any]) -> list[str]:
    """Return in words which experts a report's summary calls idle, or another one's equals.

    Args:
        summary: anybody may have written it.
    """
    idle, alike = summary.get("change_nothing"), summary.get("change_alike")
    return [
        *(
            f"{name} changes nothing: {ALL_OF_BASE}"
            for name in idle or []
            if isinstance(idle, list)
        ),
        *(
            f"{name} changes every value as {other} does: it counts twice"
            for name, other in (alike.items() if isinstance(alike, Mapping) else ())
        ),
    ]


def _adapter(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the adapter's modules have in common, and how much they hold of the update."""
    held = [((entry["update_norm"] or 0.0) ** 2, entry["adapter"]["by_rank"]) for entry in entries]
    total = sum(energy for energy, _ in held)
    rank = max(entry["adapter"]["rank"] for entry in entries)
    ranks = sorted({int(step) for _, shares in held for step in shares})
    by_rank = dict.fromkeys(map(str, ranks), 1.0)
    for step in ranks if total > 0 else ():
        of_each = (  # a module has no more than its own rank
            energy * max((share for own, share in shares.items() if int(own) <= step), default=0.0)
            for energy, shares in held
        )
        by_rank[str(step)] = sum(of_each) / total
    return {
        "modules": len(entries),
        "rank": rank,
        "needed": max(entry["adapter"]["needed"] for entry in entries),
        "kept": by_rank[str(rank)],
        "by_rank": by_rank,
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
