"""Merging LoRA adapters with the shapes of a 7B model: bytes, seconds and memory.

    python -m benchmarks.adapters DIR [--experts 4] [--rank 32] [--whole]

The base is a sparse file of zeros: to an adapter nothing of it is read but its header. The merge
runs in a process of its own; its peak of private memory is what the report says.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, FFN, LAYERS, VOCABULARY, KEYS = 3584, 18944, 28, 152064, 512
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def write_base(folder: Path) -> None:
    """Write a base of zeros that takes no room on the disk."""
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    shapes["lm_head.weight"] = [VOCABULARY, HIDDEN]
    for layer in range(LAYERS):
        for name, shape in MATRICES.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = list(shape)
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, rank: int, seed: int) -> None:
    """Write an adapter of all linear layers, float16."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        for name, (m, n) in MATRICES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for side, shape in (("A", (rank, n)), ("B", (m, rank))):
                values = random.standard_normal(shape, np.float32) * 0.01
                tensors[f"{key}.lora_{side}.weight"] = values.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    config["base_model_name_or_path"] = "base"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge(folder: Path, experts: int, method: str, *options: str) -> dict[str, object]:
    """Merge in a process of its own; return what it took."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = ["merge", "--base", str(folder / "base"), "--method", method, "--out", str(out)]
    for number in range(experts):
        words += ["--expert", str(folder / f"adapter{number}")]
    words += ["--work-dir", str(folder / "work"), *options]
    started = time.perf_counter()
    command = [sys.executable, "-m", "resmerge_stream", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    summary = json.loads((out / "resmerge/report.json").read_text())["summary"]
    taken = {
        "method": method,
        "options": " ".join(options),
        "seconds": round(seconds, 1),
        "read_mb": round(summary["bytes_read"] / 1e6),
        "written_mb": round(summary["bytes_written"] / 1e6),
        "peak_private_mb": round(summary["peak_private_bytes"] / 1e6),
    }
    shutil.rmtree(out)
    return taken


def main() -> None:
    """Write the models where they are missing, and merge them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--whole", action="store_true", help="to a whole model too: 15 GB")
    args = parser.parse_args()
    if not (args.folder / "base").is_dir():
        write_base(args.folder / "base")
    for number in range(args.experts):
        if not (args.folder / f"adapter{number}").is_dir():
            write_adapter(args.folder / f"adapter{number}", args.rank, number)
    for method in ("mean", "resmerge"):
        for dtype in ("float32", "bfloat16"):
            print(merge(args.folder, args.experts, method, "--as", "adapter", "--dtype", dtype))
    if args.whole:
        print(merge(args.folder, args.experts, "resmerge"))


if __name__ == "__main__":
    main()
