"""A visitor's own questions: few and short, checked before anything is merged; no code in them."""

import json
from typing import Any

from resmerge_stream.errors import RecipeError
from resmerge_stream.evaluation.verifiers import check_rule
from resmerge_stream.planning.request import Request

MOST, MOST_TOKENS, MOST_BYTES = 50, 128, 32_768
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
    if asked.options.output != "model" or (publication is not None and publication.create_pr):
        raise RecipeError(
            "questions are asked of a whole model at a repository's main, or of files to download. "
            "Leave them out for an adapter or a pull request."
        )


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        rule = json.loads(line)
    except (ValueError, RecursionError) as exc:
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
