"""How often a checkpoint answers the built-in experts' tasks rightly, with 95 % intervals.

Greedy decoding gives the whole right answer exactly when each of its tokens, the end token
included, is the likeliest after the prompt and the right tokens before it. So one forward pass over
prompt and answer decides what generation would decide token by token.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .accuracy import Accuracy, wilson
from .tasks import TASKS, answer, draw_prompts

# The label of positions that are not part of an answer; what torch's cross-entropy leaves out.
IGNORED = -100

_BATCH = 250


def evaluate(folder: Path | str, n_prompts: int, seed: int) -> dict[str, Accuracy]:
    """Return a checkpoint's accuracy on every task, on held-out prompts.

    Args:
        folder: a built-in expert, or a merge of such experts; see `demo.builtin_group`.
        n_prompts: distinct held-out prompts per task.
        seed: of the prompts; the same seed asks every model the same.

    Memory: the weights in float32, and some 100 MB.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return evaluate_model(model, tokenizer, n_prompts=n_prompts, seed=seed)


def evaluate_model(
    model: Any, tokenizer: Any, *, n_prompts: int, seed: int, tasks: Sequence[str] = TASKS
) -> dict[str, Accuracy]:
    """Return a loaded model's accuracy on held-out prompts, by task; see `evaluate`."""
    accuracies = {}
    for task in tasks:
        prompts = draw_prompts(task, n_prompts, seed=seed, split="held-out")
        accuracies[task] = wilson(
            sum(right for _, right in said(model, tokenizer, prompts)), n_prompts
        )
    return accuracies


@torch.no_grad()
def said(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[tuple[str, bool]]:
    """Return for each prompt what greedy decoding says, and whether that is right.

    A wrong answer ends with its first wrong token and "…": what would follow, nobody asked.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: of any tasks of `tasks`, in any order.
    """
    # Sorted by length, a batch needs little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [("", False)] * len(prompts)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        asked = [prompts[i] for i in chosen]
        encoded = encode_answers(tokenizer, asked, [answer(prompt) for prompt in asked])
        tokens, labels = (each.to(model.device) for each in encoded)
        # Padding stands on the right, where a causal model does not look.
        likeliest = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(dim=-1)
        wanted = labels[:, 1:]
        wrong = (likeliest != wanted) & (wanted != IGNORED)
        for row, i in enumerate(chosen):
            is_right = not bool(wrong[row].any())
            end = int(wrong[row].int().argmax()) + 1
            spoken = likeliest[row, :end][wanted[row, :end] != IGNORED].tolist()
            text = tokenizer.decode(spoken, skip_special_tokens=True)
            text += "" if spoken[-1:] == [tokenizer.eos_token_id] else "…"
            found[i] = (answer(prompts[i]) if is_right else text, is_right)
    return found


def encode_answers(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Encode answered prompts, padded on the right.

    Args:
        tokenizer: with a pad and an end token.
        prompts: B texts.
        answers: their answers.

    Returns:
        Tokens, and labels that are `IGNORED` outside of the answer and its end token; both of
        shape (B, T), int64.
    """
    rows = [
        (question, [*reply, tokenizer.eos_token_id])
        for question, reply in zip(
            tokenizer(list(prompts)).input_ids, tokenizer(list(answers)).input_ids, strict=True
        )
    ]
    length = max(len(question) + len(reply) for question, reply in rows)
    tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (question, reply) in enumerate(rows):
        end = len(question) + len(reply)
        tokens[row, :end] = torch.tensor(question + reply)
        labels[row, len(question) : end] = torch.tensor(reply)
    return tokens, labels


def load_model(folder: Path | str) -> Any:
    """Read a checkpoint folder into a float32 model on the CPU, in evaluation mode.

    Float32 represents every bf16 weight exactly, and is what CPUs compute fastest and most evenly.
    """
    # Importing transformers takes seconds, which nobody but an evaluation should wait for.
    from transformers import AutoModelForCausalLM

    with _without_progress_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    return model.eval()


def load_tokenizer(folder: Path | str) -> Any:
    """Read the tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
