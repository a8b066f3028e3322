"""The text of a recipe: plain YAML, alone or fenced in a model card, as plain data."""

import re
from typing import Any

from ..documents import load_yaml
from ..errors import RecipeError

MAX_RECIPE_BYTES = 32 * 1024
MAX_CARD_BYTES = 1_000_000
_FENCE = re.compile(
    r"^ {0,3}(```+|~~~+)[^\n]*\n(.*?)^ {0,3}\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL
)
_ALONE = re.compile(r"\s*(```+|~~~+)[^\n]*\n(.*?)(?:\n[ \t]*\1[`~]*)?\s*", re.DOTALL)
_END = re.compile(r"\n---\s*\Z")
_IS_RECIPE = re.compile(r"^merge_method\s*:", re.MULTILINE)


def recipes_in_card(text: str) -> list[str]:
    """Return the fenced blocks of a model card that are recipes."""
    blocks = [found.group(2) for found in _FENCE.finditer(text)]
    return [block for block in blocks if _IS_RECIPE.search(block)]


def document_of(data: bytes | str, *, where: str) -> Any:
    """Return the plain data that a recipe's text holds; nothing in it is shared.

    Args:
        data: a YAML document, the same inside a fence, or a model card with one recipe.
        where: what to call it in errors.

    Raises:
        RecipeError: it is not YAML, larger than a recipe, or a card with several recipes.
    """
    try:
        text = _unfenced(data.decode("utf-8") if isinstance(data, bytes) else data, where)
        # An end without a document behind it.
        return load_yaml(_END.sub("\n", text), max_bytes=MAX_RECIPE_BYTES)
    except RecipeError:
        raise
    except ValueError as exc:
        if "single document" not in str(exc):
            raise RecipeError(f"{where} is not a YAML document: {exc}") from exc
        raise RecipeError(
            f"{where} holds several recipes, one after the other. Save each in a file of its own "
            "and run them in order; a later one names the folder of an earlier one."
        ) from exc


def _unfenced(text: str, where: str) -> str:
    """Return the YAML of a text that may be a fenced block, or a card around one."""
    alone = _ALONE.fullmatch(text)
    # A card may begin and end with a fence too; then there are more of them.
    if alone and not re.search(rf"^ {{0,3}}{alone[1]}", alone[2], re.MULTILINE):
        return alone[2]
    found = recipes_in_card(text)
    if len(found) > 1:
        raise RecipeError(
            f"{where} holds {len(found)} recipes. Save the one that you mean in a file."
        )
    return found[0] if found else text
