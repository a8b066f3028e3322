"""Merges on a GPU beside the same on the CPU: ``python -m benchmarks.gpu``.

A group with some layers of Qwen2.5-7B's shapes, in memory. For each method it prints the time of
the merge on the CPU and on the GPU, the time that the same bytes take to cross to the GPU and back
and its share of the merge, and the largest relative difference of an update, ΔW, of all tensors
(target 1e-5, float32 output). Without a GPU it says so and exits 2; --device cpu tries the script.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.synthetic import QWEN25_7B, Updates

from .core import group
from .measure import machine, merge_command, run, scratch_folder

_TARGET = 1e-5
_CHUNK_BYTES = 256_000_000


def main() -> int:
    """Merge on both devices, compare, and return 1 where they differ by more than the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=scratch_folder("gpu"))
    parser.add_argument("--device", default="cuda", help="compared with the CPU (cuda)")
    parser.add_argument("--layers", type=int, default=4, help="of the model's 28 (4)")
    parser.add_argument("--vocab", type=int, default=32_768, help="rows of its embeddings (32768)")
    parser.add_argument("--hidden", type=int, help="another width, for a try")
    parser.add_argument("--methods", nargs="+", default=["resmerge", "ties:density=0.2", "mean"])
    parser.add_argument("--times", type=int, default=3, help="runs of which the median counts (3)")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 2
    print(machine())
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(0))
    shape = replace(QWEN25_7B, num_hidden_layers=args.layers, vocab_size=args.vocab)
    if args.hidden:
        shape = replace(shape, hidden_size=args.hidden, intermediate_size=4 * args.hidden)
    name = f"gpu-{shape.hidden_size}-{args.layers}-{args.vocab}"
    models = group(args.dir, name, shape, Updates(gap=2.0))
    crossing = _crossing(models, args.device)
    return int(max([_one(args, models, method, crossing) for method in args.methods]) > _TARGET)


def _one(args: argparse.Namespace, models: Path, method: str, crossing: float) -> float:
    """Print a method's line; return the largest relative difference of an update."""
    seconds = {}
    for device in ("cpu", args.device):
        times = args.times if device != "cpu" else 1
        runs = [_merge(args, models, method, device) for _ in range(times)]
        seconds[device] = [statistics.median(column) for column in zip(*runs, strict=True)]
    outs = [args.dir / f"float32-{number}" for number in range(2)]
    for out, device in zip(outs, ("cpu", args.device), strict=True):
        _merge(args, models, method, device, out, "--dtype", "float32")
    worst, tensor = _difference(models / "base", *outs)
    for out in outs:
        shutil.rmtree(out)
    cpu, gpu = seconds["cpu"], seconds[args.device]
    print(
        f"{method}: CPU {cpu[0]:.2f} s (process {cpu[1]:.2f}), "
        f"{args.device} {gpu[0]:.2f} s (process {gpu[1]:.2f}); "
        f"crossing alone {crossing:.2f} s, {crossing / gpu[0]:.0%} of it; "
        f"ΔW differs by {worst:.1e} at most ({tensor}; target {_TARGET:.0e})",
        flush=True,
    )
    return worst


def _merge(
    args: argparse.Namespace,
    models: Path,
    method: str,
    device: str,
    out: Path | None = None,
    *options: str,
) -> tuple[float, float]:
    """Merge; return the seconds of the merge and of the whole process."""
    folder = out or args.dir / "out"
    shutil.rmtree(folder, ignore_errors=True)
    command = merge_command(models, folder, "--device", device, "--method", method, *options)
    process = run(command).seconds
    report = json.loads((folder / "resmerge" / "report.json").read_text(encoding="utf-8"))
    warnings = report["summary"]["warnings"]
    if warnings:
        print(f"{method} on {device}: {warnings}")
    if out is None:
        shutil.rmtree(folder)
    return report["summary"]["seconds"], process


def _crossing(models: Path, device: str) -> float:
    """Return seconds for all stored bytes to cross to a device, and one model's to come back.

    From pinned memory in large pieces: what the line between them allows, copying to the pinned
    memory not counted.
    """
    sizes = [path.stat().st_size for path in models.rglob("*.safetensors")]
    there, back = sum(sizes), sum(sizes) // len(list(models.glob("*/config.json")))
    pinned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device=device)
    taken = []
    for left, right in ((target, pinned), (pinned, target)):
        left.copy_(right)
        started = time.perf_counter()
        for _ in range(4):
            left.copy_(right, non_blocking=True)
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - started) / 4 / _CHUNK_BYTES)
    print(f"to the device {1e-9 / taken[0]:.1f} GB/s, back {1e-9 / taken[1]:.1f} GB/s")
    return there * taken[0] + back * taken[1]


def _difference(base: Path, left: Path, right: Path) -> tuple[float, str]:
    """Return the largest relative difference of ΔW between two merges, and whose it is."""
    worst = (0.0, "none")
    for file in sorted(left.glob("*.safetensors")):
        with (
            safe_open(file, "pt") as one,
            safe_open(right / file.name, "pt") as two,
            safe_open(base / file.name, "pt") as start,
        ):
            for name in one.keys():  # noqa: SIM118  # safe_open is not a mapping
                W0 = start.get_tensor(name).double()
                delta = one.get_tensor(name).double() - W0
                other = two.get_tensor(name).double() - W0
                scale = max(float(delta.norm()), 1e-6 * float(W0.norm()))
                worst = max(worst, (float((other - delta).norm()) / scale, name))
    return worst


if __name__ == "__main__":
    sys.exit(main())
