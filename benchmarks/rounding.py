"""What rounding changes beside what training did: ``python -m benchmarks.rounding BASE EXPERT …``.

For each expert (folders with one model.safetensors) and each way of rounding it, over its matrices
but the embeddings: ‖rounded − expert‖ / ‖expert − base‖. Above 1, a merge that reads the rounded
expert reads more of the rounding than of the training. GGUF's types by llama.cpp's own arithmetic.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

from resmerge_stream.maths.dequantise import fp8_values
from resmerge_stream.maths.quantise import fp8_blocks
from resmerge_stream.specs import FP8_BLOCK

_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def main() -> None:
    """Print a table in Markdown: a row an expert."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("experts", type=Path, nargs="+")
    args = parser.parse_args()
    ways = {"bfloat16": _to_bfloat16, "FP8, blocks of 128": _to_fp8}
    ways |= {name: _to_gguf(gguf.GGMLQuantizationType[name]) for name in _TYPES}
    print(f"| expert | {' | '.join(ways)} |\n|---|{'---:|' * len(ways)}")
    for expert in args.experts:
        trained, lost = 0.0, dict.fromkeys(ways, 0.0)
        for base, own in _matrices(args.base, expert):
            trained += float((own - base).double().square().sum())
            for name, rounded in ways.items():
                lost[name] += float((rounded(own) - own).double().square().sum())
        cells = " | ".join(f"{(one / trained) ** 0.5:.2g}" for one in lost.values())
        print(f"| {expert.name} | {cells} |", flush=True)


def _matrices(base: Path, expert: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each matrix of both, as float32."""
    files = (folder / "model.safetensors" for folder in (base, expert))
    one, other = (safe_open(file, "pt") for file in files)
    for name in one.keys():  # noqa: SIM118  # it has no iterator
        if (
            "embed" not in name
            and "lm_head" not in name
            and len(one.get_slice(name).get_shape()) == 2
        ):
            yield one.get_tensor(name).float(), other.get_tensor(name).float()


def _to_bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def _to_fp8(values: Tensor) -> Tensor:
    codes, scales = fp8_blocks(values)
    back = torch.empty_like(values)
    fp8_values(codes, scales, (FP8_BLOCK, FP8_BLOCK), (0, 0), back)
    return back


def _to_gguf(kind: gguf.GGMLQuantizationType) -> Callable[[Tensor], Tensor]:
    return lambda values: torch.from_numpy(
        gguf.dequantize(gguf.quantize(values.numpy(), kind), kind)
    )


if __name__ == "__main__":
    main()
