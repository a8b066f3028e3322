"""The same recipes by mergekit and here, in turn: ``python -m benchmarks.peers --mergekit PYTHON``.

Whole processes, wall time and peak private memory (target S9: at least 2 times as fast, 1.4 times
for linear and model_stock, with a third of the memory). mergekit 0.1.5 is installed without its
dependencies into an environment of its own that sees this one's torch; PYTHON is that
environment's. A small group by default; ``--large`` takes Qwen2.5-0.5B's shapes.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.synthetic import QWEN25_05B, Updates, write_group

from .measure import alternate, machine, median_seconds, scratch_folder
from .methods import SMALL

# Method, parameters of each model, of the merge, and how many times faster it should be.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "linear": ({"weight": 1.0}, {}, 1.4),
    "task_arithmetic": ({"weight": 0.3}, {}, 2.0),
    "ties": ({"weight": 0.3, "density": 0.2}, {}, 2.0),
    "dare_ties": ({"weight": 0.3, "density": 0.5}, {}, 2.0),
    "della": ({"weight": 0.3, "density": 0.5}, {}, 2.0),
    "slerp": ({}, {"t": 0.5}, 2.0),
    "model_stock": ({}, {}, 1.4),
}


def main() -> None:
    """Run the named methods, all by default, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--mergekit", required=True, metavar="PYTHON", help="sees mergekit 0.1.5")
    parser.add_argument("--dir", type=Path, default=scratch_folder())
    parser.add_argument("--times", type=int, default=3, help="counted runs of each command")
    parser.add_argument("--large", action="store_true", help="Qwen2.5-0.5B's shapes")
    args = parser.parse_args()
    if unknown := set(args.names) - set(RECIPES):
        parser.error(f"there is no {sorted(unknown)}; there are {', '.join(RECIPES)}")
    print(machine())
    group = args.dir / ("methods-large" if args.large else "methods-small")
    if not (group / "complete").exists():
        print(f"making {group} …", file=sys.stderr)
        shape = QWEN25_05B if args.large else SMALL
        write_group(group, shape, updates=Updates(gap=2.0, unchanged=0.5))
        (group / "complete").touch()
    print("\n| method | mergekit | here | times faster | memory | here | share |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for number, name in enumerate(args.names or RECIPES):
        # What warms up (imports, the sources' pages) is the same for all methods.
        row = _row(name, group, args.dir / "peers-out", args.mergekit, args.times, number == 0)
        print(row, flush=True)
    shutil.rmtree(args.dir / "peers-out", ignore_errors=True)


def _row(name: str, group: Path, out: Path, mergekit: str, times: int, is_first: bool) -> str:
    """Return a method's line of the table."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / f"{name}.yml"
    recipe.write_text(yaml.safe_dump(_recipe(name, group)))
    theirs, ours = out / "mergekit", out / "here"
    commands = {
        "mergekit": [
            mergekit, "-m", "mergekit.scripts.run_yaml", str(recipe), str(theirs),
            "--no-write-model-card", "--no-copy-tokenizer",
        ],
        "here": [
            sys.executable, "-m", "resmerge_stream", "merge", str(recipe), "--out", str(ours),
            "--work-dir", str(out / "work"),
        ],
    }  # fmt: skip

    def clear(which: str) -> None:
        for folder in (theirs, ours, out / "work"):
            shutil.rmtree(folder, ignore_errors=True)

    runs = alternate(commands, times=times, before=clear, warm=int(is_first))
    slow, fast = (median_seconds(runs[which]) for which in commands)
    large, small = (max(run.peak_private for run in runs[which]) / 1e6 for which in commands)
    goal = RECIPES[name][2]
    return (
        f"| {name} | {slow:.1f} s | {fast:.1f} s | {slow / fast:.1f} (goal {goal:g}) "
        f"| {large:.0f} MB | {small:.0f} MB | {small / large:.2f} |"
    )


def _recipe(name: str, group: Path) -> dict[str, Any]:
    """Return a recipe that both read, in bfloat16 as stored."""
    own, shared, _ = RECIPES[name]
    count = 1 if name == "slerp" else 3
    models = [
        {"model": str(group / f"expert{i}"), **({"parameters": dict(own)} if own else {})}
        for i in range(count)
    ]
    base = {} if name == "linear" else {"base_model": str(group / "base")}
    parameters = {"parameters": shared} if shared else {}
    return {"merge_method": name, **base, "models": models, **parameters, "dtype": "bfloat16"}


if __name__ == "__main__":
    main()
