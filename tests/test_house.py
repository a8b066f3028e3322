"""The rooms of the house: who may import whom, how long a file may be, and what is named."""

import ast
import functools
import graphlib
import importlib
import random
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import pytest_runtest_setup
from tests.support.checkpoints import ROOT, run_python

PACKAGE = ROOT / "resmerge_stream"
FILES = sorted(PACKAGE.rglob("*.py"))
SPACE = sorted((ROOT / "space").rglob("*.py"))
HOUSE = [*FILES, *SPACE, ROOT / "app.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# The rooms, from the ground up: a room imports only from those before it. "" are the words that
# all rooms share, the modules that lie loose.
ROOMS = {
    "resmerge_stream": (
        "", "maths", "methods", "hub", "sources", "sinks", "planning", "report", "run", "studies",
        "experts", "evaluation", "jobs", "cli",
    ),
    "space": ("", "jobs", "view", "service", "endpoints", "page", "launch"),
}  # fmt: skip
# What may import gradio in the Space; its words, numbers and jobs do not know it.
WITH_GRADIO = re.compile(r"page/(ui|fields|handlers|following|news)|endpoints|launch")
# Rooms and modules that plan: they import no torch and nothing like it at the top level.
LIGHT = ("errors", "specs", "units", "roles", "recipe", "memory", "sources/__init__",
         "sources/checkpoint", "sources/store", "sources/format", "sources/files", "sources/local",
         "methods/__init__", "methods/base", "planning/*", "sinks/layout", "sinks/publication",
         "sinks/journal", "run/events", "report/build", "report/rows", "report/unusual",
         "report/values", "report/words")  # fmt: skip
HUB = re.compile(r"hub/\w+|sources/hub|sinks/hub/\w+|report/card|evaluation/(card|proposal)")
HEAVY = {"torch", "numpy", "safetensors", "transformers", "gradio", "huggingface_hub", "accelerate"}


def room_of(path):
    """Return the room of a file: its first folder, "" where it lies loose.

    A loose module that stands in `ROOMS` by its own name is a room of its own.
    """
    return room_named(name_of(path), root_of(path))


def room_named(name, root):
    """Return the room of a module, by its name inside the package `root`."""
    first = name.split("/")[0]
    return first if (root / first).is_dir() or first in ROOMS[root.name] else ""


def root_of(path):
    """Return the package that a file belongs to."""
    return PACKAGE if path.is_relative_to(PACKAGE) else ROOT / "space"


@functools.cache
def name_of(path):
    """Return a file's name inside its package, without its suffix."""
    root = root_of(path) if path.is_relative_to(root_of(path)) else ROOT
    return path.relative_to(root).with_suffix("").as_posix()


@functools.cache
def imports_of(path, *, top_level_only):
    """Return the names that a file imports, those of its own package with a leading dot."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_level_only:
        checking = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        inside = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
        nodes = [node for node in nodes if id(node) not in checking | inside]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root_of(path)).parts[:-1]
            parent = package[: len(package) - node.level + 1]
            if node.module:
                found.add("." + "/".join((*parent, *node.module.split("."))))
            else:
                found |= {"." + "/".join((*parent, alias.name)) for alias in node.names}
    return found


def test_a_room_imports_only_from_rooms_below():
    """Every module lies in a room of ROOMS, and imports from that room or an earlier one."""
    wrong = []
    for path in [*FILES, *SPACE]:
        root, own = root_of(path), room_of(path)
        rooms = ROOMS[root.name]
        if path in (root / "__init__.py", root / "__main__.py"):
            continue  # the public names, from wherever they are
        assert own in rooms, path
        for name in imports_of(path, top_level_only=False):
            if name.startswith(".") and rooms.index(room_named(name[1:], root)) > rooms.index(own):
                wrong.append((name_of(path), name))

    assert not wrong


def test_few_modules_lie_loose():
    """The library shows its rooms: what lies beside them are the words that all of them share."""
    assert len(list(PACKAGE.glob("*.py"))) <= 13


def test_what_strangers_wrote_is_read_at_one_place():
    """JSON and YAML go through `documents`, but for what this package or its own process wrote."""
    ours = {
        "planning/dtypes", "studies/advice",  # tables of the package
        # What was just written.
        "planning/sidefiles", "sinks/hub/sink", "sinks/hub/staging", "sinks/journal",
        "run/counting", "run/processes", "studies/compare", "studies/analyse",
        "evaluation/candidates",
        "run/group", "evaluation/verifiers",  # between processes
        "jobs/process", "jobs/planning", "jobs/planner", "jobs/worker",
    }  # fmt: skip
    reads = re.compile(r"\b(json|yaml)\.(load|loads|safe_load)\(")
    found = {name_of(path) for path in [*FILES, *SPACE] if reads.search(path.read_text())}

    assert found - ours == {"documents"}


def test_every_file_says_what_it_is():
    """A module begins with a docstring; only __main__ may do without."""
    files = [path for path in HOUSE if path.name != "__main__.py"]

    assert not [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))]


@pytest.mark.parametrize("pattern", LIGHT)
def test_planning_rooms_do_not_import_heavy_packages(pattern):
    """Rooms that plan import no torch and nothing like it before a function needs it."""
    files = sorted(PACKAGE.glob(f"{pattern}.py"))

    assert files
    assert not [name_of(path) for path in files if imports_of(path, top_level_only=True) & HEAVY]


@pytest.mark.parametrize(
    "module", ["specs", "roles", "recipe", "planning.plan", "planning.compat", "sources"]
)
def test_importing_a_planning_room_does_not_import_torch(module):
    """Torch takes a second to import, which a plan does not wait for."""
    code = f"import sys, resmerge_stream.{module}; print('torch' in sys.modules)"

    done = run_python(code)

    assert done.stdout.strip() == "False", done.stderr


def test_gradio_is_nowhere_in_the_library():
    """The Space and its framework are no business of the library."""
    assert not [
        name_of(path)
        for path in FILES
        if imports_of(path, top_level_only=False) & {"gradio", "space", "app"}
    ]


def test_the_spaces_words_and_jobs_know_no_gradio():
    """Only the page, its handlers, its endpoints and the launch import gradio."""
    users = {name_of(p) for p in SPACE if "gradio" in imports_of(p, top_level_only=False)}

    assert users
    assert not [name for name in users if not WITH_GRADIO.fullmatch(name)]


def test_the_app_only_launches():
    """app.py imports the launch and calls it; everything else is in space/."""
    tree = ast.parse((ROOT / "app.py").read_text())
    kinds = [type(node) for node in tree.body]

    assert kinds == [ast.Expr, ast.ImportFrom, ast.If]


def test_the_hub_has_its_own_rooms():
    """Only the files that speak to the Hub import its client."""
    users = {name_of(p) for p in FILES if "huggingface_hub" in imports_of(p, top_level_only=False)}

    assert not [name for name in users if not HUB.fullmatch(name)]


@pytest.mark.parametrize("files", [FILES, SPACE], ids=["library", "Space"])
def test_imports_do_not_go_round(files):
    """No file is imported, at the top level, by what it imports itself."""
    by_name = {name_of(file): file for file in files}
    arrows = {}
    for name, path in by_name.items():
        found = [it[1:] for it in imports_of(path, top_level_only=True) if it.startswith(".")]
        named = {it if it in by_name else f"{it}/__init__".removeprefix("/") for it in found}
        arrows[name] = named & set(by_name)

    tuple(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names it


def test_maths_knows_no_paths_and_no_names():
    """Maths takes and returns tensors: it opens nothing, logs nothing and reads no clock."""
    files = sorted((PACKAGE / "maths").glob("*.py"))
    barred = {"os", "pathlib", "logging", "time", "json", "re"}

    assert files
    assert not [path for path in files if imports_of(path, top_level_only=False) & barred]


def test_public_names_are_importable():
    """Every name in an __all__ exists."""
    for path in FILES:
        if path.name == "__main__.py":
            continue
        dotted = "resmerge_stream." + name_of(path).replace("/", ".")
        module = importlib.import_module(dotted.removesuffix(".__init__"))
        for name in getattr(module, "__all__", ()):
            assert getattr(module, name) is not None, (dotted, name)


def test_nothing_happens_at_import():
    """Importing every module prints nothing and makes no file in the working directory."""
    before = sorted(Path.cwd().iterdir())
    modules = [
        f"{root_of(path).name}." + name_of(path).replace("/", ".").removesuffix(".__init__")
        for path in [*FILES, *SPACE]
        if path.name not in ("__main__.py", "__init__.py")
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"

    done = run_python(code, *modules)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(Path.cwd().iterdir()) == before


def test_there_is_no_utils():
    """A helper lives beside its use."""
    assert not [path for path in HOUSE if path.stem in ("utils", "helpers", "common", "misc")]


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_is_on_the_map(package):
    """docs/architecture.md names every room, and every room says what is in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [room for room in ROOMS[package] if (ROOT / package / room).is_dir() and room]

    assert not [room for room in rooms if f"{room}/" not in text]
    for room in rooms:
        assert ast.get_docstring(ast.parse((ROOT / package / room / "__init__.py").read_text()))


def test_tests_lie_in_the_room_of_what_they_test():
    """A test's folder is a room, the Space's, or the loopback Hub's; what tests all lies on top."""
    tests = [path.relative_to(ROOT / "tests").parts for path in TESTS if path.stem[:5] == "test_"]
    rooms = {*ROOMS["resmerge_stream"], "space", "loopback_hub"}

    assert not [parts for parts in tests if len(parts) > 1 and parts[0] not in rooms]


def test_no_file_knows_a_machine():
    """Paths of the machine that something was written on stay out of the repository."""
    place = re.compile(r"/(?:home|root|work|mnt)/\w+")

    assert not [path for path in [*HOUSE, *TESTS] if place.search(path.read_text())]


def test_python_is_recent():
    """The tests run on a Python that the project supports."""
    assert sys.version_info >= (3, 11)


def test_random_draws_are_the_same_in_every_run(request):
    """What a test draws hangs on its name alone, so that a red run can be repeated."""
    import torch

    drawn = []
    for _ in range(2):
        pytest_runtest_setup(request.node)
        drawn.append((random.random(), torch.rand(1).item()))
    unseeded = re.compile(r"\b(default_rng|Random|RandomState|SystemRandom)\(\)")

    assert drawn[0] == drawn[1]
    assert not [path for path in TESTS if unseeded.search(path.read_text())]
