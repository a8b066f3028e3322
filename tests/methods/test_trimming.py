"""Thresholds of a tensor and of a model, against a sort."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.methods import Site, build_method
from resmerge_stream.methods.parts.trimming import ModelThresholds, tensor_thresholds
from resmerge_stream.specs import TensorSpec
from tests.support.method_tools import MATRIX, made_up, vectors_of


@given(
    values=st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=1, max_size=60),
    density=st.floats(0.0, 1.0),
)
def test_thresholds_are_those_of_a_sort(values, density):
    """Counting bits finds exactly the K-th largest magnitude, subnormals and ties included; at
    density 1 everything stays, at 0 nothing."""
    delta = torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
    rank = max(int(density * delta.numel()), 1)

    found = tensor_thresholds(vectors_of(torch.zeros_like(delta), [delta]), density)

    if density in (0, 1):
        assert found == [math.inf if density == 0 else 0.0]
        return
    assert found == [float(delta.abs().flatten().sort(descending=True).values[rank - 1])]


def test_model_thresholds_are_those_of_all_tensors_together():
    """`trim: model` ranks the entries of all tensors in one list, in any order of tensors."""
    tensors = [made_up(8, 5, 2, seed=seed, scale=10.0**-seed) for seed in range(1, 4)]
    site = Site(build_method("ties", {}).rule_for(TensorSpec(MATRIX, "F32", (8, 5)), 2), (1.0, 1.0))
    counted = {}
    for number in range(2):
        counter = ModelThresholds(number, counted, 2, 0.3)
        for base, deltas in tensors if number else tensors[::-1]:
            counter.add(vectors_of(base, deltas), site)
        counted |= counter.result()

    for i in range(2):
        every = torch.cat([deltas[i].flatten() for _, deltas in tensors]).abs()
        rank = int(0.3 * every.numel())
        assert counted["trim_thresholds"][i] == float(every.sort(descending=True).values[rank - 1])
