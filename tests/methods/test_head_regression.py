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


def exact_head(delta, k):
    """Return σ and V of the k leading triplets, by a full SVD."""
    _, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return S[:k], Vt[:k].T


def krylov_head(delta, k, steps):
    """Return ‖Δv‖ and V of the leading Ritz vectors of a block Krylov space, as it is defined.

    K = [ΔΩ, (ΔΔᵀ)ΔΩ, …]; V are the right singular vectors of QᵀΔ, Q a basis of K. What a block
    adds below 1e-5 of its size counts as nothing.
    """
    k = min(k, *delta.shape)
    start = torch.randn(k, delta.shape[1], generator=torch.Generator().manual_seed(0x5EED))
    block, Q = np.linalg.qr(start.double().numpy().T)[0], np.zeros((len(delta), 0))
    for _ in range(steps):
        image = delta @ block
        for _ in range(2):
            rest = image - Q @ (Q.T @ image)
            U, S, _ = np.linalg.svd(rest, full_matrices=False)
            new = U[:, 1e-5 * np.linalg.norm(image) < S]
        if not new.size:
            break
        Q = np.linalg.qr(np.hstack([Q, new]))[0]
        block = np.linalg.svd(delta.T @ new, full_matrices=False)[0]
    _, S, Vt = np.linalg.svd(Q.T @ delta, full_matrices=False)
    V = Vt[: min(k, np.count_nonzero(S[0] / 1e6 < S))].T
    return np.linalg.norm(delta @ V, axis=0), V


def krylov_of(steps):
    """Return `krylov_head` of so many steps."""
    return lambda delta, k: krylov_head(delta, k, steps)


def reference(deltas, *, k=16, mu=0.03, head=exact_head):
    """Return ΔW as the normal equations of the regression say, by one n × n solve."""
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
        S, V = head(delta, k)
        vote = min(1.0, norm / (0.05 * max(norms)))
        C = (V * (vote * S / S.max()) ** 2) @ V.T
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
def test_exact_heads_give_the_normal_equations_where_there_is_a_gap(shape, count):
    """With σ_k/σ_(k+1) ≥ 1.02 and exact heads the update is exact to 1e-6 before the cast."""
    number = SHAPES.index(shape) * 5 + count
    k = (4, 16, 8)[number % 3]
    gap = (1.025, 1.1, 1.5, 3.0)[number % 4]
    base, experts = draw(*shape, count, k=k, gap=gap, seed=number)

    got, update = update_of(base, experts, method="head_regression", rank=k, steps="exact")

    expected = torch.from_numpy(reference(deltas_of(base, experts), k=k))
    assert update.rule == "head_regression"
    assert relative(got, expected) <= 1e-6


SPECTRA = {
    "noise": None,
    "slow": lambda i: (i + 1.0) ** -0.7,
    "quick": lambda i: 0.8**i,
    "one strong": lambda i: np.where(i == 0, 50.0, 1 - 0.3 * i / len(i)),
    "rank 5": lambda i: (i < 5) * (1 - 0.1 * i),
    "rank 25": lambda i: (i < 25) * (1 - 0.02 * i),
    "rank 5 and a trace": lambda i: np.where(i < 5, 1 - 0.1 * i, 1e-4),
    "all equal": lambda i: np.ones(len(i)),
    "nearly equal": lambda i: 1 - 0.1 * i / len(i),
}


def shaped(m, n, kind, random):
    """Return a matrix with a spectrum of SPECTRA, float32."""
    values = SPECTRA[kind]
    if values is None:
        return torch.randn(m, n, generator=random)
    sigma = values(np.arange(min(m, n)))
    return with_spectrum(m, n, sigma.tolist(), random).float()


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(40, 90), (300, 1000), (1300, 220)])
def test_block_steps_give_what_their_definition_gives(shape, kind):
    """Whatever the spectrum, ΔW is what the definition says in float64."""
    random = torch.Generator().manual_seed(shape[0])
    experts = [shaped(*shape, kind, random) for _ in range(2)]

    got, _ = update_of(torch.zeros(shape), experts, method="head_regression", resident=False)

    deltas = [expert.double().numpy() for expert in experts]
    expected = torch.from_numpy(reference(deltas, head=krylov_of(3)))
    # Without a gap between the last direction that counts and the next, the limit is E1's other.
    assert relative(got, expected) <= (1e-5 if kind in {"noise", "nearly equal"} else 2e-6)


