"""Random numbers by place: Philox as its authors publish it, and what is dropped by it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.maths import chance, passes

KEYS = st.integers(0, 2**56 - 1)


def philox(key: int, counter: int) -> list[int]:
    """Return the four words of a counter, by Salmon et al. 2011, section 3, in Python's numbers."""
    c = [counter >> 32 * i & 0xFFFFFFFF for i in range(4)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            second >> 32 ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def words(key: int, first: int, count: int) -> list[list[int]]:
    """Return the words of some counters, one counter a row."""
    out = np.empty(4 * count, np.uint32)
    chance.words(key, first, out)
    return out.reshape(4, count).T.tolist()


def test_words_are_the_published_ones() -> None:
    """Random123's known answers: the first here; one of pi's digits by the definition above."""
    counter = 0x03707344_13198A2E_85A308D3_243F6A88
    assert words(0, 0, 1) == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    assert philox(0x299F31D0_A4093822, counter) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@given(key=KEYS, first=st.integers(0, 2**60), count=st.integers(1, 40))
def test_words_are_philoxs(key: int, first: int, count: int) -> None:
    """Every word of any key and counter is that of the definition."""
    assert words(key, first, count) == [philox(key, first + i) for i in range(count)]


@given(key=KEYS, start=st.integers(0, 2**40), count=st.integers(1, 9000), cut=st.integers(0, 9000))
def test_a_number_depends_on_its_place_alone(key: int, start: int, count: int, cut: int) -> None:
    """Numbers are the same wherever a range of places is cut."""
    cut = min(cut, count)

    whole = passes.fractions(key, start, (count,))

    parts = passes.fractions(key, start, (cut,)), passes.fractions(key, start + cut, (count - cut,))
    assert torch.equal(torch.cat(parts), whole)


def test_numbers_are_even_and_unrelated() -> None:
    """A million numbers fill a hundred bins evenly; neighbours and other keys are unrelated."""
    numbers = passes.fractions(7, 123, (1_000_000,)).double()
    other = passes.fractions(8, 123, (1_000_000,)).double()

    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 150  # of 99 degrees: once in a thousand
    for first, second in ((numbers[1:], numbers[:-1]), (numbers[1024:], numbers[:-1024])):
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.004
    assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < 0.004
    assert 0 <= float(numbers.min()) < 1e-5
    assert 1 - 1e-5 < float(numbers.max()) < 1


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 20_000])
def test_values_are_dropped_by_their_number(size: int) -> None:
    """What is kept is the value times the factor, to the bit, where the number is below p."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))

    found = passes.dropped(values, 5, 777, 0.3, 1 / 0.3)

    numbers = passes.fractions(5, 777, (size,))
    expected = values * (numbers < 0.3) * torch.tensor(1 / 0.3, dtype=torch.float32)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@given(rows=st.integers(1, 6), n=st.integers(1, 70), inverse=st.booleans(), seed=st.integers(0, 99))
def test_values_are_dropped_by_their_rank(rows: int, n: int, inverse: bool, seed: int) -> None:
    """Ranks are those of a stable sort of the magnitudes, equal ones and zeros among them."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(-5, 6, (rows, n), generator=random).float()
    chances = torch.linspace(0.2, 0.8, n)

    found = passes.dropped_by_rank(values, 9, 40, chances, inverse=inverse)

    numbers = passes.fractions(9, 40, (rows, n))
    for i, row in enumerate(values):
        order = sorted(range(n), key=lambda j, row=row: (abs(float(row[j])), j))
        for rank, j in enumerate(order):
            kept = row[j] if numbers[i, j] < chances[rank] else row[j] * 0
            assert found[i, j] == (kept / chances[rank] if inverse else kept)


def test_blocks_of_many_rows_are_ranked_in_parts() -> None:
    """More entries than are sorted at once give what their rows give alone."""
    values = torch.randn(100, 1500, generator=torch.Generator().manual_seed(2))
    chances = torch.linspace(0.1, 0.9, 1500)

    found = passes.dropped_by_rank(values, 3, 0, chances, inverse=False)

    alone = [
        passes.dropped_by_rank(values[i : i + 1], 3, 1500 * i, chances, inverse=False)
        for i in range(100)
    ]
    assert torch.equal(found, torch.cat(alone))
