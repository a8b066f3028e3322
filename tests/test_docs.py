"""What the pages for people name is there: files, commands, options, names in the code, links."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest

from resmerge_stream import methods
from resmerge_stream.cli.main import _parser
from tests.support.checkpoints import ROOT

PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt", "docs/skill/SKILL.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]  # fmt: skip
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|js|css|toml|yml)|(?:[\w.-]+/)+")
# Files that a merge or a user makes, and models in examples: no part of the repository.
MADE = re.compile(
    r"(median\.py|(README|card|recipe|(mergekit_)?config|questions|tasks|comparison)\.(md|yml))"
    r"|(models|merged|build|resmerge|hub-data|group|demo-merge|wheels|recipes|built-in|org|me|refs"
    r"|main|evaluation|data|SPACE)/.*"
)


@cache
def files():
    """Return the repository's files, as git knows them, and their folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    folders = {"/".join(name.split("/")[:n]) + "/" for name in listed for n in range(1, 9)}
    return {*listed, *folders}


@cache
def names():
    """Return what each class of the repository defines or inherits, by the class's name."""
    found, bases = {}, {}
    for name in files():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, set()).update(members(node))
                    bases.setdefault(node.name, set()).update(map(ast.unparse, node.bases))

    def all_of(name):
        return found.get(name, set()).union(*map(all_of, bases.get(name, set()) - {name}))

    return {name: all_of(name) for name in found}


def members(node):
    """Yield what a class defines by name, its own attributes included."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign | ast.Assign):
            for target in [inner.target] if isinstance(inner, ast.AnnAssign) else inner.targets:
                yield ast.unparse(target).removeprefix("self.")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """A path in backticks is that of a file here, or its end."""
    spans = SPAN.findall(FENCE.sub("", (ROOT / page).read_text()))
    named = {span for span in spans if PATH.fullmatch(span) and not MADE.fullmatch(span)}

    assert not [path for path in named if not any(f"/{f}".endswith(f"/{path}") for f in files())]


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_code_that_a_page_names_exists(page):
    """`Class.member` in backticks is in the code; classes of other libraries are not looked for."""
    spans = SPAN.findall(FENCE.sub("", (ROOT / page).read_text()))
    pairs = [span.split(".") for span in spans if re.fullmatch(r"[A-Z]\w+\.\w+", span)]

    assert not [(a, b) for a, b in pairs if a in names() and b not in names()[a]]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_finds_in_a_file_is_there(page):
    """Where a page says "`file.py`: `name`, `name`", that file has those names."""
    for path, spans in re.findall(
        r"`([\w/]+\.py)`: (`[^`]+`(?:, `[^`]+`)*)", (ROOT / page).read_text()
    ):
        (file,) = [name for name in files() if f"/{name}".endswith(f"/{path}")]
        text = (ROOT / file).read_text()

        for name in SPAN.findall(spans):
            assert re.search(rf"\b{re.escape(name.split('.')[-1])}\b", text), (path, name)


def test_every_promise_names_a_test_that_would_fail():
    """Each row of docs/guarantees.md has a test by name; that it exists is seen above."""
    text = (ROOT / "docs/guarantees.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| **")]

    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py`: `test_\w+`", row)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    """A link that is no address names a file from where the page lies."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", (ROOT / page).read_text()))
    here = (ROOT / page).parent

    assert not [to for to in links if ":" not in to and not (here / to).exists()]


def commands(page):
    """Yield the command lines of a page: of its code blocks, and those in backticks."""
    text = (ROOT / page).read_text()
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    yield from blocks.splitlines()
    yield from SPAN.findall(FENCE.sub("", text))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_is_there(page):
    """Commands of this tool and their options, programs of this repository, targets of make."""
    options = {name: set(parser._option_string_actions) for name, parser in _subcommands().items()}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in commands(page):
        line = line.split(" #")[0]
        for command, rest in re.findall(
            r"(?:resmerge-stream|-m resmerge_stream) ([a-z]+)\b(.*)", line
        ):
            assert command in options, line
            given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))
            assert given <= options[command], (line, given - options[command])
        for module in re.findall(r"python -m ((?:benchmarks|tests|space)[\w.]*)", line):
            path = module.replace(".", "/")
            assert {f"{path}.py", f"{path}/__main__.py"} & files(), line
        for target in re.findall(r"^(?:\$ )?make ([\w-]+)", line):
            assert target in targets, line


def _subcommands():
    """Return the parsers of the commands, by name."""
    return next(a.choices for a in _parser()._actions if isinstance(a.choices, dict))


def test_the_method_of_contributing_merges_as_its_test_says(tmp_path, monkeypatch):
    """The file that CONTRIBUTING shows is found as a method, and passes the test shown with it."""
    shown = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
    method, its_test = shown
    (tmp_path / "median.py").write_text(method)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    scope = {}

    try:
        exec(its_test, scope)
        scope["test_the_median_of_three_is_the_middle_one"]()
    finally:
        del sys.modules["resmerge_stream.methods.median"]


def test_every_method_stands_in_the_docs():
    """The page of methods has each by its name."""
    text = (ROOT / "docs/methods.md").read_text()

    assert not [name for name in methods.find_methods() if f"`{name}`" not in text]
