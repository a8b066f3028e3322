"""Leading singular triplets against a float64 SVD: any shape, gap, scale and solver."""

import math

import pytest
import torch

from resmerge_stream.maths.spectral import matmul, top_singular, transposed_matmul
from tests.support.matrices import orthonormal, relative, spectrum, with_spectrum

SOLVERS = ("auto", "lanczos", "dense")
SHAPES = ((1, 30), (30, 1), (40, 60), (97, 97), (110, 700), (700, 110), (150, 1400), (300, 420))


def draw(m, n, rank, gap, seed=0):
    """Return a float32 matrix with a gap after its first `rank` singular values."""
    random = torch.Generator().manual_seed(seed)
    return with_spectrum(m, n, spectrum(min(m, n), rank, gap, 0.3), random).float()


def best(delta, rank):
    """Return the best rank-k approximation and its singular values, float64."""
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], S[:rank]


def head_of(delta, head):
    """Return H = Δ V Vᵀ in float64."""
    V = head.V.double()
    return delta.double() @ V @ V.T


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("gap", "bound"), [(1.5, 1e-6), (1.02, 2e-6), (1.002, 1e-5)])
def test_the_head_is_the_best_approximation(shape, rank, gap, bound, solver):
    """Every solver finds the head that a float64 SVD finds, as far as the gap lets float32 tell."""
    rank = min(rank, *shape)
    delta = draw(*shape, rank, gap)
    expected, sigma = best(delta, rank)

    head = top_singular(delta, rank, solver=solver)

    assert relative(head_of(delta, head), expected) <= bound
    torch.testing.assert_close(
        torch.tensor(head.sigma, dtype=torch.float64), sigma, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(40, 60), (130, 250), (250, 130)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_columns_are_orthonormal(shape, rank, solver):
    """VᵀV is the identity to float32's resolution."""
    head = top_singular(draw(*shape, rank, 1.1), rank, solver=solver)

    V = head.V.double()
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(V.T @ V, identity, rtol=0, atol=5e-7)
    assert list(head.sigma) == sorted(head.sigma, reverse=True)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("gap", [1.5, 1.02, 1.0])
@pytest.mark.parametrize("shape", [(40, 60), (130, 250), (600, 140)], ids=str)
def test_the_residual_is_honest(shape, gap, solver):
    """The reported residual is the one that float64 finds, to float32's resolution."""
    delta = draw(*shape, 1, gap)

    head = top_singular(delta, 1, solver=solver)

    v = head.V.double()
    image = delta.double() @ v
    sigma = torch.linalg.vector_norm(image)
    residual = float(torch.linalg.vector_norm(delta.double().T @ image / sigma - sigma * v) / sigma)
    assert head.residual == pytest.approx(residual, abs=5e-7)
    assert residual < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(40, 60), (130, 250), (250, 130)], ids=str)
def test_repeated_top_values_span_one_space(shape, solver):
    """Where σ₁ = σ₂, rank 2 finds their plane, and rank 1 some direction inside it."""
    random = torch.Generator().manual_seed(7)
    tail = [0.5 - 0.001 * i for i in range(min(shape) - 2)]
    delta = with_spectrum(*shape, [2.0, 2.0, *tail], random).float()
    plane, _ = best(delta, 2)
    right = torch.linalg.svd(plane, full_matrices=False)[2][:2]

    both = top_singular(delta, 2, solver=solver)
    one = top_singular(delta, 1, solver=solver)

    assert relative(head_of(delta, both), plane) <= 2e-6
    assert one.sigma[0] == pytest.approx(2.0, rel=1e-6)
    inside = torch.linalg.vector_norm(right @ one.V.double())
    assert float(inside) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(40, 60), (130, 250), (250, 130)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_one_matrix_is_its_head(shape, rank, solver):
    """All of a rank-one matrix is in the head; further directions add nothing."""
    random = torch.Generator().manual_seed(3)
    delta = with_spectrum(*shape, [1.7], random).float()

    head = top_singular(delta, rank, solver=solver)

    assert relative(head_of(delta, head), delta) <= 1e-6
    assert head.sigma[0] == pytest.approx(1.7, rel=1e-6)
    assert all(sigma <= 1e-6 for sigma in head.sigma[1:])
    assert all(math.isfinite(sigma) for sigma in head.sigma)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e15])
