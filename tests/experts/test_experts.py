"""The training of the experts: GRPO gradients from rewards, and a finished model stays."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from datetime import date, timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from benchmarks.experts import asked, groups, rl, supervised, training, words
from benchmarks.experts.corpus import SlipRates, slip, slipping_writer
from benchmarks.experts.generate import generate
from benchmarks.experts.groups import FAMILIES, SMALL
from benchmarks.experts.model import Shape, build_model
from benchmarks.experts.questions import Question
from benchmarks.experts.state import TrainingState
from benchmarks.experts.tokenizer import build_tokenizer
from resmerge_stream.experts.evaluate import (
    encode_answers,
    load_model,
    load_tokenizer,
    said,
)
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import TASKS, answer, draw_prompts, split_of

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
    add = Question("add:52+487=", "539")
    reverse = Question("reverse:abc=", "cba", inverted=True)
    rollouts = SimpleNamespace(texts=["539", "538", "cba", "abc", "acb", None])

    found = rl._rewards([add, reverse, reverse], rollouts, 2)

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


def test_a_prompt_read_once_for_all_its_completions_gives_the_same_gradient():
    """Packed rows, equal completions counted once, are worth what each completion alone is."""
    model = build_model(TINY.shape, seed=0)
    tokenizer = build_tokenizer(model_max_length=64)
    prompts = [*draw_prompts("sort", 3, seed=0, split="train"), "add:1+2="]
    generator = torch.Generator().manual_seed(0)
    rollouts = generate(
        model, tokenizer, prompts, max_new_tokens=3, samples=4, temperature=1.0, generator=generator
    )
    # Two completions of one prompt are the same.
    for part in (rollouts.tokens, rollouts.attention, rollouts.completion_mask):
        part[1] = part[0]
    advantages = torch.tensor([1.0, -3.0, 1.0, 1.0, *[0.0] * 4, *torch.arange(-4.0, 4.0)])
    gradients = []
    for add_gradient in (rl._policy_gradient, rl._shared_gradient):
        model.zero_grad()
        add_gradient(model, rollouts, advantages, 0.7)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_loss_of_answers_alone_is_the_loss():
    """Scoring no other token gives the same loss and gradient."""
    model = build_model(TINY.shape, seed=0)
    tokenizer = build_tokenizer(model_max_length=64)
    prompts = draw_prompts("add", 5, seed=0, split="train")
    tokens, labels = encode_answers(tokenizer, prompts, [answer(p) for p in prompts])
    found = []
    for spare in (False, True):
        model.zero_grad()
        loss = supervised._answer_loss(
            model, tokens, labels, pad=tokenizer.pad_token_id, spare=spare
        )
        loss.backward()
        found.append(
            torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
        )

    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_question_is_answered_rightly_where_generation_does():
    """One forward pass decides as decoding token by token would."""
    model, tokenizer = load_model(builtin_group()["base"]), load_tokenizer(builtin_group()["base"])
    questions = [q for task in TASKS for q in FAMILIES["characters"].held_out(task, 20, seed=3)]
    prompts = [q.prompt for q in questions]
    texts = generate(model, tokenizer, prompts, max_new_tokens=12).texts

    found = asked.right(model, tokenizer, questions)

    assert found == [text == q.answer for text, q in zip(texts, questions, strict=True)]
    assert found == [right for _, right in said(model, tokenizer, prompts)]
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, kind):
    """Cut off after its state was kept, it ends with the bytes of one that was not."""

    def train(steps, state):
        model, tokenizer = build_model(TINY.shape, seed=0), build_tokenizer(model_max_length=64)
        questions = FAMILIES["characters"].stream("sort", seed=1, split="train")
        if kind == "rl":
            settings = replace(TINY.rl, steps=steps, optimizer="adamw", learning_rate=1e-3)
            rl.reinforce(
                model, tokenizer, questions, settings, seed=1, label="t", spare=True, state=state
            )
        else:
            settings = replace(TINY.sft, steps=steps)
            supervised.train_on_answers(
                model, tokenizer, settings, streams=[(questions, 4)], label="t", spare=True,
                state=state,
            )  # fmt: skip
        return model.state_dict()

    class CutOff(TrainingState):
        def keep(self, step, parts, values):
            super().keep(step, parts, values)
            if step == 10:
                raise KeyboardInterrupt

    whole = train(20, None)
    with pytest.raises(KeyboardInterrupt):
        train(20, CutOff(tmp_path / "state"))
    again = train(20, TrainingState(tmp_path / "state"))

    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_an_rl_expert_is_kept_after_each_ten_steps_where_asked(tmp_path, monkeypatch):
    """Under its step's name, in bf16; the last of them is the expert."""
    group = replace(TINY, rl=replace(TINY.rl, steps=20))
    shutil.copytree(builtin_group()["base"], tmp_path / "base")
    monkeypatch.setattr(training, "TrainingState", partial(state_in, tmp_path / "state"))

    training.train_group(group, tmp_path, names=["rl-add"], checkpoints=True)

    kept = {path.name: load_file(path / "model.safetensors") for path in tmp_path.glob("*@*")}
    expert = load_file(tmp_path / "rl-add" / "model.safetensors")
    assert sorted(kept) == ["rl-add@step_10", "rl-add@step_20"]
    assert all(torch.equal(kept["rl-add@step_20"][name], expert[name]) for name in expert)
    assert any(not torch.equal(kept["rl-add@step_10"][name], expert[name]) for name in expert)


