"""Speed and memory of local merges (targets S1–S4, S6, M1–M3, E4): ``python -m benchmarks.core``.

Groups with Qwen2.5-0.5B's shapes (base + 3 experts, bf16, 0.99 GB each) are made once in --dir,
best on tmpfs. Names on the command line choose what to run; all by default.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.synthetic import QWEN25_05B, Shape, Updates, write_group

from .measure import alternate, machine, median_seconds, merge_command, run, scratch_folder

MB = 1_000_000
_BY_ROWS = {
    "mean": ("mean",), "task_arithmetic": ("task_arithmetic",),
    "ties, density: 0.2": ("ties", "--set", "density=0.2"),
    "ram": ("ram",), "karcher": ("karcher",), "consensus": ("consensus",),
}  # fmt: skip


def group(folder: Path, name: str, shape: Shape, updates: Updates, *, experts: int = 3) -> Path:
    """Return a generated group, made if it is not there; a stopped call is continued."""
    target = folder / name
    if not (target / "complete").exists():
        print(f"making {target} …", file=sys.stderr)
        write_group(target, shape, experts=experts, updates=updates, goes_on=True)
        (target / "complete").touch()
    return target


def gap_group(folder: Path) -> Path:
    """Return the group with σ₁/σ₂ ≥ 1.5 in every matrix."""
    return group(folder, "qwen05b-gap", QWEN25_05B, Updates(gap=2.0))


def noise_group(folder: Path) -> Path:
    """Return the group whose updates are noise: no gap anywhere."""
    return group(folder, "qwen05b-noise", QWEN25_05B, Updates(gap=None))


def speed(folder: Path, times: int) -> None:
    """S1 and S3: whole processes against reading and writing the same bytes and importing torch."""
    gap, noise, out = gap_group(folder), noise_group(folder), folder / "out"
    models = " ".join(str(gap / m / "model.safetensors") for m in ("base", *_experts()))
    copy = f"cat {models} > /dev/null && cp {gap}/base/model.safetensors {out}"
    commands = {
        "floor: read four files, write one": ["sh", "-c", f"{copy}"],
        "import torch": [sys.executable, "-c", "import torch"],
        "resmerge, gap": merge_command(gap, out),
        "resmerge, no gap": merge_command(noise, out),
    }
    for name, options in _BY_ROWS.items():
        commands[name] = merge_command(gap, out, "--method", *options)
    runs = alternate(commands, times=times, before=lambda _: _remove(out))
    seconds = {name: median_seconds(results) for name, results in runs.items()}
    reference = seconds["floor: read four files, write one"] + seconds["import torch"]
    head = f"{'whole process':40} {'median s':>9} {'min':>6} {'max':>6} {'÷ (floor + torch)':>18}"
    print(f"{head}  peak")
    for name, results in runs.items():
        low, high = min(r.seconds for r in results), max(r.seconds for r in results)
        ratio = f"{seconds[name] / reference:.2f}"
        peak = max(r.peak_private for r in results) / MB
        print(f"{name:40} {seconds[name]:9.2f} {low:6.2f} {high:6.2f} {ratio:>18} {peak:.0f} MB")
    print("targets: resmerge gap ≤ 4, no gap ≤ 8 (S1); by rows ≤ 3, ties by tensor ≤ 5 (S3)")


def solvers(folder: Path, times: int) -> None:
    """S2: merge time with the default solver against a dense SVD, on real shapes."""
    shapes = {
        "896/4864": Shape(**_sizes(896, 4864, 2, 14, 2), vocab_size=1000),
        "256/512": Shape(**_sizes(256, 512, 4, 4, 2), vocab_size=1000),
        "96/256": Shape(**_sizes(96, 256, 8, 4, 2), vocab_size=1000),
        "48/112": Shape(**_sizes(48, 112, 8, 4, 2), vocab_size=1000),
    }
    print(f"{'widths':10} {'spectrum':10} {'auto s':>8} {'dense s':>8} {'dense ÷ auto':>13}")
    for name, shape in shapes.items():
        for spectrum, gap in (("gap 2", 2.0), ("gap 1.02", 1.02), ("noise", None)):
            key = f"solver-{name.replace('/', '-')}-{spectrum.replace(' ', '-')}"
            source = group(folder, key, shape, Updates(gap=gap))
            auto, dense = (
                min(
                    _merge_seconds(source, folder / "out", solver)
                    for _ in range(max(times // 2, 1))
                )
                for solver in ("auto", "dense")
            )
            print(f"{name:10} {spectrum:10} {auto:8.2f} {dense:8.2f} {dense / auto:13.2f}")
    print("targets: ≥ 10 at 896/4864 with a gap, nowhere < 0.77 (S2)")


def start(folder: Path, times: int) -> None:
    """S4: what starts at once."""
    gap = gap_group(folder)
    plan = merge_command(gap, folder / "out")
    plan[3] = "plan"
    program = [sys.executable, "-m", "resmerge_stream"]
    runs = alternate({"plan": plan, "--help": [*program, "--help"]}, times=times)
    for name, results in runs.items():
        print(f"{name:10} {median_seconds(results):.2f} s")
    print("targets: plan < 0.6 s, --help < 0.3 s (S4)")


def layers(folder: Path, times: int) -> None:
    """S6 and M2: eight times the layers cost eight times the time and no more memory."""
    seconds, peaks = [], []
    for count in (3, 12, 24):
        shape = replace(QWEN25_05B, num_hidden_layers=count, vocab_size=1000)
        source = group(folder, f"layers-{count}", shape, Updates(gap=2.0))
        results = []
        for _ in range(times):
            _remove(folder / "out")
            results.append(run(merge_command(source, folder / "out")))
        report = _report(folder / "out")
        seconds.append(report["summary"]["seconds"])
        peaks.append(max(r.peak_private for r in results) / MB)
        print(f"{count:3} layers: merge {seconds[-1]:.2f} s, peak private {peaks[-1]:.0f} MB")
    print(f"8 × the layers: {seconds[-1] / seconds[0]:.2f} × the time (target 7–9, S6)")


def memory(folder: Path, times: int) -> None:
    """M1, M2: peak private memory, against 350 MB + 4 (N + 2) · largest matrix."""
    sources = {
        "gap": gap_group(folder),
        "no gap": noise_group(folder),
        "embedding 152,064 × 3,584": group(
            folder,
            "embedding",
            Shape(**_sizes(3584, 1024, 1, 28, 4), vocab_size=152_064),
            Updates(gap=2.0),
        ),
    }
    largest = {"gap": 896 * 4864, "no gap": 896 * 4864, "embedding 152,064 × 3,584": 3584 * 3584}
    for name, source in sources.items():
        _remove(folder / "out")
        result = run(merge_command(source, folder / "out"))
        limit = 350 * MB + 4 * 5 * largest[name]
        peak = f"{result.peak_private / MB:.0f} MB"
        print(f"{name:28} peak {peak:>8}, limit {limit / MB:.0f} MB (M1)")


def budget(folder: Path, times: int) -> None:
    """M3 and E4: the smallest budget is kept, below it the plan refuses, the bytes are the same."""
    wide = Shape(**_sizes(2048, 8192, 1, 16, 2), vocab_size=1000)
    source = group(folder, "wide", wide, Updates(gap=2.0))
    least = 350 * MB + 6 * 2048 * 8192
    hashes = set()
    for label, size in (("default", None), ("350 MB + 3 × bf16", least)):
        _remove(folder / "out")
        options = [] if size is None else ["--memory-budget", str(size)]
        result = run(merge_command(source, folder / "out", *options))
        hashes.add(_sha256(folder / "out"))
        asked = "-" if size is None else f"{size / MB:.0f} MB"
        print(f"{label:20} budget {asked:>7}, peak {result.peak_private / MB:.0f} MB")
    refused = run(merge_command(source, folder / "out2", "--memory-budget", "200MB"), check=False)
    print(f"same bytes: {len(hashes) == 1}; 200 MB: exit {refused.code}, {refused.output.strip()}")


def same_bytes(folder: Path, times: int) -> None:
    """E4 on one machine: any shard size, any number of cores, resumed or not."""
    source = group(
        folder, "small", Shape(**_sizes(256, 704, 4, 4, 2), vocab_size=2000), Updates(gap=2.0)
    )
    variants = {
        "as it is": merge_command(source, folder / "out"),
        "again": merge_command(source, folder / "out"),
        "one core": ["taskset", "-c", "0", *merge_command(source, folder / "out")],
        "shards of 1 MB": merge_command(source, folder / "out", "--max-shard-size", "1MB"),
        "budget 320 MB": merge_command(source, folder / "out", "--memory-budget", "320MB"),
    }
    found = {}
    for name, command in variants.items():
        _remove(folder / "out")
        run(command)
        found[name] = _tensor_bytes(folder / "out")
    first = next(iter(found.values()))
    for name, tensors in found.items():
        print(f"{name:20} {'same bytes' if tensors == first else 'DIFFERENT'}")


BENCHMARKS: dict[str, Callable[[Path, int], None]] = {
    "speed": speed,
    "solvers": solvers,
    "start": start,
    "layers": layers,
    "memory": memory,
    "budget": budget,
    "same_bytes": same_bytes,
}


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--dir", type=Path, default=scratch_folder())
    parser.add_argument("--times", type=int, default=5, help="counted runs of each command")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    print(machine())
    for name in args.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        print(f"\n== {name}: {(benchmark.__doc__ or '').strip()}", flush=True)
        benchmark(args.dir, args.times)
        _remove(args.dir / "out")


def _experts() -> tuple[str, ...]:
    return ("expert0", "expert1", "expert2")


def _sizes(hidden: int, middle: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


def _merge_seconds(source: Path, out: Path, solver: str) -> float:
    _remove(out)
    run(merge_command(source, out, "--set", f"solver={solver}"))
    seconds: float = _report(out)["summary"]["seconds"]
    return seconds


def _report(out: Path) -> dict:
    return json.loads((out / "resmerge/report.json").read_text(encoding="utf-8"))


def _tensor_bytes(out: Path) -> dict[str, str]:
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            data = tensor.flatten().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def _sha256(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
