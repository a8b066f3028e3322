"""The compiled loops write the bits that torch's operations write, and sum as exactly."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmerge_stream.maths import passes, products
from resmerge_stream.methods.parts.election import disjoint_merge
from resmerge_stream.methods.ram import shared_mean

SIZES = (0, 1, 37, 4096, 4097, 10_000)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def drawn(seed, *shape, spread=40):
    """Return float32 values of many magnitudes, zeros of both signs among them."""
    random = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread, shape, generator=random)
    values = torch.randn(shape, generator=random) * 2.0**exponents
    return torch.where(torch.rand(shape, generator=random) < 0.05, -0.0, values)


def same(found, expected):
    """Whether two tensors have the same bits."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return torch.equal(found.view(kinds[found.dtype]), expected.view(kinds[expected.dtype]))


@pytest.mark.parametrize("size", SIZES)
def test_stored_values_become_float32(size):
    """bfloat16 is widened exactly."""
    stored = drawn(1, size).bfloat16()

    assert same(passes.upcast(stored), stored.float())


@pytest.mark.parametrize("size", SIZES)
def test_differences_are_ieee(size):
    """W − W0 has the bits of torch's subtraction."""
    stored, base, out = drawn(2, size).bfloat16(), drawn(3, size), torch.empty(size)

    passes.subtract(stored, base, out)

    assert same(out, stored.float() - base)


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_without_its_differences_is_the_sum_of_differences(size):
    """`summed` gives the bits of `combined`, and these are those of products added in order."""
    base = drawn(4, size)
    stored = [drawn(seed, size).bfloat16() for seed in (5, 6, 7)]
    a = [1 / 3, -0.7, 2.0]
    deltas = [values.float() - base for values in stored]
    expected = deltas[0] * a[0]
    for delta, factor in zip(deltas[1:], a[1:], strict=True):
        expected = expected + delta * factor

    total, squares = passes.summed(stored, base, a)

    assert same(total, expected)
    assert same(passes.combined(torch.stack(deltas), a), expected)
    wanted = [float(delta.double().square().sum()) for delta in deltas]
    assert squares == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_rounded_to_nearest(size):
    """W0 + ΔW has the bits of torch's cast, and its sums are those of what the cast kept."""
    base, update = drawn(8, size, spread=3), drawn(9, size, spread=3)

    weights = torch.empty(size, dtype=torch.bfloat16)
    sums = passes.moved(base, update, weights)

    assert same(weights, (base + update).bfloat16())
    kept, exact = weights.double() - base.double(), update.double()
    wanted = [exact.square().sum(), (exact * kept).sum(), kept.square().sum()]
    assert sums[:3] == pytest.approx([float(value) for value in wanted], rel=1e-5, abs=1e-12)
    assert sums[3] == int((weights.float() - base).count_nonzero())


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_every_number_is_rounded_as_torch_rounds_it(patterns):
    """Ties go to even, what is too large becomes infinite, subnormals stay."""
    bits = torch.tensor(patterns, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = torch.where(values.isnan(), 0.0, values)

    weights = torch.empty(values.shape, dtype=torch.bfloat16)
    passes.moved(values, torch.zeros_like(values), weights)

    assert same(weights, (values + 0.0).bfloat16())


@pytest.mark.parametrize("size", SIZES)
def test_trimming_keeps_what_reaches_the_threshold(size):
    """Equal magnitudes stay, smaller ones become zero; a threshold of 0 keeps all."""
    values = drawn(10, size, spread=3).bfloat16().float()
    tau = float(values.abs().median()) if size else 1.0

    assert torch.equal(passes.shrunk(values, tau), torch.where(values.abs() >= tau, values, 0))
    assert torch.equal(passes.shrunk(values, 0.0), values)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -0.7, 2.0), (0.0, 1.0, -1.0)], ids=str)
