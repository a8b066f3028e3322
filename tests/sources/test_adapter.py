"""Adapters are read as PEFT reads them: every kind changes the base as `merge_and_unload` does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from resmerge_stream.errors import UnsupportedCheckpointError
from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods import build_method
from resmerge_stream.planning.plan import PlannedTensor
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.changes import change_of
from resmerge_stream.run.pieces import Piece
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.adapter import AdapterCheckpoint
from tests.support import adapters

TINKER = Path(__file__).parents[1] / "data" / "tinker"


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


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model._fsdp_wrapped_module."),
        ("lora_B.weight", "lora_B.default.weight"),
        ("base_model.model.lm_head", "base_model.model.model.unembed_tokens"),
    ],
    ids=["no prefix", "FSDP", "the adapter's name", "Tinker's head"],
)
def test_other_trainers_names_mean_the_same(tmp_path, ours, theirs):
    """Without PEFT's prefix, with a wrapper's, with another word for the head: the same update."""
    made = adapters.KINDS["embeddings"]
    base = adapters.make_base(tmp_path / "base", made)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, made)
    other = tmp_path / "other"
    other.mkdir()
    stored = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace(ours, theirs, 1): tensor for key, tensor in stored.items()}
    save_file(renamed, other / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", other)

    found, expected = deltas(base, other), deltas(base, adapter)

    assert set(renamed) != set(stored)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


def test_a_part_whose_place_is_not_known_is_refused(tmp_path):
    """Where a part of a layer begins, only the parts before it say; without them it is refused."""
    shutil.copytree(TINKER / "qwen3_5_moe", tmp_path / "family")
    file = tmp_path / "family" / "adapter" / "adapter_model.safetensors"
    save_file(
        {key: value for key, value in load_file(file).items() if "in_proj_q" not in key}, file
    )

    with pytest.raises(UnsupportedCheckpointError, match="in_proj_q, which comes before it"):
        deltas(tmp_path / "family" / "base", tmp_path / "family" / "adapter")


EXPERTS = ("w1", "w2", "w3")


@pytest.mark.parametrize(
    ("kind", "parent", "leaves"),
    [
        ("experts by themselves", "mlp", ("gate_proj", "down_proj", "up_proj")),
        ("mixtral", "block_sparse_moe", EXPERTS),
    ],
)
def test_a_stack_of_factors_changes_each_expert(tmp_path, kind, parent, leaves):
    """Tinker's form: factors of all experts in one tensor, those they share stored once; each
    expert's own matrix gets s·Bₑ·Aₑ."""
    experts, rank, alpha = 4, 2, 3
    sizes = {"num_local_experts": experts, "num_experts_per_tok": 2}
    model = adapters.KINDS.get(kind, adapters.Kind("mixtral", {}, sizes))
    base = adapters.make_base(tmp_path / "base", model)
    stored = adapters.weights(base)
    random = torch.Generator().manual_seed(0)
    factors, expected = {}, {}
    for name, leaf in zip(EXPERTS, leaves, strict=True):
        module = f"model.layers.1.{parent}.experts"
        m, n = stored[f"{module}.0.{leaf}.weight"].shape
        inner, outer = (experts, 1) if name == "w2" else (1, experts)
        down = torch.randn(inner, rank, n, generator=random)
        up = torch.randn(outer, m, rank, generator=random)
        factors[f"base_model.model.{module}.{name}.lora_A.weight"] = down
        factors[f"base_model.model.{module}.{name}.lora_B.weight"] = up
        products = alpha / rank * up.double() @ down.double()
        for e in range(experts):
            expected[f"{module}.{e}.{leaf}.weight"] = products[e]
    adapter = written(tmp_path / "adapter", factors, r=rank, lora_alpha=alpha)

    found = deltas(base, adapter)

    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert (found[name].double() - delta).norm() <= 1e-6 * delta.norm(), name


def test_factors_that_fit_two_ways_are_refused(tmp_path):
    """Of a stack of square matrices no shape says whether it is stored transposed."""
    made = adapters.KINDS["fused experts"]
    square = replace(made, sizes={**made.sizes, "intermediate_size": adapters.SMALL["hidden_size"]})
    base = adapters.make_base(tmp_path / "base", square)
    module = "base_model.model.model.layers.0.feed_forward.experts"
    factors = {f"{module}.lora_A.weight": torch.ones(8, 16)}
    factors[f"{module}.lora_B.weight"] = torch.ones(16, 8)
    target = ["experts.down_proj"]
    adapter = written(tmp_path / "adapter", factors, r=2, lora_alpha=3, target_parameters=target)

    with pytest.raises(UnsupportedCheckpointError, match="fit in more than one way"):
        deltas(base, adapter)


def written(folder, factors, **config):
    """Write an adapter by hand: what no trainer here would write."""
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder
