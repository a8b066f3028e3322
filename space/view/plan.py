"""A plan for people: problems first, then what is done, what it costs, on which hardware."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from resmerge_stream.methods import find_methods
from resmerge_stream.report.words import rule_in_words
from resmerge_stream.units import format_size

from ..hardware import MODEL, Hardware
from .words import duration, esc, facts, sentence, table

_CHOSEN_BY = {
    "default": "the default; choose another under “Method”",
    "recipe": "by the recipe",
    "option": "chosen in the form",
}


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
    if plan["method"]:
        known = find_methods().get(plan["method"])
        title = esc(known.title if known else plan["method"])
        how = _CHOSEN_BY[plan["chosen_by"]]
        parts.append(f'<p class="rm-soft">Method: <b>{title}</b>, {how}.</p>')
    if plan["problems"]:
        items = "".join(f"<li>{esc(sentence(text))}</li>" for text in plan["problems"])
        count = len(plan["problems"])
        what = "one problem" if count == 1 else f"{count} problems"
        parts.append(
            f'<div class="rm-note rm-bad" role="alert"><b>This cannot be merged: {what}.</b>'
            f"<ul>{items}</ul></div>"
        )
    else:
        where = f"into {'a pull request on ' * create_pr}<code>{esc(push_to)}</code>"
        where = where if push_to else "into files to download"
        parts.append(_verdict(plan, where, hindrance))
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


def advice_html(advice: Mapping[str, Any]) -> str:
    """Return which methods to compare for these experts, and on what evidence."""
    methods = find_methods()
    items = "".join(
        f"<li><b>{esc(methods[one['method']].title)}</b>: {-one['points']:.1f} points behind the "
        f"best of each group on average, {-one['worst']:.1f} where it was worst</li>"
        for one in advice["candidates"]
        if one["method"] in methods
    )
    return (
        f'<div class="rm"><div class="rm-note"><b>Advice.</b> {esc(sentence(advice["reason"]))}'
        f"<ul>{items}</ul></div></div>"
    )


def no_advice_html() -> str:
    """Return how to get advice where the weights are not read here."""
    command = "resmerge-stream plan recipe.yml --advice --sample 20%"
    return (
        '<p class="rm-soft">Which method suits these experts, their weights say, and a plan reads '
        f"none: <code>{command}</code> does; or compare methods on your questions.</p>"
    )


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
        rank = source.get("adapter_rank")
        rows.append(
            (
                source["part"] + (f", LoRA of rank {rank}" if rank else ""),
                f"<code>{name}</code>",
                f"<code>{esc(str(commit)[:10])}</code>" if commit else "comes with this app",
                format_size(source["bytes"]),
                esc(source.get("license") or "not stated"),
                "yes" if source.get("gated") else "no",
            )
        )
    head = ("Part", "Repository", "Commit", "Weights", "Licence", "Gated")
    return table(head, rows, "What is read, and which commit")


def hardware_html(found: Sequence[Hardware]) -> str:
    """Return the table of what a plan takes here and on other hardware."""
    if not found:
        return ""
    rows = []
    for one in found:
        gone, cost = "–" if one.lacks else "", "–"
        if one.cost is not None:
            cost = f"${one.cost:.2f}" if one.cost >= 0.01 else "under $0.01"
        rows.append(
            (
                esc(one.name),
                str(one.cores),
                format_size(one.memory),
                format_size(one.disk),
                f'<span title="{esc(one.lacks)}">✗ too small</span>' if one.lacks else "✓ fits",
                gone or duration(one.seconds),
                gone or cost,
            )
        )
    head = ("Hardware", "Cores", "Memory", "Disk", "Enough?", "Time", "Cost")
    shown = table(
        head, rows, "This plan here, and on hardware that a duplicate or a Job could have"
    )
    return (
        "<details><summary>Here and on other hardware</summary>"
        f"{here_html(found[0])}{shown}"
        f'<p class="rm-soft">{esc(MODEL)} Estimates, not promises.</p></details>'
    )


def here_html(here: Hardware) -> str:
    """Return the plain statement of what this hardware can do."""
    return (
        '<p class="rm-soft">This runs on <b>'
        f"{here.cores} CPU cores with {format_size(here.memory)} of free memory and "
        f"{format_size(here.disk)} of free disk</b>. Memory grows with a model's largest "
        "matrix, not with the model, and the network is what takes the time. A duplicate of this "
        "Space on paid hardware has no queue but your own.</p>"
    )