def test_an_election_is_the_same_everywhere(weights, normalize):
    """What a CPU's loop merges is what torch's operations merge, zeros and ties among them."""
    deltas = drawn(11, 3, 50, 99, spread=2).bfloat16().float()
    deltas[1, :10] = -deltas[0, :10]
    deltas[2, :10] = 0
    settings = {"normalize": normalize, "scale": 0.7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_loops_for", lambda *tensors: None)
        expected = disjoint_merge(deltas, weights, **settings)

    found = disjoint_merge(deltas, weights, **settings)

    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


@given(st.lists(floats, max_size=30), st.lists(floats, max_size=30))
@settings(max_examples=50)
def test_sums_that_overflow_are_not_finite_numbers(first, second):
    """An inner product is close to float64's, or not finite where float32 products are not."""
    size = min(len(first), len(second))
    x, y = (torch.tensor(values[:size], dtype=torch.float32) for values in (first, second))
    exact = float((x.double() * y.double()).sum())
    scale = float((x.double() * y.double()).abs().sum())

    found = passes.dsdot(x, y)

    assert abs(found - exact) <= 1e-6 * scale + 1e-40 or scale > 1e38


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (97, 97), (513, 129), (60, 1000)])
@pytest.mark.parametrize("power", [-60, 0, 60])
def test_a_krylov_step_is_that_of_blocks(shape, power):
    """One vector's loop builds the basis and the projected matrix that torch's operations build."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(12)) * 2.0**power
    short, steps = min(shape), 3
    start = torch.randn(1, short, generator=torch.Generator().manual_seed(13))
    start /= torch.linalg.vector_norm(start)
    found = []
    for twice in (False, True):
        # A matrix in columns has no loop of its own.
        matrix = delta.T.contiguous().T if twice else delta
        V, T = torch.zeros(8, short), torch.zeros(8, 8, dtype=torch.float64)
        block, beta = products.krylov_steps(matrix, 2.0**power, V, T, start, 0, steps)
        found.append((V[:steps], T[:steps, :steps], block, beta))

    for one, other in zip(*found, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (513, 129)])
def test_a_precise_product_is_that_of_float64(shape):
    """ΔᵀΔ·x, on the short side, as float64 gives it."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(14))
    x = torch.randn(min(shape), 1, dtype=torch.float64)
    wide = (delta if shape[0] < shape[1] else delta.T).double()

    found = products.precise_gram_product(delta, x)

    torch.testing.assert_close(found, wide @ (wide.T @ x), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("own", [0.0, -0.25])
@pytest.mark.parametrize("size", SIZES)
def test_one_pass_writes_what_several_write(size, own):
    """`merged_sum` gives the bits and sums of `summed` and `moved`, one after the other."""
    base = drawn(15, size, spread=3).bfloat16()
    stored = [drawn(seed, size, spread=3).bfloat16() for seed in (16, 17)]
    expected, out = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16)
    total, squares = passes.summed(stored, base.float(), [0.5, 0.75])
    update = total + base.float() * own if own else total
    sums = passes.moved(base.float(), update, expected)

    found = passes.merged_sum(base, stored, [0.5, 0.75], own, out)

    assert same(out, expected)
    assert found == (squares, sums)


