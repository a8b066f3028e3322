"""Matrices that lie in one tensor: the gate and up projections of a feed-forward block.

Each is a linear map of its own, and has a head of its own: decomposed apart, a fused checkpoint
gives what its split form gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..sources.checkpoint import StoredTensor
from ..specs import TensorSpec

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
# gpt-oss lets the columns of gate and up take turns (transformers: modeling_gpt_oss).
_WOVEN = frozenset({"gpt_oss"})


@dataclass(frozen=True, slots=True)
class Fused:
    """How matrices lie in one, or in each matrix of a stack.

    Attributes:
        names: of the matrices, in order.
        axis: 0 where they lie one below the other, 1 where side by side.
        woven: whether their rows or columns take turns.
    """

    names: tuple[str, ...]
    axis: int
    woven: bool = False

    @property
    def in_rows(self) -> bool:
        """Whether each of them is one range of rows."""
        return self.axis == 0 and not self.woven

    def shape(self, m: int, n: int) -> tuple[int, int]:
        """Return rows and columns of each of the matrices in one of m × n."""
        count = len(self.names)
        return (m // count, n) if self.axis == 0 else (m, n // count)

    def place(self, number: int, m: int, n: int) -> tuple[slice, slice]:
        """Return which rows and columns of m × n are a matrix's."""
        count, size = len(self.names), (m, n)[self.axis] // len(self.names)
        own = slice(number * size, (number + 1) * size)
        if self.woven:
            own = slice(number, None, count)
        return (own, slice(None)) if self.axis == 0 else (slice(None), own)


def fused_in(
    spec: TensorSpec, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Fused | None:
    """Return how gate and up lie in a tensor; None where it is one matrix, or that is not known.

    The way is told by the projection down, whose shape says which axis has both.

    Args:
        spec: of a matrix or a stack of them.
        tensors: of its checkpoint.
        config: of its checkpoint.
    """
    down = tensors.get(spec.name.replace(_GATE_UP, _DOWN))
    if _GATE_UP not in spec.name or down is None or len(down.spec.shape) != len(spec.shape):
        return None
    m, n = spec.shape[-2:]
    rows, columns = down.spec.shape[-2:]
    woven = len(spec.shape) == 3 and str(config.get("model_type")) in _WOVEN
    if (m, n) == (2 * columns, rows):
        return Fused(("gate", "up"), 0, woven)
    if (m, n) == (columns, 2 * rows):
        return Fused(("gate", "up"), 1, woven)
    return None
