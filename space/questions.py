"""A visitor's own questions: few and short, checked before anything is merged; no code in them."""

from collections.abc import Sequence
from typing import Any

from resmerge_stream.documents import load_json
from resmerge_stream.errors import RecipeError, shown
from resmerge_stream.evaluation.verifiers import check_rule
from resmerge_stream.methods import find_methods
from resmerge_stream.planning.request import Request

from .examples import is_built_in

MOST, MOST_TOKENS, MOST_BYTES = 50, 128, 32_768
MOST_METHODS = 4
# A pattern can take for ever, and a function is code.
_VERIFY = ("exact", "number")


def parse_questions(text: str) -> list[dict[str, Any]]:
    """Return the questions in a text, one JSON object a line.

    Args:
        text: each line with ``prompt``, ``answer``, and perhaps ``verify`` (exact or number) and
            ``max_new_tokens``.

    Raises:
        RecipeError: a line is wrong, or there are too many.
    """
    if len(text.encode()) > MOST_BYTES:
        raise RecipeError(f"the questions have more than {MOST_BYTES:,} bytes.")
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            found.append(_question(line, f"question {number}"))
    if len(found) > MOST:
        raise RecipeError(f"at most {MOST} questions are asked here, not {len(found)}.")
    return found


def check_comparison(methods: Sequence[str], text: str, asked: Request, prompts: int) -> None:
    """Refuse a comparison of methods that nobody could make, or whose merges nobody could ask.

    Args:
        methods: by name.
        text: questions, as `parse_questions` takes them; empty for the built-in ones.
        asked: the models, and how.
        prompts: built-in questions that this Space asks.

    Raises:
        RecipeError: it is such.
    """
    known = find_methods()
    if not 2 <= len(set(methods)) <= MOST_METHODS or len(set(methods)) < len(methods):
        raise RecipeError(f"choose 2 to {MOST_METHODS} methods to compare.")
    for name in methods:
        if name not in known:
            raise RecipeError(f"there is no method {shown(name)}.")
    count = len(parse_questions(text))
    if count == 1 or (not count and not (prompts > 1 and is_built_in(asked.recipe))):
        raise RecipeError(
            "what the merges should be asked is missing: write two or more questions under "
            "“Advanced”, one half chooses the best and the other half reports."
        )


def check_questions(text: str, asked: Request) -> None:
    """Refuse questions that are wrong, or that nobody could answer.

    Args:
        text: as `parse_questions` takes it; empty for none.
        asked: the merge.

    Raises:
        RecipeError: they are.
    """
    if not parse_questions(text):
        return
    publication = asked.publication
    if publication is not None and publication.create_pr:
        raise RecipeError(
            "questions need a merge at a repository's main, or files to download. Remove them to "
            "open a pull request."
        )


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        rule = load_json(line)
    except ValueError as exc:
        raise RecipeError(
            f'{where} is not JSON. Write one object a line: {{"prompt": "2+2=", "answer": "4"}}.'
        ) from exc
    if not isinstance(rule, dict) or not isinstance(rule.get("prompt"), str):
        raise RecipeError(f"{where}: expected an object with a prompt, a text.")
    how = rule.get("verify", "exact")
    if how not in _VERIFY:
        raise RecipeError(
            f"{where}: answers are compared as {' or '.join(_VERIFY)} here; patterns and functions "
            "run from the command line."
        )
    check_rule(rule, where)
    tokens = rule.get("max_new_tokens", 32)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MOST_TOKENS:
        raise RecipeError(f"{where}: max_new_tokens must be 1 to {MOST_TOKENS} here.")
    return {
        "prompt": rule["prompt"],
        "answer": rule["answer"],
        "verify": how,
        "max_new_tokens": tokens,
    }
