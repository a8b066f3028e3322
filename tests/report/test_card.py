"""The card and its files: what they say, what they must not show."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor

from resmerge_stream import Options, Plan, Recipe, plan_merge, run_merge
from resmerge_stream.cli.console import gate_table
from resmerge_stream.errors import Notice
from resmerge_stream.methods import find_methods
from resmerge_stream.planning.recipe_file import parse_recipe
from resmerge_stream.recipe import ModelRef
from resmerge_stream.report.card import render_card
from resmerge_stream.report.statement import STATEMENT
from resmerge_stream.run.events import Finished
from tests.support.checkpoints import edit_tensors

CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2}


def write_group(
    root: Path, *, experts: int = 2, layers: int = 2, stack: bool = False, step: float = 1e-3
) -> list[Path]:
    """Write a base and its experts; return their folders, the base first.

    Args:
        stack: FFN matrices as stacks [3, m, n] of an MoE.
        step: size of the experts' differences; 0 makes them copies of the base.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {"model.embed_tokens.weight": draw(20, 16)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        base[prefix + "self_attn.q_proj.weight"] = draw(16, 16)
        base[prefix + "self_attn.q_proj.bias"] = draw(16)
        down = "mlp.experts.down_proj" if stack else "mlp.down_proj.weight"
        base[prefix + down] = draw(3, 16, 24) if stack else draw(16, 24)
        base[prefix + "input_layernorm.weight"] = torch.ones(16)
    base = {name: (0.02 * value).bfloat16() for name, value in base.items()}
    folders = [root / "base", *(root / f"expert{i}" for i in range(experts))]
    for folder in folders:
        folder.mkdir(parents=True)
        delta = 0.0 if folder.name == "base" else step
        tensors = {
            name: (value.float() + delta * draw(*value.shape)).bfloat16()
            for name, value in base.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return folders


def merge(
    folders: list[Path],
    method: str = "resmerge",
    *,
    options: Options | None = None,
    dtype: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Merge through the whole pipeline; return the plan and the report."""
    refs = [ModelRef(str(folder)) for folder in folders]
    base = refs.pop(0) if len(refs) > 1 else None
    recipe = Recipe(base, tuple(refs), method, parameters or {}, dtype)
    out, work = (folders[0].parent.parent / name for name in ("the-output", "the-work-dir"))
    plan = plan_merge(recipe, options, out=out)
    last = list(run_merge(plan, out=out, work_dir=work))[-1]
    assert isinstance(last, Finished)
    return plan, last.report


def as_hub(plan: Plan, *, licence: str | None = "apache-2.0", **attributes: Any) -> Plan:
    """Make a plan's folders look like models of the Hub, org/base and org/expert0 and so on."""
    shown: dict[str, Any] = {"folder": None, "license": licence, "is_private": False} | attributes
    base, *experts = (
        replace(
            source,
            id=f"org/{'expert' + str(number - 1) if number else 'base'}",
            revision=f"{number:040x}",
            **shown,
        )
        for number, source in enumerate(plan.checkpoints)
    )
    refs = tuple(ModelRef(source.id, "main") for source in experts)
    recipe = replace(plan.recipe, base=ModelRef(base.id, "main"), experts=refs)
    return replace(plan, base=base, experts=tuple(experts), recipe=recipe)


def readme(plan: Plan, report: Mapping[str, Any], **options: Any) -> str:
    """Return the card's text."""
    return render_card(plan, report, **options)["README.md"].decode()


def table_rows(text: str, start: str) -> list[str]:
    """Return the lines of tables whose first cell starts so."""
    return [line for line in text.splitlines() if line.startswith(f"| {start}")]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing here: the picture takes longer than all the rest, and has its own tests."""
    monkeypatch.setattr("resmerge_stream.report.card.gates_png", lambda report: b"PNG")


@pytest.fixture
def group(tmp_path: Path) -> list[Path]:
    """Return a base and two experts."""
    return write_group(tmp_path / "group")


# The methods of mergekit 0.1.5.
MERGEKITS = {
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
    "della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp",
    "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "experts"),
    [
        (name, experts)
        for name, method in find_methods().items()
        for experts in (0, 1, 2, 3)
        if method.models[0] <= experts <= (3 if method.models[1] is None else method.models[1])
        and (experts != 2 or method.models[1])
    ],
)
def test_every_method_has_a_card(tmp_path: Path, method: str, experts: int) -> None:
    """A merge by any method, of no expert or more, leaves all files; mergekit's if it has it."""
    plan, report = merge(write_group(tmp_path / "group", experts=experts), method)

    files = render_card(plan, report)

    expected = {"README.md", "resmerge/report.json", "resmerge/recipe.yml", "resmerge/gates.png"}
    expected |= {STATEMENT}
    if method in MERGEKITS:
        expected |= {"mergekit_config.yml"}
    assert set(files) == expected
    assert plan.method is not None
    assert plan.method.title in files["README.md"].decode()


@pytest.mark.parametrize("variant", ["paper", "release-2026-06", "release-2026-07"])
def test_resmerge_card_shows_the_gates_and_names_the_variant(
    group: list[Path], variant: str
) -> None:
    """A ResMerge card holds a row of gates for each family, the variant and the citation."""
    text = readme(*merge(group, parameters={"variant": variant}))

    assert f"variant `{variant}`" in text
    assert "| family | tensors | S_H | c_R | floor 1/√N | α_R | ‖C‖/‖A‖ | head energy |" in text
    assert len(table_rows(text, "attention |")) == 1
    assert len(table_rows(text, "down_proj |")) == 1
    assert "| 0.707 |" in table_rows(text, "ffn |")[0]
    assert "2606.02252" in text


def test_stack_shows_the_gates_of_its_slices(tmp_path: Path) -> None:
    """A stack of matrices counts as one tensor and shows the medians of its slices."""
    text = readme(*merge(write_group(tmp_path / "group", stack=True)))

    cells = table_rows(text, "ffn |")[0].split(" | ")
    assert cells[1] == "2"
    assert "–" not in (cell.strip() for cell in cells)


def test_unchanged_tensors_are_counted(tmp_path: Path) -> None:
    """Tensors that no expert changed stand in the card's table of rules."""
    folders = write_group(tmp_path / "group", step=0.0)
    edit_tensors(folders[1], lambda tensors: tensors["model.embed_tokens.weight"].add_(1))

    text = readme(*merge(folders))

    assert "no expert changed it | 8 |" in text


def test_null_values_never_fail(group: list[Path]) -> None:
    """A row may have null for every key but its name, shape and rule."""
    plan, report = merge(group)
    for row in report["tensors"]:
        row.update({key: None for key in row if key not in ("name", "shape", "rule")})
    report["summary"]["kept_norm"] = report["summary"]["kept_cosine"] = None

    assert "no tensor differs from the base" in readme(plan, report)


def test_no_file_shows_a_local_path(tmp_path: Path) -> None:
    """Local sources appear by their folder's last name, in the warnings and the recipe too."""
    folders = write_group(tmp_path / "very-secret" / "group")
    config = CONFIG | {"rope_theta": 5}
    (folders[1] / "config.json").write_text(json.dumps(config))
    (folders[2] / "extra.safetensors").touch()
    plan, report = merge(folders, options=Options(tokenizer_from=str(folders[2])))
    report["summary"]["left_out"]["x"] = f"the base lacks it (seen in {folders[2]})"
    report["tensors"][0]["warnings"] = [f"odd values in {folders[1]}/model.safetensors"]

    files = render_card(plan, report)

    assert "very-secret" in json.dumps(report)
    for name, content in files.items():
        assert b"very-secret" not in content, name
        assert str(tmp_path).encode() not in content, name
    text = files["README.md"].decode()
    assert "expert0 (local folder)" in text
    assert "rope_theta is 5 in expert0 and not set in base" in text
    assert "seen in expert1" in text
    assert "odd values in expert0/model.safetensors" in text
    assert '--tokenizer-from "expert1"' in text


def test_report_differs_only_in_the_names(group: list[Path]) -> None:
    """The published report is the run's, which is not modified, but for the local names."""
    plan, report = merge(group)
    before = copy.deepcopy(report)

    published = json.loads(render_card(plan, report)["resmerge/report.json"])

    assert report == before
    assert [source["id"] for source in published["sources"]] == ["base", "expert0", "expert1"]
    assert published["recipe"]["base_model"] == "base"
    for key in ("tensors", "plan_hash", "files", "environment", "method"):
        assert published[key] == before[key]
    warnings = [text.replace(str(group[0]), "base") for text in before["summary"]["warnings"]]
    assert published["summary"] == {**before["summary"], "warnings": warnings}


def test_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    """Two local folders with the same last name get different names."""
    folders = write_group(tmp_path / "group")
    folders[2] = folders[2].rename(tmp_path / "base")
    plan, report = merge(folders)

    recipe = parse_recipe(render_card(plan, report)["resmerge/recipe.yml"])

    assert (recipe.base.id, [expert.id for expert in recipe.experts]) == (
        "base",
        ["expert0", "base-2"],
    )


def test_metadata_is_what_the_hub_reads(group: list[Path]) -> None:
    """The front matter parses as a model card: bases, relation, tags, library, licence."""
    plan, report = merge(group)

    card = ModelCard(readme(as_hub(plan), report))

    data = card.data.to_dict()
    assert data["base_model"] == ["org/base", "org/expert0", "org/expert1"]
    assert data["base_model_relation"] == "merge"
    assert set(data["tags"]) == {"merge", "resmerge"}
    assert (data["library_name"], data["license"]) == ("transformers", "apache-2.0")


def test_local_sources_are_not_base_models(group: list[Path]) -> None:
    """The front matter names models of the Hub only."""
    text = readme(*merge(group))

    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front
    assert front["base_model_relation"] == "merge"


@pytest.mark.parametrize("hidden", ["is_private", "gated"])
def test_private_and_gated_models_are_named_only_when_allowed(
    group: list[Path], hidden: str
) -> None:
    """Without name_private no file names a private or gated model, nor its commit."""
    plan, report = merge(group)
    plan = as_hub(plan, **{hidden: True})
    report["recipe"] = plan.recipe.to_dict()
    plan = replace(plan, warnings=(Notice("org/expert0 has another tokenizer.json"),))

    hidden_files = render_card(plan, report)
    named = render_card(plan, report, name_private=True)

    for name, content in hidden_files.items():
        assert b"org/" not in content, name
        assert b"0" * 39 + b"1" not in content, name
    assert "a private model (expert 1) has another" in hidden_files["README.md"].decode()
    assert b"org/expert0@" + b"0" * 39 + b"1" in named["resmerge/recipe.yml"]


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["mit", "mit", "mit"], "mit"),
        (["MIT", "mit", "mit "], "mit"),
        (["mit", "apache-2.0", "mit"], "other"),
        (["mit", None, "mit"], "other"),
        ([None, None, None], "other"),
        (["other", "other", "other"], "other"),
        (["my own\nlicence"] * 3, "other"),
    ],
)
def test_licence_is_the_common_one_or_other_with_a_warning(
    group: list[Path], licences: list[str | None], expected: str
) -> None:
    """Only a licence that all sources state is claimed; else `other`, a table and a warning."""
    plan, report = merge(group)
    plan = as_hub(plan)
    base, *experts = (
        replace(source, license=licence)
        for source, licence in zip(plan.checkpoints, licences, strict=True)
    )
    plan = replace(plan, base=base, experts=tuple(experts))

    text = readme(plan, report)

    assert yaml.safe_load(text.split("---")[1])["license"] == expected
    assert ("licences differ" in text) == (expected == "other")
    assert len(table_rows(text, "expert 1 |")) == 1


