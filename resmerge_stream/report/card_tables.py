"""The card's tables: gates by family and module, unusual tensors; text safe for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..planning.plan import Plan
from ..units import printable
from .public_names import PublicNames
from .unusual import NOTHING, by_reason, unusual
from .values import family_rank, has_values, median, module_label, module_rank, value_of
from .words import COLUMNS, NAMES

LISTED = 20


def gate_tables(report: Mapping[str, Any]) -> str:
    """Return what the gates decided, or what changed, by family and by module."""
    by_family: dict[str, list[Mapping[str, Any]]] = {}
    by_module: dict[str, list[Mapping[str, Any]]] = {}

    def place(row: Mapping[str, Any]) -> tuple[int, int]:
        return family_rank(row.get("role")), module_rank(module_label(row["name"]))

    rows = sorted(report["tensors"], key=place)
    for row in rows:
        by_family.setdefault(row.get("role") or "unknown", []).append(row)
        by_module.setdefault(module_label(row["name"]), []).append(row)
    return "\n\n".join(
        [
            "Median (least – greatest) over the tensors of a family, then of a module.",
            _table("family", by_family),
            _table("module", by_module),
        ]
    )


def reading(report: Mapping[str, Any]) -> str:
    """Return the section with the picture: how to read the gates, or what changed."""
    has_gates = has_values(report["tensors"], "S_H")
    title = "How to read the gates" if has_gates else "What changed"
    shown = "The gates by layer and module" if has_gates else "What changed by layer and module"
    what = "Every gate of every tensor is" if has_gates else "The numbers of every tensor are"
    return "\n\n".join(
        [
            f"## {title}",
            f"![{shown}](resmerge/gates.png)",
            _READING_GATES if has_gates else _READING_KEPT,
            f"{what} in [resmerge/report.json](resmerge/report.json).",
        ]
    )


def _table(heading: str, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table with a row a group; columns without any value are left out."""
    numbers = {
        (group, key): [v for row in rows if (v := value_of(row, key)) is not None]
        for group, rows in groups.items()
        for key in COLUMNS
    }
    columns = [(key, NAMES[key]) for key in COLUMNS if any(numbers[g, key] for g in groups)]
    lines = [
        "| " + " | ".join([heading, "tensors", *(title for _, title in columns)]) + " |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for group, rows in groups.items():
        cells = [
            escape(group),
            str(len(rows)),
            *(_spread(numbers[group, key]) for key, _ in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{median(values):.3f} ({low} – {high})"


def unusual_tensors(plan: Plan, report: Mapping[str, Any], names: PublicNames) -> str:
    """Return the tensors with warnings, fallbacks, other rules than planned, lost updates."""
    rules = {name: it.rule.name for name, it in plan.tensors.items() if it.rule}
    ranked = by_reason(
        (row["name"], unusual(row, planned=rules.get(row["name"], "carried")))
        for row in report["tensors"]
    )
    if not ranked:
        return NOTHING
    each = max(1, LISTED // len(ranked))
    lines = ["| what | tensors | such as |", "|---|---:|---|"]
    for reason, found in ranked[:LISTED]:
        shown = ", ".join(_code(name) for name in found[:each])
        more = f" and {len(found) - each} more" if len(found) > each else ""
        lines.append(f"| {escape(names.clean(reason))} | {len(found)} | {shown}{more} |")
    more = f"\n\n{len(ranked) - LISTED} more kinds." if len(ranked) > LISTED else ""
    return "\n".join(lines) + more + "\n\nAll are in the report."


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, also in a table's cell."""
    special = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "|": "&#124;", "`": "&#96;"}
    special |= {"[": "&#91;", "]": "&#93;", "*": "&#42;"}
    return "".join(special.get(c, c) for c in printable(text))


def _code(name: str) -> str:
    """Return a name as code; a backtick would end it and a bar would end the cell."""
    plain = printable(name).replace("`", "'").replace("|", "¦")
    return f"`{plain[:160]}`"


def code_list(found: Sequence[str]) -> str:
    """Return up to five names as code, and how many more there are."""
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return (", ".join(_code(name) for name in found[:5]) or "none") + more


_READING_GATES = (
    "Each expert's update of a matrix is cut into its *head*, the strongest "
    "direction(s), and the *residual*, all the rest; head energy is the head's share of the "
    "squared length. *S_H* is the mean cosine between the experts' heads, negative ones counted "
    "as 0: at 1 they pull the same way, near 0 they have nothing in common, and the heads come "
    "back only in that measure (‖C‖/‖A‖ is how much of them was added beside the merged "
    "residual). *s_R* (in the report) is the mean cosine between two experts' residuals, *c_R* "
    "their mean cosine with their common direction. N unrelated residuals already have "
    "c_R = 1/√N, the *floor*: at the floor the residuals are no more aligned than chance, below "
    "it they oppose each other. In matrices this large chance hardly moves s_R from 0, so a "
    "small step above the floor is real agreement. *α_R* is the length of the merged "
    "residual, as a share of the mean residual's. *Kept norm* and *kept cosine* compare "
    "the update in the file with the one that was computed; 1 means nothing was lost."
)


_READING_KEPT = (
    "*Changed* is the share of weights that differ from the base's. *Kept "
    "norm* and *kept cosine* compare the update in the file, after rounding, with the one that "
    "was computed in float32; 1 means nothing was lost."
)
