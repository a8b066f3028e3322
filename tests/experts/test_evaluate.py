"""The built-in group: loads, answers as its log says, and is asked as generation would answer."""

import fnmatch
import json
import tomllib

import pytest
import torch

from resmerge_stream.experts.evaluate import evaluate, load_model, load_tokenizer, said
from resmerge_stream.experts.group import built_in_recipe, builtin_group
from resmerge_stream.experts.tasks import TASKS, draw_prompts, is_correct
from tests.support.checkpoints import ROOT

transformers = pytest.importorskip("transformers")
GROUP = builtin_group()
EXPERTS = ROOT / "resmerge_stream" / "experts"


@pytest.mark.parametrize("name", GROUP)
def test_every_built_in_model_loads_whole_in_bf16(name):
    """transformers finds every weight of a built-in model, none too many, in bf16."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        GROUP[name], output_loading_info=True, dtype="auto"
    )

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_one_forward_pass_decides_what_greedy_generation_answers():
    """A prompt counts as answered exactly when generating token by token gives its answer."""
    model, tokenizer = load_model(GROUP["base"]), load_tokenizer(GROUP["base"])
    prompts = [p for task in TASKS for p in draw_prompts(task, 12, seed=5, split="held-out")]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")

    tokens = model.generate(**batch, max_new_tokens=16, do_sample=False)
    generated = [
        is_correct(prompt, tokenizer.decode(row, skip_special_tokens=True))
        for prompt, row in zip(prompts, tokens[:, batch.input_ids.shape[1] :], strict=True)
    ]

    assert [right for _, right in said(model, tokenizer, prompts)] == generated
    assert 10 < sum(generated) < 38


def test_a_wrong_answer_is_what_generation_says_up_to_its_first_wrong_token():
    """A text is the generated one, or begins it and breaks off with an ellipsis where it errs."""
    model, tokenizer = load_model(GROUP["base"]), load_tokenizer(GROUP["base"])
    prompts = draw_prompts("sort", 24, seed=5, split="held-out")
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=24, do_sample=False)
    generated = [
        tokenizer.decode(row, skip_special_tokens=True)
        for row in tokens[:, batch.input_ids.shape[1] :]
    ]

    answers = said(model, tokenizer, prompts)

    broken = [text.endswith("…") for text, _ in answers]
    assert any(broken)
    for (text, right), whole in zip(answers, generated, strict=True):
        assert text == whole or (not right and whole.startswith(text.removesuffix("…")))


@pytest.mark.parametrize("task", TASKS)
def test_each_expert_is_better_at_its_own_task(task):
    """On fresh prompts an expert is well above the base on its task (by 21 points or more)."""
    prompts = draw_prompts(task, 200, seed=11, split="held-out")
    right = {
        name: sum(
            right
            for _, right in said(load_model(GROUP[name]), load_tokenizer(GROUP[name]), prompts)
        )
        for name in ("base", f"rl-{task}")
    }

    assert 0.2 * 200 <= right["base"] <= 0.8 * 200
    assert right[f"rl-{task}"] - right["base"] >= 0.1 * 200


def test_the_training_log_is_of_these_models():
    """The bundled log's accuracies are those that the bundled weights have, give or take a few."""
    log = json.loads((EXPERTS / "training_log.json").read_text("utf-8"))
    asked = log["settings"]["accuracy_on"]

    found = evaluate(GROUP["rl-add"], 300, asked["seed"])

    assert list(log["models"]) == list(GROUP)
    for task, result in log["models"]["rl-add"]["accuracy"].items():
        assert found[task].low - 0.02 <= result["accuracy"] <= found[task].high + 0.02, task


def test_the_group_is_small_and_goes_with_the_package():
    """At most 25 MB in all and 10 MB a file, and every file is named as package data."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = document["tool"]["setuptools"]["package-data"]["resmerge_stream.experts"]
    files = [path for path in EXPERTS.rglob("*") if path.is_file()]
    names = [path.relative_to(EXPERTS).as_posix() for path in files if path.suffix != ".py"]

    assert sum(path.stat().st_size for path in files) <= 25e6
    assert max(path.stat().st_size for path in files) <= 10e6
    assert [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)] == []
    assert {str(ref) for ref in built_in_recipe().experts} == {
        str(folder) for name, folder in GROUP.items() if name != "base"
    }
