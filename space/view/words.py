"""Words and pieces of pages: escaping, times, tables."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from resmerge_stream.methods import find_methods
from resmerge_stream.units import format_duration, printable

# So many columns of a table stand side by side on a phone.
_FIT_A_PHONE = 4


def esc(value: object) -> str:
    """Return text for HTML, safe in attributes too."""
    text = printable(str(value), "\N{REPLACEMENT CHARACTER}", kept="\n\t")
    return html.escape(text, quote=True)


def duration(seconds: float | None) -> str:
    """Return a time for people, a dash for none."""
    return "–" if seconds is None else format_duration(seconds)


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


def method_title(name: str) -> str:
    """Return what the form calls a method; its own name where it has no other."""
    found = find_methods().get(name)
    return found.title if found else name


def notice(text: str, kind: str = "bad") -> str:
    """Return one boxed message; kinds: bad, warn, good, plain."""
    return f'<div class="rm-note rm-{kind}" role="status">{esc(sentence(text))}</div>'


def code(title: str, text: str) -> str:
    """Return a block of code, named for a screen reader, with a button that copies it."""
    return (
        f'<div class="rm-code"><button type="button" class="rm-copy" aria-label="Copy: '
        f'{esc(title)}">Copy</button><pre tabindex="0" role="region" aria-label="{esc(title)}">'
        f"<code>{esc(text)}</code></pre></div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table of cells that are HTML already; numbers are aligned by CSS.

    In a narrow window each row of a wide table becomes a list, so that no column is cut.
    """
    wide = ' class="rm-wide"' if len(head) > _FIT_A_PHONE else ""
    labels = [f' data-label="{cell}"' if wide else "" for cell in head]
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            f"<td{label}>{cell}</td>" for label, cell in zip(labels[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="rm-scroll" tabindex="0" role="region" aria-label="{esc(caption)}">'
        f"<table{wide}><caption>{esc(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return pairs of label and value as tiles."""
    inner = "".join(f"<div><dt>{esc(k)}</dt><dd>{_unbroken(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="rm-tiles">{inner}</dl>'


def _unbroken(value: str) -> str:
    """Return text for HTML in which a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=[kMGT]?B\b|s\b|min\b|h\b)", "&nbsp;", esc(value))
