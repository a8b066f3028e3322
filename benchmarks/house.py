"""The figures of the house, of this tree or another: ``python -m benchmarks.house [FOLDER]``.

Files, lines, rooms, levels of imports, arrows between modules, private functions used once, imports
inside functions, places that list what a publication has, files with a test of their name; and, of
one plan and merge, what is asked of the plan, and how often settings are resolved and hashed.
"""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Files of more lines have a test file of their name.
_LARGE = 150
# Whoever names so many fields of a publication lists them.
_LISTED = 4
# Plans and merges a small model, and counts calls; run in the tree that is looked at.
_COUNTED = """
import json, sys, tempfile, threading
from collections import Counter
from pathlib import Path
from benchmarks.synthetic import Shape, write_group
from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.recipe import ModelRef
from resmerge_stream.planning.planned import Draft, PlannedTensor

calls = Counter()

def seen(frame, event, arg):
    code = frame.f_code
    if event != "call" or "resmerge_stream" not in code.co_filename:
        return
    calls["resolvers"] += code.co_qualname == "Resolver.__post_init__"
    calls["hashes"] += code.co_name in ("plan_hash", "hash_of")
    names = code.co_varnames[: code.co_argcount]
    if names[:1] == ("self",) and isinstance(frame.f_locals["self"], Draft):
        calls["questions"] += any(isinstance(frame.f_locals[n], PlannedTensor) for n in names[1:])

with tempfile.TemporaryDirectory() as name:
    shape = Shape(hidden_size=64, intermediate_size=96, num_hidden_layers=5, vocab_size=128)
    write_group(Path(name), shape, experts=3)
    threading.setprofile(seen)
    sys.setprofile(seen)
    base, *experts = (ModelRef(f"{name}/{it}") for it in ("base", "expert0", "expert1", "expert2"))
    recipe = Recipe(base, tuple(experts), "ties", {"density": 0.5})
    plan = plan_merge(recipe, out=Path(name) / "out")
    for _ in run_merge(plan, out=Path(name) / "out", work_dir=Path(name) / "work"):
        pass
    sys.setprofile(None)
    print(json.dumps([calls["questions"] / len(plan.tensors), calls["resolvers"], calls["hashes"]]))
"""


def main() -> None:
    """Print a table row by row."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    library, space = _files(root / "resmerge_stream"), _files(root / "space")
    tests = [path for path in _files(root / "tests") if "loopback_hub" not in path.parts]
    source = _lines(library) + _lines(space) + _lines([root / "app.py"])
    trees = {_name(path, root): ast.parse(path.read_text()) for path in library}
    arrows = {name: set(_arrows(name, tree, trees, root)) for name, tree in trees.items()}
    rooms = [
        path for path in (root / "resmerge_stream").iterdir() if (path / "__init__.py").exists()
    ]
    for label, *figures in (
        ("library: files, lines", len(library), _lines(library)),
        ("Space: files, lines", len(space), _lines(space)),
        ("loose modules", len(list((root / "resmerge_stream").glob("*.py")))),
        ("rooms", len(rooms)),
        ("levels of imports", _levels(arrows)),
        (
            "arrows between modules",
            sum(len({there for there, _ in own}) for own in arrows.values()),
        ),
        ("functions, private and used once", *_used_once(library)),
        ("the Space's", *_used_once(space)),
        ("imports inside functions", sum(len(_inside(tree)) for tree in trees.values())),
        ("questions to the plan a tensor, resolvers, hashes", *_counted(root)),
        ("places that list a publication's fields", len(_listing(root, [*library, *space]))),
        (f"files over {_LARGE} lines, with a test of their name", *_tested(root, tests)),
        ("tests ÷ library and Space", round(_lines(tests) / source, 2)),
    ):
        print(f"{label}: {', '.join(f'{figure:,}' for figure in figures)}")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def _name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _used_once(paths: list[Path]) -> tuple[int, int]:
    """Return how many functions there are, and how many private ones their file names twice."""
    count = once = 0
    for path in paths:
        text = path.read_text()
        for function in _functions(ast.parse(text)):
            count += 1
            is_private = function.name.startswith("_") and not function.name.endswith("__")
            once += is_private and len(re.findall(rf"\b{function.name}\b", text)) == 2
    return count, once


def _counted(root: Path) -> tuple[float, int, int]:
    """Return what one plan and merge of a small model asks, resolves and hashes."""
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root.resolve())},
    )  # fmt: skip
    questions, resolvers, hashes = json.loads(done.stdout)
    return round(questions, 1), resolvers, hashes


def _listing(root: Path, paths: list[Path]) -> list[str]:
    """Return the functions that name the fields of a publication."""
    source = ast.parse((root / "resmerge_stream/sinks/publication.py").read_text())
    (own,) = (n for n in source.body if isinstance(n, ast.ClassDef) and n.name == "Publication")
    fields = {
        node.target.id
        for node in own.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                words = {word.replace("-", "_").lstrip("_") for word in _words(node)}
                if len(fields & words) >= _LISTED:
                    found.append(f"{path.relative_to(root)}:{node.name}")
    return found


def _words(tree: ast.AST) -> Iterator[str]:
    """Yield what is named: arguments, keywords, attributes, and texts that are one word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword | ast.arg) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.rpartition(".")[2]


def _tested(root: Path, tests: list[Path]) -> tuple[int, int]:
    """Return how many files are large, and how many of them have a test of their name."""
    known = {path.relative_to(root / "tests").as_posix() for path in tests}
    large = [
        path
        for package in ("resmerge_stream", "space")
        for path in _files(root / package)
        if _lines([path]) > _LARGE
    ]

    def expected(path: Path) -> str:
        parts = path.relative_to(root).parts
        room = "space" if parts[0] == "space" else parts[1] if len(parts) > 2 else ""
        return f"{room}/test_{path.stem}.py".lstrip("/")

    return len(large), sum(expected(path) in known for path in large)


def _inside(tree: ast.AST) -> set[int]:
    """Return the imports inside functions, by identity."""
    return {
        id(node)
        for function in _functions(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


def _arrows(
    name: str, tree: ast.AST, modules: dict[str, ast.Module], root: Path
) -> Iterator[tuple[str, bool]]:
    """Yield which modules one imports, and whether only in functions or for types."""
    late = _inside(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            late |= {id(inner) for inner in ast.walk(node)}
    is_room = (root / name.replace(".", "/") / "__init__.py").exists()
    package = name.split(".") if is_room else name.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parent = package[: len(package) - node.level + 1]
        whole = ".".join([*parent, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            there = f"{whole}.{alias.name}" if f"{whole}.{alias.name}" in modules else whole
            if there in modules and there != name:
                yield there, id(node) in late


def _levels(arrows: dict[str, set[tuple[str, bool]]]) -> int:
    """Return the length of the longest chain of imports at the top of modules."""

    @functools.cache
    def level(name: str) -> int:
        return 1 + max((level(there) for there, late in arrows[name] if not late), default=0)

    return max(level(name) for name in arrows)


if __name__ == "__main__":
    main()
