"""Head regression against its formulas in float64, and what must hold whatever the numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.matrices import orthonormal, relative, spectrum, update_of, with_spectrum

# Small ones go to the dense solver; the others cross what cuts products and solvers into pieces.
SHAPES = (
    (5, 40), (40, 5), (24, 24), (48, 64), (112, 64), (97, 130), (128, 300), (300, 128),
    (160, 1500), (700, 110), (257, 400),
)  # fmt: skip


def reference(deltas, *, k=16, mu=0.03):
    """Return ΔW as the normal equations of the regression say, by full SVDs and one n × n solve."""
    deltas = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    deltas = [delta for delta in deltas if delta.any()]
    norms = [np.linalg.norm(delta) for delta in deltas]
    pairs = [
        np.vdot(deltas[i], deltas[j]) / (norms[i] * norms[j])
        for i in range(len(deltas))
        for j in range(i)
    ]
    s = min(max(np.mean(pairs), 0.0), 1.0) if pairs else 0.0
    B = sum(deltas) / (1 + (len(deltas) - 1) * s)
    n = B.shape[1]
    left, right = mu * B, mu * np.eye(n)
    for delta, norm in zip(deltas, norms, strict=True):
        _, S, Vt = np.linalg.svd(delta, full_matrices=False)
        vote = min(1.0, norm / (0.05 * max(norms)))
        C = (Vt[:k].T * (vote * S[:k] / S[0]) ** 2) @ Vt[:k]
        left, right = left + delta @ C, right + C
    return np.linalg.solve(right.T, left.T).T


def draw(m, n, count, *, k, gap, seed, shared=0.6):
    """Return a base and experts with a gap at k and partly shared directions, float32."""
    random = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(m, n, generator=random, dtype=torch.float64)
    sigma = torch.tensor(spectrum(min(m, n), min(k, m, n), gap, 0.5), dtype=torch.float64)
    common = torch.randn(m, n, generator=random, dtype=torch.float64)
    experts = []
    for _ in range(count):
        own = torch.randn(m, n, generator=random, dtype=torch.float64)
        U, _, Vt = torch.linalg.svd(shared * common + own, full_matrices=False)
        experts.append((base + 1e-2 * (U * sigma) @ Vt).float())
    return base.float(), experts


def deltas_of(base, experts):
    """Return the task vectors that the stored weights have, float64."""
    return [(expert.double() - base.double()).numpy() for expert in experts]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_equals_the_normal_equations_where_there_is_a_gap(shape, count):
    """With σ_k/σ_(k+1) ≥ 1.02 the update is exact to 1e-6 before the cast."""
    number = SHAPES.index(shape) * 5 + count
    k = (4, 16, 8)[number % 3]
    gap = (1.025, 1.1, 1.5, 3.0)[number % 4]
    base, experts = draw(*shape, count, k=k, gap=gap, seed=number)

    got, update = update_of(base, experts, method="head_regression", rank=k)

    expected = torch.from_numpy(reference(deltas_of(base, experts), k=k))
    assert update.rule == "head_regression"
    assert relative(got, expected) <= 1e-6


@pytest.mark.parametrize("mu", [0.003, 0.1, 10.0])
def test_mu_pulls_towards_the_backbone(mu):
    """μ is the weight of the backbone in the regression."""
    base, experts = draw(60, 70, 3, k=4, gap=1.5, seed=1)

    got, _ = update_of(base, experts, method="head_regression", rank=4, mu=mu)

    expected = torch.from_numpy(reference(deltas_of(base, experts), k=4, mu=mu))
    assert relative(got, expected) <= 1e-6


def test_the_report_says_how_well_each_constraint_is_met():
    """Before and after are ‖(X − Δ_i)V_i q_i‖ relative to the target, of the backbone and of ΔW."""
    base, experts = draw(60, 70, 3, k=4, gap=1.5, seed=2)
    deltas = deltas_of(base, experts)

    got, update = update_of(base, experts, method="head_regression", rank=4)

    gates = update.gates
    B = gates["a"] * sum(deltas)
    for i, delta in enumerate(deltas):
        _, S, Vt = np.linalg.svd(delta, full_matrices=False)
        V = Vt[:4].T * (S[:4] / S[0])
        for key, X in (("residual_before", B), ("residual_after", got.double().numpy())):
            wanted = np.linalg.norm((X - delta) @ V) / np.linalg.norm(delta @ V)
            assert gates[key][i] == pytest.approx(wanted, abs=1e-5)
        assert gates["residual_after"][i] < gates["residual_before"][i]
    assert gates["rank"] == 4
    assert len(gates["sigma"][0]) == 4
    assert 1 < gates["condition"] <= (3 + 0.03) / 0.03


def test_the_report_says_how_far_the_experts_agree():
    """a is 1/(1 + (N−1)·s) with s the mean cosine of the pairs."""
    base, experts = draw(40, 50, 3, k=4, gap=1.5, seed=3)
    deltas = deltas_of(base, experts)

    _, update = update_of(base, experts, method="head_regression", rank=4)

    cosines = [
        np.vdot(deltas[i], deltas[j]) / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j])
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert update.gates["agreement"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert update.gates["a"] == pytest.approx(1 / (1 + 2 * np.mean(cosines)), abs=1e-6)


def test_opposed_experts_leave_the_sum_at_its_length():
    """A negative mean cosine counts as none: a is 1."""
    base, (expert, _) = draw(40, 50, 2, k=4, gap=1.5, seed=4)
    opposed = base - 0.5 * (expert - base)

    _, update = update_of(base, [expert, opposed], method="head_regression", rank=4)

    assert update.gates["agreement"] == 0
    assert update.gates["a"] == 1


@given(st.integers(5, 60), st.integers(5, 60), st.integers(1, 5), st.integers(0, 2**31))
def test_copies_of_one_expert_give_that_expert(m, n, count, seed):
    """Any number of equal experts merges to the expert."""
    random = torch.Generator().manual_seed(seed)
    expert = torch.randn(m, n, generator=random)

    got, _ = update_of(torch.zeros(m, n), [expert] * count, method="head_regression")

    assert relative(got, expert) <= 2e-6


@given(st.integers(5, 60), st.integers(5, 60), st.integers(0, 2**31))
def test_experts_that_changed_nothing_leave_the_group(m, n, seed):
    """A zero task vector changes neither N nor the result."""
    base, experts = draw(m, n, 2, k=4, gap=1.3, seed=seed)

    alone, _ = update_of(base, experts, method="head_regression", rank=4)
    beside, update = update_of(
        base, [experts[0], base, experts[1]], method="head_regression", rank=4
    )

    assert relative(beside, alone) <= 1e-6
    assert update.gates["residual_after"][1] is None


def test_one_changed_expert_among_unchanged_ones_passes_through():
    """Where all others equal the base, the merge is the one that does not."""
    base, (expert,) = draw(30, 40, 1, k=4, gap=1.3, seed=5)

    got, _ = update_of(base, [base, expert, base], method="head_regression")

    assert torch.equal(got, expert - base)


@given(st.permutations(range(4)), st.integers(0, 2**31))
def test_the_order_of_the_experts_does_not_matter(order, seed):
    """Another order gives the same update up to rounding."""
    base, experts = draw(40, 30, 4, k=4, gap=1.3, seed=seed)

    first, _ = update_of(base, experts, method="head_regression", rank=4)
    second, _ = update_of(base, [experts[i] for i in order], method="head_regression", rank=4)

    assert relative(second, first) <= 1e-6


@given(st.integers(6, 40), st.integers(6, 40), st.integers(0, 2**31))
def test_rotating_inputs_and_outputs_rotates_the_update(m, n, seed):
    """merge(U Δ_i Vᵀ) is U merge(Δ_i) Vᵀ: no coordinate is special."""
    random = torch.Generator().manual_seed(seed)
    _, drawn = draw(m, n, 3, k=4, gap=1.3, seed=seed)
    experts = [expert.double() for expert in drawn]
    U, V = orthonormal(m, m, random), orthonormal(n, n, random)

    plain, _ = update_of(
        torch.zeros(m, n), [e.float() for e in experts], method="head_regression", rank=4
    )
    turned, _ = update_of(
        torch.zeros(m, n),
        [(U @ e @ V.T).float() for e in experts],
        method="head_regression",
        rank=4,
    )

    assert relative(turned, U @ plain.double() @ V.T) <= 1e-4


def test_scaling_every_expert_scales_the_update():
    """The update is of degree one in the task vectors."""
    random = torch.Generator().manual_seed(0)
    experts = [with_spectrum(40, 30, [3, 2, 1, 0.5], random).float() for _ in range(3)]

    large, _ = update_of(torch.zeros(40, 30), experts, method="head_regression", rank=2)
    small, _ = update_of(
        torch.zeros(40, 30), [2.0**-20 * e for e in experts], method="head_regression", rank=2
    )

    assert relative(small * 2.0**20, large) <= 1e-6


def test_a_negligible_expert_has_a_small_vote_and_a_warning():
    """An expert of a thousandth of the others' length has 2 % of a vote, and is named."""
    base, experts = draw(60, 70, 3, k=4, gap=1.5, seed=6)
    tiny = base + 1e-3 * (experts[2] - base)

    got, update = update_of(base, [*experts[:2], tiny], method="head_regression", rank=4)

    deltas = deltas_of(base, [*experts[:2], tiny])
    assert relative(got, torch.from_numpy(reference(deltas, k=4))) <= 1e-6
    assert "expert 3" in update.warnings[0]


