"""The rooms of the house: who may import whom, how long a file may be, and what is named."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.checkpoints import ROOT, run_python

PACKAGE = ROOT / "resmerge_stream"
FILES = sorted(PACKAGE.rglob("*.py"))
SPACE = sorted((ROOT / "space").glob("*.py"))
HOUSE = [*FILES, *SPACE, ROOT / "app.py"]
# Rooms of the Space that hold words, numbers and jobs; the page is not their business.
WITHOUT_GRADIO = {
    "asked", "downloads", "examples", "explore", "figures", "forms", "hardware", "identity", "jobs",
    "planning", "process", "progress", "records", "rows", "search", "service", "settings", "texts",
    "view", "view_plan", "view_report", "words", "worker",
}  # fmt: skip
LIGHT = ("errors", "specs", "roles", "recipe", "events", "memory", "layout", "compat", "plan",
         "sidefiles", "report", "sources/format", "sources/checkpoint", "sources/local",
         "sources/__init__", "methods/base", "methods/__init__", "__init__")  # fmt: skip
HUB = re.compile(r"sources/(hub\w*|ranges)|sinks/hub\w*|card")
HEAVY = {"torch", "numpy", "safetensors", "transformers", "gradio", "huggingface_hub", "accelerate"}


def root_of(path):
    """Return the package that a file belongs to."""
    return PACKAGE if path.is_relative_to(PACKAGE) else ROOT / "space"


def name_of(path):
    """Return a file's name inside its package, without its suffix."""
    root = root_of(path) if path.is_relative_to(root_of(path)) else ROOT
    return path.relative_to(root).with_suffix("").as_posix()


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


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_no_file_is_longer_than_300_lines(path):
    """A file that does not fit into one reading is two files."""
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_every_file_says_what_it_is(path):
    """A module begins with a docstring; only __main__ may do without."""
    assert ast.get_docstring(ast.parse(path.read_text())) or path.name == "__main__.py"


@pytest.mark.parametrize("name", [name for name in LIGHT if (PACKAGE / f"{name}.py").exists()])
def test_planning_rooms_do_not_mention_heavy_packages(name):
    """Rooms that plan import no torch and nothing like it, not even inside a function."""
    found = imports_of(PACKAGE / f"{name}.py", top_level_only=True)

    assert not found & HEAVY


@pytest.mark.parametrize(
    "module", ["specs", "roles", "recipe", "plan", "layout", "compat", "sources"]
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

    assert {name_of(path) for path in SPACE} >= WITHOUT_GRADIO
    assert not users & WITHOUT_GRADIO


def test_the_app_only_launches():
    """app.py imports the launch and calls it; everything else is in space/."""
    tree = ast.parse((ROOT / "app.py").read_text())
    kinds = [type(node) for node in tree.body]

    assert kinds == [ast.Expr, ast.ImportFrom, ast.If]


def test_the_hub_has_its_own_rooms():
    """Only the files that speak to the Hub import its client."""
    users = {name_of(p) for p in FILES if "huggingface_hub" in imports_of(p, top_level_only=False)}

    assert not [name for name in users if not HUB.fullmatch(name)]


@pytest.mark.parametrize("path", [*FILES, *SPACE], ids=name_of)
def test_imports_do_not_go_round(path):
    """No file is imported, at the top level, by what it imports itself."""
    by_name = {name_of(file): file for file in (FILES if path in FILES else SPACE)}

    def resolve(name):
        return name if name in by_name else f"{name}/__init__" if name else "__init__"

    seen, waiting = set(), [name_of(path)]
    while waiting:
        current = waiting.pop()
        for found in imports_of(by_name[current], top_level_only=True):
            target = resolve(found[1:]) if found.startswith(".") else None
            if target in by_name and target not in seen:
                seen.add(target)
                waiting.append(target)

    assert name_of(path) not in seen


@pytest.mark.parametrize("room", ["sources", "sinks", "methods"])
def test_rooms_do_not_know_the_engine(room):
    """Reading, writing and arithmetic do not import the loop that joins them."""
    for path in (PACKAGE / room).glob("*.py"):
        found = imports_of(path, top_level_only=False)

        assert not found & {".engine", ".merging", ".cli", ".plan"}, name_of(path)


@pytest.mark.parametrize("name", ["spectral", "rounding", "task_vectors", "methods/gates"])
def test_maths_knows_no_paths_and_no_names(name):
    """Maths takes and returns tensors: it opens nothing, logs nothing and reads no clock."""
    found = imports_of(PACKAGE / f"{name}.py", top_level_only=False)

    assert not found & {"os", "pathlib", "logging", "time", "json", "re"}


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


def test_every_file_is_on_the_map():
    """docs/architecture.md names every file of the library and of the Space."""
    text = (ROOT / "docs" / "architecture.md").read_text()

    missing = [name_of(p) for p in HOUSE if p.name != "__init__.py" and p.name not in text]

    assert not missing


@pytest.mark.parametrize("path", [*HOUSE, *sorted((ROOT / "tests").glob("*.py"))], ids=str)
def test_no_file_knows_a_machine(path):
    """Paths of the machine that something was written on stay out of the repository."""
    found = re.findall(r"/(?:home|root|work|mnt)/\w+", path.read_text())

    assert not found


def test_python_is_recent():
    """The tests run on a Python that the project supports."""
    assert sys.version_info >= (3, 11)
