"""A plan for people: problems first, then what is done, what it costs, on which hardware."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from resmerge_stream.report.words import rule_in_words
from resmerge_stream.units import format_size

from ..hardware import MODEL, Fit, Machine
from .words import duration, esc, facts, sentence, table


def plan_html(
    plan: Mapping[str, Any],
    *,
    push_to: str,
    create_pr: bool = False,
    hindrance: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> str:
    """Return a plan: problems first, then what will be done, costs, hardware and sources.

    Args:
        plan: as the service gives it.
        push_to: where it is to be published; empty for files.
        create_pr: whether as a pull request.
        hindrance: why Merge would not start it for this visitor, and what to do.
        recipe: what the link to this recipe has in it.
    """
    parts = []
    if plan["problems"]:
        items = "".join(f"<li>{esc(sentence(text))}</li>" for text in plan["problems"])
        count = len(plan["problems"])
        what = "one problem" if count == 1 else f"{count} problems"
        parts.append(
            f'<div class="rm-note rm-bad" role="alert"><b>This cannot be merged: {what}.</b>'
            f"<ul>{items}</ul></div>"
        )
    else:
        parts.append(_verdict(plan, _where(push_to, create_pr), hindrance))
    if plan["warnings"]:
        items = "".join(f"<li>{esc(sentence(text))}</li>" for text in plan["warnings"])
        parts.append(f'<div class="rm-note rm-warn"><b>Good to know</b><ul>{items}</ul></div>')
    if plan["tensors"] and not plan["refused"]:
        parts += [_tiles(plan), _rules(plan)]
        parts.append(hardware_html(plan.get("hardware") or ()))
    if plan["sources"]:
        parts.append(_sources(plan["sources"]))
    if recipe is not None and not plan["refused"]:
        link = quote(json.dumps(recipe, separators=(",", ":")))
        parts.append(f'<p><a href="?recipe={link}">Share this recipe</a>: the form, as a link.</p>')
    return '<div class="rm">' + "".join(parts) + "</div>"


def _where(push_to: str, create_pr: bool) -> str:
    if not push_to:
        return "into files to download"
    return f"into {'a pull request on ' * create_pr}<code>{esc(push_to)}</code>"


def _verdict(plan: Mapping[str, Any], where: str, hindrance: str) -> str:
    if hindrance:
        return (
            '<div class="rm-note rm-warn" role="status"><b>These models can be merged, but not '
            f"yet:</b> {esc(hindrance)}</div>"
        )
    seconds = duration(plan["seconds_estimate"])
    return (
        f'<div class="rm-note rm-good" role="status"><b>This can be merged</b> {where}, in about '
        f"{seconds} here.</div>"
    )


def _tiles(plan: Mapping[str, Any]) -> str:
    tiles = (
        ("To read", format_size(plan["read_bytes"])),
        ("To write", format_size(plan["write_bytes"])),
        ("Files", str(len(plan["shards"]))),
        ("Tensors", f"{plan['tensors']:,}"),
        ("Memory, at most", format_size(plan["peak_memory_bytes"])),
        ("Disk, at most", format_size(plan["peak_disk_bytes"])),
    )
    return facts(tiles)


def _rules(plan: Mapping[str, Any]) -> str:
    rows = [
        (f"<code>{esc(rule)}</code>", f"{count:,}", esc(rule_in_words(rule)))
        for rule, count in plan["by_rule"].items()
    ]
    return table(("Rule", "Tensors", "What it does"), rows, "What is done with each tensor")


def _sources(sources: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for source in sources:
        name, commit = esc(source["id"]), source.get("revision")
        rows.append(
            (
                source["part"],
                f"<code>{name}</code>",
                f"<code>{esc(str(commit)[:10])}</code>" if commit else "comes with this app",
                format_size(source["bytes"]),
                esc(source.get("license") or "not stated"),
                "yes" if source.get("gated") else "no",
            )
        )
    head = ("Part", "Repository", "Commit", "Weights", "Licence", "Gated")
    return table(head, rows, "What is read, and which commit")


def hardware_html(fits: Sequence[Fit]) -> str:
    """Return the table of what a plan takes here and on other hardware."""
    if not fits:
        return ""
    rows = []
    for fit in fits:
        machine = fit.machine
        gone = "–" if fit.lacks else ""
        rows.append(
            (
                esc(fit.name),
                str(machine.cores),
                format_size(machine.memory),
                format_size(machine.disk),
                f'<span title="{esc(fit.lacks)}">✗ too small</span>' if fit.lacks else "✓ fits",
                gone or duration(fit.seconds),
                gone or ("–" if fit.cost is None else _dollars(fit.cost)),
            )
        )
    head = ("Hardware", "Cores", "Memory", "Disk", "Enough?", "Time", "Cost")
    shown = table(
        head, rows, "This plan here, and on hardware that a duplicate or a Job could have"
    )
    return (
        "<details><summary>Here and on other hardware</summary>"
        f"{here_html(fits[0].machine)}{shown}"
        f'<p class="rm-soft">{esc(MODEL)} Estimates, not promises.</p></details>'
    )


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 0.01 else "under $0.01"


def here_html(machine: Machine) -> str:
    """Return the plain statement of what this hardware can do."""
    return (
        '<p class="rm-soft">This runs on <b>'
        f"{machine.cores} CPU cores with {format_size(machine.memory)} of free memory and "
        f"{format_size(machine.disk)} of free disk</b>. Memory grows with a model's largest "
        "matrix, not with the model, and the network is what takes the time. A duplicate of this "
        "Space on paid hardware has no queue but your own.</p>"
    )
