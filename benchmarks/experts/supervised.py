"""Supervised training on written answers: the base on all tasks, an SFT expert on one."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from resmerge_stream.experts.evaluate import IGNORED, encode_answers

from .asked import logits_at
from .optimizers import MAX_GRADIENT_NORM, OptimizerName, build_optimizer
from .questions import Question
from .state import TrainingState


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
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: SupervisedSettings,
    *,
    streams: Sequence[tuple[Iterator[Question], int]],
    label: str,
    spare: bool = False,
    state: TrainingState | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place on answered questions.

    The loss is the cross-entropy of the answer and the end token; the prompt is only read.

    Args:
        model: float32 weights, trained in place.
        tokenizer: its tokenizer.
        settings: how long and how fast.
        streams: the questions, and how many of each stream are in a batch.
        label: name of the run in the progress on stderr.
        spare: whether logits are computed for answers only; the last bits then differ.
        state: where a stopped training continues from.

    Returns:
        The log: an entry each 50 steps, 10 of a spare training, with the mean loss since the last.
    """
    optimizer = build_optimizer(
        settings.optimizer, model.parameters(), learning_rate=settings.learning_rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, settings))
    state = state or TrainingState(None)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    kept = state.restore(parts)
    log: list[dict[str, Any]] = kept.get("log", [])
    losses: list[float] = []
    every = 10 if spare else 50
    start = time.monotonic() - kept.get("seconds", 0)
    model.train()
    for step in range(1, settings.steps + 1):
        questions = [q for stream, count in streams for q in itertools.islice(stream, count)]
        if step <= kept.get("step", 0):
            continue
        tokens, labels = encode_answers(
            tokenizer, [q.prompt for q in questions], [q.answer for q in questions]
        )
        loss = _answer_loss(model, tokens, labels, pad=tokenizer.pad_token_id, spare=spare)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds = time.monotonic() - start
        if step % every == 0 or step == settings.steps:
            mean = sum(losses) / len(losses)
            log.append({"step": step, "loss": round(mean, 5), "seconds": round(seconds, 1)})
            print(f"{label}: {log[-1]}", file=sys.stderr, flush=True)
            losses.clear()
            state.keep(step, parts, {"log": log, "seconds": seconds})
    model.eval()
    return log


def _pace(step: int, settings: SupervisedSettings) -> float:
    """Return the share of the peak learning rate at a step, counted from 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _answer_loss(model: Any, tokens: Tensor, labels: Tensor, *, pad: int, spare: bool) -> Tensor:
    inputs = {"input_ids": tokens, "attention_mask": (tokens != pad).long()}
    if spare:
        wanted = labels.roll(-1, 1)
        answered = wanted != IGNORED
        return functional.cross_entropy(logits_at(model, inputs, answered), wanted[answered])
    logits = model(**inputs, use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
