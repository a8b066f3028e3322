"""What a merge costs against copying (targets S1', S3', S8): ``python -m benchmarks.speed``.

Base + 3 experts of Qwen2.5-0.5B's shapes. Every round runs the floor (reading four files, writing
one), importing torch and each method, whole processes; a ratio is the median over the rounds of
method ÷ (floor + torch) in the same round. Beside it processor time, page faults and peak private
memory, and a roofline: the bytes that a method has to move at least, by its merge seconds, as a
share of what this machine's cores copied in the same run. Names choose rows; `compare`, mergekit's
other methods by element and methods with whole SVDs run only when named. ``--quick`` takes small
shapes and one round.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthetic import QWEN25_05B, Shape, Updates

from .core import group
from .measure import Run, machine, merge_command, run, scratch_folder
from .methods import SMALL


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        options: of the command.
        target: times (floor + import torch); None where the issue names none.
        group: whose updates have a ``gap`` in their spectra, or not.
        experts: how many of the group's.
    """

    options: tuple[str, ...]
    target: float | None
    group: str = "gap"
    experts: int = 3


_TIES = ("ties", "--set", "density=0.2")
ROWS = {
    "mean": Row(("mean",), 1.6),
    "linear": Row(("linear",), 1.6),
    "task_arithmetic": Row(("task_arithmetic",), 1.6),
    "ram": Row(("ram",), 1.8),
    "karcher": Row(("karcher",), 1.7),
    "ties": Row(_TIES, 3.0),
    "consensus": Row(("consensus",), 2.5),
    "dare_linear": Row(("dare_linear", "--set", "density=0.5"), 2.3),
    "della": Row(("della", "--set", "density=0.5"), 4.0),
    "model_stock": Row(("model_stock",), 2.5),
    "resmerge": Row(("resmerge",), 2.2),
    "resmerge, no gap": Row(("resmerge",), 3.5, "noise"),
    "head_regression": Row(("head_regression",), 3.5),
}
# mergekit's other methods by element (S3), and whole SVDs of every matrix, which take minutes.
NAMED = {
    "slerp": Row(("slerp", "--set", "t=0.4"), 3, experts=1),
    "nearswap": Row(("nearswap", "--set", "t=0.001"), 3, experts=1),
    "nuslerp": Row(("nuslerp",), 3, experts=2),
    "multislerp": Row(("multislerp",), 3),
    "ramplus_tl": Row(("ramplus_tl",), 3),
    "arcee_fusion": Row(("arcee_fusion",), 5, experts=1),
    "sce": Row(("sce",), 5),
    "breadcrumbs": Row(("breadcrumbs", "--set", "density=0.5"), 5),
    "breadcrumbs_ties": Row(("breadcrumbs_ties", "--set", "density=0.5"), 5),
    "dare_ties": Row(("dare_ties", "--set", "density=0.5"), 5),
    "della_linear": Row(("della_linear", "--set", "density=0.5"), 5),
    "tsv_m": Row(("tsv_m",), None),
    "iso_c": Row(("iso_c",), None),
}
COMPARED = ("resmerge", "head_regression", "ties:density=0.2", "task_arithmetic")
_MB = 1_000_000


def main() -> None:
    """Run the chosen rows and print a table in Markdown."""
    known = {**ROWS, **NAMED, "compare": None}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ROW", help=", ".join(known))
    parser.add_argument("--dir", type=Path, default=scratch_folder(), help="a tmpfs, or a disk")
    parser.add_argument("--times", type=int, default=3, help="rounds")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"there is no {sorted(unknown)}; there are {', '.join(known)}")
    names = args.names or list(ROWS)
    shape, times = (SMALL, 1) if args.quick else (QWEN25_05B, args.times)
    groups = _groups(args.dir, shape, args.quick, names)
    out = args.dir / "speed-out"
    bandwidth = copied_bytes_per_second()
    print(f"{machine()}; copying: {bandwidth / 1e9:.1f} GB/s read and written by all cores\n")
    commands = {
        "floor": _floor(groups["gap"], args.dir / "speed-floor"),
        "import torch": [sys.executable, "-c", "import torch"],
        **{name: _command(name, groups, out) for name in names},
    }
    if "compare" in names:
        commands |= {f"alone: {text}": _alone(text, groups["gap"], out) for text in COMPARED}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    merges: dict[str, dict[str, Any]] = {}
    for number in range(times):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(run(command))
            report = out / "merged/resmerge/report.json"
            if report.exists():
                merges[name] = json.loads(report.read_text(encoding="utf-8"))
        print(f"round {number + 1} of {times} done", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    (args.dir / "speed-floor").unlink(missing_ok=True)
    _print_table(runs, merges, bandwidth)


def copied_bytes_per_second() -> float:
    """Return bytes a second, read and written, that all cores copy beyond the caches (STREAM)."""
    import numpy as np

    from resmerge_stream.device import usable_cores

    arrays = [(np.ones(1 << 24), np.zeros(1 << 24)) for _ in range(usable_cores())]
    best = 0.0
    for _ in range(5):
        threads = [threading.Thread(target=np.copyto, args=(b, a)) for a, b in arrays]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, 2 * 8 * (1 << 24) * len(arrays) / (time.perf_counter() - started))
    return best


