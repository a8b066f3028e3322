"""Fused gate and up projections are decomposed apart, as in a checkpoint that has them split."""

import pytest
import torch

from resmerge_stream.run.verify import verify_folder
from resmerge_stream.studies.compare import run_comparison
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support.checkpoints import (
    edit_config,
    edit_tensors,
    make_group,
    merge,
    read_tensors,
    recipe_of,
)

pytestmark = pytest.mark.usefixtures("without_picture")

MLP = "model.layers.0.mlp"
EXPERTS = f"{MLP}.experts"


def split_mixture(tensors):
    """Put three experts of other numbers in the place of a feed-forward block."""
    gate, up, down = (tensors.pop(f"{MLP}.{name}_proj.weight") for name in ("gate", "up", "down"))
    for e in range(3):
        tensors[f"{EXPERTS}.{e}.gate_proj.weight"] = gate.roll(e, 0)
        tensors[f"{EXPERTS}.{e}.up_proj.weight"] = up.roll(e, 1)
        tensors[f"{EXPERTS}.{e}.down_proj.weight"] = down.roll(e, 0)


def fused_mixture(tensors, *, turned=False, woven=False):
    """Fuse such experts as transformers runs them: [E, 2f, h], or turned as [E, h, 2f]."""
    gates, downs = [], []
    for e in range(3):
        gate, up, down = (
            tensors.pop(f"{EXPERTS}.{e}.{name}_proj.weight") for name in ("gate", "up", "down")
        )
        both = torch.stack([gate, up], 1).flatten(0, 1) if woven else torch.cat([gate, up])
        gates.append(both.T if turned else both)
        downs.append(down.T if turned else down)
    tensors[f"{EXPERTS}.gate_up_proj"] = torch.stack(gates)
    tensors[f"{EXPERTS}.down_proj"] = torch.stack(downs)


def fused_block(tensors):
    """Fuse gate and up of a dense block, one below the other, as Phi-3 does."""
    both = [tensors.pop(f"{MLP}.{name}_proj.weight") for name in ("gate", "up")]
    tensors[f"{MLP}.gate_up_proj.weight"] = torch.cat(both)


def written_both_ways(tmp_path, prepare, fuse, *, model_type="qwen2"):
    """Write the split and the fused form of one group."""
    groups = [make_group(tmp_path / name, layers=1, experts=2) for name in ("split", "fused")]
    for group in groups:
        for folder in group.folders:
            edit_tensors(folder, prepare)
    for folder in groups[1].folders:
        edit_tensors(folder, fuse)
        edit_config(folder, model_type=model_type)
    return groups


def merged_both_ways(tmp_path, prepare, fuse, *, model_type="qwen2", **recipe):
    """Return what the split and the fused form of one group become."""
    groups = written_both_ways(tmp_path, prepare, fuse, model_type=model_type)
    return [
        merge(group, tmp_path / f"merged-{group.base.parent.name}", **recipe) for group in groups
    ]


@pytest.mark.parametrize("method", ["resmerge", "tsv_m", "mean"])
def test_a_dense_block_has_the_bytes_of_its_split_form(tmp_path, method):
    """[2f, h]: what is written is gate and up as they are merged alone, bit for bit."""
    split, fused = merged_both_ways(tmp_path, lambda tensors: None, fused_block, method=method)

    fused_block(split.tensors)
    assert set(split.tensors) == set(fused.tensors)
    for name, tensor in split.tensors.items():
        assert torch.equal(tensor, fused.tensors[name])


@pytest.mark.parametrize("method", ["resmerge", "iso_c", "head_regression"])
def test_a_mixture_has_the_bytes_of_its_split_form(tmp_path, method):
    """[E, 2f, h]: every expert's gate, up and down, bit for bit."""
    split, fused = merged_both_ways(tmp_path, split_mixture, fused_mixture, method=method)

    fused_mixture(split.tensors)
    for name, tensor in split.tensors.items():
        assert torch.equal(tensor, fused.tensors[name])


@pytest.mark.parametrize("method", ["resmerge", "iso_c"])
@pytest.mark.parametrize("is_woven", [False, True], ids=["llama4", "gpt_oss"])
def test_turned_stacks_have_the_bytes_of_their_split_form(tmp_path, is_woven, method):
    """[E, h, 2f] and [E, f, h], side by side or by turns: gate, up and down, bit for bit."""

    def turned(tensors):
        fused_mixture(tensors, turned=True)

    def woven(tensors):
        fused_mixture(tensors, turned=True, woven=True)

    fuse, model_type = (woven, "gpt_oss") if is_woven else (turned, "llama4")
    split, fused = merged_both_ways(
        tmp_path, split_mixture, fuse, model_type=model_type, method=method, dtype="float32"
    )

    fuse(split.tensors)
    assert set(split.tensors) == set(fused.tensors)
    for name, tensor in split.tensors.items():
        assert torch.equal(tensor, fused.tensors[name])
    row = fused.row(f"{EXPERTS}.down_proj")
    assert row["rule"] == split.row(f"{EXPERTS}.0.down_proj.weight")["rule"] != "copy"
    assert "fused" not in row


def test_the_report_has_gates_of_each_part(tmp_path):
    """A fused tensor's row names its parts; the gates of each stand under slices, in order."""
    split, fused = merged_both_ways(tmp_path, split_mixture, fused_mixture)

    row = fused.row(f"{EXPERTS}.gate_up_proj")
    assert row["fused"] == ["gate", "up"]
    names = [f"{EXPERTS}.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up")]
    expected = [split.row(name)["c_R"] for name in names]
    assert [piece["c_R"] for piece in row["slices"]] == expected


@pytest.mark.parametrize("variant", ["release-2026-06", "release-2026-07"])
def test_the_releases_decompose_a_fused_matrix_as_one(tmp_path, variant):
    """The authors' code knows no fused matrices; its variants do as it does."""
    _, fused = merged_both_ways(
        tmp_path, lambda tensors: None, fused_block, parameters={"variant": variant}
    )

    row = fused.row(f"{MLP}.gate_up_proj.weight")
    assert "fused" not in row
    assert "slices" not in row


def test_a_fused_tensor_is_merged_again_by_verify(tmp_path):
    """The check of a finished merge puts parts together as the merge did."""
    _, group = written_both_ways(tmp_path, split_mixture, fused_mixture)
    merge(group, tmp_path / "out")

    checks = {
        check.name: check
        for check in verify_folder(tmp_path / "out", recipe=recipe_of(group), sample=100)
    }

    assert f"{EXPERTS}.gate_up_proj" in checks["recomputed"].detail
    assert not [problem for check in checks.values() for problem in check.problems]


def test_a_comparison_gives_the_bytes_of_each_merge_alone(tmp_path):
    """Methods that decompose parts and methods that take the whole tensor read it side by side."""

    def turned(tensors):
        fused_mixture(tensors, turned=True)

    _, group = written_both_ways(tmp_path, split_mixture, turned, model_type="llama4")
    methods = ["resmerge", "mean", "ties", "tsv_m"]
    comparison = plan_comparison(recipe_of(group), methods, out=tmp_path / "compared")
    list(run_comparison(comparison, work_dir=tmp_path / "work"))

    for method in methods:
        alone = merge(group, tmp_path / "alone" / method, method=method)
        compared = read_tensors(tmp_path / "compared" / method)
        assert all(torch.equal(compared[name], tensor) for name, tensor in alone.tensors.items())
