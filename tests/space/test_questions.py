"""A visitor's own questions: checked first, asked of base, experts and merge after it."""

import json
from pathlib import Path

import pytest

from resmerge_stream.errors import RecipeError
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import answer, draw_prompts
from space.asked import web_request
from space.jobs.examiner import ask_own
from space.questions import check_questions, parse_questions
from space.settings import Settings

SETTINGS = Settings(folder=Path("unused"))
RECIPE = {"base_model": "built-in/base", "models": ["built-in/rl-sort", "built-in/rl-add"]}
GROUP = builtin_group()


def lines(count: int, **more: object) -> str:
    """Return so many questions about sorting, one a line."""
    prompts = draw_prompts("sort", count, seed=7, split="held-out")
    rules = [{"prompt": prompt, "answer": answer(prompt), **more} for prompt in prompts]
    return "\n".join(json.dumps(rule) for rule in rules)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sort cab", "question 1 is not JSON"),
        ('{"prompt": "a", "answer": "b"}\n{"answer": "b"}', "question 2: expected an object"),
        ('{"prompt": "a"}', "needs an answer"),
        ('{"prompt": "a", "answer": "(a+)+$", "verify": "regex"}', "exact or number here"),
        ('{"prompt": "a", "verify": "python", "function": "def check(t): 1"}', "exact or number"),
        ('{"prompt": "a", "answer": "b", "max_new_tokens": 5000}', "must be 1 to 128"),
        (lines(51), "at most 50 questions"),
        ('{"prompt": "' + "x" * 40_000 + '", "answer": ""}', "more than 32,768 bytes"),
    ],
)
def test_a_wrong_question_is_named(text: str, says: str) -> None:
    """Nothing is merged before each line can be asked; no code and no pattern runs here."""
    with pytest.raises(RecipeError, match=says):
        parse_questions(text)


def test_what_cannot_answer_is_not_asked() -> None:
    """A merge that is only proposed is refused questions before the merge."""
    asked = web_request({"recipe": RECIPE, "push_to": "me/a", "create_pr": True}, SETTINGS)

    check_questions("", asked)
    with pytest.raises(RecipeError, match="Remove them"):
        check_questions(lines(1), asked)


def events_of(folder: Path, questions: str, seconds: float) -> list[dict]:
    """Ask the built-in models, one of them in place of a merge; return what is said."""
    said: list[dict] = []
    asked = web_request({"recipe": RECIPE}, SETTINGS)
    ask_own(
        asked, questions, str(GROUP["rl-sort"]),
        token=False, folder=folder / "asked", seconds=seconds, say=said.append,
    )  # fmt: skip
    return said


def test_base_experts_and_merge_are_asked_the_same(tmp_path: Path) -> None:
    """Shares with intervals, by the names that the visitor used; nothing stays on the disk."""
    said = events_of(tmp_path, lines(20, max_new_tokens=12), 300.0)

    *asking, last = said
    names = ["built-in/base", "built-in/rl-sort", "built-in/rl-add", "merged"]
    assert [event["model"] for event in asking] == names
    shares = last["accuracies"]
    assert list(shares) == names
    assert shares["merged"] == shares["built-in/rl-sort"]
    share, low, high, count = shares["built-in/rl-sort"]["questions"]
    assert (count, low < share < high) == (20, True)
    assert share > shares["built-in/base"]["questions"][0]
    assert not (tmp_path / "asked").exists()


def test_models_too_slow_to_be_asked_here_are_not(tmp_path: Path) -> None:
    """What would hold up the other visitors is said, and the merge is none the worse."""
    (last,) = events_of(tmp_path, lines(20), 0.1)

    assert last["event"] == "unasked"
    assert "Ask them as a Job" in last["message"]