def moved_bytes(report: dict[str, Any]) -> int:
    """Return the bytes that a merge moves at least: what is read, what is written, and one pass
    over every expert's float32 matrix for each Lanczos step of the slowest."""
    summary, passes = report["summary"], 0
    for row in report["tensors"]:
        steps = int((row.get("solver") or {}).get("steps") or 0)
        passes += 4 * math.prod(row["shape"]) * steps * len(row.get("sigma") or ())
    return int(summary["bytes_read"]) + int(summary["bytes_written"]) + passes


def _groups(folder: Path, shape: Shape, quick: bool, names: list[str]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "quick" if quick else "qwen05b"
    groups = {"gap": group(folder, f"{prefix}-gap", shape, Updates(gap=2.0))}
    if "resmerge, no gap" in names:
        groups["noise"] = group(folder, f"{prefix}-noise", shape, Updates(gap=None))
    return groups


def _floor(source: Path, target: Path) -> list[str]:
    models = " ".join(
        str(source / name / "model.safetensors")
        for name in ("base", *(f"expert{i}" for i in range(3)))
    )
    return ["sh", "-c", f"cat {models} > /dev/null && cp {source}/base/model.safetensors {target}"]


def _command(name: str, groups: dict[str, Path], out: Path) -> list[str]:
    work = ("--work-dir", str(out / "work"))
    if name == "compare":
        command = merge_command(groups["gap"], out / "compared", *work)
        command[3] = "compare"
        return [*command, "--methods", ",".join(COMPARED)]
    row = {**ROWS, **NAMED}[name]
    options = ("--method", *row.options, *work)
    return merge_command(groups[row.group], out / "merged", *options, experts=row.experts)


def _alone(text: str, source: Path, out: Path) -> list[str]:
    name, _, setting = text.partition(":")
    options = ["--method", name, *(["--set", setting] if setting else [])]
    return merge_command(source, out / "merged", *options, "--work-dir", str(out / "work"))


def _print_table(
    runs: dict[str, list[Run]], merges: dict[str, dict[str, Any]], bandwidth: float
) -> None:
    copies = [
        f.seconds + t.seconds for f, t in zip(runs["floor"], runs["import torch"], strict=True)
    ]
    print(
        "| whole process | s | ÷ (floor + torch) | target | user + sys s | faults | peak MB "
        "| merge s | GB moved | share of bandwidth |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, found in runs.items():
        ratio = statistics.median(r.seconds / c for r, c in zip(found, copies, strict=True))
        row = {**ROWS, **NAMED}.get(name)
        target = "" if row is None or row.target is None else f"{row.target:g}"
        cells = [
            name,
            f"{statistics.median(r.seconds for r in found):.2f}",
            f"{ratio:.2f}",
            target,
            f"{statistics.median(r.user for r in found):.2f} + "
            f"{statistics.median(r.system for r in found):.2f}",
            f"{statistics.median(r.faults for r in found):.0f}",
            f"{max(r.peak_private for r in found) / _MB:.0f}",
        ]
        if name in merges:
            seconds, moved = merges[name]["summary"]["seconds"], moved_bytes(merges[name])
            share = moved / seconds / bandwidth
            cells += [f"{seconds:.2f}", f"{moved / 1e9:.1f}", f"{share:.0%}"]
        else:
            cells += ["", "", ""]
        print(f"| {' | '.join(cells)} |")
    alone = [found for name, found in runs.items() if name.startswith("alone: ")]
    if alone:
        sums = [sum(r.seconds for r in one_round) for one_round in zip(*alone, strict=True)]
        share = statistics.median(r.seconds / s for r, s in zip(runs["compare"], sums, strict=True))
        print(f"\ncompare ÷ the sum of the four alone: {share:.2f} (target 0.7)")


if __name__ == "__main__":
    main()
