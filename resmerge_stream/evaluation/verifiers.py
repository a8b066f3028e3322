"""Whether an answer is right: the whole text, a pattern, a number, or a function under a limit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..documents import load_json
from ..errors import RecipeError

VERIFIERS = ("exact", "regex", "number", "python")
# Of one function over all answers to it.
_SECONDS, _MEMORY = 10, 1_000_000_000
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
# Reads function and answers as JSON, writes verdicts; in a process of its own, isolated from ours.
_RUNNER = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
asked = json.load(sys.stdin)
names = {{}}
exec(asked["function"], names)
verdicts = [bool(names["check"](text)) for text in asked["texts"]]
sys.__stdout__.write("\\n" + json.dumps(verdicts))
"""


def check_rule(rule: Mapping[str, Any], where: str) -> None:
    """Refuse a rule that cannot verify anything.

    Args:
        rule: ``verify`` (exact when absent) with ``answer``, or with ``function`` for python.
        where: the file and line, for the message.

    Raises:
        RecipeError: the rule is malformed.
    """
    how = rule.get("verify", "exact")
    if how not in VERIFIERS:
        raise RecipeError(f"{where}: verify must be {', '.join(VERIFIERS)}, not {how!r}.")
    if how == "python":
        if not isinstance(rule.get("function"), str) or "def check(" not in rule["function"]:
            raise RecipeError(f"{where}: python needs a function: def check(text): …")
        return
    answer = rule.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise RecipeError(f"{where}: {how} needs an answer, a text or a number.")
    if how == "regex":
        try:
            re.compile(str(answer))
        except re.error as exc:
            raise RecipeError(f"{where}: {answer!r} is not a regular expression: {exc}.") from exc
    if how == "number" and _last_number(str(answer)) is None:
        raise RecipeError(f"{where}: {answer!r} holds no number.")


def verify(rules: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[bool]:
    """Return for each text whether its rule takes it.

    Args:
        rules: checked by `check_rule`, one a text.
        texts: what a model answered, without the prompt.

    Raises:
        RecipeError: a function failed, or ran past its limit.
    """
    verdicts = [False] * len(texts)
    functions: dict[str, list[int]] = {}
    for i, (rule, text) in enumerate(zip(rules, texts, strict=True)):
        if rule.get("verify") == "python":
            functions.setdefault(rule["function"], []).append(i)
        else:
            verdicts[i] = _plain(rule, text)
    for function, places in functions.items():
        found = _run(function, [texts[i] for i in places])
        for i, verdict in zip(places, found, strict=True):
            verdicts[i] = verdict
    return verdicts


def _plain(rule: Mapping[str, Any], text: str) -> bool:
    how, answer = rule.get("verify", "exact"), str(rule["answer"])
    if how == "regex":
        return re.search(answer, text) is not None
    if how == "number":
        found, wanted = _last_number(text), _last_number(answer)
        return found is not None and wanted is not None and math.isclose(found, wanted)
    return text.strip() == answer.strip()


def _last_number(text: str) -> float | None:
    """Return the last number of a text: where models put their result."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _run(function: str, texts: Sequence[str]) -> list[bool]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RUNNER],
            input=json.dumps({"function": function, "texts": list(texts)}),
            capture_output=True,
            text=True,
            timeout=2 * _SECONDS,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise RecipeError(f"a task's check did not end within {2 * _SECONDS} seconds.") from exc
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise RecipeError(
            f"a task's check failed: {last}. It may take {_SECONDS} seconds and "
            f"{_MEMORY // 10**9} GB for all answers."
        )
    try:
        verdicts: list[bool] = load_json(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as exc:
        raise RecipeError("a task's check ended itself, without a verdict.") from exc
    return verdicts
