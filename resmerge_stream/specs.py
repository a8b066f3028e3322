"""What a tensor is without its values: name, dtype, shape, bytes; and the table of dtypes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the safetensors format.

    Attributes:
        name: the format's name, such as ``BF16``.
        nbytes: bytes an element.
        rank: the format's own order; files hold tensors by descending rank, then by name.
        is_merged: whether arithmetic is done on it; the others are copied or refused.
        torch_name: attribute of the torch module that is this type.
    """

    name: str
    nbytes: int
    rank: int
    is_merged: bool
    torch_name: str


_FLOATS = {"F16", "BF16", "F32", "F64"}
_ORDER = (
    ("BOOL", 1, "bool"),
    ("U8", 1, "uint8"),
    ("I8", 1, "int8"),
    ("F8_E5M2", 1, "float8_e5m2"),
    ("F8_E4M3", 1, "float8_e4m3fn"),
    ("F8_E8M0", 1, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 1, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 1, "float8_e5m2fnuz"),
    ("I16", 2, "int16"),
    ("U16", 2, "uint16"),
    ("F16", 2, "float16"),
    ("BF16", 2, "bfloat16"),
    ("I32", 4, "int32"),
    ("U32", 4, "uint32"),
    ("F32", 4, "float32"),
    ("C64", 8, "complex64"),
    ("F64", 8, "float64"),
    ("I64", 8, "int64"),
    ("U64", 8, "uint64"),
)

DTYPES: dict[str, DType] = {
    name: DType(name, nbytes, rank, name in _FLOATS, torch_name)
    for rank, (name, nbytes, torch_name) in enumerate(_ORDER)
}

OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# In which linear maps are written in FP8, with scales, and the rest in bfloat16.
FP8 = "fp8"
RECIPE_DTYPES = (*OUTPUT_DTYPES, FP8)
# Rows and columns that share a scale.
FP8_BLOCK = 128
_SCALES = "_scale_inv"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape.

    Attributes:
        name: the parameter name, such as ``model.layers.0.mlp.up_proj.weight``.
        dtype: a key of `DTYPES`.
        shape: sizes, outermost first; ``()`` is a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * DTYPES[self.dtype].nbytes

    @property
    def scales(self) -> "TensorSpec":
        """What is written beside a matrix that is written in FP8: a scale for each block."""
        grid = tuple(-(-size // FP8_BLOCK) for size in self.shape)
        return TensorSpec(self.name + _SCALES, "F32", grid)

    @property
    def scaled(self) -> str:
        """The name of what this is the scales of; empty where its name says no such thing."""
        return self.name.removesuffix(_SCALES) if self.name.endswith(_SCALES) else ""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape as rows × columns: first axis × the rest, a vector as one column."""
        if not self.shape:
            return (1, 1)
        return (self.shape[0], math.prod(self.shape[1:]))
