"""The built-in experts as LoRA adapters: what they are, and what a merge of them says."""

import json

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from safetensors.torch import load_file

from resmerge_stream import Options, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.experts.evaluate import load_model, load_tokenizer
from resmerge_stream.experts.group import built_in_recipe, builtin_adapters, builtin_group
from resmerge_stream.experts.tasks import TASKS, draw_prompts
from resmerge_stream.recipe import override
from resmerge_stream.studies.extract import plan_extract
from tests.support.adapters import quiet

BASE = builtin_group()["base"]
PROMPTS = [prompt for task in TASKS for prompt in draw_prompts(task, 6, seed=3, split="held-out")]


def said(model):
    """Return the tokens that a model says to each prompt, greedily."""
    tokenizer = load_tokenizer(BASE)
    answers = []
    for prompt in PROMPTS:
        tokens = tokenizer([prompt], return_tensors="pt")
        with quiet(), torch.no_grad():
            answers.append(model.generate(**tokens, max_new_tokens=12, do_sample=False)[0].tolist())
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("method", ["resmerge", "head_regression"])
def test_an_adapter_on_the_base_says_what_the_full_merge_says(tmp_path, method):
    """Merged to an adapter and put on by PEFT, or merged to a model: the same tokens."""
    recipe = override(built_in_recipe(lora=True), method=method, dtype="float32")
    for output in ("model", "adapter"):
        out = tmp_path / output
        list(run_merge(plan_merge(recipe, Options(output=output), out=out), out=out))

    with quiet():
        with_adapter = PeftModel.from_pretrained(load_model(BASE), tmp_path / "adapter").eval()
    answers = said(with_adapter)

    assert answers == said(load_model(tmp_path / "model"))
    assert answers != said(load_model(BASE))


def test_the_demo_merges_the_adapters_and_verifies_the_result(tmp_path, monkeypatch, capsys):
    """`demo --lora` reads adapters beside the base, writes a whole model, and checks it."""
    monkeypatch.chdir(tmp_path)

    code = main(["demo", "--lora", "--prompts", "0", "--out", "out"])

    report = json.loads((tmp_path / "out" / "resmerge" / "report.json").read_text())
    files = [[file["name"] for file in source["files"]] for source in report["sources"]]
    assert code == 0
    assert files == [["model.safetensors"], *[["adapter_model.safetensors"]] * len(TASKS)]
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_the_adapters_are_extracts_of_the_experts(tmp_path, task):
    """What `extract` makes of an expert today is the adapter that is kept, whatever the machine."""
    experts = [str(builtin_group()[f"rl-{task}"])]
    recipe = override(None, base=str(BASE), experts=experts, dtype="bfloat16")
    kept = builtin_adapters()[f"lora-{task}"]

    list(run_merge(plan_extract(recipe, Options(adapter_rank=16), out=tmp_path), out=tmp_path))

    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((kept / "adapter_config.json").read_text())
    assert ours | {"base_model_name_or_path": "base"} == theirs
    mine, stored = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, kept))
    assert set(mine) == set(stored)
    for key in (key for key in mine if "lora_A" in key):
        pair = key, key.replace("lora_A", "lora_B")
        new, old = (w[pair[1]].double() @ w[pair[0]].double() for w in (mine, stored))
        assert (new - old).norm() <= 0.01 * old.norm(), key
