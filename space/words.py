"""Words and pieces of pages: escaping, times, tables, the library's messages in a page's words."""

import html
import re
from collections.abc import Iterable, Sequence

# What the library says to somebody at a terminal, for somebody at a page.
_WORDS = (
    (r"--push-to\s+NAMESPACE/NAME", "a target repository"),
    (r"(?:choose )?another --push-to", "choose another name"),
    (r"--push-to", "the target"),
    (r"or give --update", "or tick “Replace the model that stands there”"),
    (r"with --update", "with “Replace the model that stands there” ticked"),
    (r"--update", "“Replace the model that stands there”"),
    (r"\(give --public to name them\)", "(publish it as public to name them)"),
    (r"(?:or start afresh )?with --discard-staging", "with “Remove what it left”"),
    (r"--max-shard-size (\S+)", r"a file size of \1"),
    (r"a smaller --max-shard-size", "a smaller file size"),
    (r"--tokenizer-from", "“Tokenizer from”"),
    (r"--max-disk \S+|--work-dir|--memory-budget \S*", "a larger machine"),
    (r"(?:The same command continues|Run this again|run this again)\b", "Continue the job"),
    (r"Run that command again to finish it", "Continue that job to finish it"),
    (r" \(HF_TOKEN, or 'hf auth login'\)", ""),
    (r"Log in again with 'hf auth login', or set HF_TOKEN\.", "Sign in again."),
    (r"Log in again\b", "Sign in again"),
    (r"log in with 'hf auth login', or set HF_TOKEN to a token that may write", "sign in"),
    (r"the same command\b", "the same job"),
    (r" Nor is there a folder \S+ here\.", ""),
)


def esc(value: object) -> str:
    """Return text for HTML, safe in attributes too."""
    return html.escape(str(value), quote=True)


def in_page_words(text: str) -> str:
    """Return what the library says, without the command line's options."""
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    return text


def duration(seconds: float | None) -> str:
    """Return a time for people."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def notice(text: str, kind: str = "bad") -> str:
    """Return one boxed message; kinds: bad, warn, good, plain."""
    return f'<div class="rm-note rm-{kind}" role="status">{esc(in_page_words(text))}</div>'


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
    inner = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="rm-tiles">{inner}</dl>'