def test_directions_that_nothing_tells_apart_are_named():
    """Where the last direction is as strong as the next to float32, the report says so."""
    random = torch.Generator().manual_seed(0)
    experts = [with_spectrum(300, 1000, [50.0] + [1.0] * 299, random).float() for _ in range(2)]

    _, update = update_of(torch.zeros(300, 1000), experts, method="head_regression")

    assert "not unique" in update.warnings[0]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_more_steps_come_closer_to_exact_heads(steps):
    """Any number of steps is what it is defined as, and each step halves the way at least."""
    base, experts = draw(300, 1000, 2, k=16, gap=1.2, seed=11)
    deltas = deltas_of(base, experts)
    exact = torch.from_numpy(reference(deltas))

    got, update = update_of(base, experts, method="head_regression", steps=steps)
    fewer, _ = update_of(base, experts, method="head_regression", steps=max(steps - 1, 1))

    expected = torch.from_numpy(reference(deltas, head=krylov_of(steps)))
    assert relative(got, expected) <= 1e-6
    assert update.gates["solver"]["name"] == "krylov"
    assert update.gates["solver"]["steps"] == steps
    assert steps == 1 or relative(got, exact) <= relative(fewer, exact)


def test_the_residual_says_how_far_the_directions_are_from_singular_ones():
    """It is the largest ‖Δv − σu‖ relative to σ₁, with u = Qw and σ from QᵀΔ."""
    base, experts = draw(60, 70, 1, k=4, gap=1.1, seed=12)
    (delta,) = deltas_of(base, experts)

    _, update = update_of(base, [experts[0], base + 0.5 * (experts[0] - base)],
                          method="head_regression", rank=4)  # fmt: skip

    lengths, V = krylov_head(delta, 4, 3)
    image = delta.T @ (delta @ V)
    wanted = np.linalg.norm(image - V * lengths**2, axis=0) / lengths.max() ** 2
    assert wanted.max() / 2 <= update.gates["solver"]["residual"] <= 10 * np.sqrt(wanted.max())
    assert update.gates["sigma"][0] == pytest.approx(sorted(lengths, reverse=True), rel=1e-5)


@pytest.mark.parametrize("mu", [0.003, 0.1, 10.0])
def test_mu_pulls_towards_the_backbone(mu):
    """μ is the weight of the backbone in the regression."""
    base, experts = draw(60, 70, 3, k=4, gap=1.5, seed=1)

    got, _ = update_of(base, experts, method="head_regression", rank=4, mu=mu)

    deltas = deltas_of(base, experts)
    expected = torch.from_numpy(reference(deltas, k=4, mu=mu, head=krylov_of(3)))
    assert relative(got, expected) <= 1e-6


def test_the_report_says_how_well_each_constraint_is_met():
    """Before and after are ‖(X − Δ_i)V_i q_i‖ relative to the target, of the backbone and of ΔW."""
    base, experts = draw(60, 70, 3, k=4, gap=1.5, seed=2)
    deltas = deltas_of(base, experts)

    got, update = update_of(base, experts, method="head_regression", rank=4)

    gates = update.gates
    B = gates["a"] * sum(deltas)
    for i, delta in enumerate(deltas):
        S, V = krylov_head(delta, 4, 3)
        V = V * (S / S.max())
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

    def merged(deltas, steps):
        deltas = [delta.float() for delta in deltas]
        got, _ = update_of(torch.zeros(m, n), deltas, method="head_regression", rank=4, steps=steps)
        return got.double()

    exact = merged([U @ e @ V.T for e in experts], "exact")
    assert relative(exact, U @ merged(experts, "exact") @ V.T) <= 1e-4
    # A start is not turned with the inputs.
    assert relative(merged([U @ e for e in experts], "3"), U @ merged(experts, "3")) <= 1e-4


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
    expected = torch.from_numpy(reference(deltas, k=4, head=krylov_of(3)))
    assert relative(got, expected) <= 1e-6
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
