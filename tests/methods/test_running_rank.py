"""The K-th largest of a stream: exact, or said not to be known; and little of it is kept."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.methods.parts import trimming
from resmerge_stream.methods.parts.running_rank import RunningRank
from tests.support.method_tools import vectors_of


def found_in(blocks, rank):
    """Return the finder after a stream of blocks."""
    finder = RunningRank(rank, sum(block.size for block in blocks))
    for block in blocks:
        finder.add(block.view(np.float32))
    return finder


def patterns_of(magnitudes):
    """Return the float32 patterns of some magnitudes."""
    return np.abs(magnitudes).astype(np.float32).view(np.uint32)


@given(
    blocks=st.lists(
        st.lists(st.integers(0, 40) | st.integers(0, 0x7F800000), min_size=1, max_size=30),
        min_size=1,
        max_size=20,
    ),
    share=st.floats(0.0, 1.0),
)
def test_what_is_found_is_that_of_a_sort(blocks, share):
    """Whatever comes, in whatever order: the K-th largest of a sort, or None."""
    arrays = [np.array(block, np.uint32) for block in blocks]
    together = np.sort(np.concatenate(arrays))[::-1]
    rank = max(int(share * together.size), 1)

    found = found_in(arrays, rank).result()

    assert found in (None, int(together[rank - 1]))


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["normal", "grid", "mostly zero"])
def test_blocks_alike_are_never_lost(share, kind):
    """A stream whose blocks are alike is followed to its end: noise, a grid of values, zeros."""
    random = np.random.default_rng(5)
    blocks = random.normal(size=(200, 2_000))
    if kind == "grid":
        blocks = np.round(blocks * 8)
    if kind == "mostly zero":
        blocks *= random.random(blocks.shape) < 0.1
    arrays = [patterns_of(block) for block in blocks]
    rank = int(share * blocks.size)

    found = found_in(arrays, rank).result()

    assert found == int(np.sort(patterns_of(blocks.ravel()))[::-1][rank - 1])


def test_little_is_kept_of_a_long_stream():
    """Of 400 blocks only what lies close around the K-th largest is still held."""
    random = np.random.default_rng(6)
    arrays = [patterns_of(random.normal(size=2_000)) for _ in range(400)]
    finder = found_in(arrays, 160_000)

    held = finder._values.size + finder._wait_count

    assert held < 0.03 * 800_000


def test_a_stream_that_leaves_the_bracket_is_said_to():
    """Blocks that grow and grow end far from where the bracket was drawn."""
    arrays = [patterns_of(np.linspace(k, k + 1, 1_000)) for k in range(64)]

    assert found_in(arrays, 12_800).result() is None


def test_a_tensor_whose_first_rows_are_unlike_the_others_has_exact_thresholds_too(monkeypatch):
    """Where one pass does not suffice, two passes over all bits find the threshold."""
    monkeypatch.setattr("resmerge_stream.maths.task_vectors.BLOCK_ELEMENTS", 64)
    delta = torch.randn(512, 16, generator=torch.Generator().manual_seed(3))
    order = trimming._scattered(vectors_of(torch.zeros_like(delta), [delta]).blocks())
    for rows in order[:4]:
        delta[rows] += 100
    vectors = vectors_of(torch.zeros_like(delta), [delta])
    stacks = [vectors.stack(rows).clone() for rows in order]
    rank = trimming.keep_count(delta.numel(), 0.2)

    found = trimming.tensor_thresholds(vectors, 0.2)

    assert trimming._running_thresholds(stacks, [rank], delta.numel()) is None
    assert found == [float(delta.abs().flatten().sort(descending=True).values[rank - 1])]
