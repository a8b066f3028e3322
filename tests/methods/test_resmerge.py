"""The library against the paper written out, and against outputs of others (targets E1 to E3)."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import SHARED, Group, merge, read_tensors
from tests.support.matrices import relative, spectrum, update_of, with_spectrum
from tests.support.reference import resmerge

pytestmark = pytest.mark.usefixtures("without_picture")

GATES = ("s_R", "c_R", "score", "beta", "alpha_R", "S_H")
NORMS = ("n_R", "norm_A", "norm_C")
FAMILIES = ("attention", "ffn", "other")
# Small ones go to the dense solver; the others cross 96 columns, 256 rows and 1,024 columns,
# where the products are cut into chunks.
SHAPES = (
    (5, 40), (40, 5), (2, 3), (48, 48), (64, 112), (112, 64), (3, 2000),
    (97, 97), (128, 300), (300, 128), (160, 1500), (700, 110), (257, 400), (400, 520),
)  # fmt: skip

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference checkpoints are not beside this repository"
)


def draw_group(m, n, count, *, rank, gap, energy, seed):
    """Return a base and experts whose float32 differences share a direction and have a gap."""
    random = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(m, n, generator=random, dtype=torch.float64)
    sigma = spectrum(min(m, n), rank, gap, energy)
    shared = with_spectrum(m, n, [4.0 / (1 + i) for i in range(min(m, n))], random)
    experts = []
    for _ in range(count):
        own = with_spectrum(m, n, [1.0] * min(m, n), random)
        U, _, Vt = torch.linalg.svd(shared + own, full_matrices=False)
        delta = (U * torch.tensor(sigma, dtype=torch.float64)) @ Vt
        experts.append((base + 1e-2 * delta).float())
    return base.float(), experts


def deltas_of(base, experts):
    """Return the task vectors that the stored weights have, float64."""
    return [expert.double() - base.double() for expert in experts]


def least_gap(deltas, rank):
    """Return the smallest σ_k / σ_(k+1)."""
    ratios = []
    for delta in deltas:
        sigma = torch.linalg.svdvals(delta)
        ratios.append(float(sigma[rank - 1] / sigma[rank]) if len(sigma) > rank else 1e9)
    return min(ratios)


def check(base, experts, *, family, rank, bound, variant="paper"):
    """Compare update and gates with the reference."""
    deltas = deltas_of(base, experts)
    expected, gates = resmerge(
        [delta.numpy() for delta in deltas], variant=variant, family=family, k=rank
    )

    got, update = update_of(base, experts, family=family, rank=rank, variant=variant)

    assert update.rule == "resmerge"
    assert relative(got, torch.from_numpy(expected)) <= bound
    for key in GATES:
        if key in gates:
            assert update.gates[key] == pytest.approx(gates[key], abs=1e-6, rel=0), key
    for key in NORMS:
        assert update.gates[key] == pytest.approx(gates[key], rel=0, abs=bound * gates["n_R"]), key


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_paper_equals_the_reference_where_there_is_a_gap(shape, count):
    """With σ_k/σ_(k+1) ≥ 1.02 the paper's update is exact to 1e-6 before the cast (E1)."""
    number = SHAPES.index(shape) * 7 + count
    rank = 1 + number % 2 if min(shape) > 2 else 1
    gap = (1.025, 1.1, 1.5, 3.0)[number % 4]
    energy = (0.2, 0.6, 0.9, 0.99)[(number // 2) % 4]
    base, experts = draw_group(*shape, count, rank=rank, gap=gap, energy=energy, seed=number)
    assert least_gap(deltas_of(base, experts), rank) >= 1.02

    check(base, experts, family=FAMILIES[number % 3], rank=rank, bound=1e-6)


@pytest.mark.parametrize("gap", [1.002, 1.0005])
@pytest.mark.parametrize("shape", [(48, 64), (130, 200), (200, 300)])
@pytest.mark.parametrize("rank", [1, 2])
def test_paper_stays_close_to_the_reference_without_a_gap(shape, gap, rank):
    """With a smaller gap the paper's update is exact to 1e-5 before the cast (E1)."""
    base, experts = draw_group(*shape, 3, rank=rank, gap=gap, energy=0.3, seed=int(gap * 1e5))

    check(base, experts, family="attention", rank=rank, bound=1e-5)


@pytest.mark.parametrize("shape", [(60, 80), (150, 220)])
@pytest.mark.parametrize("rest", [1e-4, 3e-6, 1e-7])
def test_an_update_that_is_almost_all_head_keeps_its_residual(shape, rest):
    """Where the residual has little of the energy, its gates stay exact to 1e-4 or warn of it."""
    random = torch.Generator().manual_seed(5)
    m, n = shape
    experts = []
    for _ in range(3):
        head = with_spectrum(m, n, [1.0], random)
        tail = with_spectrum(m, n, [1.0 - 0.01 * i for i in range(20)], random)
        tail *= (rest / 20) ** 0.5
        experts.append((head + tail).float())
    base = torch.zeros(m, n)
    expected, gates = resmerge([expert.double().numpy() for expert in experts])

    got, update = update_of(base, experts)

    assert relative(got, torch.from_numpy(expected)) <= 1e-3
    assert update.gates["s_R"] == pytest.approx(gates["s_R"], abs=1e-4)
    assert update.gates["n_R"] == pytest.approx(gates["n_R"], rel=1e-3)


@pytest.mark.parametrize("variant", ["release-2026-06", "release-2026-07"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_releases_equal_their_written_out_equations(variant, family, count):
    """Each release's variant follows that release's formulas, fallback included."""
    base, experts = draw_group(40, 56, count, rank=1, gap=1.4, energy=0.5, seed=count)

    check(base, experts, family=family, rank=1, bound=2e-6, variant=variant)


@pytest.mark.parametrize("variant", ["paper", "release-2026-06", "release-2026-07"])
def test_opposed_residuals_take_each_variants_own_branch(variant):
    """Residuals that disagree on average give what each variant says, down to its fallback."""
    random = torch.Generator().manual_seed(3)
    first = with_spectrum(30, 40, [2.0, *[1.0 - 0.02 * i for i in range(29)]], random)
    noise = [with_spectrum(30, 40, [0.3 - 0.01 * i for i in range(20)], random) for _ in range(3)]
    experts = [(sign * first + n).float() for sign, n in zip((1, -1, 1), noise, strict=True)]
    base = torch.zeros(30, 40)

    check(base, experts, family="ffn", rank=1, bound=2e-6, variant=variant)


@needs_shared
@pytest.mark.parametrize("folder", ["dev2", "dev3"])
@pytest.mark.parametrize(
    ("file", "method", "parameters"),
    [
        ("resmerge-paper.k1", "resmerge", {}),
        ("resmerge-paper.k2", "resmerge", {"rank": 2}),
        ("resmerge-release-2026-06.k1", "resmerge", {"variant": "release-2026-06"}),
        ("resmerge-release-2026-07.k1", "resmerge", {"variant": "release-2026-07"}),
        ("resmerge-release-2026-07.k2", "resmerge", {"variant": "release-2026-07", "rank": 2}),
        ("task_arithmetic.mean", "task_arithmetic", {"normalize": True}),
        ("task_arithmetic.mean", "mean", {}),
    ],
)
def test_pipeline_equals_outputs_of_others(folder, file, method, parameters, tmp_path):
    """A merge of the reference checkpoints equals what the releases and mergekit made of them."""
    group = Group(SHARED / folder / "base", tuple(sorted((SHARED / folder).glob("expert*"))))
    base = read_tensors(group.base)
    experts = [read_tensors(expert) for expert in group.experts]
    expected = load_file(SHARED / folder / "expected" / f"{file}.safetensors")

    merged = merge(group, tmp_path / "out", method=method, parameters=parameters)

    assert merged.tensors.keys() == expected.keys() == base.keys()
    for name, tensor in expected.items():
        start = base[name].double()
        size = float(torch.linalg.vector_norm(start))
        wanted = float(torch.linalg.vector_norm(tensor.double() - start))
        error = float(torch.linalg.vector_norm(merged.tensors[name].double() - tensor.double()))
        if all(torch.equal(expert[name], base[name]) for expert in experts):
            # Copied bit by bit here. The release averages N equal float32 weights instead, which
            # rounds each to 2.6e-8 of itself and would count as an update that nobody made.
            assert torch.equal(merged.tensors[name], base[name]), name
            assert error <= 1e-7 * size, name
        else:
            assert error <= 1e-4 * max(wanted, 1e-6 * size), name
