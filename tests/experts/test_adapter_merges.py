"""Two papers' merges of LoRA adapters, against what defines them in other words."""

import pytest
import torch

from benchmarks.quality.adapters import (
    at_mean_length,
    calibrated,
    compressed,
    cut,
    merged,
    shared_bases,
)
from resmerge_stream.maths.low_rank import LowRank
from resmerge_stream.methods import build_method

SUM = build_method("task_arithmetic", {})


def adapters(count: int = 3, *, m: int = 12, n: int = 9, rank: int = 2) -> list[LowRank]:
    """Adapters of one matrix, one longer than the other, all with one output in common."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    common = normal(m, 1)
    return [LowRank((i + 1) * (normal(m, rank) + common), normal(n, rank)) for i in range(count)]


def whole(update: LowRank) -> torch.Tensor:
    """Δ as a matrix."""
    return update.left @ update.right.T


def test_pico_divides_by_what_is_shared() -> None:
    """Pico's S is the inverse of I + (N − 1) G / tr G, G the sum of the B·Bᵀ: no SVD needed."""
    own = adapters()
    G = sum(one.left @ one.left.T for one in own)
    S = torch.linalg.inv(torch.eye(12, dtype=torch.float64) + (len(own) - 1) * G / G.trace())

    found = calibrated(own)

    for one, before in zip(found, own, strict=True):
        torch.testing.assert_close(whole(one), S @ whole(before))


def test_pico_gives_the_merge_the_adapters_mean_length() -> None:
    """Whatever the merge made, it is as long as the adapters are on average."""
    own = adapters()

    update = at_mean_length(merged(SUM, own), own)

    lengths = [float(whole(one).norm()) for one in own]
    assert float(update.norm()) == pytest.approx(sum(lengths) / 3)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_each_shared_basis_is_the_best_beside_the_other(beta: float) -> None:
    """Given V, no orthonormal U holds more of the scaled updates than what is found; nor V."""
    own = adapters()
    mean = sum(whole(one).norm() for one in own) / len(own)
    scaled = [(beta + (1 - beta) * mean / whole(one).norm()) * whole(one) for one in own]

    U, V = shared_bases(own, 3, beta=beta)

    held = sum((U.T @ x @ V).square().sum() for x in scaled)
    for side in (torch.cat([x @ V for x in scaled], 1), torch.cat([x.T @ U for x in scaled], 1)):
        most = torch.linalg.svdvals(side)[:3].square().sum()
        torch.testing.assert_close(held, most, rtol=1e-6, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(3, dtype=torch.float64))


def test_compress_then_merge_of_one_adapter_is_its_best_approximation() -> None:
    """With nothing to share, the bases are the adapter's own singular vectors."""
    own = adapters(1, rank=5)

    update = compressed(SUM, own, rank=3, beta=0.25)

    torch.testing.assert_close(update, cut(whole(own[0]), 3), rtol=1e-5, atol=1e-5)


def test_compress_then_merge_loses_nothing_where_all_fit() -> None:
    """Bases as wide as all adapters together hold their sum."""
    own = adapters()

    update = compressed(SUM, own, rank=6, beta=0.25)

    torch.testing.assert_close(update, sum(map(whole, own)), rtol=1e-5, atol=1e-5)
