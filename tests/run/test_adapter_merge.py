"""Adapters merged into a full model equal the experts that PEFT makes of them, merged whole."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from resmerge_stream import Options, Recipe, plan_merge, run_merge
from resmerge_stream.errors import PlanRefusedError
from resmerge_stream.methods import build_method
from resmerge_stream.planning.recipe_file import load_recipe
from resmerge_stream.recipe import ModelRef
from tests.support import adapters
from tests.support.method_tools import run_method

pytestmark = pytest.mark.usefixtures("without_picture")
TINKER = Path(__file__).parents[1] / "data" / "tinker"
OWN_MAP = "model.layers.0.mlp.experts.0.down_proj.weight"
IN_GROUP = ("plain", "rslora", "patterns")
DENSITY = 0.2
METHODS = (("mean", {}), ("resmerge", {}), ("tsv_m", {}), ("ties", {"density": DENSITY}))


def merged(out, base, experts, method, parameters=None, **options):
    """Run a merge to float32; return its weights and its report."""
    refs = tuple(ModelRef(str(expert)) for expert in experts)
    recipe = Recipe(ModelRef(str(base)), refs, method, parameters or {}, "float32")
    plan = plan_merge(recipe, Options(**options), out=out)
    assert not plan.refused, plan.problems
    *_, last = run_merge(plan, out=out)
    return adapters.weights(out), last.report


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Return a base, three adapters of different kinds, and their whole float64 weights."""
    folder = tmp_path_factory.mktemp("group")
    kinds = [adapters.KINDS[name] for name in IN_GROUP]
    base = adapters.make_base(folder / "base", kinds[0])
    made = [
        adapters.make_adapter(folder / f"adapter{i}", base, kind, seed=i)
        for i, kind in enumerate(kinds)
    ]
    wholes = [adapters.whole(base, a, folder / f"whole{i}") for i, a in enumerate(made)]
    return base, made, [adapters.weights(whole) for whole in wholes]


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=str)
def test_a_merge_of_adapters_is_the_merge_of_the_models_that_peft_makes(
    tmp_path, group, method, parameters
):
    """The update equals that of the float64 weights within 1e-6, before the cast."""
    base, made, wholes = group
    before = adapters.weights(base)

    found, report = merged(tmp_path / "out", base, made, method, parameters)

    for row in report["tensors"]:
        name, W0 = row["name"], before[row["name"]].double()
        deltas = [whole[name] - W0 for whole in wholes]
        if not any(delta.any() for delta in deltas):
            assert torch.equal(found[name].double(), W0), name
            continue
        # A base of zeros, so that float32 stores the experts to 1e-7 of the update.
        assert _is_close(method, parameters, name, deltas, found[name].double() - W0, W0), name


def test_adapters_that_add_nothing_are_refused(tmp_path, group):
    """Factors decide for an adapter: one whose B is zero is the base, as PEFT begins it."""
    base, (first, *_), _ = group
    empty = [shutil.copytree(first, tmp_path / name) for name in ("a", "b")]
    for folder in empty:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        zeroed = {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}
        save_file(zeroed, file)

    with pytest.raises(PlanRefusedError, match="nothing differs"):
        merged(tmp_path / "out", base, empty, "mean")

    found, _ = merged(tmp_path / "out", base, [empty[0], first], "mean")
    assert any((found[name] != tensor).any() for name, tensor in adapters.weights(base).items())


def _is_close(method, parameters, name, deltas, update, W0):
    """Return whether an update is the method's of float64 task vectors, within 1e-6."""
    expected = _expected(build_method(method, parameters), name, deltas)
    error = update - expected
    if method == "ties":
        error = error[~_near_thresholds(deltas)]
    # What float32 itself rounds of W0 + ΔW.
    return bool(error.norm() <= 1e-6 * expected.norm() + 2.0**-24 * W0.norm())


def _expected(method, name, deltas):
    """Return the merged update, float64; of stacks by each expert's own maps."""
    is_spectral = method.name in ("resmerge", "tsv_m")
    if deltas[0].dim() < 3 or not is_spectral:
        # A base of zeros, so that float32 stores the experts to 1e-7 of the update.
        zeros = torch.zeros(deltas[0].shape)
        return run_method(method, zeros, deltas, name=name)[0].double()
    parts = 2 if "gate_up" in name else 1  # (in, out), gate before up
    found = []
    for maps in zip(*(delta.mT.unbind() for delta in deltas), strict=True):
        halves = zip(*(each.chunk(parts) for each in maps), strict=True)
        found.append(torch.cat([_expected(method, OWN_MAP, half) for half in halves]))
    return torch.stack(found).mT


