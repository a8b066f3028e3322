"""Task vectors given as factors: what is answered from L and R is what the formed matrix says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmerge_stream.maths.changes import Dense, Factored, ReplacedRows, Rescaled, Sum, Unchanged
from resmerge_stream.maths.low_rank import FactorSpace, LowRank, balanced, concatenated, svd
from resmerge_stream.maths.task_vectors import NonFiniteValues, TaskVectors, Workspace
from resmerge_stream.methods import Site, build_method
from resmerge_stream.specs import TensorSpec
from tests.support import reference
from tests.support.method_tools import MATRIX, relative

CPU = torch.device("cpu")
CLOSED_FORM = (
    ("mean", {}),
    ("task_arithmetic", {}),
    ("resmerge", {}),
    ("resmerge", {"rank": 3}),
    ("resmerge", {"variant": "release-2026-06"}),
    ("resmerge", {"variant": "release-2026-07"}),
    ("resmerge", {"ablation": "head_only"}),
    ("resmerge", {"ablation": "residual_only"}),
    ("tsv_m", {}),
    ("iso_c", {}),
)


def factors(m, n, ranks, *, seed=0, common=0.5):
    """Return low-rank matrices that share a direction, float32 factors."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    left, right = normal(m, 1), normal(n, 1)
    made = []
    for rank in ranks:
        L, R = normal(m, rank), normal(n, rank) * 0.01
        made.append(LowRank(torch.cat([L, common * left], 1), torch.cat([R, 0.01 * right], 1)))
    return made


def formed(matrix):
    """Return L·Rᵀ in float64."""
    return matrix.left.double() @ matrix.right.double().T


def vectors_of(base, changes, *, resident=True):
    """Return the task vectors of some changes."""
    return TaskVectors(base, changes, Workspace(CPU), resident=resident)


def merged(method, parameters, vectors, weights=None):
    """Return a method's update of a matrix, and its rows."""
    built = build_method(method, parameters)
    spec = TensorSpec(MATRIX, "F32", vectors.shape)
    weights = weights or (1.0,) * vectors.count
    site = Site(built.rule_for(spec, vectors.count), weights, spec=spec)
    update = built.merge(vectors, site)
    return update, torch.cat([update.rows(b, vectors.stack(b)) for b in vectors.blocks()])


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_inner_products_are_those_of_the_formed_matrices(m, n, ranks, seed):
    """D from traces of small matrices is D of the matrices, for any shapes and ranks."""
    made = factors(m, n, ranks, seed=seed)
    whole = torch.stack([formed(matrix).flatten() for matrix in made])

    D = FactorSpace(made).gram()

    torch.testing.assert_close(D, whole @ whole.T, rtol=1e-10, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_svd_of_a_sum_is_that_of_the_formed_sum(m, n, ranks, seed):
    """Singular values, and U·diag(σ)·Vᵀ, equal LAPACK's of the formed matrix."""
    made = factors(m, n, ranks, seed=seed)
    whole = sum(formed(matrix) for matrix in made)

    found = svd(concatenated(made))

    expected = torch.linalg.svdvals(whole)
    above = int((expected > 1e-6 * expected[0]).sum())
    torch.testing.assert_close(found.sigma[:above], expected[:above], rtol=1e-7, atol=0)
    assert relative(formed(balanced(found)), whole) <= 1e-6


def test_directions_that_stand_twice_cost_no_rank():
    """Two experts with the same factors need as many directions as one."""
    [one] = factors(50, 40, [6])

    found = svd(concatenated([one, one]))

    assert found.rank == 7
    assert relative(formed(balanced(found)), 2 * formed(one)) <= 1e-7


def test_fewer_directions_are_the_best_that_a_rank_allows():
    """What is cut away is the tail of the spectrum."""
    made = factors(60, 30, [4, 4])
    whole = sum(formed(matrix) for matrix in made)

    cut = formed(balanced(svd(concatenated(made)), 3))

    tail = torch.linalg.svdvals(whole)[3:]
    assert float((whole - cut).norm()) == pytest.approx(float(tail.norm()), rel=1e-6)


@pytest.mark.parametrize(("method", "parameters"), CLOSED_FORM, ids=str)
@pytest.mark.parametrize("shape", [(120, 90), (90, 120)], ids=str)
def test_the_closed_form_is_what_the_method_does_with_the_formed_matrices(
    method, parameters, shape
):
    """A method's result in factors equals its result from the whole matrices, within 1e-6."""
    made = factors(*shape, [5, 9, 3])
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # Of the size of the update, so that float32 stores the experts to 1e-7 of it.
    base *= float(formed(made[0]).std())
    whole = vectors_of(torch.zeros(shape), [Dense(formed(matrix).float()) for matrix in made])

    update, _ = merged(method, parameters, vectors_of(base, [Factored(x) for x in made]))
    found = update.combination.of(vectors_of(base, [Factored(x) for x in made]))
    _, expected = merged(method, parameters, whole)

    assert relative(formed(found), expected) <= 2e-6


@pytest.mark.parametrize("variant", ["paper", "release-2026-06", "release-2026-07"])
@pytest.mark.parametrize("k", [1, 3])
def test_resmerge_of_factors_is_the_papers_formula(variant, k):
    """The update and its gates equal the equations written out in float64, within 1e-8."""
    made = factors(80, 60, [4, 6, 5])
    vectors = vectors_of(torch.zeros(80, 60), [Factored(matrix) for matrix in made])
    expected, gates = reference.resmerge(
        [formed(matrix).numpy() for matrix in made], variant=variant, k=k
    )

    update, _ = merged("resmerge", {"variant": variant, "rank": k}, vectors)

    found = formed(update.combination.of(vectors)).numpy()
    assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected)
    assert update.gates["solver"]["name"] == "factors"
    for key, value in gates.items():
        assert update.gates[key] == pytest.approx(value, rel=1e-7, abs=1e-9), key


