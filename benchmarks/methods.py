"""Speed of the methods (target S3) and of comparisons: ``python -m benchmarks.methods``.

`elementwise` measures each method by rows against the floor (reading the sources and writing one
model, plus importing torch); `compare` measures four methods in one pass against each alone
(target: at most 1.6 times the dearest). A small group by default; ``--large`` takes Qwen2.5-0.5B's
shapes, the numbers that docs/performance.md quotes.
"""

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.synthetic import QWEN25_05B, Shape, Updates, write_group

from .measure import alternate, machine, median_seconds, merge_command, scratch_folder

SMALL = Shape(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
    vocab_size=8_000,
)  # fmt: skip
# Method, parameters and S3's limit as a multiple of floor + import torch, where there is one.
ELEMENTWISE: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("mean", (), 3.0),
    ("task_arithmetic", (), 3.0),
    ("ties", ("density=0.2",), 5.0),
    ("ties", ("preset=paper",), None),
    ("ram", (), 3.0),
    ("ram_plus", (), None),
    ("consensus", (), 3.0),
    ("karcher", (), 3.0),
    ("widen", (), None),
    ("dare_linear", (), None),
    ("dare_ties", (), None),
)
SETS = (
    ("resmerge", "ties:density=0.2", "ram", "task_arithmetic"),
    ("resmerge", "tsv_m", "iso_c", "ties:density=0.2"),
    ("tsv_m", "star", "dc_merge", "iso_cts"),
)


def elementwise(group: Path, out: Path, times: int) -> None:
    """Print each method's time as a multiple of the floor."""
    names = {f"{name} {' '.join(given)}".strip(): (name, given) for name, given, _ in ELEMENTWISE}
    commands: dict[str, list[str]] = {"floor": _floor(group, out / "floor.bin")}
    for label, (name, given) in names.items():
        options = ["--method", name]
        for text in given:
            options += ["--set", text]
        commands[label] = merge_command(group, out / "merged", *options, *_work(out))
    runs = alternate(commands, times=times, before=lambda name: _clear(out))
    floor = median_seconds(runs["floor"])
    print(f"floor (read all, write one, import torch): {floor:.2f} s")
    for (label, _), (_, _, limit) in zip(names.items(), ELEMENTWISE, strict=True):
        seconds = median_seconds(runs[label])
        peak = max(run.peak_private for run in runs[label]) / 1e6
        goal = f"  (limit {limit:g} ×)" if limit else ""
        print(f"{label:24} {seconds:7.2f} s  {seconds / floor:5.2f} ×  {peak:5.0f} MB{goal}")


def compare(group: Path, out: Path, times: int) -> None:
    """Print the time of four methods in one pass against each of them alone."""
    for methods in SETS:
        commands = {"all": _compare(group, out, ",".join(methods))}
        commands["reports"] = [*_compare(group, out, ",".join(methods)), "--report-only"]
        for text in methods:
            name, _, rest = text.partition(":")
            options = ["--method", name, *(["--set", rest] if rest else [])]
            commands[text] = merge_command(group, out / "merged", *options, *_work(out))
        runs = alternate(commands, times=times, before=lambda name: _clear(out))
        alone = {text: median_seconds(runs[text]) for text in methods}
        dearest = max(alone.values())
        print(", ".join(f"{text} {seconds:.2f} s" for text, seconds in alone.items()))
        for label in ("all", "reports"):
            seconds = median_seconds(runs[label])
            peak = max(run.peak_private for run in runs[label]) / 1e6
            ratio = seconds / dearest
            print(f"  {label:8} {seconds:6.2f} s  {ratio:4.2f} × the dearest  {peak:4.0f} MB")


BENCHMARKS = {"elementwise": elementwise, "compare": compare}


def main() -> None:
    """Run the named benchmarks, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--dir", type=Path, default=scratch_folder())
    parser.add_argument("--times", type=int, default=3, help="counted runs of each command")
    parser.add_argument("--large", action="store_true", help="Qwen2.5-0.5B's shapes")
    args = parser.parse_args()
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no {sorted(unknown)}; there are {', '.join(BENCHMARKS)}")
    print(machine())
    group = args.dir / ("methods-large" if args.large else "methods-small")
    if not (group / "complete").exists():
        print(f"making {group} …", file=sys.stderr)
        shape = QWEN25_05B if args.large else SMALL
        write_group(group, shape, updates=Updates(gap=2.0, unchanged=0.5))
        (group / "complete").touch()
    out = args.dir / "methods-out"
    for name in args.names or BENCHMARKS:
        print(f"\n{name}")
        BENCHMARKS[name](group, out, args.times)
    shutil.rmtree(out, ignore_errors=True)


def _floor(group: Path, target: Path) -> list[str]:
    files = [str(path) for path in sorted(group.glob("*/*.safetensors"))]
    base = [path for path in files if "/base/" in path]
    code = (
        "import hashlib, shutil, sys, torch\n"
        f"for path in {files!r}:\n"
        "    with open(path, 'rb') as file:\n"
        "        while file.read(1 << 24): pass\n"
        f"for path in {base!r}: shutil.copyfile(path, {str(target)!r})\n"
    )
    return [sys.executable, "-c", code]


def _compare(group: Path, out: Path, methods: str) -> list[str]:
    command = [sys.executable, "-m", "resmerge_stream", "compare", "--base", str(group / "base")]
    for number in range(3):
        command += ["--expert", str(group / f"expert{number}")]
    return [*command, "--methods", methods, "--out", str(out / "compared"), *_work(out)]


def _work(out: Path) -> list[str]:
    return ["--work-dir", str(out / "work")]


def _clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


if __name__ == "__main__":
    main()
