"""Matrices with a chosen spectrum, and the merge of one matrix without files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods import Site, Update, build_method
from resmerge_stream.specs import TensorSpec

NAMES = {
    "attention": "model.layers.0.self_attn.q_proj.weight",
    "ffn": "model.layers.0.mlp.up_proj.weight",
    "other": "model.layers.0.adapter.weight",
}


def orthonormal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """Return random orthonormal columns, float64."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=random, dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, sigma: Sequence[float], random: torch.Generator) -> Tensor:
    """Return an m × n float64 matrix with the given singular values and random directions."""
    values = torch.tensor(sigma, dtype=torch.float64)
    left, right = orthonormal(m, len(sigma), random), orthonormal(n, len(sigma), random)
    return (left * values) @ right.T


def spectrum(short: int, rank: int, gap: float, energy: float) -> list[float]:
    """Return singular values: `rank` slightly different ones, then a tail below a gap.

    Args:
        short: how many.
        rank: size of the head.
        gap: σ_k / σ_(k+1).
        energy: the head's share of the squared sum; the tail is scaled down to it where the gap
            allows, and never up.
    """
    head = [1.1 + 0.2 * (rank - i) for i in range(rank)]
    tail = [head[-1] / gap * (1 - 0.6 * i / short) for i in range(short - rank)]
    largest = sum(s * s for s in head) * (1 - energy) / energy
    total = sum(s * s for s in tail)
    factor = min(1.0, (largest / total) ** 0.5) if total else 1.0
    return head + [s * factor for s in tail]


def update_of(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    method: str = "resmerge",
    family: str = "attention",
    resident: bool = True,
    name: str | None = None,
    weights: Sequence[float] | None = None,
    **parameters: Any,
) -> tuple[Tensor, Update]:
    """Return ΔW before the cast, as a merge computes it, and what the method decided."""
    built = build_method(method, parameters)
    vectors = TaskVectors(base, experts, Workspace(torch.device("cpu")), resident=resident)
    spec = TensorSpec(name or NAMES[family], "F32", tuple(base.shape))
    factors = tuple(weights or [1.0] * len(experts))
    update = built.merge(vectors, Site(built.rule_for(spec, len(experts)), factors))
    blocks = [update.rows(rows, vectors.stack(rows)).clone() for rows in vectors.blocks()]
    return torch.cat(blocks), update


def relative(got: Tensor, expected: Tensor) -> float:
    """Return ‖got − expected‖ / ‖expected‖ in float64."""
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))
