"""A merge on a GPU beside the same on the CPU, speed and equality: ``python -m benchmarks.gpu``.

Prints the wall time of both and the largest relative difference of an update, ΔW, of all tensors
(target 1e-5, float32 output). Without a GPU it says so and exits 2; --device cpu tries the script.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.synthetic import Shape, Updates

from .core import group
from .measure import machine, merge_command, run, scratch_folder

_TARGET = 1e-5


def main() -> int:
    """Merge on both devices, compare, and return 1 where they differ by more than the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=scratch_folder("gpu"))
    parser.add_argument("--device", default="cuda", help="compared with the CPU (cuda)")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model (2048)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (4)")
    parser.add_argument("--method", default="resmerge", help="the merge method (resmerge)")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 2
    print(machine())
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(0))
    shape = Shape(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        vocab_size=8 * args.hidden,
    )
    name = f"gpu-{args.hidden}-{args.layers}"
    models = group(args.dir, name, shape, Updates(gap=2.0))
    outs = {}
    for device in ("cpu", args.device):
        outs[device] = out = args.dir / f"out-{len(outs)}"
        shutil.rmtree(out, ignore_errors=True)
        options = ["--device", device, "--method", args.method, "--dtype", "float32"]
        seconds = run(merge_command(models, out, *options)).seconds
        report = json.loads((out / "resmerge" / "report.json").read_text(encoding="utf-8"))
        merging, warnings = report["summary"]["seconds"], report["summary"]["warnings"]
        print(f"{device:8} whole process {seconds:.2f} s, merge {merging:.2f} s {warnings or ''}")
    worst, tensor = _difference(models / "base", outs["cpu"], outs[args.device])
    print(f"largest relative difference of an update: {worst:.1e} ({tensor}), target {_TARGET:.0e}")
    return int(worst > _TARGET)


def _difference(base: Path, left: Path, right: Path) -> tuple[float, str]:
    """Return the largest relative difference of ΔW between two merges, and whose it is."""
    worst = (0.0, "none")
    for file in sorted(left.glob("*.safetensors")):
        with (
            safe_open(file, "pt") as one,
            safe_open(right / file.name, "pt") as two,
            safe_open(base / file.name, "pt") as start,
        ):
            for name in one.keys():  # noqa: SIM118  # safe_open is no mapping
                W0 = start.get_tensor(name).double()
                delta = one.get_tensor(name).double() - W0
                other = two.get_tensor(name).double() - W0
                scale = max(float(delta.norm()), 1e-6 * float(W0.norm()))
                worst = max(worst, (float((other - delta).norm()) / scale, name))
    return worst


if __name__ == "__main__":
    sys.exit(main())
