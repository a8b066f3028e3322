"""How time and memory grow with the model and with the experts: ``python -m benchmarks.growth``.

Qwen2.5's shapes of 0.5B, 1.5B and 3B (layers and widths) with two experts, then 0.5B with two, four
and eight; on a disk, for they are large (50 GB). Before each run the sources leave the page cache,
so that all sizes read from the disk alike. Given is the merge's own time for each GB that it reads
and writes. ``--quick`` takes small shapes.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.synthetic import QWEN25_05B, QWEN25_3B, QWEN25_15B, Updates

from .core import group
from .measure import machine, merge_command, run
from .methods import SMALL

_GB = 1e9


def main() -> None:
    """Run every size and number of experts, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("methods", nargs="*", default=["mean", "resmerge"], metavar="METHOD")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "resmerge-growth")
    parser.add_argument("--times", type=int, default=3, help="rounds")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round")
    args = parser.parse_args()
    sizes = {"0.5B": QWEN25_05B, "1.5B": QWEN25_15B, "3B": QWEN25_3B}
    if args.quick:
        sizes = {"4 layers": SMALL, "8 layers": replace(SMALL, num_hidden_layers=8)}
        args.times = 1
    smallest = next(iter(sizes))
    cases = [(name, 2) for name in sizes] + [(smallest, 4), (smallest, 8)]
    print(f"{machine()}; {args.dir}, sources not in memory\n")
    print("| method | model | experts | GB moved | merge s | s / GB | ÷ the first | peak MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for method in args.methods:
        first = None
        for name, experts in cases:
            most = max(count for other, count in cases if other == name)
            label = name.replace(" ", "-")
            source = group(args.dir, label, sizes[name], Updates(gap=2.0), experts=most)
            nbytes, seconds, peak = _merged(method, source, experts, args.dir, args.times)
            each = seconds / nbytes * _GB
            first = first or each
            print(
                f"| {method} | {name} | {experts} | {nbytes / _GB:.1f} | {seconds:.2f} "
                f"| {each:.2f} | {each / first:.2f} | {peak / 1e6:.0f} |",
                flush=True,
            )


def _merged(
    method: str, source: Path, experts: int, folder: Path, times: int
) -> tuple[int, float, int]:
    """Return bytes read and written, the median of the merge's own seconds, and the top peak."""
    found = []
    for _ in range(times):
        shutil.rmtree(folder / "out", ignore_errors=True)
        leave_page_cache(source)
        options = ("--method", method, "--work-dir", str(folder / "out/work"))
        done = run(merge_command(source, folder / "out/merged", *options, experts=experts))
        report = (folder / "out/merged/resmerge/report.json").read_text(encoding="utf-8")
        found.append((json.loads(report)["summary"], done.peak_private))
    shutil.rmtree(folder / "out", ignore_errors=True)
    nbytes = found[0][0]["bytes_read"] + found[0][0]["bytes_written"]
    seconds = statistics.median(summary["seconds"] for summary, _ in found)
    return nbytes, seconds, max(peak for _, peak in found)


def leave_page_cache(source: Path) -> None:
    """Let the page cache forget a group's weights, so that they are read from the disk again."""
    os.sync()
    for file in source.glob("*/*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