def test_lossy_cast_is_warned_of(tmp_path: Path) -> None:
    """Where bfloat16 lost much of the update, the card advises what keeps it."""
    folders = write_group(tmp_path / "group", experts=3, step=2e-5)
    plan, report = merge(folders)
    assert report["summary"]["kept_cosine"] < 0.9

    text = readme(plan, report)

    assert "Merge again with `--dtype float32`" in text
    assert "--rounding stochastic" in text


def test_float32_output_is_not_warned_of(tmp_path: Path) -> None:
    """The same update in float32 keeps its direction, and there is no warning."""
    folders = write_group(tmp_path / "group", experts=3, step=2e-5)
    text = readme(*merge(folders, dtype="float32"))

    assert "Merge again" not in text
    assert "Computed and stored in float32" in text


def test_stochastic_rounding_is_not_advised_twice(tmp_path: Path) -> None:
    """A merge that was rounded stochastically is only advised float32."""
    folders = write_group(tmp_path / "group", experts=3, step=2e-5)
    plan, report = merge(folders, options=Options(rounding="stochastic", seed=7))
    report["summary"]["kept_cosine"] = 0.5

    text = readme(plan, report)

    assert "noise without bias; `--dtype float32`" in text
    assert "--rounding stochastic --seed 7" in text


