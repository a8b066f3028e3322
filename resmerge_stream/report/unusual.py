"""What is unusual about a merged tensor, told from its row of the report."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# A tensor of which less than this is left is named.
_MOSTLY_LOST = 0.5
# Branches that are the normal way through, or that the recipe asked for.
_USUAL = ("consensus", "head only", "residual only")
NOTHING = "None: every tensor went the planned way."


def unusual(row: Mapping[str, Any], *, planned: str | None = None) -> list[str]:
    """Return what a reader should know of a tensor: warnings, fallbacks, a lost update.

    Args:
        row: of a report that `parse_report` let through; the rest of it may be anything.
        planned: the rule of the plan, where there is one to compare with.
    """
    warnings, slices = row.get("warnings"), row.get("slices")
    reasons = [t for t in warnings if isinstance(t, str)] if isinstance(warnings, list) else []
    if not reasons:  # a warning about a fallback already says what the branch repeats
        parts = slices if isinstance(slices, list) and slices else [row]
        branches = Counter(
            part["branch"]
            for part in parts
            if isinstance(part, dict) and isinstance(part.get("branch"), str)
        )
        reasons += [
            f"fallback: {branch}" + (" in some slices" if count < len(parts) else "")
            for branch, count in branches.items()
            if branch not in _USUAL
        ]
    if row["rule"] == "copy":
        reasons.append("no expert changed it")
    elif planned is not None and row["rule"] != planned and not reasons:
        reasons.append(f"{row['rule']} instead of {planned}")
    kept = row.get("kept_cosine")
    if isinstance(kept, int | float) and kept < _MOSTLY_LOST:
        reasons.append(f"mostly lost in the cast (kept cosine below {_MOSTLY_LOST})")
    return reasons


def by_reason(found: Iterable[tuple[str, Iterable[str]]]) -> list[tuple[str, list[str]]]:
    """Return each reason with the tensors it is said of, the most frequent first.

    Args:
        found: tensors and what is unusual about them.
    """
    groups: dict[str, list[str]] = {}
    for name, reasons in found:
        for reason in reasons:
            groups.setdefault(reason, []).append(name)
    return sorted(groups.items(), key=lambda item: -len(item[1]))
