"""What reading a quantisation costs: ``python -m benchmarks.formats [FORMAT …]``.

A base in bfloat16 and three experts of four layers (width 1,024, middle 4,096), merged by `mean`
from the page cache: the experts in bfloat16, then with each linear matrix in a quantised form.
Codes and scales are drawn: what they mean costs nothing. Beside the time, the memory that the plan
promised and that was seen.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resmerge_stream.planning.plan import Options, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe

from .measure import machine, run
from .synthetic import Shape, write_group

_SHAPE = Shape(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=32_000)
Stored = Mapping[str, Tensor]


def _codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=torch.int64).to(dtype)


def _fp8(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def _scales(*shape: int) -> Tensor:
    return 0.01 * torch.rand(shape) + 0.001


def _compressed(kind: str, **weights: Any) -> Mapping[str, Any]:
    said = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 32} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": said}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


def _nf4(m: int, n: int) -> Stored:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [m, n]}
    raw = list(json.dumps(state).encode())
    return {
        "weight": _codes(m * n // 2, 1), "weight.absmax": _scales(m * n // 64),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(raw, dtype=torch.uint8),
    }  # fmt: skip


# By format: what stands in a matrix's place, by what follows its module's name; what config says.
_FORMATS: Mapping[str, tuple[Callable[[int, int], Stored], Mapping[str, Any]]] = {
    "FP8, blocks of 128": (
        lambda m, n: {"weight": _fp8(m, n), "weight_scale_inv": _scales(m // 128, n // 128)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "MXFP8": (
        lambda m, n: {"weight": _fp8(m, n), "weight_scale": _codes(m, n // 32) % 8 + 115},
        _compressed("mxfp8-quantized", num_bits=8, strategy="group", scale_dtype="torch.uint8"),
    ),
    "INT4, compressed-tensors": (
        lambda m, n: {
            "weight_packed": _codes(m, n // 8, dtype=torch.int32),
            "weight_scale": _scales(m, n // 32).bfloat16(),
            "weight_shape": torch.tensor([m, n]),
        },
        _compressed("pack-quantized", type="int", strategy="group"),
    ),
    "NVFP4": (
        lambda m, n: {
            "weight_packed": _codes(m, n // 2),
            "weight_scale": _scales(m, n // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([3.0]),
        },
        _compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16),
    ),
    "GPTQ, 4 bits": (
        lambda m, n: {
            "qweight": _codes(n // 8, m, dtype=torch.int32),
            "qzeros": _codes(n // 128, m // 8, dtype=torch.int32),
            "scales": _scales(n // 128, m).half(),
            "g_idx": (torch.arange(n) // 128).to(torch.int32),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    ),
    "AWQ": (
        lambda m, n: {
            "qweight": _codes(n, m // 8, dtype=torch.int32),
            "qzeros": _codes(n // 128, m // 8, dtype=torch.int32),
            "scales": _scales(n // 128, m).half(),
        },
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    ),
    "NF4, bitsandbytes": (
        _nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}


def main() -> None:
    """Merge each form in turn, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(_FORMATS))
    parser.add_argument("--times", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    if unknown := set(args.formats) - set(_FORMATS):
        parser.error(f"there is no {sorted(unknown)}; there are {', '.join(_FORMATS)}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_group(root / "bfloat16", _SHAPE)
        print(f"{machine()}\n")
        print("| experts in | read | seconds | ÷ bfloat16 | memory planned | seen |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        plain, cells = _merged(root / "bfloat16", root / "out", args.times)
        print(f"| bfloat16 | {cells[0]} | {plain:.2f} | 1 | {cells[1]} | {cells[2]} |")
        for name in args.formats or _FORMATS:
            group = root / "quantised"
            shutil.copytree(root / "bfloat16", group, dirs_exist_ok=True)
            for number in range(3):
                _quantise(group / f"expert{number}", name)
            seconds, cells = _merged(group, root / "out", args.times)
            print(f"| {name} | {cells[0]} | {seconds:.2f} | {seconds / plain:.2f} | {cells[1]} "
                  f"| {cells[2]} |", flush=True)  # fmt: skip
            shutil.rmtree(group)


def _quantise(folder: Path, name: str) -> None:
    """Write a model's linear matrices anew, in a format."""
    stored_as, said = _FORMATS[name]
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(folder / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if value.ndim == 2 and module != key and "embed" not in key:
            tensors |= {f"{module}.{part}": one for part, one in stored_as(*value.shape).items()}
        else:
            tensors[key] = value.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"quantization_config": said})
    (folder / "config.json").write_text(text, encoding="utf-8")


def _merged(group: Path, out: Path, times: int) -> tuple[float, list[str]]:
    """Return the median of the seconds, and MB read, planned and seen at the most."""
    experts = [str(group / f"expert{number}") for number in range(3)]
    recipe = Recipe(ModelRef(str(group / "base")), tuple(map(ModelRef, experts)), "mean")
    plan = plan_merge(recipe, Options(unrelated="merge")).accepted()
    read, planned = plan.read_bytes, plan.peak_memory_bytes
    plan.close()
    command = [sys.executable, "-m", "resmerge_stream", "merge", "--method", "mean"]
    command += ["--unrelated", "merge", "--base", str(group / "base"), "--out", str(out)]
    for expert in experts:
        command += ["--expert", expert]
    runs = []
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        runs.append(run(command))
    seen = max(one.peak_private for one in runs)
    cells = [f"{nbytes / 1e6:,.0f} MB" for nbytes in (read, planned, seen)]
    return statistics.median(one.seconds for one in runs), cells


if __name__ == "__main__":
    main()
