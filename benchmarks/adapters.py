"""Merging LoRA adapters with the shapes of a 7B model: bytes, seconds and memory.

    python -m benchmarks.adapters DIR [--layers 28] [--whole] [--plan-70b]

The base is a sparse file of zeros: to an adapter nothing of it is read but its header. Each merge
runs in a process of its own; its peak of private memory is what the report says. ``--whole`` merges
the same adapters to a whole model, and beside it the mean of one whole expert, which reads and
writes the same bytes and more. ``--plan-70b`` plans a 70B model from headers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of Qwen2's kind."""

    hidden: int
    ffn: int
    keys: int
    vocabulary: int
    layers: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the linear maps of all layers by module."""
        own = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        return {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in own.items()
        }


SEVEN = Shape(3584, 18944, 512, 152064, 28)
SEVENTY = Shape(8192, 28672, 1024, 128256, 80)


def write_model(folder: Path, shape: Shape) -> None:
    """Write a model of zeros that takes no room on the disk."""
    table = (shape.vocabulary, shape.hidden)
    shapes = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    shapes |= {f"{name}.weight": size for name, size in shape.matrices().items()}
    write_zeros(folder / "model.safetensors", "BF16", shapes)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_zeros(path: Path, dtype: str, shapes: dict[str, tuple[int, int]]) -> int:
    """Write a safetensors file of zeros, two bytes an element; return where its values begin."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return 8 + len(text)


def write_adapter(folder: Path, shape: Shape, rank: int, seed: int | None) -> None:
    """Write an adapter of all linear layers, float16; of zeros without a seed."""
    sizes = {}
    for name, (m, n) in shape.matrices().items():
        for side, size in (("A", (rank, n)), ("B", (m, rank))):
            sizes[f"base_model.model.{name}.lora_{side}.weight"] = size
    path = folder / "adapter_model.safetensors"
    start = write_zeros(path, "F16", sizes)
    if seed is not None:
        random = np.random.default_rng(seed)
        with path.open("r+b") as file:
            file.seek(start)
            for size in sizes.values():
                values = random.standard_normal(size, np.float32) * 0.01
                file.write(values.astype(np.float16).tobytes())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    config["base_model_name_or_path"] = "base"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_expert(folder: Path, shape: Shape) -> None:
    """Write a whole expert that differs from the zeros in some of each block of rows."""
    write_model(folder, shape)
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        ones = np.full(2048, 0x3C00, np.uint16).tobytes()
        for place in range(1 << 20, size - len(ones), 1 << 20):
            file.seek(place)
            file.write(ones)


def merge(folder: Path, experts: list[str], method: str, *options: str) -> dict[str, object]:
    """Merge in a process of its own; return what it took."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = ["merge", "--base", str(folder / "base"), "--method", method, "--out", str(out)]
    words += [word for name in experts for word in ("--expert", str(folder / name))]
    words += ["--work-dir", str(folder / "work"), *options]
    started, before = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "resmerge_stream", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, os.times()
    summary = json.loads((out / "resmerge/report.json").read_text())["summary"]
    shutil.rmtree(out)
    return {
        "experts": f"{len(experts)} × {experts[0].rstrip('0')}",
        "method": method,
        "options": " ".join(options),
        "seconds": round(seconds, 1),
        "user_s": round(after.children_user - before.children_user, 1),
        "system_s": round(after.children_system - before.children_system, 1),
        "read_mb": round(summary["bytes_read"] / 1e6),
        "written_mb": round(summary["bytes_written"] / 1e6),
        "peak_private_mb": round(summary["peak_private_bytes"] / 1e6),
    }


def plan(folder: Path, experts: list[str], *options: str) -> dict[str, object]:
    """Plan in a process of its own; return what it says."""
    words = ["plan", "--base", str(folder / "base"), *options, "--json"]
    words += [word for name in experts for word in ("--expert", str(folder / name))]
    started = time.perf_counter()
    command = [sys.executable, "-m", "resmerge_stream", *words]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {
        "planned": "70B, " + " ".join(options),
        "plan_seconds": round(time.perf_counter() - started, 1),
        "read_mb": round(found["read_bytes"] / 1e6),
        "written_mb": round(found["write_bytes"] / 1e6),
        "peak_private_mb": round(found["peak_memory_bytes"] / 1e6),
        "seconds_estimate": found["seconds_estimate"],
    }


def main() -> None:
    """Write the models where they are missing, and merge them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=SEVEN.layers, help="fewer are a smaller run")
    parser.add_argument("--whole", action="store_true", help="to a whole model: 15 GB at 28 layers")
    parser.add_argument("--plan-70b", action="store_true", help="plan only, from headers")
    args = parser.parse_args()
    shape = SEVENTY if args.plan_70b else replace(SEVEN, layers=args.layers)
    experts = [f"adapter{number}" for number in range(args.experts)]
    if not (args.folder / "base").is_dir():
        write_model(args.folder / "base", shape)
    for number, name in enumerate(experts):
        if not (args.folder / name).is_dir():
            seed = None if args.plan_70b else number
            write_adapter(args.folder / name, shape, args.rank, seed)
    if args.plan_70b:
        print(plan(args.folder, experts, "--as", "adapter"))
        print(plan(args.folder, experts, "--as", "model"))
    elif args.whole:
        write_expert(args.folder / "expert0", shape)
        print(merge(args.folder, ["expert0"], "mean"))
        print(merge(args.folder, experts, "mean"))
        print(merge(args.folder, experts, "resmerge"))
    else:
        for method in ("mean", "resmerge"):
            for dtype in ("float32", "bfloat16"):
                print(merge(args.folder, experts, method, "--as", "adapter", "--dtype", dtype))


if __name__ == "__main__":
    main()
