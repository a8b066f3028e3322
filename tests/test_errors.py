"""Errors as data: what is wrong, of which kind, and what to do, in whose words."""

import ast
import copy
import errno
import json
import os
import pickle
import re
import string
from pathlib import Path

import pytest

from resmerge_stream import errors
from resmerge_stream.errors import (
    CheckpointNotFoundError,
    Findings,
    Notice,
    PlanRefusedError,
    Remedy,
    ResMergeError,
    StoppedError,
    error_from_dict,
)
from resmerge_stream.hub.client import NoSuchRepositoryError
from space.remedies import PAGE_WORDS, said

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


def test_a_rooms_own_error_travels_as_the_class_above_it():
    """Another process catches it as what the tree of errors knows."""
    again = error_from_dict(NoSuchRepositoryError("gone").to_dict())

    assert type(again) is CheckpointNotFoundError


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


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.EIO, 3), (errno.ENOSPC, 3)],
)
def test_what_the_system_says_of_a_file_becomes_a_message(number, code):
    """A path that cannot be used is bad input; a disk that fails is a stop, and can go on."""
    with pytest.raises(ResMergeError, match=os.strerror(number)) as told, errors.system_errors():
        raise OSError(number, os.strerror(number), "a/b")

    assert told.value.exit_code == code
    assert "'a/b'" in str(told.value)


def test_only_errors_of_files_are_translated():
    """A pipe that broke says nothing of a file; an error of the tree stays what it is."""
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), CheckpointNotFoundError("gone")):
        with pytest.raises(type(error)) as told, errors.system_errors():
            raise error

        assert told.value is error


ROOT = Path(__file__).resolve().parents[1]
OPTION = re.compile(r"(?<![\w-])--[a-z]|same command|hf auth|HF_TOKEN|[Rr]un this again")
# The command line speaks of its own options; the card, the page's "From code" and a plan without
# advice show commands;
# who runs the page on their own machine is told of HF_TOKEN; trainers' leavings need converters.
NAMES_OPTIONS = {
    "resmerge_stream/errors.py", "resmerge_stream/report/card.py", "space/page/texts.py",
    "space/page/handlers.py", "space/view/jobs.py", "space/view/plan.py",
    "resmerge_stream/sources/trainers.py", "resmerge_stream/jobs/slurm.py",
}  # fmt: skip


def sources():
    """Return every file whose messages may be read on the page."""
    found = [*(ROOT / "resmerge_stream").rglob("*.py"), *(ROOT / "space").rglob("*.py")]
    names = {str(path.relative_to(ROOT)): path for path in found}
    return {
        name: path
        for name, path in names.items()
        if not name.startswith("resmerge_stream/cli/") and name not in NAMES_OPTIONS
    }


def texts(tree):
    """Yield every text of a module, docstrings left out."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docs and " " in node.value:
            yield node.value


@pytest.mark.parametrize("name", sources())
def test_no_text_names_an_option(name):
    """What the library says holds for a page too: options are named by remedies alone."""
    found = [text for text in texts(ast.parse(sources()[name].read_text())) if OPTION.search(text)]

    assert not found


def raised_with(name):
    """Yield a remedy and the keywords of the call that it is given to, for a module."""
    for node in ast.walk(ast.parse(sources()[name].read_text())):
        if isinstance(node, ast.Call):
            for part in (part for argument in node.args for part in ast.walk(argument)):
                if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "Remedy":
                    yield Remedy[part.attr], {keyword.arg for keyword in node.keywords}


def test_a_remedy_that_names_arguments_gets_them():
    """Whoever gives a remedy with a gap in its words says what fills it."""
    for name in sources():
        for remedy, given in raised_with(name):
            needed = {field for _, field, _, _ in string.Formatter().parse(remedy.value) if field}
            assert needed <= given or not given, (name, remedy)


def test_no_remedy_is_left_without_a_use():
    """Every remedy is given somewhere."""
    cli = [path.read_text() for path in (ROOT / "resmerge_stream" / "cli").rglob("*.py")]
    given = {remedy for name in sources() for remedy, _ in raised_with(name)}

    assert not [
        r for r in Remedy if r not in given and not any(f"Remedy.{r.name}" in c for c in cli)
    ]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("remedy", Remedy)
def test_every_error_is_worded_for_terminal_and_page(kind, remedy):
    """Both say the error; the terminal names no button, and the page no option."""
    error = kind("it failed", remedy, needed="800MB", model="org/x")
    terminal, page = str(error), said(error)

    assert "“" not in terminal
    assert "{" not in terminal + page
    assert not OPTION.search(page)
    assert terminal.startswith("it failed. ")
    assert page.startswith("it failed")


def test_the_page_words_every_remedy():
    """A remedy without words on the page was thought of: it is nothing that a page can do."""
    assert set(PAGE_WORDS) == set(Remedy)