def test_recipe_runs_again_to_the_same_bytes(
    group: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe that is left behind gives the same weights where its names are folders."""
    plan, report = merge(group, parameters={"rank": 2})
    recipe = parse_recipe(render_card(plan, report)["resmerge/recipe.yml"])
    monkeypatch.chdir(group[0].parent)

    again = plan_merge(recipe, out=tmp_path / "again")
    last = list(run_merge(again, out=tmp_path / "again", work_dir=tmp_path / "work"))[-1]

    assert isinstance(last, Finished)
    assert last.report["files"] == report["files"]
    assert recipe.parameters["rho"] == 0.2


def test_recipe_pins_the_commits(group: list[Path]) -> None:
    """Models of the Hub are written with the commit that was read, not the branch."""
    plan, report = merge(group)

    recipe = parse_recipe(render_card(as_hub(plan), report)["resmerge/recipe.yml"])

    assert str(recipe.base) == "org/base@" + "0" * 40
    assert [expert.revision for expert in recipe.experts] == [f"{i:040x}" for i in (1, 2)]


def test_weights_stay_in_the_recipe(group: list[Path]) -> None:
    """Per-model weights are part of what makes the bytes."""
    plan, report = merge(group, "task_arithmetic")
    experts = tuple(replace(ref, weight=0.5) for ref in plan.recipe.experts)
    plan = replace(plan, recipe=replace(plan.recipe, experts=experts))

    recipe = parse_recipe(render_card(plan, report)["resmerge/recipe.yml"])

    assert [expert.weight for expert in recipe.experts] == [0.5, 0.5]


def test_unusual_tensors_are_grouped_and_few_are_listed(tmp_path: Path) -> None:
    """Warnings, fallbacks and other rules than planned are counted; at most 20 are named."""
    plan, report = merge(write_group(tmp_path / "group", layers=30))
    for number, row in enumerate(report["tensors"]):
        if row["rule"] == "resmerge":
            row["branch"] = "residuals cancel"
        elif row["role"] == "norm":
            row["rule"] = "base"
        elif row["role"] == "vector":
            row["warnings"] = [f"odd {number % 2}"]

    section = readme(plan, report).split("Unusual tensors")[1].split("</details>")[0]

    assert "| fallback: residuals cancel | 60 |" in section
    assert "| base instead of mean | 30 |" in section
    assert "| odd 1 | " in section
    assert section.count("`model.layers.") <= 20


def test_fallback_of_some_slices_is_said(tmp_path: Path) -> None:
    """A stack of which only a part took a fallback is not counted as if all of it had."""
    plan, report = merge(write_group(tmp_path / "group", stack=True))
    stacks = [row for row in report["tensors"] if row.get("slices")]
    stacks[0]["slices"][1]["branch"] = "mean of residuals"

    assert "| fallback: mean of residuals in some slices | 1 |" in readme(plan, report)


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    """Bars, backticks, tags and newlines in names break no table and start no HTML."""
    folders = write_group(tmp_path / "group")
    folders[1] = folders[1].rename(tmp_path / "a|b`<i>*[x](y)\n# c")
    plan, report = merge(folders)
    report["tensors"][0]["name"] = "evil`|<script>\n.weight"
    report["tensors"][0]["warnings"] = ["<b>|\nbad"]
    report["summary"]["left_out"] = {"x`|y": "<u>|"}
    plan = replace(plan, left_out=report["summary"]["left_out"])

    text = readme(plan, report)

    for markup in ("<i>", "<b>", "<u>", "[x](y)", "\n# c", "\n.weight"):
        assert markup not in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), (
            markup
        )
    assert table_rows(text, "expert 1 |")[0].count("|") == 6
    assert all(line.count("|") == 4 for line in text.splitlines() if "bad" in line)
    assert parse_recipe(render_card(plan, report)["resmerge/recipe.yml"]).experts
    assert text.count("```yaml") == 1


def test_own_code_of_the_base_is_listed(group: list[Path]) -> None:
    """Python files that the base needs are named, and loading says trust_remote_code."""
    (group[0] / "modeling_x.py").write_text("")
    (group[0] / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"A": "modeling_x.A"}}))

    text = readme(*merge(group))

    assert "copied unread: `modeling_x.py`" in text
    assert "trust_remote_code=True" in text


def test_card_warns_before_use(group: list[Path]) -> None:
    """Every card says that a merge may inherit its experts' risks and was not evaluated."""
    text = readme(*merge(group, "mean"))

    assert "may inherit" in text
    assert "Evaluate it" in text


def test_a_reader_finds_scores_first_and_internals_folded(group: list[Path]) -> None:
    """What it is, scores, load, recipe, licence, then how to read it; tables are folded."""
    text = readme(*merge(group))

    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.removeprefix("## ") for title in titles] == [
        "Evaluation", "Load it", "Recipe and sources", "Licence", "Before you use it", "Citation",
        "How to read the gates",
    ]  # fmt: skip
    assert "resmerge-stream evaluate base expert0 expert1 merged" in text
    folded = text.index("<details>")
    assert folded > text.index("## How to read the gates")
    assert text.index("| family |") > folded
    assert text.count("<details>") == text.count("</details>") >= 3


@pytest.mark.parametrize("method", ["head_regression", "mean"])
def test_a_method_without_gates_speaks_of_none(group: list[Path], method: str) -> None:
    """Card and terminal of head regression and mean name no gate, and show no empty column."""
    plan, report = merge(group, method)

    text = readme(plan, report)

    assert "gate" not in re.sub(r"gate_proj|gates\.png|aggregate", "", text).lower()
    assert "## What changed" in text
    head, *_ = gate_table(report["tensors"])
    assert "S_H" not in head
    assert "kept cosine" in head