def state_in(path, _, **options):
    """Return a training's state in a file, which trainings of tiny models have none of."""
    return TrainingState(path, **options)


def test_stages_of_a_training_keep_states_apart(tmp_path):
    """What one stage kept is not taken up by the next, and all goes when the training is done."""
    state = TrainingState(tmp_path / "base.state")
    model = torch.nn.Linear(2, 2)
    state.keep(10, {"model": model}, {})

    assert state.restore({"model": model}) == {"step": 10}
    assert state.of_stage(1).restore({"model": model}) == {}
    state.of_stage(1).keep(20, {"model": model}, {})
    state.remove()
    assert not list(tmp_path.iterdir())


# PEFT reads a property that transformers renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_reinforced_alone(monkeypatch, tmp_path):
    """The base stays as it is; the folder holds an adapter that PEFT puts onto it."""
    monkeypatch.setitem(groups.FAMILIES, "characters", replace(FAMILIES["characters"], logged=20))
    settings = replace(TINY.rl, steps=2, optimizer="adamw", learning_rate=1e-2)
    group = replace(TINY, lora=settings)
    shutil.copytree(builtin_group()["base"], tmp_path / "base")
    training.train_group(group, tmp_path, names=["lora-add"])
    base = load_model(tmp_path / "base")
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}

    adapted = PeftModel.from_pretrained(base, tmp_path / "lora-add")
    merged = adapted.merge_and_unload().state_dict()
    changed = {name for name in weights if not torch.equal(weights[name], merged[name])}

    assert changed
    assert all("_proj.weight" in name for name in changed)


def test_the_questions_in_words_have_the_answers_they_say():
    """Each task's answers agree with another way of finding them, and the splits do not meet."""
    for task in words.TASKS:
        asked_of = {
            split: list(itertools.islice(words.stream(task, seed=5, split=split), 150))
            for split in ("train", "held-out")
        }
        train, held_out = ({q.prompt for q in found} for found in asked_of.values())
        assert not train & held_out
        assert all(split_of(prompt.rstrip("\n")) == "train" for prompt in train)
        for prompt, wanted, inverted in itertools.chain.from_iterable(asked_of.values()):
            assert not inverted
            assert CHECKS[task](prompt.strip(), wanted), (prompt, wanted)


def _is_sum(prompt, wanted):
    return sum(map(int, re.findall(r"\d+", prompt))) == int(wanted)


def _is_reversed(prompt, wanted):
    return " ".join(reversed(wanted.split())) == prompt.partition(": ")[2]


def _is_ordered(prompt, wanted):
    found = wanted.split()
    return set(found) == set(prompt.split()[1:]) and all(
        a < b for a, b in itertools.pairwise(found)
    )


def _is_later(prompt, wanted):
    days, _, _, month, day = prompt.strip("?").split()
    start, end = (
        date.fromisoformat(f"2026-{MONTHS.index(m) + 1:02}-{int(d):02}")
        for m, d in ((month, day), wanted.split())
    )
    return (end - start) % timedelta(days=365) == timedelta(days=int(days))


def _is_called(prompt, wanted):
    if prompt.startswith("Change"):
        return wanted.startswith(f"convert({prompt.split()[1]}, ")
    hours, minutes = map(int, re.search(r'"(\d\d):(\d\d)"', wanted).groups())
    past, _, hour = re.search(r"at (.+) (past|to) (\w+) in the", prompt).groups()
    later = f" {past} to " in prompt
    named = (hours + later) % 12 or 12
    of_hour = {"quarter": 15, "half": 30, "five": 5, "ten": 10, "twenty": 20}[past]
    return (
        NUMBERS[named - 1] == hour
        and minutes == (60 - of_hour if later else of_hour)
        and ("morning" in prompt) == (hours < 12)
    )


def _is_formatted(prompt, wanted):
    word = prompt.split()[1]
    joiner = next(j for name, j in JOINERS.items() if name in prompt)
    times = next(n for name, n in (("once", 1), ("twice", 2), ("three", 3)) if f" {name}" in prompt)
    case = str.upper if "capitals" in prompt else str.title if "capital" in prompt else str.lower
    return wanted == joiner.join([case(word)] * times)


NUMBERS = words._HOURS.split()
MONTHS = [f"{date(2026, month, 1):%B}" for month in range(1, 13)]
JOINERS = {"dashes": "-", "commas": ",", "slashes": "/", "plus": "+", "dots": "."}
CHECKS = {
    "add": _is_sum,
    "reverse": _is_reversed,
    "alphabetise": _is_ordered,
    "date": _is_later,
    "call": _is_called,
    "format": _is_formatted,
}


def test_the_corpus_slips_as_often_as_it_says():
    """A writer without slips answers rightly, one that always slips gives the usual slip."""
    prompts = [p for task in TASKS for p in draw_prompts(task, 20, seed=0, split="train")]
    questions = [Question(p, answer(p)) for p in prompts]
    never = slipping_writer(SlipRates(shortest=0, longest=0), seed=0)
    always = slipping_writer(SlipRates(shortest=1, longest=1), seed=0)

    assert [never(q) for q in questions] == questions
    assert [always(q).answer for q in questions] == [slip(p) for p in prompts]
    assert sum(slip(p) != answer(p) for p in prompts) > 0.8 * len(prompts)


def test_a_group_is_trained_once_and_the_same_again(monkeypatch, tmp_path):
    """A finished model is kept; the same seed makes the same bytes; other settings are refused."""
    family = replace(FAMILIES["characters"], logged=20)
    monkeypatch.setitem(groups.FAMILIES, "characters", family)
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