def test_every_share_of_a_vote_above_the_floor_is_a_whole_one():
    """An expert of a tenth of the longest one's length has its whole vote and no warning."""
    base, experts = draw(60, 70, 2, k=4, gap=1.5, seed=7)

    _, update = update_of(
        base, [experts[0], base + 0.1 * (experts[1] - base)], method="head_regression", rank=4
    )

    assert update.warnings == ()


@pytest.mark.parametrize("shape", [(30, 20), (1500, 700), (130, 9000)])
def test_keeping_the_task_vectors_or_not_gives_the_same_bits(shape):
    """Resident and re-read task vectors lead to bit-identical updates and gates."""
    base, experts = draw(*shape, 2, k=4, gap=1.5, seed=8) if min(shape) < 200 else _cheap(*shape)

    kept, one = update_of(base, experts, method="head_regression", rank=4, resident=True)
    reread, two = update_of(base, experts, method="head_regression", rank=4, resident=False)

    assert torch.equal(kept, reread)
    assert one.gates == two.gates


def _cheap(m, n):
    """Return experts with four strong directions and noise, without an SVD."""
    random = torch.Generator().manual_seed(0)
    experts = [
        torch.randn(m, 4, generator=random) @ torch.randn(4, n, generator=random)
        + 0.1 * torch.randn(m, n, generator=random)
        for _ in range(2)
    ]
    return torch.zeros(m, n), experts
