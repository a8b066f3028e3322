"""A merge written as an adapter: PEFT loads it, and gets the weights of the whole merge."""

import json

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from safetensors.torch import load_file

from resmerge_stream import Options, Recipe, plan_merge, run_merge
from resmerge_stream.errors import PlanRefusedError
from resmerge_stream.planning.options import declared
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.verify import verify_folder
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support import adapters

pytestmark = pytest.mark.usefixtures("without_picture")
METHODS = (
    ("mean", {}),
    ("linear", {}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("resmerge", {}),
    ("resmerge", {"variant": "release-2026-07"}),
    ("tsv_m", {}),
    ("iso_c", {}),
    ("head_regression", {}),
)


def merged(out, base, experts, method, parameters=None, **options):
    """Run a merge to float32; return the report."""
    refs = tuple(ModelRef(str(expert)) for expert in experts)
    recipe = Recipe(ModelRef(str(base)), refs, method, parameters or {}, "float32")
    plan = plan_merge(recipe, Options(**options), out=out)
    assert not plan.refused, plan.problems
    *_, last = run_merge(plan, out=out)
    return last.report


def update(base, folder):
    """Return ΔW of a whole model by name, float64."""
    before = adapters.weights(base)
    return {
        name: weight.double() - before[name].double()
        for name, weight in adapters.weights(folder).items()
    }


def a_group(folder, *kinds, **save):
    """Write a base and an adapter of each kind."""
    base = adapters.make_base(folder / "base", adapters.KINDS[kinds[0]])
    made = [
        adapters.make_adapter(folder / f"a{i}", base, adapters.KINDS[kind], seed=i, **save)
        for i, kind in enumerate(kinds)
    ]
    return base, made


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Return a base and three adapters of different kinds and ranks."""
    return a_group(tmp_path_factory.mktemp("group"), "plain", "rslora", "patterns")


def same_update(tmp_path, base, out, whole, places=1e-6):
    """Assert that PEFT's merge of an adapter is a whole merge, up to float32's own rounding."""
    found = update(base, adapters.whole(base, out, tmp_path / "by-peft"))
    expected = update(base, whole)
    weights = adapters.weights(base)
    for name, delta in expected.items():
        rounding = 2.0**-24 * weights[name].double().norm()
        error = (found[name] - delta).norm()
        assert error <= places * delta.norm() + rounding, (name, error / delta.norm())


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=str)
def test_peft_makes_the_whole_merge_of_it(tmp_path, group, method, parameters):
    """Loaded by PEFT onto the base, the adapter gives the weights of the full merge."""
    base, made = group
    merged(tmp_path / "whole", base, made, method, parameters)

    report = merged(tmp_path / "out", base, made, method, parameters, output="adapter")

    same_update(tmp_path, base, tmp_path / "out", tmp_path / "whole")
    assert report["adapter"]["kept"] == pytest.approx(1.0)
    assert report["summary"]["bytes_read"] == sum(
        tensor.numel() * tensor.element_size()
        for folder in made
        for tensor in load_file(folder / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("kind", ["embeddings", "gpt2", "all-linear"])
def test_other_modules_come_back_as_they_were_adapted(tmp_path, kind):
    """Embeddings and transposed layers of the experts are such modules of the result."""
    base, made = a_group(tmp_path, kind, kind, save_embedding_layers=False)
    merged(tmp_path / "whole", base, made, "mean")

    merged(tmp_path / "out", base, made, "mean", output="adapter")

    same_update(tmp_path, base, tmp_path / "out", tmp_path / "whole")


def test_every_module_has_the_sum_of_the_ranks_at_most(tmp_path, group):
    """The ranks of the experts' modules add up, or less where the matrix is smaller."""
    base, made = group

    report = merged(tmp_path / "out", base, made, "mean", output="adapter")

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn"
    assert found[f"{layer}.q_proj.lora_A.weight"].shape == (4 + 5 + 2, 16)
    assert found[f"{layer}.k_proj.lora_B.weight"].shape == (8, 8)  # no more than its 8 rows
    assert config["r"] == max(t.shape[0] for k, t in found.items() if "lora_A" in k)
    assert report["adapter"]["rank"] == config["r"]


def test_a_smaller_rank_that_is_exact_is_named_and_writes_the_same_update(tmp_path, group):
    """An expert twice has the rank of one: report and card say so, and the option gives it."""
    base, (adapter, *_) = group
    report = merged(tmp_path / "twice", base, [adapter, adapter], "mean", output="adapter")
    own = load_file(adapter / "adapter_model.safetensors")
    rank = max(len(value) for name, value in own.items() if "lora_A" in name)

    assert (report["adapter"]["rank"], report["adapter"]["needed"]) == (2 * rank, rank)
    option = f"--adapter-rank {rank}"
    assert option in (tmp_path / "twice" / "README.md").read_text()

    kept = {"output": "adapter", "adapter_rank": report["adapter"]["needed"]}
    smaller = merged(tmp_path / "out", base, [adapter, adapter], "mean", **kept)

    assert smaller["adapter"]["kept"] == pytest.approx(1.0)
    same_update(tmp_path, base, tmp_path / "out", adapters.whole(base, adapter, tmp_path / "one"))
    sizes = [
        (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("twice", "out")
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_smaller_rank_is_the_best_of_that_rank_and_says_what_it_keeps(tmp_path, group):
    """Cut at rank 3, each update is the truncated SVD of the whole one; the share is reported."""
    base, made = group
    merged(tmp_path / "whole", base, made, "mean")

    report = merged(tmp_path / "out", base, made, "mean", output="adapter", adapter_rank=3)

    found = update(base, adapters.whole(base, tmp_path / "out", tmp_path / "by-peft"))
    rows = {row["name"]: row for row in report["tensors"]}
    energy = kept = 0.0
    for name, delta in update(base, tmp_path / "whole").items():
        if not delta.any():
            continue
        U, sigma, Vh = torch.linalg.svd(delta)
        best = U[:, :3] * sigma[:3] @ Vh[:3]
        assert (found[name] - best).norm() <= 2e-6 * delta.norm()
        share = float(sigma[:3].square().sum() / sigma.square().sum())
        assert rows[name]["adapter"]["kept"] == pytest.approx(share, abs=1e-5)
        energy += float(sigma.square().sum())
        kept += float(sigma[:3].square().sum())
    assert report["adapter"]["kept"] == pytest.approx(kept / energy, abs=1e-5)


def test_what_bfloat16_loses_of_the_factors_is_reported(tmp_path, group):
    """Factors in bfloat16 keep the update to the precision that the report says."""
    base, made = group
    refs = tuple(ModelRef(str(expert)) for expert in made)
    recipe = Recipe(ModelRef(str(base)), refs, "mean", {}, "bfloat16")
    plan = plan_merge(recipe, Options(output="adapter"), out=tmp_path / "out")

    *_, last = run_merge(plan, out=tmp_path / "out")

    cosine = last.report["summary"]["kept_cosine"]
    assert 0.9999 < cosine < 1 - 1e-8


def test_whole_models_give_the_best_adapter_of_a_rank(tmp_path, group):
    """A whole expert among them is allowed where a rank is given: its update is cut to it."""
    base, made = group
    full = adapters.whole(base, made[1], tmp_path / "full")

    report = merged(
        tmp_path / "out", base, [made[0], full], "ties", output="adapter", adapter_rank=4
    )

    merged(tmp_path / "whole", base, [made[0], full], "ties")
    found = update(base, adapters.whole(base, tmp_path / "out", tmp_path / "by-peft"))
    for name, delta in update(base, tmp_path / "whole").items():
        if not delta.any():
            continue
        U, sigma, Vh = torch.linalg.svd(delta)
        best = U[:, :4] * sigma[:4] @ Vh[:4]
        assert (found[name] - best).norm() <= 1e-5 * delta.norm(), name
    assert 0 < report["adapter"]["kept"] < 1


@pytest.mark.parametrize(
    ("kind", "method", "words"),
    [
        ("plain", "ties", "decides weight by weight"),
        ("dora", "mean", "beyond its factors"),
        ("modules_to_save", "mean", "beyond its factors"),
        ("lora_bias", "mean", "vectors"),
        ("fused experts", "mean", "fused experts"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, kind, method, words):
    """The plan says why, and that a whole model can be had."""
    base, made = a_group(tmp_path, kind, kind)
    recipe = Recipe(ModelRef(str(base)), tuple(ModelRef(str(m)) for m in made), method)

    plan = plan_merge(recipe, Options(output="adapter"))

    assert any(words in problem for problem in plan.problems), plan.problems
    assert all("eave --as adapter away" in problem for problem in plan.problems)


def test_a_whole_expert_without_a_rank_is_refused(tmp_path, group):
    """An update of full rank is no adapter, unless a rank says what to keep."""
    base, made = group
    full = adapters.whole(base, made[1], tmp_path / "full")
    recipe = Recipe(ModelRef(str(base)), (ModelRef(str(full)), ModelRef(str(made[0]))), "mean")

    plan = plan_merge(recipe, Options(output="adapter"))

    assert "whole model" in plan.problems[0]
    assert "--adapter-rank" in plan.problems[0]


def test_an_adapter_is_verified_like_a_model(tmp_path, group):
    """Layout, hashes and tensors that are merged again agree; a changed factor is found."""
    base, made = group
    merged(tmp_path / "out", base, made, "resmerge", output="adapter")

    passed = [check.problems for check in verify_folder(tmp_path / "out")]

    assert passed == [()] * 5
    file = tmp_path / "out" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\x80?")
    assert any(check.problems for check in verify_folder(tmp_path / "out", sample=100))


def test_the_card_is_an_adapters(tmp_path, group):
    """The card names PEFT, what the adapter holds, and how to load it."""
    base, made = group
    merged(tmp_path / "out", base, made, "resmerge", output="adapter")

    card = (tmp_path / "out" / "README.md").read_text()

    assert "library_name: peft" in card
    assert "base_model_relation: adapter" in card
    assert "PeftModel.from_pretrained" in card
    assert "**100.0000%** of the merged update" in card
    assert "--as adapter" in card


def test_a_comparison_writes_models(tmp_path, group):
    """Several methods are compared as whole models; an adapter is refused."""
    base, made = group
    recipe = Recipe(ModelRef(str(base)), tuple(ModelRef(str(m)) for m in made))

    with pytest.raises(PlanRefusedError, match="whole models"):
        plan_comparison(recipe, ["mean"], Options(output="adapter"), out=tmp_path / "out")


def test_a_rank_of_a_whole_model_is_refused(group):
    """A rank without an adapter says nothing, so it is not ignored."""
    base, made = group
    recipe = Recipe(ModelRef(str(base)), tuple(ModelRef(str(m)) for m in made))

    plan = plan_merge(recipe, Options(adapter_rank=8))

    assert "--as adapter" in plan.problems[0]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"rounding": "stochastic"}, "rounded to nearest"),
        ({"max_shard_bytes": 10**6}, "one file"),
        ({"tokenizer_from": "BASE"}, "an adapter has none"),
    ],
    ids=str,
)
def test_an_option_that_says_nothing_of_an_adapter_is_refused(group, option, words):
    """What an adapter knows nothing of is refused in the plan, not ignored."""
    base, made = group
    recipe = Recipe(ModelRef(str(base)), tuple(ModelRef(str(m)) for m in made))

    options = {key: str(base) if value == "BASE" else value for key, value in option.items()}

    plan = plan_merge(recipe, Options(output="adapter", **options))

    assert words in plan.problems[0]
    assert "Leave --as adapter away" in plan.problems[0]


def test_every_option_is_used_by_an_adapter_or_refused():
    """An option that is declared later has to say which of the two it is."""
    refused = {"rounding", "max_shard_size", "tokenizer_from"}
    used = {"seed", "missing", "unrelated", "as", "adapter_rank"}

    assert {known.key for known in declared() if known.changes != "nothing"} == refused | used


def test_transformers_loads_it_as_peft_does(tmp_path, group):
    """`load_adapter` of transformers' own models gives the logits of PEFT's model."""
    base, made = group
    merged(tmp_path / "out", base, made, "resmerge", output="adapter")
    tokens = torch.arange(8)[None]

    with torch.no_grad(), adapters.quiet():
        plain = adapters.loaded(base, torch.float32)
        before = plain(tokens).logits
        plain.load_adapter(str(tmp_path / "out"))
        found = plain(tokens).logits
        by_peft = PeftModel.from_pretrained(adapters.loaded(base, torch.float32), tmp_path / "out")(
            tokens
        ).logits

    assert (by_peft - before).norm() > 1e-3 * before.norm()
    assert (found - by_peft).norm() <= 1e-6 * by_peft.norm()
