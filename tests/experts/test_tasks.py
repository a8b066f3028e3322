"""The built-in experts' tasks: every prompt has one right answer, and held-out means held out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.experts.tasks import (
    ALPHABET,
    CLOSING,
    TASKS,
    answer,
    draw_prompts,
    is_correct,
    split_of,
    split_prompt,
)

tasks = st.sampled_from(TASKS)
splits = st.sampled_from(("train", "held-out"))
seeds = st.integers(min_value=0, max_value=2**32)


@given(task=tasks, split=splits, seed=seeds)
def test_prompts_are_distinct_of_their_task_and_of_their_split(task, split, seed):
    """Drawn prompts repeat neither themselves nor between runs, and keep to their split."""
    prompts = draw_prompts(task, 20, seed=seed, split=split)

    assert len(set(prompts)) == 20
    assert {split_prompt(prompt)[0] for prompt in prompts} == {task}
    assert {split_of(prompt) for prompt in prompts} == {split}
    assert prompts == draw_prompts(task, 20, seed=seed, split=split)


@given(task=tasks, seed=seeds)
def test_one_completion_is_right(task, seed):
    """The answer is right; a shorter, a longer and another one are wrong."""
    (prompt,) = draw_prompts(task, 1, seed=seed, split="train")
    right = answer(prompt)

    assert is_correct(prompt, right)
    assert not is_correct(prompt, right[:-1])
    assert not is_correct(prompt, right + right[-1])
    assert not is_correct(prompt, right + " ")
    assert set(prompt + right) <= set(ALPHABET)


@given(seed=seeds)
def test_answers_are_what_the_tasks_say(seed):
    """Sums add, sorted letters are in order, reversed ones backwards, brackets all closed."""
    questions = {
        task: split_prompt(draw_prompts(task, 1, seed=seed, split="held-out")[0])[1]
        for task in TASKS
    }

    left, right = questions["add"].split("+")
    assert int(answer(f"add:{questions['add']}=")) == int(left) + int(right)
    assert list(answer(f"sort:{questions['sort']}=")) == sorted(questions["sort"])
    assert answer(f"reverse:{questions['reverse']}=") == "".join(reversed(questions["reverse"]))
    whole = questions["close"] + answer(f"close:{questions['close']}=")
    pairs = [opening + closing for opening, closing in CLOSING.items()]
    while any(pair in whole for pair in pairs):
        for pair in pairs:
            whole = whole.replace(pair, "")
    assert whole == ""


def test_no_prompt_is_both_trained_on_and_held_out():
    """The split is a function of the text alone, so no seed can mix the two."""
    for task in TASKS:
        train = set(draw_prompts(task, 2000, seed=1, split="train"))
        held_out = set(draw_prompts(task, 2000, seed=1, split="held-out"))

        assert not train & held_out


@pytest.mark.parametrize("text", ["", "add", "add:1+2", "sum:1+2=", "sort=", "close:)="])
def test_what_is_no_prompt_is_refused(text):
    """A text of another form has no answer, and the message shows it."""
    with pytest.raises(ValueError, match=r"Not a prompt|do not match"):
        answer(text)


def test_an_unknown_task_is_refused():
    """A task that there is not is named with those that there are."""
    with pytest.raises(ValueError, match="add, sort, reverse, close"):
        draw_prompts("multiply", 1, seed=0, split="train")