def _near_thresholds(deltas):
    """Return which entries are within 1e-6 of a threshold or of a tie in sign; they are few."""
    near = torch.zeros(deltas[0].shape, dtype=torch.bool)
    kept = []
    for delta in deltas:
        flat = delta.abs().flatten()
        threshold = flat.sort(descending=True).values[max(int(DENSITY * flat.numel()), 1) - 1]
        near |= ((delta.abs() - threshold).abs() <= 1e-6 * flat.max()) & (delta != 0)
        kept.append(torch.where(delta.abs() >= threshold, delta, 0.0))
    total = sum(kept)
    near |= (total.abs() <= 1e-6 * total.abs().max()) & (total != 0)
    assert near.sum() <= max(2 * len(deltas), 0.01 * near.numel())
    return near


def test_adapters_and_whole_models_merge_together(tmp_path, group):
    """A mixed group gives the mean of all of them; the adapter's untouched tensors count zero."""
    base, made, wholes = group
    before = adapters.weights(base)
    full = tmp_path / "full"
    full.mkdir()
    save_file({k: v.float() for k, v in wholes[1].items()}, full / "model.safetensors")
    (full / "config.json").write_text((base / "config.json").read_text())

    found, _ = merged(tmp_path / "out", base, [made[0], full], "mean")

    for name, W0 in before.items():
        expected = (wholes[0][name] + wholes[1][name].float().double()) / 2
        assert (found[name].double() - expected).norm() <= 1e-6 * expected.norm() + 1e-12, name
        del W0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in adapters.KINDS if kind not in IN_GROUP])
def test_every_kind_is_merged_as_its_whole_models_are(tmp_path, kind):
    """DoRA, saved modules, trained tokens, biases, stacks of experts and what else PEFT has: by
    each method within 1e-6 of the merge of PEFT's whole weights."""
    made = adapters.KINDS[kind]
    base = adapters.make_base(tmp_path / "base", made)
    folders = [
        adapters.make_adapter(tmp_path / f"a{i}", base, made, seed=i, dtype=torch.bfloat16)
        for i in range(2)
    ]
    wholes = [
        adapters.weights(adapters.whole(base, folder, tmp_path / f"w{i}"))
        for i, folder in enumerate(folders)
    ]
    before = adapters.weights(base)
    for method, parameters in METHODS:
        found, report = merged(tmp_path / method, base, folders, method, parameters)

        for row in report["tensors"]:
            name, W0 = row["name"], before[row["name"]].double()
            deltas = [whole[name] - W0 for whole in wholes]
            update = found[name].double() - W0
            if not any(delta.any() for delta in deltas):
                assert not update.any(), (method, name)
            else:
                assert _is_close(method, parameters, name, deltas, update, W0), (method, name)


def test_mergekit_is_told_of_adapters_on_the_base(tmp_path, group, monkeypatch):
    """Its recipe names ``base+adapter``, and read again it is the same merge."""
    monkeypatch.chdir(group[0].parent)
    first, _ = merged(tmp_path / "first", "base", ["adapter0", "adapter1"], "task_arithmetic")
    written = tmp_path / "first" / "mergekit_config.yml"

    recipe = load_recipe(written)
    list(run_merge(plan_merge(recipe), out=tmp_path / "again"))

    names = [model["model"] for model in yaml.safe_load(written.read_text())["models"]]
    again = adapters.weights(tmp_path / "again")
    assert names == ["base+adapter0", "base+adapter1"]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_factors_are_counted_once_however_many_rows_take_them(tmp_path, group, monkeypatch):
    """What a merge by row blocks says that it read is what the files hold: base and factors."""
    monkeypatch.setattr("resmerge_stream.run.pieces.PIECE_BYTES", 256)
    base, (adapter, *_), _ = group

    _, report = merged(tmp_path / "out", base, [adapter], "mean")

    own = load_file(adapter / "adapter_model.safetensors")
    stored = [*own.values(), *adapters.weights(base).values()]
    assert report["summary"]["bytes_read"] == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("family", sorted(path.name for path in TINKER.iterdir() if path.is_dir()))
def test_tinkers_adapters_merge_as_its_own_code_merges_them(tmp_path, family):
    """Its names, experts in stacks, layers that it trains in parts: every update is the one that
    tinker-cookbook adds, in its place, and no other tensor is changed."""
    expected = load_file(TINKER / family / "expected.safetensors")
    base = TINKER / family / "base"  # zeros

    found, _ = merged(tmp_path / "out", base, [TINKER / family / "adapter"], "mean")

    assert {name for name, weight in found.items() if weight.any()} == set(expected)
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= 1e-6 * delta.norm(), name
