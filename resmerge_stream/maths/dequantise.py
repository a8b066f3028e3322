"""Codes of a quantisation as the float32 numbers that they stand for. Pure arithmetic.

FP8: value = code · scale, one scale a block of the matrix. MXFP4 (Open Compute Project,
Microscaling Formats 1.0): 32 values share one power of two; each is a 4-bit e2m1 number.
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