def test_the_update_has_no_higher_rank_than_its_experts_together():
    """ΔW is a combination of task vectors and heads: rank Σ r_i and not one more."""
    made = factors(70, 50, [4, 6], common=0.0)
    vectors = vectors_of(torch.zeros(70, 50), [Factored(matrix) for matrix in made])

    update, _ = merged("resmerge", {}, vectors)

    assert svd(update.combination.of(vectors)).rank == 10


@pytest.mark.parametrize("method", ["mean", "resmerge", "tsv_m", "iso_c", "karcher", "dc_merge"])
def test_mixed_groups_merge_like_whole_ones(method):
    """Dense values, factors and an expert that leaves the matrix alone are merged together."""
    made = factors(100, 80, [5, 7])
    random = torch.Generator().manual_seed(3)
    full = 0.1 * torch.randn(100, 80, generator=random)
    base = torch.zeros(100, 80)
    mixed = vectors_of(base, [Factored(made[0]), Dense(full), Unchanged(), Factored(made[1])])
    whole = vectors_of(base, [formed(made[0]).float(), full, base, formed(made[1]).float()])

    _, found = merged(method, {}, mixed)
    _, expected = merged(method, {}, whole)

    assert relative(found, expected) <= 2e-6


def test_an_expert_that_changes_nothing_counts_in_the_mean():
    """Two experts, one of them without this matrix: half the other's update."""
    [made] = factors(20, 30, [3])
    vectors = vectors_of(torch.ones(20, 30), [Factored(made), Unchanged()])

    _, found = merged("mean", {}, vectors)

    assert relative(found, formed(made) / 2) <= 1e-6


def test_dora_rescales_the_rows_of_the_moved_base():
    """W = m·(W0 + L·Rᵀ)/‖W0 + L·Rᵀ‖ row by row, in whatever blocks it is asked for."""
    [made] = factors(300, 1200, [4])
    random = torch.Generator().manual_seed(5)
    base = torch.randn(300, 1200, generator=random)
    magnitude = torch.rand(300, generator=random) + 0.5
    vectors = vectors_of(base, [Rescaled(made, magnitude)])
    moved = base.double() + formed(made)
    expected = magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - base

    found = torch.cat([vectors.stack(rows)[0] for rows in vectors.blocks()])

    assert len(vectors.blocks()) > 1
    assert relative(found, expected) <= 1e-7


def test_trained_tokens_replace_their_rows_alone():
    """Rows that were trained take their values, the others stay as in the base."""
    base = torch.arange(40.0).view(10, 4)
    values = torch.full((2, 4), 7.0)
    change = ReplacedRows(torch.tensor([3, 8]), values)
    vectors = vectors_of(base, [change])

    [delta] = vectors.stack(slice(0, 10))

    expected = base.clone()
    expected[[3, 8]] = 7.0
    assert torch.equal(base + delta, expected)
    assert not change.touches(slice(4, 8))


def test_a_saved_embedding_and_its_adapter_add_up():
    """An adapter that brings the base's layer along is added to what it brought."""
    [made] = factors(20, 30, [3])
    saved = torch.ones(20, 30)
    vectors = vectors_of(torch.zeros(20, 30), [Sum([Dense(saved), Factored(made)])])

    [delta] = vectors.stack(slice(0, 20))

    assert relative(delta, saved + formed(made)) <= 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_factor_that_is_not_finite_names_its_expert(side):
    """NaN in a factor is found before anything is merged, and whose it is."""
    made = factors(20, 30, [3, 3])
    getattr(made[1], side)[0, 0] = float("nan")

    with pytest.raises(NonFiniteValues) as refused:
        vectors_of(torch.zeros(20, 30), [Factored(matrix) for matrix in made])

    assert refused.value.source == 1
