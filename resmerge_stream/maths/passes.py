"""What a merge does to every value, each in one pass over memory.

On the CPU by compiled loops (`kernels`), for the dtypes that most models have; by torch's
operations elsewhere, with the same bits in what is written. Sums of products agree to float32's
resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

# float32 products are summed in chunks of so many, these in float64: `torch.dot` over a whole FFN
# matrix is off by up to 1 % on a CPU, and y @ Δ over 4,864 rows by 1.2e-6, in chunks by 2.9e-7.
#
# What torch 2.13 does slowly on a CPU, ns an element on one thread: `where` with a number 2.5 and a
# comparison 0.37 (numpy's 0.05); `count_nonzero` of floats 4.4, of the same bits as int32 0.26;
# `vector_norm` of infinite order 2.9, `aminmax` 0.16; `isfinite().all()` 2.6. Tried in vain: `sub`
# of bf16 and float32 (0.6; copying, then subtracting 0.54), and Σ aᵢ Δᵢ as one product (0.53
# instead of 0.61, with other bits).
CHUNK = 4096
# Entries whose keys stay in the cache while they are sorted.
_SORTED_ENTRIES = 1 << 15


@dataclass(frozen=True, slots=True)
class Drop:
    """Which entries of each Δᵢ stay, by chance: those whose random number is below a density.

    Attributes:
        keys: of the random numbers, one an expert.
        first: place of the matrix's first entry; see `chance`.
        densities: p, one an expert; 1 and more keep everything.
        factors: of what is kept, one an expert.
    """

    keys: tuple[int, ...]
    first: int
    densities: tuple[float, ...]
    factors: tuple[float, ...]

    def of_block(self, rows: slice, stack: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Return every Δ̂ᵢ of some rows from the Δᵢ there, (b, n) each."""
        place = self.first + rows.start * stack[0].shape[1]
        return [
            delta if density >= 1 else dropped(delta, key, place, density, factor)
            for delta, key, density, factor in zip(
                stack, self.keys, self.densities, self.factors, strict=True
            )
        ]

    def arguments(self, start: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Return keys, place, densities and factors as the compiled loops take them."""
        singles = np.array([self.densities, self.factors], np.float32)
        return np.array(self.keys, np.int64), self.first + start, singles[0], singles[1]


def is_plain(*tensors: Tensor) -> bool:
    """Return whether compiled loops can work on these tensors: on the CPU, without holes."""
    return all(values.device.type == "cpu" and values.is_contiguous() for values in tensors)


def _loops_for(*tensors: Tensor) -> ModuleType | None:
    """Return the compiled loops if they can work on these tensors."""
    if not is_plain(*tensors):
        return None
    from . import kernels  # late: planning needs none

    return kernels


def _flat(values: Tensor) -> np.ndarray:
    """Return values as numpy has them: bfloat16 as its bits."""
    bits = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    found: np.ndarray = bits.numpy().reshape(-1)
    return found


def upcast(values: Tensor) -> Tensor:
    """Return values as float32; the tensor itself if it has that dtype."""
    kernels = _loops_for(values) if values.dtype == torch.bfloat16 else None
    if kernels is None:
        return values.to(torch.float32)
    out = torch.empty(values.shape)
    kernels.upcast(_flat(values), _flat(out))
    return out


def subtract(values: Tensor, base: Tensor, out: Tensor) -> None:
    """Write values − base.

    Args:
        values: any float dtype, any device.
        base: float32, same shape, on the device of `out`.
        out: float32, written over.
    """
    kernels = _loops_for(values, base, out) if values.dtype == torch.bfloat16 else None
    if kernels is None:
        out.copy_(values.to(out.device))
        out.sub_(base)
    else:
        kernels.subtracted(_flat(values), _flat(base), _flat(out))


def differences(
    base: Tensor, values: Sequence[Tensor], out: Tensor, *, all_pairs: bool
) -> Tensor | None:
    """Write Δᵢ = Wᵢ − W0 of all experts, and return ⟨Δᵢ, Δⱼ⟩.

    Args:
        base: W0 as stored.
        values: W as stored, same shape.
        out: Δ, float32, one more axis.
        all_pairs: or of i = j only; the others are zero then.

    Returns:
        float64, shape (N, N), each as `dsdot` adds it. None where there is no compiled loop for it.
    """
    if not values or any(stored.dtype != torch.bfloat16 for stored in (base, *values)):
        return None
    kernels = _loops_for(base, *values, *out)
    if kernels is None:
        return None
    products = torch.zeros(len(values), len(values), dtype=torch.float64)
    experts, outs = tuple(map(_flat, values)), tuple(map(_flat, out))
    kernels.differences(_flat(base), experts, outs, products.numpy(), all_pairs)
    return products + torch.tril(products, -1).T


def products(base: Tensor, values: Sequence[Tensor]) -> Tensor | None:
    """Return the products of W0 and all Δᵢ = Wᵢ − W0 with one another; nothing is kept of them.

    Args:
        base: W0 as stored.
        values: W as stored, same shape.

    Returns:
        float64, shape (N + 1, N + 1), each as `dsdot` adds it. None where there is no compiled loop
        for it.
    """
    if not values or any(stored.dtype != torch.bfloat16 for stored in (base, *values)):
        return None
    kernels = _loops_for(base, *values)
    if kernels is None:
        return None
    sums = torch.zeros(len(values) + 1, len(values) + 1, dtype=torch.float64)
    kernels.products(_flat(base), tuple(map(_flat, values)), sums.numpy())
    return sums + torch.tril(sums, -1).T


def combined(stack: Sequence[Tensor] | Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return Σ aᵢ Δᵢ, a new tensor: each product rounded, then added in order.

    Args:
        stack: Δ, float32, N tensors of one shape.
        coefficients: a.
    """
    first, *others = stack
    kernels = _loops_for(first, *others) if first.dtype == torch.float32 else None
    if kernels is None:
        total = first * coefficients[0]
        for delta, coefficient in zip(others, coefficients[1:], strict=True):
            # Not `add_(alpha=…)`, which rounds once on some processors and twice on others.
            total.add_(delta * coefficient)
        return total
    total = torch.empty_like(first)
    kernels.scaled(_flat(first), np.float32(coefficients[0]), _flat(total))
    for delta, coefficient in zip(others, coefficients[1:], strict=True):
        kernels.added(_flat(delta), np.float32(coefficient), _flat(total))
    return total


def summed(
    values: Sequence[Tensor], base: Tensor, coefficients: Sequence[float]
) -> tuple[Tensor, list[float]] | None:
    """Return Σ aᵢ (Wᵢ − W0) as `combined` gives it, and every ‖Wᵢ − W0‖²; no difference is kept.

    Args:
        values: W.
        base: W0, float32, same shape.
        coefficients: a.

    Returns:
        None where there is no compiled loop for it.
    """
    if any(stored.dtype != torch.bfloat16 for stored in values):
        return None
    kernels = _loops_for(base, *values)
    if kernels is None:
        return None
    total, squares = torch.empty_like(base), list[float]()
    W0, flat = _flat(base), _flat(total)
    for stored, a in zip(values, coefficients, strict=True):
        is_first = not squares
        squares.append(kernels.summand(_flat(stored), W0, np.float32(a), flat, is_first))
    return total, squares


def merged_sum(
    base: Tensor,
    values: Sequence[Tensor],
    coefficients: Sequence[float],
    own: float,
    out: Tensor,
    drop: tuple[Drop, int] | None = None,
) -> tuple[list[float], list[float]] | None:
    """Write W0 + Σ aᵢ (Wᵢ − W0) + e·W0, rounded to nearest: `summed` and `moved` in one pass.

    Args:
        base: W0 as stored.
        values: W as stored, same shape.
        coefficients: a.
        own: e; 0 where entries are dropped.
        out: the weights, same shape.
        drop: which entries of Wᵢ − W0 count, and where in the matrix the first of them stands.

    Returns:
        Every ‖Wᵢ − W0‖², and the sums of `moved`. None where there is no compiled loop for it.
    """
    if any(stored.dtype != torch.bfloat16 for stored in (base, out, *values)):
        return None
    kernels = _loops_for(base, out, *values)
    if kernels is None:
        return None
    squares, sums = np.zeros(len(values)), np.zeros(4)
    experts = tuple(map(_flat, values))
    factors = np.array(coefficients, np.float32)
    W0, merged = _flat(base), _flat(out)
    if drop is None:
        kernels.merged_sum(W0, experts, factors, np.float32(own), merged, squares, sums)
    else:
        from . import chance

        how, start = drop
        chance.dropped_sum(W0, experts, factors, *how.arguments(start), merged, squares, sums)
    return squares.tolist(), sums.tolist()


def dropped_lengths(
    base: Tensor, values: Sequence[Tensor], drop: Drop, start: int
) -> list[list[float]] | None:
    """Return ‖Wᵢ − W0‖₁ before and after entries are dropped, of each expert.

    Args:
        base: W0 as stored.
        values: W as stored, same shape.
        drop: which entries count.
        start: where in the matrix the first of these stands.

    Returns:
        None where there is no compiled loop for it.
    """
    if not values or any(stored.dtype != torch.bfloat16 for stored in (base, *values)):
        return None
    if not is_plain(base, *values):
        return None
    from . import chance

    lengths = np.zeros((len(values), 2))
    experts = tuple(map(_flat, values))
    chance.dropped_lengths(_flat(base), experts, *drop.arguments(start), lengths)
    found: list[list[float]] = lengths.tolist()
    return found


def moved(base: Tensor, update: Tensor, out: Tensor) -> list[float] | None:
    """Write base + update rounded to nearest, and return what that kept of the update.

    Args:
        base, update: float32, same shape.
        out: the weights.

    Returns:
        ‖ΔW‖², ⟨ΔW, K⟩, ‖K‖² and the number of nonzero K, with K = weights − base. None where there
        is no compiled loop for it.
    """
    if update.dtype != torch.float32 or out.dtype != torch.bfloat16:
        return None
    kernels = _loops_for(base, update, out)
    if kernels is None:
        return None
    sums = np.zeros(4)
    kernels.moved(_flat(base), _flat(update), _flat(out), sums)
    return [float(value) for value in sums]


def shrunk(values: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    """Return float32 values where their magnitude is at least a threshold, zero elsewhere.

    Args:
        values: any shape.
        threshold: a float32 number.
        out: written over, and returned; a new tensor when None.
    """
    out = torch.empty_like(values) if out is None else out
    kernels = _loops_for(values, out)
    if kernels is None:
        return out.copy_(torch.where(values.abs() >= threshold, values, 0))
    kernels.shrunk(_flat(values), np.float32(threshold), _flat(out))
    return out


def fractions(key: int, start: int, shape: tuple[int, ...]) -> Tensor:
    """Return the random numbers at consecutive places: float32 from [0, 1), on the CPU.

    See `resmerge_stream.maths.chance`.
    """
    from . import chance

    out = torch.empty(shape)
    chance.fractions(key, start, _flat(out))
    return out


def dropped(values: Tensor, key: int, start: int, density: float, factor: float = 1.0) -> Tensor:
    """Return factor·values where the random number at a value's place is below the density.

    Args:
        values: float32, any shape, any device.
        key, start: of the numbers.
        density: p.
        factor: of what is kept; the rest is zero.
    """
    if not is_plain(values):
        numbers = fractions(key, start, tuple(values.shape)).to(values.device)
        return (values * (numbers < density)).mul_(factor)
    from . import chance

    out = torch.empty_like(values)
    sizes = np.float32(density), np.float32(factor)
    chance.dropped(_flat(values), key, start, *sizes, _flat(out))
    return out


def dropped_by_rank(
    values: Tensor, key: int, start: int, chances: Tensor, *, inverse: bool
) -> Tensor:
    """Return the values whose random number is below the chance of their rank in the row.

    Args:
        values: float32, shape (b, n), any device. Equal magnitudes are ranked by their places.
        key, start: of the numbers.
        chances: from the smallest magnitude to the largest, float32, shape (n,), on the CPU.
        inverse: divide what is kept by its chance.
    """
    if not is_plain(values):
        ascending = values.abs().argsort(dim=1, stable=True)
        own = chances.to(values.device).expand_as(values)
        own = torch.empty_like(values).scatter_(1, ascending, own)
        numbers = fractions(key, start, tuple(values.shape)).to(values.device)
        kept = values * (numbers < own)
        return kept.div_(own) if inverse else kept
    from . import chance

    out, rows = torch.empty_like(values), values.numpy()
    # Numbers with their place below them are sorted in half the time of torch's stable order; in
    # parts, so that they stay in the cache.
    n = values.shape[1]
    height = max(_SORTED_ENTRIES // max(n, 1), 1)
    keys = np.empty((min(height, len(values)), n), np.int64)
    for first in range(0, len(values), height):
        part = slice(first, min(first + height, len(values)))
        order = keys[: part.stop - first]
        chance.ranking(rows[part], order)
        order.sort(axis=1)
        chance.dropped_by_rank(
            rows[part], key, start + first * n, chances.numpy(), inverse, order, out.numpy()[part]
        )
    return out


def l1_norm(values: Tensor) -> float:
    """Return ‖X‖₁ of a float32 tensor, summed in float64."""
    kernels = _loops_for(values)
    if kernels is not None:
        return float(kernels.l1_norm(_flat(values)))
    return float(values.abs().sum(dtype=torch.float64))


def shared_sum(
    stack: Sequence[Tensor] | Tensor, share: float, least: int, factor: float
) -> Tensor | None:
    """Return what `methods.consensus` makes of float32 tensors, or None without a compiled loop."""
    kernels = _loops_for(*stack)
    if kernels is None or any(delta.dtype != torch.float32 for delta in stack):
        return None
    out, rows = torch.empty_like(stack[0]), tuple(map(_flat, stack))
    kernels.shared_sum(rows, share, least, np.float32(factor), _flat(out))
    return out


def elected(
    deltas: Sequence[Tensor] | Tensor, weights: Sequence[float], normalize: bool, scale: float
) -> Tensor | None:
    """Return the disjoint merge of float32 tensors, or None where there is no compiled loop for it.

    See `resmerge_stream.methods.parts.election`.
    """
    kernels = _loops_for(*deltas)
    if kernels is None or any(delta.dtype != torch.float32 for delta in deltas):
        return None
    out, rows = torch.empty_like(deltas[0]), tuple(map(_flat, deltas))
    kernels.elected(rows, np.array(weights, float), normalize, np.float32(scale), _flat(out))
    return out


def shared_mean(
    stack: Sequence[Tensor] | Tensor, threshold: float, lone_factors: Sequence[float]
) -> Tensor | None:
    """Return the mean of each entry's changes above a threshold; see `methods.ram.shared_mean`.

    None where there is no compiled loop for it.
    """
    kernels = _loops_for(*stack)
    if kernels is None or any(delta.dtype != torch.float32 for delta in stack):
        return None
    out = torch.empty_like(stack[0])
    rows, factors = tuple(map(_flat, stack)), np.array(lone_factors, np.float32)
    kernels.shared_mean(rows, np.float32(threshold), factors, _flat(out))
    return out


def dsdot(x: Tensor, y: Tensor) -> float:
    """Return ⟨X, Y⟩ of two float32 tensors of one shape: float64 sums of float32 chunks."""
    kernels = _loops_for(x, y)
    if kernels is not None:
        return float(kernels.dsdot(_flat(x), _flat(y)))
    x, y = x.flatten(), y.flatten()
    whole = len(x) // CHUNK * CHUNK
    chunks = (values[:whole].view(-1, CHUNK) for values in (x, y))
    total = torch.linalg.vecdot(*chunks).sum(dtype=torch.float64)
    return float(total + x[whole:] @ y[whole:])


def gram(stack: Sequence[Tensor] | Tensor) -> Tensor:
    """Return ⟨X_i, X_j⟩ of N float32 tensors of one shape: float64, shape (N, N), on the CPU."""
    count = len(stack)
    if count and stack[0].device.type != "cpu":
        rows = torch.stack(tuple(stack)).flatten(1)
        whole = rows.shape[1] // CHUNK * CHUNK
        chunks = rows[:, :whole].view(len(rows), -1, CHUNK).transpose(0, 1)
        total = torch.bmm(chunks, chunks.transpose(1, 2)).sum(0, dtype=torch.float64)
        rest = rows[:, whole:]
        if rest.shape[1]:
            total = total + (rest @ rest.T).double()
        return total.cpu()
    products = torch.zeros(count, count, dtype=torch.float64)
    if not count:
        return products
    from . import kernels

    kernels.gram(tuple(_flat(values.contiguous()) for values in stack), products.numpy())
    return products + torch.tril(products, -1).T
