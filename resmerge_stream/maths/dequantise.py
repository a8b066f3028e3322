"""Codes of a quantisation as the float32 numbers that they stand for. Pure arithmetic.

FP8: value = code · scale, one scale a block of the matrix. MXFP4 (Open Compute Project,
Microscaling Formats 1.0): 32 values share one power of two; each is a 4-bit e2m1 number. NVFP4: 16
share an FP8 number, and all of a matrix one more. INT4 and INT8 of compressed-tensors: value =
(code − zero) · scale, and so AWQ and GPTQ, whose words lie along other axes. NF4 of bitsandbytes:
value = table[code] · scale, a scale each 64 values of the flattened matrix, which may be codes of
their own.
"""

import torch
from torch import Tensor

# What the 16 codes of e2m1 mean: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255


def power_scales(codes: Tensor) -> Tensor:
    """Return e8m0 scales as float32: 2^(code − 127), NaN for the code 255.

    Args:
        codes: uint8 or float8_e8m0fnu, any shape.
    """
    codes = codes.view(torch.uint8)
    powers = torch.ldexp(torch.ones(codes.shape), codes.to(torch.int32) - _E8M0_BIAS)
    return powers.masked_fill_(codes == _E8M0_NAN, float("nan"))


def fp8_values(
    codes: Tensor, scales: Tensor, block: tuple[int, int], first: tuple[int, int], out: Tensor
) -> None:
    """Write code · scale of some rows and columns of a matrix.

    Args:
        codes: (b, n), float8 of any kind.
        scales: the matrix' grid of float32 scales, from the block of the first row on.
        block: rows and columns that share a scale.
        first: row and column of the matrix where `codes` begin; the row counts from the first
            row of `scales`.
        out: (b, n), float32.

    Memory: one more float32 copy of `codes`.
    """
    rows = torch.arange(first[0], first[0] + codes.shape[0]) // block[0]
    columns = torch.arange(first[1], first[1] + codes.shape[1]) // block[1]
    torch.mul(codes.to(torch.float32), scales[rows][:, columns], out=out)


def mxfp4_values(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write the values of some MXFP4 blocks.

    Args:
        blocks: (…, g, 16), uint8: two values a byte, the lower four bits first.
        scales: (…, g), e8m0.
        out: (…, g · 32), float32.
    """
    signed = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack((signed[(blocks & 15).int()], signed[(blocks >> 4).int()]), dim=-1)
    values = pairs.flatten(-2) * power_scales(scales)[..., None]
    out.copy_(values.flatten(-2))


def halves(codes: Tensor) -> Tensor:
    """Return two four-bit codes a byte, the lower one first; shape (…, w) to (…, 2w)."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def e2m1_values(codes: Tensor) -> Tensor:
    """Return what bytes of two e2m1 numbers stand for: float32, shape (…, w) to (…, 2w)."""
    return torch.tensor([*E2M1, *(-value for value in E2M1)])[halves(codes).int()]


def unsigned_integers(words: Tensor, bits: int) -> Tensor:
    """Return codes that are packed along the last axis, the lowest bits first.

    Args:
        words: (…, w), int32.
        bits: 4 or 8.

    Returns:
        uint8, (…, w · 32 / bits).
    """
    # A copy: what has one column counts as contiguous, whatever its stride.
    codes = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return halves(codes) if bits == 4 else codes


def packed_integers(words: Tensor, bits: int) -> Tensor:
    """Return signed codes, packed as `unsigned_integers` has them: float32, from −2^(bits − 1)."""
    return unsigned_integers(words, bits).to(torch.float32).sub_(2 ** (bits - 1))


def nf4_values(codes: Tensor, table: Tensor, scales: Tensor, first: int, size: int) -> Tensor:
    """Return the values of consecutive NF4 codes.

    Args:
        codes: (b,), uint8: two codes a byte, the upper one first.
        table: (16,), float32.
        scales: float32, of all blocks from the one that the first value is in.
        first: place of the first value in that block.
        size: values that share a scale.

    Returns:
        float32, (2b,).
    """
    values = table[torch.stack((codes >> 4, codes & 15), dim=-1).flatten().int()]
    return values * scales[(torch.arange(values.numel()) + first) // size]