@pytest.mark.parametrize("start", [0, 3, 5000])
@pytest.mark.parametrize("size", SIZES)
def test_a_pass_that_drops_writes_what_several_write(size, start):
    """Entries dropped on the way: the bits of a drop, a sum and a cast; both L1 norms."""
    base = drawn(15, size, spread=3).bfloat16()
    stored = [drawn(seed, size, spread=3).bfloat16() for seed in (16, 17)]
    drop = passes.Drop((11, 12), 7, (0.3, 1.0), (1 / 0.3, 1.0))
    deltas = [values.float() - base.float() for values in stored]
    kept = [passes.dropped(deltas[0], 11, 7 + start, 0.3, 1 / 0.3), deltas[1]]
    expected, out = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16)
    sums = passes.moved(base.float(), passes.combined(kept, [0.5, 0.75]), expected)

    squares, found = passes.merged_sum(base, stored, [0.5, 0.75], 0.0, out, (drop, start))
    lengths = passes.dropped_lengths(base, stored, drop, start)

    assert same(out, expected)
    assert found == sums
    assert squares == [passes.dsdot(delta, delta) for delta in deltas]
    norms = [[passes.l1_norm(x), passes.l1_norm(y)] for x, y in zip(deltas, kept, strict=True)]
    torch.testing.assert_close(lengths, norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_differences_come_with_their_products(size):
    """`differences` gives the bits of `subtract`, and the products of `gram` or squares alone."""
    base = drawn(18, size, spread=3).bfloat16()
    stored = [drawn(seed, size, spread=3).bfloat16() for seed in (19, 20, 21)]
    expected, out = torch.empty(3, size), torch.empty(3, size)
    for values, delta in zip(stored, expected, strict=True):
        passes.subtract(values, base.float(), delta)

    products = passes.differences(base, stored, out, all_pairs=True)

    assert same(out, expected)
    assert torch.equal(products, passes.gram(expected))
    squares = passes.differences(base, stored, out, all_pairs=False)
    assert torch.equal(squares, torch.diag(products.diagonal()))
    exact = expected.double() @ expected.double().T
    lengths = exact.diagonal().sqrt()
    assert ((products - exact).abs() <= 1e-6 * lengths[:, None] * lengths[None, :]).all()


@pytest.mark.parametrize("unique", [(1.0, 1.0, 1.0), (1.5, 0.2, 3.0)], ids=str)
def test_a_shared_mean_is_the_same_everywhere(unique):
    """A CPU's loop and torch's operations make the same of changes that some experts share."""
    deltas = drawn(22, 3, 50, 99, spread=2).bfloat16().float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_loops_for", lambda *tensors: None)
        expected = shared_mean(deltas, 0.5, list(unique))

    found = shared_mean(deltas, 0.5, list(unique))

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [0, 100_000])
def test_loops_that_cannot_be_kept_run_all_the_same(size, tmp_path):
    """Where the disk for compiled loops is full, they are compiled for this process."""
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size or 4096}", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        # As in tests/sinks/test_full_disk.py: root runs it, and so does .ci/run.
        pytest.skip(f"only root may mount a small disk: {done.stderr.strip()}")
    if size == 0:
        (place / "filler").write_bytes(bytes(4096))
    code = (
        "import torch; from resmerge_stream.maths import passes; x = torch.ones(9); "
        "print(passes.dsdot(x, x))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(place)}

    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )

    subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert (run.returncode, run.stdout) == (0, "9.0\n"), run.stderr


@settings(deadline=None)
@given(
    share=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    least=st.integers(0, 4),
    factor=st.sampled_from([1.0, 0.4, -2.0]),
    seed=st.integers(0, 50),
)
def test_a_shared_sum_is_its_definition(share, least, factor, seed):
    """Σ Δ where enough experts matter, in float64 as written in the paper, and zero elsewhere."""
    deltas = drawn(seed, 3, 20, 41, spread=2)

    found = passes.shared_sum(deltas, share, least, factor)

    exact = deltas.double()
    total = exact.sum(0)
    users = (exact.abs() > share * (total - exact).abs()).sum(0)
    expected = torch.where(users >= least, total, 0.0).float() * torch.tensor(factor)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_length_is_summed_in_float64(size):
    """‖x‖₁ is exact to float64's resolution."""
    values = drawn(30, size, spread=3)

    assert passes.l1_norm(values) == pytest.approx(float(values.double().abs().sum()), rel=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_products_of_the_base_and_its_differences_need_no_differences(size):
    """W0 first, then Δᵢ: each pair has the product that `gram` gives of them."""
    base = drawn(31, size, spread=3).bfloat16()
    stored = [drawn(seed, size, spread=3).bfloat16() for seed in (32, 33)]
    rows = [base.float(), *(values.float() - base.float() for values in stored)]

    found = passes.products(base, stored)

    assert torch.equal(found, passes.gram(rows))
    exact = torch.stack(rows).double()
    bound = 1e-6 * float(exact.square().sum(1).max()) if size else 0
    torch.testing.assert_close(found, exact @ exact.T, rtol=0, atol=bound)
