"""Adapters are read as PEFT reads them: every kind changes the base as `merge_and_unload` does."""

import pytest
import torch

pytest.importorskip("peft")

from tests.support import adapters


@pytest.mark.parametrize("kind", list(adapters.KINDS))
def test_an_adapter_changes_the_base_as_peft_merges_it(tmp_path, kind):
    """Every update equals PEFT's in float64 within 1e-6, and no other tensor is changed."""
    made = adapters.KINDS[kind]
    base = adapters.make_base(tmp_path / "base", made)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, made)
    before = adapters.weights(base)
    after = adapters.weights(adapters.whole(base, adapter, tmp_path / "whole"))

    found = adapters.deltas(base, adapter)

    changed = {name for name, W in before.items() if not torch.equal(W.double(), after[name])}
    assert {name for name, delta in found.items() if delta.any()} == changed
    for name in changed:
        expected = after[name] - before[name].double()
        error = (found[name].double() - expected).norm() / expected.norm()
        assert error <= 1e-6, name
