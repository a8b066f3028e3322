"""Each method's numbers against its equation, written out in float64 with full SVDs."""

import math

import pytest
import torch

from resmerge_stream.errors import RecipeError
from resmerge_stream.methods import build_method
from resmerge_stream.recipe import parse_method
from tests.support.method_tools import experts_of, made_up, relative, run_method, ties64

AROUND_BASE = build_method("karcher", {"preset": "task_vectors"})


def polar64(matrix):
    """Return the orthogonal polar factor."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def svds(deltas):
    """Return the thin SVDs, float64."""
    return [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]


def test_ram_plus_enlarges_lone_changes():
    """ρᵢ = 1 + (r − 1)·min(1, shared/unique), counted over the model; shared entries average."""
    base = torch.zeros(1, 5)
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0]])
    second = torch.tensor([[5.0, 0.0, 0.0, 0.0, 7.0]])

    update, _ = run_method("ram_plus", base, [first, second])

    one, two = 1 + 0.05 * (1 / 3), 1 + 0.05 * 1.0
    expected = torch.tensor([[3.0, 2 * one, 3 * one, 4 * one, 7 * two]])
    assert relative(update, expected) < 1e-6


def test_ram_drops_what_is_below_its_threshold():
    """Changes of at most 1e-5 count as none."""
    base = torch.zeros(1, 3)
    update, _ = run_method("ram", base, [torch.tensor([[1e-5, 2e-5, 1.0]])])

    assert update.tolist() == [[0.0, pytest.approx(2e-5), 1.0]]


def test_consensus_keeps_what_two_experts_use():
    """mask_i = |Δ_i| > λ|τ − Δ_i|; two masks keep the entry."""
    base, deltas = made_up(10, 9, 3)
    total = sum(d.double() for d in deltas)
    users = sum((d.double().abs() > 0.4 * (total - d).abs()).double() for d in deltas)

    update, _ = run_method("consensus", base, experts_of(base, deltas))

    assert relative(update, 0.4 * total * (users >= 2)) < 1e-6


def test_slerp_walks_the_arc():
    """At the middle of the arc of two unit vectors the result has unit length."""
    _base, deltas = made_up(10, 9, 2)
    units = [d / d.norm() for d in deltas]

    update, _ = run_method("nuslerp", torch.zeros(10, 9), units)

    assert float(update.norm()) == pytest.approx(1.0, abs=1e-5)
    assert relative(update, polar_middle(*units)) < 1e-5


def polar_middle(a, b):
    """Return the normalised sum."""
    return (a + b) / (a + b).norm()


def test_karcher_of_two_is_slerp():
    """For two experts the Karcher mean is the middle of the arc."""
    _base, deltas = made_up(10, 9, 2)
    units = [d / d.norm() for d in deltas]

    slerp, _ = run_method("nuslerp", torch.zeros(10, 9), units)
    karcher, _ = run_method(AROUND_BASE, torch.zeros(10, 9), units)

    assert relative(karcher, slerp) < 1e-5


def test_karcher_solves_its_equation():
    """At the mean direction u the weighted logarithms of the directions add up to zero."""
    base, deltas = made_up(10, 9, 4)
    units = [(d / d.norm()).double() for d in deltas]

    update, _ = run_method(AROUND_BASE, base, experts_of(base, deltas))

    u = update.double() / update.double().norm()
    logs = []
    for unit in units:
        cosine = float((unit * u).sum())
        theta = math.acos(cosine)
        logs.append(theta / math.sin(theta) * (unit - cosine * u))
    assert float(sum(logs).norm()) < 1e-5
    assert float(update.norm()) == pytest.approx(sum(float(d.norm()) for d in deltas) / 4, rel=1e-5)


def test_opposite_experts_have_no_karcher_mean():
    """Where the directions cancel, the weighted mean is used and said."""
    _base, deltas = made_up(6, 5, 1)

    update, decided = run_method(AROUND_BASE, torch.zeros(6, 5), [deltas[0], -deltas[0]])

    assert float(update.norm()) == 0
    assert "cancel" in decided.warnings[0]


def test_widen_is_its_ranking():
    """Columns ranked by change of length and direction; softmax; the upper half counts whole."""
    base, deltas = made_up(12, 10, 3)
    W0, experts = base.double(), [x.double() for x in experts_of(base, deltas)]
    scores = torch.zeros(3, 10, dtype=torch.float64)
    lengths = torch.stack([(W.norm(dim=0) - W0.norm(dim=0)).abs() for W in experts])
    turns = torch.stack([1 - torch.cosine_similarity(W, W0, dim=0) for W in experts])
    for change in (lengths, turns):
        ranks = torch.stack([row.argsort().argsort() / 10 for row in change]).double()
        soft = ranks.exp() / ranks.exp().sum(0)
        scores += torch.where(ranks > ranks.mean(1, keepdim=True), 1.0, soft) / 2

    update, _ = run_method("widen", base, experts_of(base, deltas))

    expected = sum((W - W0) * s for W, s in zip(experts, scores, strict=True))
    assert relative(update, expected) < 1e-5


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
def test_tsv_merge_is_its_equation(shape):
    """ΔW = polar(Û) diag(Ŝ) polar(V̂)ᵀ with ⌊r/N⌋ triplets of each expert."""
    base, deltas = made_up(*shape, 3)
    k = min(shape) // 3
    found = svds(deltas)
    U = torch.cat([u[:, :k] for u, _, _ in found], 1)
    V = torch.cat([vh[:k].T for _, _, vh in found], 1)
    S = torch.cat([s[:k] for _, s, _ in found])

    update, _ = run_method("tsv_m", base, experts_of(base, deltas))

    assert relative(update, polar64(U) @ torch.diag(S) @ polar64(V).T) < 1e-5


def test_tsv_merge_takes_no_null_vectors():
    """An expert of rank 1 gives one direction, not arbitrary ones to fill its share."""
    _base, deltas = made_up(12, 12, 2)
    deltas[0] = torch.outer(torch.arange(12.0), torch.ones(12)) * 1e-3

    _, decided = run_method("tsv_m", torch.zeros(12, 12), deltas)

    assert decided.gates["directions"] == 1 + 6


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_iso_c_flattens_the_sum(shape):
    """ΔW = mean(S)·UVᵀ of the sum."""
    base, deltas = made_up(*shape, 3)
    U, S, Vh = svds([sum(d.double() for d in deltas)])[0]

    update, _ = run_method("iso_c", base, experts_of(base, deltas))

    assert relative(update, S.mean() * U @ Vh) < 1e-5


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_iso_cts_adds_each_experts_own_directions(shape):
    """Common directions of the sum, the leading ones of every projected rest, one strength."""
    base, deltas = made_up(*shape, 2)
    U_c, S_c, Vh_c = svds([sum(d.double() for d in deltas)])[0]
    common, own = 16, 2  # r = 20, fraction 0.8, two experts
    rests = svds([d.double() - U_c[:, :common] @ (U_c[:, :common].T @ d.double()) for d in deltas])
    U = torch.cat([*(u[:, :own] for u, _, _ in rests), U_c[:, :common]], 1)
    V = torch.cat([*(vh[:own].T for _, _, vh in rests), Vh_c[:common].T], 1)
    S = torch.cat([*(s[:own] for _, s, _ in rests), S_c[:common]])

    update, _ = run_method("iso_cts", base, experts_of(base, deltas))

    assert relative(update, S.mean() * polar64(U) @ polar64(V).T) < 1e-5


def test_star_keeps_the_nuclear_norm():
    """Each expert is cut at 40 % of Σσ and scaled back to Σσ; the experts are averaged."""
    base, deltas = made_up(18, 14, 2)
    expected = torch.zeros(18, 14, dtype=torch.float64)
    for U, S, Vh in svds(deltas):
        r = int((S.cumsum(0) < 0.4 * S.sum()).sum()) + 1
        expected += U[:, :r] @ torch.diag(S[:r] * S.sum() / S[:r].sum()) @ Vh[:r] / 2

    update, _ = run_method("star", base, experts_of(base, deltas))

    assert relative(update, expected) < 1e-5


@pytest.mark.parametrize("alpha", [-1.0, 1.0])
def test_svc_calibrates_every_direction(alpha):
    """γ_r = N / Σ max(α, ⟨uᵀM, uᵀΔᵢ⟩ / ‖uᵀΔᵢ‖²) on the singular values of the sum."""
    base, deltas = made_up(15, 11, 3)
    M = sum(d.double() for d in deltas)
    U, S, Vh = svds([M])[0]
    least = 1 / 3 if alpha < 0 else alpha
    gamma = []
    for r in range(len(S)):
        shares = [
            float((U[:, r] @ M) @ (U[:, r] @ d.double()) / (U[:, r] @ d.double()).norm() ** 2)
            for d in deltas
        ]
        gamma.append(3 / sum(max(least, share) for share in shares))

    method = build_method("svc", {"alpha": alpha})
    update, _ = run_method(method, base, experts_of(base, deltas))

    expected = U @ torch.diag(torch.tensor(gamma, dtype=torch.float64) * S) @ Vh
    assert relative(update, expected) < 1e-5


def test_dc_merge_works_in_the_cover_space():
    """Coordinates of each truncated expert, the largest kept, elected, diagonal blocks only."""
    base, deltas = made_up(24, 20, 2)
    k, found = 10, svds(deltas)
    U = polar64(torch.cat([u[:, :k] for u, _, _ in found], 1))
    V = polar64(torch.cat([vh[:k].T for _, _, vh in found], 1))
    kept = []
    for u, s, vh in found:
        M = U.T @ (u[:, :k] * s[:k]) @ vh[:k] @ V
        threshold = M.abs().flatten().sort(descending=True).values[int(0.05 * M.numel()) - 1]
        kept.append(torch.where(M.abs() >= threshold, M, 0.0))
    blocks = torch.block_diag(torch.ones(k, k), torch.ones(k, k))
    merged = ties64(kept, [0.0, 0.0]) * blocks

    method = build_method("dc_merge", {"density": 0.05})
    update, _ = run_method(method, base, experts_of(base, deltas))

    assert relative(update, U @ merged @ V.T) < 1e-5


def test_opcm_scales_once_what_the_code_scales_in_steps():
    """The published step-by-step scaling comes to one factor at the end."""
    base, deltas = made_up(16, 13, 3)
    D = [d.double() for d in deltas]
    norms = [float(d.norm()) for d in D]
    merged, lam = D[0].clone(), 1.0
    for t in range(1, 3):
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
        split = int(((S.cumsum(0) / S.sum()) <= 0.5).sum())
        P = U.T @ D[t] @ Vh.T
        removed = torch.diag(P.diagonal())
        removed[:split, :split] = P[:split, :split]
        step = lam * merged + D[t] - U @ removed @ Vh
        new = float(step.norm()) / (sum(norms[: t + 1]) / (t + 1))
        merged, lam = step / new, new

    update, _ = run_method("opcm", base, experts_of(base, deltas))

    assert relative(update, merged) < 1e-5


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("model.embed_tokens.weight", 1 / 3),
        ("model.layers.0.mlp.up_proj.weight", 1 / 3),
        ("model.layers.1.mlp.up_proj.weight", 1.0),
    ],
)
def test_lines_grows_with_depth(name, factor):
    """Of three added experts the first block takes a third, the last all; the rest a third."""
    base, deltas = made_up(8, 6, 3)

    update, _ = run_method("lines", base, experts_of(base, deltas), name=name)

    assert relative(update, factor * sum(d.double() for d in deltas)) < 1e-6


def test_lines_measures_other_methods():
    """α = (‖ΣΔᵢ‖₁ / ‖ΔW‖₁) / N for a method that is not a plain sum."""
    base, deltas = made_up(8, 6, 2)
    mean = sum(d.double() for d in deltas) / 2

    method = build_method("lines", {"inner": "task_arithmetic:normalize=true"})
    update, _ = run_method(method, base, experts_of(base, deltas), name="model.layers.0.a.weight")

    assert relative(update, mean) < 1e-6  # α = 2 / 2


@pytest.mark.parametrize(
    "text", ["no_such_method", "ties:dense=1", "ties:density", "ties:density=2"]
)
def test_a_wrong_inner_method_is_refused(text):
    """What a wrapper cannot build is refused when the wrapper is built."""
    with pytest.raises(RecipeError):
        build_method("svc", {"inner": text})


def test_a_method_with_parameters_is_one_word():
    """``name:key=value:key=value`` names a method and its parameters."""
    assert parse_method("ties:trim=tensor:density=0.1") == (
        "ties",
        {"trim": "tensor", "density": "0.1"},
    )


def test_embeddings_of_spectral_methods_follow_other():
    """`other` says what happens to tensors that are not decomposed."""
    base, deltas = made_up(8, 6, 2)
    for other, factor in (("mean", 0.5), ("sum", 1.0), ("base", 0.0)):
        method = build_method("tsv_m", {"other": other})

        update, decided = run_method(
            method, base, experts_of(base, deltas), name="model.embed_tokens.weight"
        )

        assert decided.rule == other
        expected = factor * sum(d.double() for d in deltas)
        assert float((update.double() - expected).norm()) < 1e-7
