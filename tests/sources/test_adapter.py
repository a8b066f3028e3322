"""Adapters are read as PEFT reads them: every kind changes the base as `merge_and_unload` does."""

import pytest
import torch

pytest.importorskip("peft")

from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods import build_method
from resmerge_stream.planning.plan import PlannedTensor
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.changes import change_of
from resmerge_stream.run.pieces import Piece
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.adapter import AdapterCheckpoint
from tests.support import adapters


def deltas(base_folder, adapter_folder):
    """Return ΔW of every tensor that an adapter changes, as it is read."""
    base = open_checkpoint(ModelRef(str(base_folder)))
    adapter = AdapterCheckpoint(open_checkpoint(ModelRef(str(adapter_folder))), base)
    method = build_method("mean", {})
    found = {}
    weights = adapters.weights(base_folder)
    for name, edit in adapter.edits.items():
        rule = method.rule_for(edit.spec, 1)
        rows, columns = edit.spec.matrix_shape
        piece = Piece(PlannedTensor(edit.spec, rule, method), 0, rows, None, True, [])
        change = change_of(adapter.read_edit(name), piece, base, lambda tensor: tensor)
        W0 = weights[name].reshape(rows, columns)
        vectors = TaskVectors(W0, [change], Workspace(torch.device("cpu")), resident=False)
        found[name] = vectors.matrix(0).clone().reshape(edit.spec.shape)
        adapter.done_with(name)
    return found


@pytest.mark.parametrize("kind", list(adapters.KINDS))
def test_an_adapter_changes_the_base_as_peft_merges_it(tmp_path, kind):
    """Every update equals PEFT's in float64 within 1e-6, and no other tensor is changed."""
    made = adapters.KINDS[kind]
    base = adapters.make_base(tmp_path / "base", made)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, made)
    before = adapters.weights(base)
    after = adapters.weights(adapters.whole(base, adapter, tmp_path / "whole"))

    found = deltas(base, adapter)

    changed = {name for name, W in before.items() if not torch.equal(W.double(), after[name])}
    assert {name for name, delta in found.items() if delta.any()} == changed
    for name in changed:
        expected = after[name] - before[name].double()
        error = (found[name].double() - expected).norm() / expected.norm()
        assert error <= 1e-6, name
