"""The sparse methods: what stays of the task vectors, and how it is combined, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.methods import Site, build_method
from resmerge_stream.methods.sparse import drop_of
from resmerge_stream.specs import TensorSpec
from tests.support.method_tools import MATRIX, experts_of, made_up, relative, run_method, ties64


@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_ties_is_its_three_steps(trim):
    """Trim, elect, disjoint mean; one tensor alone is the whole model."""
    base, deltas = made_up(20, 12, 3, share=0.3)
    rank = int(0.2 * base.numel())
    thresholds = [float(d.abs().flatten().sort(descending=True).values[rank - 1]) for d in deltas]

    method = build_method("ties", {"preset": "paper", "trim": trim})
    update, _ = run_method(method, base, experts_of(base, deltas))

    assert relative(update, ties64(deltas, thresholds)) < 1e-6


def test_trimming_sparse_updates_keeps_all_that_changed():
    """Where fewer entries changed than are to be kept, the threshold is zero and nothing goes."""
    base, deltas = made_up(20, 12, 3, share=0.9)

    update, _ = run_method(build_method("ties", {"density": 0.2}), base, experts_of(base, deltas))

    assert relative(update, ties64(deltas, [0.0] * 3)) < 1e-6


def test_ties_counts_weights():
    """Weights move the election and the mean."""
    base, deltas = made_up(6, 4, 2)
    method = build_method("ties", {})

    update, _ = run_method(method, base, experts_of(base, deltas), weights=(3.0, 1.0))

    a, b = (d.double() for d in deltas)
    total = 3 * a + b
    both = (3 * a + b) / 4
    expected = torch.where(a * b > 0, both, torch.where(a * total > 0, a, b))
    assert relative(update, expected) < 1e-6


def test_dare_keeps_a_share_and_the_expectation():
    """About p of the entries are kept, each divided by p; the others are zero."""
    base, deltas = made_up(200, 300, 1)

    method = build_method("dare_linear", {"preset": "paper"})
    update, _ = run_method(method, base, experts_of(base, deltas))

    kept = update != 0
    assert abs(float(kept.float().mean()) - 0.2) < 0.01
    assert relative(update[kept], deltas[0][kept] / 0.2) < 1e-6


@given(start=st.integers(0, 700), length=st.integers(1, 64))
def test_dare_draws_the_same_wherever_a_tensor_is_cut(start, length):
    """A row's draw depends on the tensor's name, the expert and the row; not on the piece."""
    spec = TensorSpec(MATRIX, "F32", (1000, 300))
    rule = build_method("dare_linear", {}).rule_for(spec, 1)
    of_all = drop_of(Site(rule, (1.0,), 5), 300, [0.2], inverse=False)
    (whole,) = of_all.of_block(slice(0, 1000), torch.ones(1, 1000, 300))
    site = Site(rule, (1.0,), 5, start_row=start)

    of_piece = drop_of(site, 300, [0.2], inverse=False)
    (piece,) = of_piece.of_block(slice(0, length), torch.ones(1, length, 300))

    assert torch.equal(piece, whole[start : start + length])
    assert 0.19 < float(whole.mean()) < 0.21


def test_dare_can_match_the_l1_norm():
    """mergekit's rescaling gives the kept entries the L1 norm of the whole tensor."""
    base, deltas = made_up(40, 30, 1)

    method = build_method("dare_linear", {"density": 0.2, "rescale": "l1"})
    update, _ = run_method(method, base, experts_of(base, deltas))

    assert float(update.abs().sum()) == pytest.approx(float(deltas[0].abs().sum()), rel=1e-5)
