"""Supervised training on written answers: the base on all tasks, an SFT expert on one."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from resmerge_stream.experts.evaluate import IGNORED, encode_answers
from resmerge_stream.experts.tasks import stream_prompts

from .corpus import Writer
from .optimizers import MAX_GRADIENT_NORM, OptimizerName, build_optimizer

_LOG_EVERY = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        optimizer: see `optimizers`.
        learning_rate: at its peak, reached after `warmup` steps; then cosine to a tenth.
        warmup: steps of linear warm-up.
    """

    steps: int
    optimizer: OptimizerName
    learning_rate: float
    warmup: int


def train_on_answers(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: SupervisedSettings,
    *,
    prompts_per_step: Mapping[str, int],
    write: Writer,
    seed: int,
    label: str,
) -> list[dict[str, Any]]:
    """Train a model in place on the answers a writer gives to training prompts.

    The loss is the cross-entropy of the answer and the end token; the prompt is only read.

    Args:
        model: float32 weights, trained in place.
        tokenizer: its tokenizer.
        settings: how long and how fast.
        prompts_per_step: prompts of each task in a batch.
        write: answers the prompts.
        seed: of the prompts.
        label: name of the run in the progress on stderr.

    Returns:
        The log: an entry each 50 steps with the mean loss since the last.
    """
    streams = [
        (stream_prompts(task, seed=seed, split="train"), count)
        for task, count in prompts_per_step.items()
    ]
    optimizer = build_optimizer(
        settings.optimizer, model.parameters(), learning_rate=settings.learning_rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, settings))
    log: list[dict[str, Any]] = []
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for step in range(1, settings.steps + 1):
        prompts = [p for stream, count in streams for p in itertools.islice(stream, count)]
        answers = [write(prompt) for prompt in prompts]
        tokens, labels = encode_answers(tokenizer, prompts, answers)
        loss = _answer_loss(model, tokens, labels, pad=tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % _LOG_EVERY == 0 or step == settings.steps:
            mean = sum(losses) / len(losses)
            seconds = time.monotonic() - start
            log.append({"step": step, "loss": round(mean, 5), "seconds": round(seconds, 1)})
            print(f"{label}: {log[-1]}", file=sys.stderr, flush=True)
            losses.clear()
    model.eval()
    return log


def _pace(step: int, settings: SupervisedSettings) -> float:
    """Return the share of the peak learning rate at a step, counted from 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _answer_loss(model: Qwen2ForCausalLM, tokens: Tensor, labels: Tensor, *, pad: int) -> Tensor:
    logits = model(input_ids=tokens, attention_mask=(tokens != pad).long(), use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