@pytest.mark.parametrize("shape", [(40, 60), (130, 250)], ids=str)
def test_scale_does_not_matter(shape, scale, solver):
    """Task vectors near float32's limits neither underflow nor overflow."""
    delta = (draw(*shape, 1, 1.2).double() * scale).float()
    expected, sigma = best(delta, 1)

    head = top_singular(delta, 1, solver=solver)

    # Divided by the scale, so that the comparison itself does not underflow.
    assert relative(head_of(delta, head) / scale, expected / scale) <= 2e-6
    assert head.sigma[0] == pytest.approx(float(sigma[0]), rel=1e-6)


@pytest.mark.parametrize("solver", ["auto", "lanczos"])
def test_noise_without_a_gap_ends(solver):
    """A matrix of pure noise gives a head with a small residual, and says how small the gap is."""
    random = torch.Generator().manual_seed(1)
    delta = torch.randn(300, 300, generator=random)

    head = top_singular(delta, 1, solver=solver)

    exact = torch.linalg.svdvals(delta.double())
    assert head.sigma[0] == pytest.approx(float(exact[0]), rel=1e-6)
    assert head.gap == pytest.approx(float(exact[0] / exact[1]), rel=1e-2)
    assert head.residual <= 1e-5


def test_the_solver_that_was_asked_for_is_the_one_that_works():
    """Small matrices go dense by themselves, large ones iterate, and dense can be demanded."""
    small, large = draw(40, 60, 1, 1.5), draw(200, 300, 1, 1.5)

    assert top_singular(small, 1).solver == "dense"
    assert top_singular(large, 1).solver == "lanczos"
    assert top_singular(large, 1).steps > 0
    assert top_singular(large, 1, solver="dense").solver == "dense"
    assert top_singular(small, 1, solver="lanczos").solver == "lanczos"


def test_a_rank_above_the_short_side_means_all_of_it():
    """k larger than min(m, n) gives H = Δ."""
    delta = draw(5, 30, 1, 1.5)

    head = top_singular(delta, 9)

    assert head.V.shape == (30, 5)
    assert relative(head_of(delta, head), delta) <= 1e-6


@pytest.mark.parametrize("shape", [(50, 70), (300, 2000), (2000, 300), (513, 1025)], ids=str)
def test_products_are_as_exact_as_float32_is(shape):
    """Long sums are cut into chunks and added in float64, whatever the rest of the division."""
    random = torch.Generator().manual_seed(2)
    m, n = shape
    delta = torch.randn(m, n, generator=random)
    right, left = orthonormal(n, 3, random).float(), orthonormal(m, 3, random).float()

    assert relative(matmul(delta, right), delta.double() @ right.double()) <= 4e-7
    assert relative(transposed_matmul(delta, left), delta.double().T @ left.double()) <= 4e-7


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(130, 130), (384, 128), (128, 384)], ids=str)
def test_a_single_changed_element_is_its_own_head(shape, solver):
    """An update of one element, as sparse RL experts have, exhausts the Krylov space exactly."""
    delta = torch.zeros(shape)
    delta[3, 5] = -1.5e-3

    head = top_singular(delta, 1, solver=solver)

    assert relative(head_of(delta, head), delta.double()) <= 1e-6
    assert head.sigma[0] == pytest.approx(1.5e-3, rel=1e-6)


def test_the_fallback_copies_no_wide_matrix_in_float64():
    """What a wide matrix takes beside itself stays far below another copy of it."""
    delta = torch.randn(100, 60_000, generator=torch.Generator().manual_seed(0))
    energy = float((delta * delta).sum(dtype=torch.float64))

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        head = top_singular(delta, 1, energy=energy)

    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert head.solver == "gram"
    assert peak < delta.nbytes / 2
