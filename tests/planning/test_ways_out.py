"""Every way out that a message names, followed to a merge.

A row is what a user asked, the words of the refusal that name the way out, and what the user does
then: a recipe, or options of the command line. Where a message sends the user through a merge
before, `first` is that merge's recipe; its folder is called ``first``.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from resmerge_stream.cli.main import main
from tests.support.checkpoints import edit_tensors

DATA = Path(__file__).parents[1] / "data" / "mergekit"
MODELS = ("expert0", "expert1")
ADAPTED = "model.layers.0.self_attn.q_proj"
TIES: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "models": list(MODELS)}
LINEAR: dict[str, Any] = {"merge_method": "linear", "models": list(MODELS)}


def weighted(*weights: float) -> list[dict[str, Any]]:
    """Return the models, each with its weight."""
    return [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(MODELS, weights, strict=True)
    ]


@dataclass(frozen=True)
class Row:
    """A refusal and its way out.

    Attributes:
        bad: the recipe that is refused.
        words: of the message, that name the way out.
        good: the recipe that the message asks for.
        options: of the command, beside the recipe's file, that are refused with `bad`.
        instead: the options that the message asks for.
        first: the recipe of a merge that the message asks for before.
    """

    bad: Any
    words: tuple[str, ...]
    good: Any = None
    options: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    first: Any = None


ROWS = {
    "a parameter at the top": Row(
        {**TIES, "normalize": True},
        ("under 'parameters'",),
        {**TIES, "parameters": {"normalize": True}},
    ),
    "a parameter beside a model": Row(
        {**TIES, "models": [{"model": "expert0", "weight": 1}]},
        ("under 'parameters'",),
        {**TIES, "models": [{"model": "expert0", "parameters": {"weight": 1}}]},
    ),
    "a misspelt key in a module": Row(
        {"merge_method": "ties", "modules": {"all": {"base_modle": "base", "models": ["expert0"]}}},
        ("Did you mean 'base_model'? It stands at the top",),
        {
            "merge_method": "ties",
            "base_model": "base",
            "modules": {"all": {"models": ["expert0"]}},
        },
    ),
    "a misspelt parameter": Row(
        {**TIES, "parameters": {"densty": 0.5}},
        ("Did you mean 'density'",),
        {**TIES, "parameters": {"density": 0.5}},
    ),
    "an unknown method": Row(
        {**TIES, "merge_method": "tie"}, ("Did you mean 'ties'",), TIES
    ),
    "models and slices": Row(
        {**TIES, "slices": [{"sources": []}]}, ("Keep one",), TIES
    ),
    "two slices": Row(
        {
            **{key: value for key, value in TIES.items() if key != "models"},
            "slices": [
                {"sources": [{"model": "expert0", "layer_range": [0, 1]}]},
                {"sources": [{"model": "expert1", "layer_range": [1, 3]}]},
            ],
        },
        ("list the models under 'models'",),
        TIES,
    ),
    "no base": Row(
        {"merge_method": "ties", "models": ["expert0"]},
        ("no base_model: the model that the experts were trained from",),
        {"merge_method": "ties", "base_model": "base", "models": ["expert0"]},
    ),
    "weights that cancel in a mean": Row(
        {**LINEAR, "models": weighted(1, -1)},
        ("set normalize: false",),
        {**LINEAR, "models": weighted(1, -1), "parameters": {"normalize": False}},
    ),
    "weights that cancel in the mean of task vectors": Row(
        {**TIES, "merge_method": "mean", "models": weighted(1, -1)},
        ("take task_arithmetic",),
        {**TIES, "merge_method": "task_arithmetic", "models": weighted(1, -1)},
    ),
    "weights that cancel on the sphere": Row(
        {"merge_method": "multislerp", "models": weighted(1, -1)},
        ("set normalize_weights: false",),
        {
            "merge_method": "multislerp",
            "models": weighted(1, -1),
            "parameters": {"normalize_weights": False},
        },
    ),
    "a weight where there is none": Row(
        {**TIES, "merge_method": "tsv_m", "models": weighted(1, 0.5)},
        ("Leave 'weight' out, or use task_arithmetic",),
        {**TIES, "merge_method": "task_arithmetic", "models": weighted(1, 0.5)},
    ),
    "two models for passthrough": Row(
        {**LINEAR, "merge_method": "passthrough"},
        ("list one under 'models'",),
        {"merge_method": "passthrough", "models": ["expert0"]},
    ),
    "an adapter on another model": Row(
        {**TIES, "models": ["expert0+lora", "expert1"]},
        ("merge_method: passthrough and expert0+lora as its one model", "name that merge's folder"),
        {**TIES, "models": ["first", "expert1"]},
        first={"merge_method": "passthrough", "models": ["expert0+lora"]},
    ),
    "adapters on two models": Row(
        {**LINEAR, "models": ["base+lora", "expert1+lora"]},
        ("merge_method: passthrough and base+lora as its one model",),
        {**LINEAR, "base_model": "expert1", "models": ["first", "expert1+lora"]},
        first={"merge_method": "passthrough", "models": ["base+lora"]},
    ),
    "a base with an adapter": Row(
        {**TIES, "base_model": "base+lora"},
        ("merge_method: passthrough and base+lora as its one model", "name that merge's folder"),
        {**TIES, "base_model": "first"},
        first={"merge_method": "passthrough", "models": ["base+lora"]},
    ),
    "an adapter where a method takes no base from it": Row(
        {"merge_method": "nuslerp", "models": ["base+lora", "expert1"]},
        ("merge_method: passthrough and base+lora as its one model",),
        {"merge_method": "nuslerp", "models": ["first", "expert1"]},
        first={"merge_method": "passthrough", "models": ["base+lora"]},
    ),
    "an adapter alone": Row(
        {"merge_method": "passthrough", "models": ["lora"]},
        ("the model that it was trained on as the base, and the adapter as an expert",),
        {"merge_method": "passthrough", "base_model": "base", "models": ["lora"]},
    ),
    "an adapter as the base": Row(
        {**TIES, "base_model": "lora"},
        ("the model that it was trained on as the base, and the adapter as an expert",),
        {**TIES, "models": ["lora", *MODELS]},
    ),
    "several recipes": Row(
        f"{yaml.safe_dump(TIES)}---\n{yaml.safe_dump(TIES)}", ("Save each in a file",), TIES
    ),
    "a dtype that is not written": Row(
        {**TIES, "dtype": "float64"}, ("choose 'bfloat16'",), {**TIES, "dtype": "bfloat16"}
    ),
    "no output": Row(TIES, ("Give --out DIR",), options=("",), instead=("--out", "out")),
    "a rank without an adapter": Row(
        TIES,
        ("Give --as adapter",),
        {**TIES, "merge_method": "task_arithmetic", "models": ["base+lora"]},
        options=("--adapter-rank", "2"),
        instead=("--adapter-rank", "2", "--as", "adapter"),
    ),
    "a file size for an adapter": Row(
        {**TIES, "merge_method": "task_arithmetic", "models": ["base+lora"]},
        ("Leave --as adapter away",),
        options=("--as", "adapter", "--max-shard-size", "1GB"),
        instead=("--max-shard-size", "1GB"),
    ),
    "an adapter of full rank": Row(
        {**TIES, "merge_method": "slerp", "models": ["expert0"], "parameters": {"t": 0.5}},
        ("--adapter-rank K",),
        options=("--as", "adapter"),
        instead=("--as", "adapter", "--adapter-rank", "3"),
    ),
    "stochastic rounding of an adapter": Row(
        {**TIES, "merge_method": "task_arithmetic", "models": ["base+lora"]},
        ("Leave --as adapter away",),
        options=("--as", "adapter", "--rounding", "stochastic"),
        instead=("--rounding", "stochastic"),
    ),
    "a tokenizer for an adapter": Row(
        {**TIES, "merge_method": "task_arithmetic", "models": ["base+lora"]},
        ("Leave --as adapter away",),
        options=("--as", "adapter", "--tokenizer-from", "tokens/base"),
        instead=("--tokenizer-from", "tokens/base"),
    ),
    "models with other tokens": Row(
        {**TIES, "base_model": "tokens/base", "models": ["tokens/expert0"]},
        ("Give --tokenizer-source base, or union",),
        instead=("--tokenizer-source", "union"),
    ),
    "models with other tokens, by the recipe": Row(
        {**TIES, "base_model": "tokens/base", "models": ["tokens/expert0"]},
        ("With tokenizer_source in the recipe",),
        {
            **TIES,
            "base_model": "tokens/base",
            "models": ["tokens/expert0"],
            "tokenizer_source": "base",
        },
    ),
    "values that float16 cannot hold": Row(
        {**TIES, "models": ["huge"]},
        ("Give --dtype bfloat16 or float32",),
        options=("--dtype", "float16"),
        instead=("--dtype", "bfloat16", "--out", "again"),
    ),
    "an expert that is the base": Row(
        {**TIES, "models": ["copy"]},
        ("Give experts that were trained from this base",),
        {**TIES, "models": ["copy", "expert0"]},
    ),
    "too little memory": Row(
        TIES,
        ("Give --memory-budget", "or more"),
        options=("--memory-budget", "1MB"),
        instead=("--memory-budget", "600MB"),
    ),
    "a GPU that is not there": Row(
        TIES,
        ("Use --device cpu, or auto",),
        options=("--device", "cuda:77"),
        instead=("--device", "cpu"),
    ),
    "an output in the place of a file": Row(
        TIES,
        ("Choose another --out",),
        options=("--out", "base/config.json"),
        instead=("--out", "other"),
    ),
    "mergekit's options": Row(
        TIES,
        ("Leave --lazy-unpickle, --allow-crimes away", "--out merged"),
        options=("merged", "--lazy-unpickle", "--allow-crimes"),
        instead=("--out", "merged"),
    ),
    "an output that exists": Row(
        TIES, ("Choose another --out",), options=("--out", "base"), instead=("--out", "other")
    ),
    "a base as its own expert": Row(
        {**TIES, "models": ["base"]}, ("lists no expert",), {**TIES, "models": ["expert0"]}
    ),
}  # fmt: skip


@pytest.fixture
def models(tmp_path, monkeypatch, without_picture):
    """A folder with a base, experts and an adapter of the base; the working folder."""
    for name in ("base", *MODELS):
        shutil.copytree(DATA / name, tmp_path / name)
    shutil.copytree(DATA.parent / "mergekit_tokens", tmp_path / "tokens")
    for name in ("huge", "copy"):
        shutil.copytree(DATA / ("base" if name == "copy" else "expert0"), tmp_path / name)
    edit_tensors(tmp_path / "huge", lambda tensors: tensors[f"{ADAPTED}.weight"].mul_(1e6))
    rows, columns = load_file(DATA / "base" / "model.safetensors")[f"{ADAPTED}.weight"].shape
    random = torch.Generator().manual_seed(0)
    folder = tmp_path / "lora"
    folder.mkdir()
    factors = {
        f"base_model.model.{ADAPTED}.lora_A.weight": torch.randn(2, columns, generator=random),
        f"base_model.model.{ADAPTED}.lora_B.weight": torch.randn(rows, 2, generator=random),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(recipe, options):
    """Run the command on a recipe, into ``out`` if nothing else is said; return its exit code."""
    if not {"", "--out"} & set(options):
        options = (*options, "--out", "out")
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
    Path("recipe.yml").write_text(text)
    try:
        return main(["merge", "recipe.yml", *(word for word in options if word)])
    except SystemExit as exc:
        return exc.code


@pytest.mark.parametrize("name", ROWS)
def test_a_way_out_leads_to_a_merge(name, models, capsys):
    """What was asked is refused in words that name a way out, and that way ends in a merge."""
    row = ROWS[name]

    code = merged(row.bad, row.options)
    told = " ".join(capsys.readouterr().err.split())
    before = 0 if row.first is None else merged(row.first, ("--out", "first"))
    after = merged(row.good or row.bad, row.instead)

    assert code == 2
    for words in row.words:
        assert words in told
    assert (before, after) == (0, 0), capsys.readouterr().err
