"""Print a group's training log as Markdown tables.

`python -m benchmarks.experts.report DIR/small/training_log.json`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resmerge_stream.tasks import TASKS


def accuracy_table(models: dict[str, Any]) -> str:
    """Return every model's accuracy on every task, in percent with its 95 % interval."""
    rows = []
    for name, entry in models.items():
        cells = []
        for task in TASKS:
            result = entry["accuracy"][task]
            cell = f"{_percent(result['accuracy'])} ({_percent(result['low'])}–"
            cell += f"{_percent(result['high'])})"
            cells.append(f"**{cell}**" if name.endswith(f"-{task}") else cell)
        rows.append([name, *cells])
    return _table(["model", *TASKS], rows)


def change_table(models: dict[str, Any]) -> str:
    """Return what each expert gained on its own task, and what that changed in its weights."""
    header = ["expert", "gain, points", "changed weights", "‖Δ‖/‖W₀‖"]
    header += ["head energy, attention", "head energy, FFN", "seconds"]
    rows = []
    for name, entry in models.items():
        if name == "base":
            continue
        task = name.partition("-")[2]
        own, before = (m["accuracy"][task]["accuracy"] for m in (entry, models["base"]))
        change = entry["change"]
        rows.append(
            [
                name,
                f"{100 * (own - before):+.1f}",
                f"{_percent(change['changed'])} %",
                f"{change['relative_norm']:.4f}",
                f"{change['head_energy']['attention']['mean']:.3f}",
                f"{change['head_energy']['ffn']['mean']:.3f}",
                f"{entry['seconds']:.0f}",
            ]
        )
    return _table(header, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both tables of a log."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts.report")
    parser.add_argument("log", type=Path, help="a group's training_log.json")
    models = json.loads(parser.parse_args().log.read_text("utf-8"))["models"]
    print(accuracy_table(models), change_table(models), sep="\n\n")


if __name__ == "__main__":
    main()
