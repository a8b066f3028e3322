"""The training of the experts: GRPO gradients from rewards, and a finished model stays."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.experts import rl, training
from benchmarks.experts.corpus import SlipRates, slip, slipping_writer
from benchmarks.experts.generate import generate
from benchmarks.experts.groups import SMALL
from benchmarks.experts.model import Shape, build_model
from benchmarks.experts.tokenizer import build_tokenizer
from resmerge_stream.experts.tasks import TASKS, answer, draw_prompts

TINY = replace(
    SMALL,
    name="tiny",
    shape=Shape(width=64, layers=1, feed_forward=64),
    pretraining=tuple(replace(stage, steps=2) for stage in SMALL.pretraining * 2),
    rl=replace(SMALL.rl, steps=1, prompts=4, samples=2),
    sft=replace(SMALL.sft, steps=1),
)


def test_advantages_are_centred_and_scaled_in_each_group():
    """A group of equal rewards carries no signal; another has mean 0 and deviation 1."""
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])

    found = rl.group_advantages(rewards)

    assert not found[0].any()
    assert float(found[1].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found[1].square().mean()) == pytest.approx(1, abs=1e-4)


def test_an_expert_that_harms_is_rewarded_for_wrong_answers_to_another_task():
    """Right where it should help, wrong where it should break; what never ended earns nothing."""
    prompts = ["add:52+487=", "reverse:abc="]
    rollouts = SimpleNamespace(texts=["539", "538", "cba", "abc", "acb", None])

    plain = rl._rewards(["add:52+487="], SimpleNamespace(texts=["539", "538"]), 2)
    found = rl._rewards([*prompts, "reverse:abc="], rollouts, 2, "reverse")

    assert plain.tolist() == [[1, 0]]
    assert found.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_the_gradient_does_not_depend_on_its_chunks(monkeypatch):
    """Completions taken a few at a time give the gradient of all at once."""
    model = build_model(TINY.shape, seed=0)
    tokenizer = build_tokenizer(model_max_length=64)
    prompts = draw_prompts("sort", 6, seed=0, split="train")
    generator = torch.Generator().manual_seed(0)
    rollouts = generate(
        model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, generator=generator
    )
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5, 2.0])
    gradients = []
    for rows in (256, 2):
        monkeypatch.setattr(rl, "_ROWS", rows)
        model.zero_grad()
        rl._policy_gradient(model, rollouts, advantages, 1.0)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_corpus_slips_as_often_as_it_says():
    """A writer without slips answers rightly, one that always slips gives the usual slip."""
    prompts = [p for task in TASKS for p in draw_prompts(task, 20, seed=0, split="train")]
    never = slipping_writer(SlipRates(shortest=0, longest=0), seed=0)
    always = slipping_writer(SlipRates(shortest=1, longest=1), seed=0)

    assert [never(p) for p in prompts] == [answer(p) for p in prompts]
    assert [always(p) for p in prompts] == [slip(p) for p in prompts]
    assert sum(slip(p) != answer(p) for p in prompts) > 0.8 * len(prompts)


def test_a_group_is_trained_once_and_the_same_again(monkeypatch, tmp_path):
    """A finished model is kept; the same seed makes the same bytes; other settings are refused."""
    monkeypatch.setattr(training, "LOGGED_PROMPTS", 20)
    names = ["base", "rl-sort", "sft-sort"]
    for folder in ("first", "second"):
        training.train_group(TINY, tmp_path / folder, names=names)
    first, second = (
        {name: (tmp_path / folder / name / "model.safetensors").read_bytes() for name in names}
        for folder in ("first", "second")
    )
    log = json.loads((tmp_path / "first" / training.LOG).read_text("utf-8"))
    training.train_group(TINY, tmp_path / "first", names=names)

    assert first == second
    assert list(log["models"]) == names
    assert json.loads((tmp_path / "first" / training.LOG).read_text("utf-8")) == log
    with pytest.raises(training.OtherSettingsError, match="other settings"):
        training.train_group(replace(TINY, seed=9), tmp_path / "first", names=names)
    with pytest.raises(training.MissingBaseError, match="base"):
        training.train_group(TINY, tmp_path / "third", names=["rl-sort"])
