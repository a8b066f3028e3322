"""Where the parts of a runtime tensor are stored, against what its tree makes of their values."""

import random

import numpy as np
import pytest

from resmerge_stream.sources.assembly import Joined, Part, Stacked, Stored, Transposed, Woven, whole
from resmerge_stream.sources.runtime import leaves_of
from resmerge_stream.sources.store import StoredTensor
from resmerge_stream.specs import TensorSpec


class Values:
    """A store of arrays that count upwards, each in a file of its own."""

    def __init__(self):
        self.arrays = {}

    def add(self, *shape):
        """Store a tensor; return it as a leaf."""
        name, count = f"t{len(self.arrays)}", int(np.prod(shape))
        first = 1000 * len(self.arrays)
        self.arrays[name] = np.arange(first, first + count, dtype=np.float32).reshape(shape)
        return Stored(self, StoredTensor(TensorSpec(name, "F32", shape), name, 0))

    def read(self, file, begin, end):
        """Return a range of bytes."""
        return memoryview(self.arrays[file]).cast("B")[begin:end]


def drawn(tree, values, chance):
    """Return a tree around a matrix: turned, cut, joined or woven with others of its shape."""
    way = chance.choice(["turn", "cut", "skip", "join", "weave"])
    axis = chance.randrange(2)
    if way == "turn":
        return Transposed(tree, (1, 0))
    if way == "cut" and tree.shape[axis] % 2 == 0:
        half = tree.shape[axis] // 2
        return Part(tree, axis, chance.choice([0, half]), half)
    if way == "skip" and tree.shape[axis] % 2 == 0:
        return Part(tree, axis, chance.randrange(2), tree.shape[axis] // 2, 2)
    if way == "join":
        return Joined([tree, values.add(*tree.shape)], axis)
    return Woven([values.add(*tree.shape), tree], axis)


@pytest.mark.parametrize("seed", range(100))
def test_the_parts_are_where_the_tree_takes_them_from(seed):
    """Every part of a leaf holds the tree's values; each value of the tree is in one part."""
    chance, values = random.Random(seed), Values()
    tree = values.add(4, 6)
    for _ in range(chance.randrange(4)):
        tree = drawn(tree, values, chance)
    if seed % 3 == 0:
        tree = Stacked([tree, values.add(*tree.shape)])
    made = tree.array(whole(tree.shape))
    covered = np.zeros(tree.shape, int)

    leaves = list(leaves_of(tree))

    for leaf in leaves:
        places = np.ix_(*(span.place + span.step * np.arange(span.size) for span in leaf.spans))
        stored = values.arrays[leaf.name][places]
        rows = {span.axis: span.row + span.row_step * np.arange(span.size) for span in leaf.spans}
        if leaf.index is not None:
            rows[0] = np.array([leaf.index])
        taken = np.ix_(*(rows[axis] for axis in range(len(tree.shape))))
        covered[taken] += 1
        order = [span.axis for span in leaf.spans]
        own = made[taken] if leaf.index is None else made[taken][0]
        low = [axis - (leaf.index is not None) for axis in order]
        assert np.array_equal(own.transpose(low), stored)
    assert (covered == 1).all()
