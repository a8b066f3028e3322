"""Errors as data: what is wrong, of which kind, and what to do, in whose words."""

import copy
import json
import pickle

import pytest

from resmerge_stream import errors
from resmerge_stream.errors import (
    Findings,
    Notice,
    PlanRefusedError,
    Remedy,
    ResMergeError,
    StoppedError,
    error_from_dict,
)

EVERY = sorted(
    (kind for kind in vars(errors).values()
     if isinstance(kind, type) and issubclass(kind, ResMergeError)),
    key=lambda kind: kind.__name__,
)  # fmt: skip


def test_an_error_says_its_text_then_its_remedies():
    """The terminal's wording is the text, then the ways out as one sentence."""
    error = ResMergeError("'x' is a file.", Remedy.ANOTHER_FOLDER, Remedy.CONTINUE)

    assert str(error) == (
        "'x' is a file. Choose another --out, or run the same command again to continue."
    )


def test_a_remedy_names_the_errors_arguments():
    """What stands in braces in a remedy is filled in from the arguments."""
    notice = Notice("no room", Remedy.MORE_MEMORY, needed="800MB")

    assert str(notice).startswith("no room. Give --memory-budget 800MB or more")


def test_text_with_braces_is_left_alone():
    """A name from a stranger's file is never taken for a field to fill in."""
    assert str(Notice("{0} {x}", Remedy.CONTINUE)).startswith("{0} {x}. Run")


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_crosses_between_processes(kind):
    """Each error of the tree is the same after JSON, a pickle and a copy: class, parts, words."""
    error = kind("no {room}", Remedy.MORE_MEMORY, kind="memory-here", needed="8GB")

    for again in (
        error_from_dict(json.loads(json.dumps(error.to_dict()))),
        pickle.loads(pickle.dumps(error)),
        copy.deepcopy(error),
    ):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.notices[0].to_dict() == error.notices[0].to_dict()


def test_kinds_tell_classes_apart():
    """Each class of the tree has a slug of its own."""
    assert len({kind.kind for kind in EVERY}) == len(EVERY)


def test_an_unknown_error_of_another_version_is_a_stop():
    """What this version does not know ends a run in words all the same."""
    stored = ResMergeError("gone").to_dict() | {"error": "Path"}

    assert type(error_from_dict(stored)) is StoppedError


def test_a_refused_plan_has_all_its_problems():
    """One error carries every problem with its own remedies; the terminal has a line each."""
    found = Findings()
    found.problem("a", Remedy.ANOTHER_REPO)
    found.problem("b")

    error = PlanRefusedError.of(found.problems)

    assert str(error).splitlines() == ["a. Choose another --push-to.", "b"]
    assert error.notices[0].remedies == (Remedy.ANOTHER_REPO,)


def test_others_word_the_same_notice():
    """A page's words replace the terminal's; a remedy without any is left out."""
    notice = Notice("'x' is a file.", Remedy.ANOTHER_FOLDER, Remedy.NO_DISK)

    assert notice.worded({Remedy.ANOTHER_FOLDER: "choose another name"}) == (
        "'x' is a file. Choose another name."
    )
