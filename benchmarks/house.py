"""The figures of the house, of this tree or another: ``python -m benchmarks.house [FOLDER]``.

Files, lines, rooms, levels of imports, arrows between modules, long functions, imports inside them.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

_LONG = 40


def main() -> None:
    """Print a table row by row."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    library, space = _files(root / "resmerge_stream"), _files(root / "space")
    tests = [path for path in _files(root / "tests") if "loopback_hub" not in path.parts]
    source = _lines(library) + _lines(space) + _lines([root / "app.py"])
    trees = {_name(path, root): ast.parse(path.read_text()) for path in library}
    functions = [node for tree in trees.values() for node in _functions(tree)]
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
        ("functions, over 40 lines", len(functions), sum(_length(f) > _LONG for f in functions)),
        ("imports inside functions", sum(len(_inside(tree)) for tree in trees.values())),
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


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


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
