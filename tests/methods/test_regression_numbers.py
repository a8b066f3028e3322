"""SWUDI and SAR against their formulas in float64, and what Core Space comes to."""

import math

import numpy as np
import pytest
import torch

from resmerge_stream.methods import build_method
from tests.support.method_tools import MATRIX, experts_of, made_up, relative, run_method

SHAPES = [(24, 18), (18, 24), (12, 40), (130, 50)]


def swudi64(deltas, *, time, keep):
    """Return the filtered normal equations of the interference loss, by one n × n eigenproblem."""
    deltas = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    squares = [(delta**2).sum() for delta in deltas]
    C = sum(d.T @ d / q for d, q in zip(deltas, squares, strict=True))
    D = sum(d @ d.T @ d / q for d, q in zip(deltas, squares, strict=True))
    values, V = np.linalg.eigh(C)
    values = np.maximum(values, 1e-8)
    f = 1 - np.exp(-values * time)
    f[: len(f) - math.ceil(keep * len(f) - 1e-9)] = 0
    start = sum(deltas)
    return start - start @ V @ np.diag(f) @ V.T + D @ V @ np.diag(f / values) @ V.T


def steps64(deltas, *, rate, count):
    """Return WUDI's loss minimised from the sum by `count` plain gradient steps of size `rate`."""
    deltas = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    X = sum(deltas)
    for _ in range(count):
        X = X - rate * sum((X - d) @ d.T @ d / (d**2).sum() for d in deltas)
    return X


def sar64(base, deltas, *, ratio, variant):
    """Return Σ U Uᵀ Δ_k V Vᵀ by full SVDs."""
    U, S, Vt = np.linalg.svd(np.asarray(base, dtype=np.float64), full_matrices=False)
    k = max(1, int(ratio * len(S) + 1e-9))
    r = len(S) if variant == "release" else k
    P, Q = U[:, :r] @ U[:, :r].T, Vt[:r].T @ Vt[:r]
    total = np.zeros(base.shape)
    for delta in deltas:
        u, s, vt = np.linalg.svd(np.asarray(delta, dtype=np.float64), full_matrices=False)
        total += P @ ((u[:, :k] * s[:k]) @ vt[:k]) @ Q
    return total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("time", "keep"), [(300.0, 0.85), (300.0, 1.0), (3.0, 0.4), (0.0, 1.0)])
def test_swudi_is_its_filtered_normal_equations(shape, time, keep):
    """Whatever side is longer, the factored form is the n × n solution."""
    base, deltas = made_up(*shape, 3)

    method = build_method("swudi", {"time": time, "keep": keep})
    update, _ = run_method(method, base, experts_of(base, deltas))

    deltas = [((base + d) - base).numpy() for d in deltas]
    assert relative(update, torch.from_numpy(swudi64(deltas, time=time, keep=keep))) < 1e-5


def test_keeping_every_direction_is_gradient_flow_on_wudis_loss():
    """`keep: 1` follows many small steps of gradient descent from the sum."""
    base, deltas = made_up(20, 16, 3)

    method = build_method("swudi", {"time": 20.0, "keep": 1.0})
    update, _ = run_method(method, base, experts_of(base, deltas))

    deltas = [((base + d) - base).numpy() for d in deltas]
    assert relative(update, torch.from_numpy(steps64(deltas, rate=0.002, count=10_000))) < 2e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 1.0])
def test_sar_is_a_truncation_between_two_projections(shape, variant, ratio):
    """Both variants are U Uᵀ Δ_k V Vᵀ, added up; they differ in how many of U and V there are."""
    base, deltas = made_up(*shape, 3)

    method = build_method("sar", {"variant": variant, "ratio": ratio})
    update, _ = run_method(method, base, experts_of(base, deltas))

    deltas = [((base + d) - base).numpy() for d in deltas]
    expected = sar64(base.numpy(), deltas, ratio=ratio, variant=variant)
    assert float((update.double() - torch.from_numpy(expected)).norm()) < 1e-5 * sum(
        np.linalg.norm(d) for d in deltas
    )


def test_sar_leaves_everything_else_the_bases():
    """Embeddings and vectors are not merged, as in the release."""
    base, deltas = made_up(8, 6, 2)

    update, decided = run_method(
        "sar", base, experts_of(base, deltas), name="model.embed_tokens.weight"
    )

    assert decided.rule == "base"
    assert not update.any()


def test_core_space_of_adapters_is_what_the_whole_matrices_give():
    """TSV-M inside the adapters' joint subspace is `tsv_m`: why there is no `core_space`."""
    random = np.random.default_rng(0)
    m, n, r, count = 30, 40, 3, 3
    pairs = [(random.normal(size=(m, r)), random.normal(size=(r, n))) for _ in range(count)]
    U = np.linalg.svd(np.concatenate([B for B, _ in pairs], axis=1), full_matrices=False)[0]
    Vt = np.linalg.svd(np.concatenate([A for _, A in pairs]), full_matrices=False)[2]
    cores = [np.linalg.svd(U.T @ B @ A @ Vt.T) for B, A in pairs]

    def polar(columns):
        left, _, right = np.linalg.svd(columns, full_matrices=False)
        return left @ right

    left = polar(np.concatenate([u[:, :r] for u, _, _ in cores], axis=1))
    right = polar(np.concatenate([vt[:r].T for _, _, vt in cores], axis=1))
    sigma = np.concatenate([s[:r] for _, s, _ in cores])
    core = U @ ((left * sigma) @ right.T) @ Vt

    experts = [torch.from_numpy(B @ A).float() for B, A in pairs]
    update, _ = run_method("tsv_m", torch.zeros(m, n), experts, name=MATRIX)

    assert relative(update, torch.from_numpy(core)) < 1e-5
