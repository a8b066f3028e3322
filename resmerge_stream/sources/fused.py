"""How linear maps lie in a tensor otherwise than alone: gate and up in one, experts turned.

Each is a linear map of its own, and has a head of its own: decomposed apart, and as a layer of its
own would store it, a fused checkpoint gives the bytes that its split form gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..specs import TensorSpec
from .store import StoredTensor

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
        turned: whether each is stored as (in, out): it is merged as its transpose.
    """

    names: tuple[str, ...]
    axis: int
    woven: bool = False
    turned: bool = False

    @property
    def in_rows(self) -> bool:
        """Whether each of them is one range of rows."""
        return self.axis == 0 and not self.woven

    def shape(self, m: int, n: int) -> tuple[int, int]:
        """Return rows and columns of each matrix as it is merged, of those in one of m × n."""
        count = len(self.names)
        rows, columns = (m // count, n) if self.axis == 0 else (m, n // count)
        return (columns, rows) if self.turned else (rows, columns)

    def place(self, number: int, m: int, n: int) -> tuple[slice, slice]:
        """Return which rows and columns of m × n are a matrix's, as they are stored."""
        count, size = len(self.names), (m, n)[self.axis] // len(self.names)
        own = slice(number * size, (number + 1) * size)
        if self.woven:
            own = slice(number, None, count)
        return (own, slice(None)) if self.axis == 0 else (slice(None), own)


def fused_in(
    spec: TensorSpec, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Fused | None:
    """Return how linear maps lie in a tensor; None where it is one alone, or that is not known.

    The way is told by both projections: the shape of the one down says which axis of the other has
    gate and up. In a stack whose last axis has them, all maps are stored as (in, out).

    Args:
        spec: of a matrix or a stack of them.
        tensors: of its checkpoint.
        config: of its checkpoint.
    """
    both = tensors.get(spec.name.replace(_DOWN, _GATE_UP))
    down = tensors.get(spec.name.replace(_GATE_UP, _DOWN))
    if both is None or down is None or both is down:
        return None
    is_down, is_stack = down.spec.name == spec.name, len(spec.shape) == 3
    if not len(both.spec.shape) == len(down.spec.shape) == len(spec.shape):
        return None
    m, n = both.spec.shape[-2:]
    rows, columns = down.spec.shape[-2:]
    woven = is_stack and str(config.get("model_type")) in _WOVEN
    if (m, n) == (2 * columns, rows):
        return None if is_down else Fused(("gate", "up"), 0, woven)
    if (m, n) != (columns, 2 * rows):
        return None
    if is_down:
        return Fused(("down",), 1, turned=True) if is_stack else None
    return Fused(("gate", "up"), 1, woven, turned=is_stack)
