"""The analysis: its numbers against full SVDs, its files, and the component models."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.synthetic import Shape, Updates, write_group
from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.errors import PlanRefusedError, RecipeError
from resmerge_stream.planning.plan import Options
from resmerge_stream.recipe import ModelRef
from resmerge_stream.studies.analyse import component_recipe, plan_analysis, run_analysis

SMALL = Shape(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def recipe(tmp_path):
    """Three float32 experts, so that every number can be had again from the files."""
    folder = tmp_path / "group"
    write_group(folder, SMALL, updates=Updates(unchanged=0.3), dtype="F32")
    experts = tuple(ModelRef(str(folder / f"expert{i}")) for i in range(3))
    return Recipe(ModelRef(str(folder / "base")), experts)


def deltas_of(recipe, name=NAME):
    """Return the experts' task vectors, float64."""
    base, *experts = (
        load_file(f"{ref.id}/model.safetensors")[name] for ref in (recipe.base, *recipe.experts)
    )
    return [(expert - base).double() for expert in experts]


def analysed(recipe, out, sft=(), **options):
    """Run an analysis to its end and return its document."""
    plan = plan_analysis(recipe, sft, **options)
    *_, finished = run_analysis(plan, out=out, sft=len(sft))
    return finished.report


def row_of(document, name=NAME):
    """Return a tensor's row."""
    return next(entry for entry in document["tensors"] if entry["name"] == name)


@pytest.mark.parametrize("rank", [1, 2])
def test_spectra_are_those_of_full_svds(recipe, tmp_path, rank):
    """Head energy, stable and effective rank, before and after the head, by definition."""
    row = row_of(analysed(recipe, tmp_path / "out", rank=rank))

    for delta, found in zip(deltas_of(recipe), row["experts"], strict=True):
        sigma = torch.linalg.svdvals(delta)
        rest = sigma[rank:]
        p, q = sigma / sigma.sum(), rest / rest.sum()
        assert found["head_energy"] == pytest.approx(
            float((sigma[:rank] ** 2).sum() / (sigma**2).sum()), rel=1e-5
        )
        assert found["stable_rank"] == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2))
        assert found["stable_rank_residual"] == pytest.approx(
            float((rest**2).sum() / rest[0] ** 2), rel=1e-5
        )
        assert found["effective_rank"] == pytest.approx(math.exp(-float((p * p.log()).sum())))
        assert found["effective_rank_residual"] == pytest.approx(
            math.exp(-float((q * q.log()).sum())), rel=1e-5
        )
        assert found["unchanged"] == float((delta == 0).double().mean())


def test_geometry_is_the_papers(recipe, tmp_path):
    """c_R with its floor, s_R, S_H, retentions and pair cosines, from explicit heads."""
    deltas = deltas_of(recipe)
    heads = []
    for delta in deltas:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        heads.append(S[0] * torch.outer(U[:, 0], Vh[0]))
    rests = [d - h for d, h in zip(deltas, heads, strict=True)]

    def cosine(x, y):
        return float((x * y).sum() / (x.norm() * y.norm()))

    pairs = [(0, 1), (0, 2), (1, 2)]
    units = [r / r.norm() for r in rests]

    found = row_of(analysed(recipe, tmp_path / "out"))["groups"]["RL"]

    assert found["c_R"] == pytest.approx(float(sum(units).norm()) / 3, abs=1e-6)
    assert found["c_R_floor"] == pytest.approx(1 / math.sqrt(3))
    s_R = sum(cosine(rests[i], rests[j]) for i, j in pairs) / 3
    assert found["s_R"] == pytest.approx(s_R, abs=1e-6)
    S_H = sum(max(cosine(heads[i], heads[j]), 0) for i, j in pairs) / 3
    assert found["S_H"] == pytest.approx(S_H, abs=1e-6)
    ret = float(sum(heads).norm()) / sum(float(h.norm()) for h in heads)
    assert found["ret_H"] == pytest.approx(ret, abs=1e-6)
    ret = float(sum(rests).norm()) / sum(float(r.norm()) for r in rests)
    assert found["ret_R"] == pytest.approx(ret, abs=1e-6)
    expected = [cosine(heads[i], heads[j]) for i, j in pairs]
    assert found["pair_cosines_H"] == pytest.approx(expected, abs=1e-6)


def test_rl_and_sft_are_kept_apart(recipe, tmp_path):
    """Geometry is measured inside each group; a group of one expert has none."""
    sft = [recipe.experts[2]]
    rl = Recipe(recipe.base, recipe.experts[:2])

    document = analysed(rl, tmp_path / "out", sft)

    assert [expert["group"] for expert in document["experts"]] == ["RL", "RL", "SFT"]
    assert set(row_of(document)["groups"]) == {"RL"}
    assert set(document["families"]["ffn"]) == {"RL", "SFT"}


def test_the_analysis_leaves_its_files(recipe, tmp_path):
    """Every tensor as JSON, families and layers as tables, and the three figures."""
    analysed(recipe, tmp_path / "out")

    out = tmp_path / "out"
    document = json.loads((out / "analysis.json").read_text())
    assert set(document["layers"]) == {"0", "1", "outside"}
    assert "| ffn | RL |" in (out / "analysis.md").read_text()
    for figure in ("spectra.png", "coherence.png", "cosines.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")


def test_unchanged_experts_have_no_spectrum(tmp_path):
    """Experts equal to the base are analysed without a division by zero."""
    write_group(tmp_path / "g", SMALL, updates=Updates(unchanged=1.0))
    experts = tuple(ModelRef(str(tmp_path / "g" / f"expert{i}")) for i in range(3))

    document = analysed(Recipe(ModelRef(str(tmp_path / "g" / "base")), experts), tmp_path / "out")

    assert all(e["unchanged"] == 1.0 for e in row_of(document)["experts"])


def test_an_analysis_that_does_not_fit_is_refused(recipe, tmp_path):
    """The plan counts the spectra's memory too."""
    plan = plan_analysis(recipe, options=Options(memory_budget=1_000_000))

    with pytest.raises(PlanRefusedError, match="memory"):
        next(run_analysis(plan, out=tmp_path / "out"))


@pytest.mark.parametrize("component", ["head", "residual"])
def test_component_models_hold_one_part_of_one_expert(recipe, tmp_path, component):
    """W0 + H_i or W0 + R_i for matrices, the expert's own values elsewhere."""
    chosen = component_recipe(recipe, component, "2")
    out = tmp_path / "out"
    list(run_merge(plan_merge(chosen, out=out), out=out, work_dir=tmp_path / "work"))

    merged = load_file(out / "model.safetensors")
    base = load_file(f"{recipe.base.id}/model.safetensors")
    expert = load_file(f"{recipe.experts[1].id}/model.safetensors")
    delta = deltas_of(recipe)[1]
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    head = S[0] * torch.outer(U[:, 0], Vh[0])
    expected = head if component == "head" else delta - head
    got = merged[NAME].double() - base[NAME].double()
    assert float((got - expected).norm() / expected.norm()) < 1e-4  # float32 weights
    assert torch.equal(merged["model.embed_tokens.weight"], expert["model.embed_tokens.weight"])


@pytest.mark.parametrize(("component", "of"), [("head", "4"), ("head", "nobody"), ("tail", "1")])
def test_unknown_components_and_experts_are_refused(recipe, component, of):
    """The message names what there is."""
    with pytest.raises(RecipeError):
        component_recipe(recipe, component, of)
