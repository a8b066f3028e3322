"""Words and pieces of pages: escaping, times, tables."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def esc(value: object) -> str:
    """Return text for HTML, safe in attributes too."""
    return html.escape(str(value), quote=True)


def duration(seconds: float | None) -> str:
    """Return a time for people."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def sentence(text: str) -> str:
    """Return text that begins with a capital, unless a name stands first, such as org/base."""
    first = text.partition(" ")[0].rstrip(",:;")
    return text[:1].upper() + text[1:] if first.isalpha() else text


def base_of(recipe: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether a recipe has a base, and whether the base takes part as one of the models.

    Args:
        recipe: as `Recipe.to_dict`, perhaps in a stranger's report.
    """
    base, models = recipe.get("base_model"), recipe.get("models")
    named = [
        model.get("model") if isinstance(model, dict) else model
        for model in (models if isinstance(models, list) else ())
    ]
    return bool(base), bool(base) and base in named


def notice(text: str, kind: str = "bad") -> str:
    """Return one boxed message; kinds: bad, warn, good, plain."""
    return f'<div class="rm-note rm-{kind}" role="status">{esc(sentence(text))}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table of cells that are HTML already; numbers are aligned by CSS."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )  # fmt: skip
    return (
        f'<div class="rm-scroll" tabindex="0" role="region" aria-label="{esc(caption)}">'
        f"<table><caption>{esc(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return pairs of label and value as tiles."""
    inner = "".join(f"<div><dt>{esc(k)}</dt><dd>{_unbroken(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="rm-tiles">{inner}</dl>'


def _unbroken(value: str) -> str:
    """Return text for HTML in which a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=[kMGT]?B\b|s\b|min\b|h\b)", "&nbsp;", esc(value))
