"""Readings that several methods share: whose cut they follow."""

from resmerge_stream.run.reading import shared_order
from tests.support.checkpoints import make_group, plan_group


def test_the_method_that_needs_most_of_a_tensor_leads(tmp_path):
    """Who needs float32 copies of whole matrices says how they are kept, wherever it is listed."""
    group = make_group(tmp_path)
    plans = {
        name: plan_group(group, method=name) for name in ("head_regression", "resmerge", "mean")
    }

    for order in (list(plans), list(reversed(plans))):
        led = list(shared_order({name: plans[name] for name in order}, plans["mean"].tensors))

        merged = [tensor for tensor in led if tensor.rule is not None]
        assert any(tensor.rule.needs_matrix for tensor in merged)
        assert all(tensor.rule.copies for tensor in merged if tensor.rule.needs_matrix)
