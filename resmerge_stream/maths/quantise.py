"""Numbers as codes of a quantisation. Pure arithmetic; the way back is in `dequantise`.

FP8 as DeepSeek and Qwen publish it: a scale for each block of 128 × 128, by which its largest
magnitude becomes 448, the largest of e4m3; value = code · scale. Source of the order of operations:
``Fp8Quantize`` of transformers, so that the bits are the same.
"""

import torch
from torch import Tensor

from ..specs import FP8_BLOCK
from .dequantise import fp8_values

_LARGEST = 448.0


def fp8_blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of some rows of a matrix.

    Args:
        weights: (b, n), float32, finite; from the first row of a block on.

    Returns:
        Codes (b, n), float8_e4m3fn; scales, float32, one for each block, those at the edges too.

    Memory: four float32 copies of the rows.
    """
    rows, columns = weights.shape
    tall, wide = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = torch.nn.functional.pad(
        weights, (0, wide * FP8_BLOCK - columns, 0, tall * FP8_BLOCK - rows)
    )
    blocks = padded.reshape(tall, FP8_BLOCK, wide, FP8_BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    ones = torch.ones_like(largest)
    factors = torch.where(largest > 0, _LARGEST / torch.where(largest > 0, largest, ones), ones)
    scaled = (blocks * factors[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    codes = scaled.reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return codes.contiguous(), 1.0 / factors


def fp8_rounded(weights: Tensor) -> Tensor:
    """Return what is left of some rows of a matrix in FP8, as float32; as `fp8_blocks`."""
    codes, scales = fp8_blocks(weights)
    out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    fp8_values(codes, scales, (FP8_BLOCK, FP8_BLOCK), (0, 0), out)
    return out
