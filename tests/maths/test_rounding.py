"""The one rounding of a merge, and the account of what it kept."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.maths.rounding import Kept, block_seed, cast

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def neighbours(values, dtype):
    """Return the largest representable value ≤ each float32 value, and the smallest ≥ it."""
    nearest = values.to(dtype)
    below = torch.where(
        nearest.float() > values,
        torch.nextafter(nearest, torch.full_like(nearest, -math.inf)),
        nearest,
    )
    above = torch.where(
        nearest.float() < values,
        torch.nextafter(nearest, torch.full_like(nearest, math.inf)),
        nearest,
    )
    return below, above


def samples(dtype):
    """Return values of every kind: usual, tiny, subnormal, negative, and near the largest."""
    random = torch.Generator().manual_seed(0)
    usual = torch.randn(300, generator=random)
    info = torch.finfo(dtype)
    subnormal = usual * info.smallest_normal / 4
    tiny = usual * info.smallest_normal * info.eps / 2
    large = torch.tensor([0.999, 1.0, 0.5]) * info.max
    return torch.cat([usual, usual * 1e-3, subnormal, tiny, large, -large])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_nearest_is_what_torch_does(dtype):
    """Without a seed the cast is torch's own, ties to even."""
    values = samples(torch.float16)

    assert torch.equal(cast(values, dtype), values.to(dtype))


@halves
def test_stochastic_rounding_picks_one_of_the_two_neighbours(dtype):
    """Whatever the draw, the result is the value just below or just above."""
    values = samples(dtype)
    below, above = neighbours(values, dtype)

    for seed in range(20):
        got = cast(values, dtype, seed=seed)

        assert bool(((got == below) | (got == above)).all())


@halves
def test_exact_values_stay(dtype):
    """What the output dtype can hold is not moved, zeros and the largest value included."""
    info = torch.finfo(dtype)
    usual = torch.randn(500, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    special = torch.tensor([0.0, -0.0, info.max, info.min, info.smallest_normal, 1.0, -2.0])
    values = torch.cat([usual, special])

    for seed in range(10):
        got = cast(values, dtype, seed=seed)

        assert torch.equal(got.view(torch.int16), values.to(dtype).view(torch.int16))


@halves
@pytest.mark.parametrize(
    "kind", ["usual", "negative", "subnormal", "across zero", "between powers"]
)
def test_stochastic_rounding_is_unbiased(kind, dtype):
    """The mean over many draws is the value itself, within five standard errors."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    value = {
        "usual": 0.1,
        "negative": -0.0123456,
        "subnormal": 5.3 * smallest,
        "across zero": -0.3 * smallest,
        "between powers": 1 - info.eps / 5,
    }[kind]
    exact = torch.tensor(value, dtype=torch.float32)
    below, above = (float(x) for x in neighbours(exact, dtype))
    share = (float(exact) - below) / (above - below)
    count = 40_000

    got = cast(exact.expand(count), dtype, seed=3).double()

    upper = float((got == above).double().mean())
    assert 0 < share < 1
    assert abs(upper - share) <= 5 * math.sqrt(share * (1 - share) / count)


@halves
def test_small_updates_survive_on_average(dtype):
    """An update of a tenth of a step is lost by nearest and kept by stochastic rounding."""
    step = torch.finfo(dtype).eps
    weights = torch.full((50_000,), 1 + step / 10, dtype=torch.float32)

    lost = cast(weights, dtype).double() - 1
    kept = cast(weights, dtype, seed=5).double() - 1

    assert not lost.any()
    assert float(kept.mean()) == pytest.approx(step / 10, rel=0.1)


def test_near_the_largest_value_nothing_becomes_infinite():
    """Between float16's largest value and where rounding overflows, the largest value is kept."""
    values = torch.full((1000,), 65_515.0)

    got = cast(values, torch.float16, seed=0)

    assert torch.equal(got, torch.full((1000,), 65_504.0, dtype=torch.float16))


def test_beyond_the_largest_value_is_infinite_and_seen():
    """An overflow stays one, so that it can be refused."""
    weights = torch.tensor([1e6, 1.0])
    kept = Kept()

    kept.add(weights, cast(weights, torch.float16, seed=0).float())

    assert kept.overflowed


@halves
def test_a_seed_gives_the_same_draw_again(dtype):
    """Equal seeds round equally, other seeds otherwise, and the input is not changed."""
    values = samples(dtype)
    before = values.clone()

    one, same, other = (cast(values, dtype, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(values, before)


def test_a_block_has_its_own_seed():
    """Seed, tensor name and row all count, and nothing else does."""
    every = {block_seed(s, n, r) for s in (0, 1) for n in ("a", "b", "a\x000") for r in (0, 16)}

    assert len(every) == 12
    assert block_seed(0, "a", 0) == block_seed(0, "a", 0)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    size=st.sampled_from((1e-6, 1e-3, 1.0)),
    seed=st.integers(0, 1000),
)
def test_what_was_kept_is_what_float64_counts(rows, columns, size, seed):
    """Norms, cosine and changed share agree with float64, however the rows are cut into blocks."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=random).bfloat16()
    update = size * torch.randn(rows, columns, generator=random)
    left = (base.float() + update).bfloat16().float() - base.float()
    kept = Kept()

    for start in range(0, rows, 7):
        kept.add(update[start : start + 7], left[start : start + 7])

    U, K = update.double(), left.double()
    norm = torch.linalg.vector_norm
    assert kept.update_norm == pytest.approx(float(norm(U)), rel=1e-6)
    assert kept.kept_norm == pytest.approx(float(norm(K) / norm(U)), rel=1e-6)
    assert kept.changed_fraction == pytest.approx(float((K != 0).double().mean()))
    if K.any():
        cosine = float((U * K).sum() / (norm(U) * norm(K)))
        assert kept.kept_cosine == pytest.approx(cosine, abs=1e-6)
    else:
        assert kept.kept_cosine == 0
    assert not kept.overflowed


def test_nothing_kept_of_nothing_is_not_a_number_in_the_report():
    """A zero update has no kept norm and no cosine; a wholly lost one has zeros."""
    nothing, lost = Kept(), Kept()

    nothing.add(torch.zeros(2, 3), torch.zeros(2, 3))
    lost.add(torch.ones(2, 3), torch.zeros(2, 3))

    assert (nothing.kept_norm, nothing.kept_cosine, nothing.changed_fraction) == (None, None, 0.0)
    assert (lost.kept_norm, lost.kept_cosine, lost.changed_fraction) == (0.0, 0.0, 0.0)


def test_a_zero_of_the_other_sign_is_not_a_change():
    """An element that went from 0 to −0 equals the base's, and is not counted as changed."""
    update = torch.tensor([[-1e-12, 1.0]])
    base = torch.zeros(1, 2)
    kept = Kept()

    kept.add(update, cast(base + update, torch.float16).float() - base)

    assert kept.changed_fraction == 0.5
