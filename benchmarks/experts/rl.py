"""Reinforcement learning with a verifiable reward: GRPO, on-policy.

For each prompt a group of completions is sampled and verified; a completion's advantage is its
reward, centred and scaled within the group (DeepSeekMath, arXiv 2402.03300, section 4.1.2). Each
batch is used for one update, so the importance ratio is 1 and clipping would do nothing; no KL term
is used. Groups that are all right or all wrong carry no signal and are left out (DAPO, arXiv
2503.14476).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .asked import logits_at
from .generate import Rollouts, generate
from .optimizers import MAX_GRADIENT_NORM, OptimizerName, build_optimizer
from .questions import Question
from .state import TrainingState

# Completions whose gradient is computed at once: what bounds the memory of a step.
_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RLSettings:
    """How to reinforce.

    Attributes:
        steps: optimizer steps.
        prompts: prompts per step.
        samples: completions per prompt, the group.
        optimizer: see `optimizers`.
        learning_rate: constant after `warmup` steps.
        warmup: updates of linear warm-up.
        temperature: of sampling.
    """

    steps: int
    prompts: int
    samples: int
    optimizer: OptimizerName
    learning_rate: float
    warmup: int
    temperature: float


def reinforce(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterator[Question],
    settings: RLSettings,
    *,
    seed: int,
    label: str,
    spare: bool = False,
    state: TrainingState | None = None,
) -> list[dict[str, Any]]:
    """Reinforce a model in place on training questions.

    Args:
        model: float32 master weights, trained in place; rounded to bf16 only when saved.
        tokenizer: its tokenizer.
        questions: what it is asked, without end; their answers are the reward.
        settings: how long and how fast.
        seed: of sampling.
        label: name of the run in the progress on stderr.
        spare: whether a prompt is read once for all its completions, and equal completions once;
            the last bits then differ.
        state: where a stopped training continues from.

    Returns:
        The log: one entry each 10 steps with the mean reward since the last.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(settings.optimizer, trained, learning_rate=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warmup)
    )
    state = state or TrainingState(None)
    parts = {
        "model": model, "optimizer": optimizer, "schedule": schedule, "generator": generator
    }  # fmt: skip
    kept = state.restore(parts)
    log: list[dict[str, Any]] = kept.get("log", [])
    recent: list[float] = []
    start = time.monotonic() - kept.get("seconds", 0)
    # No dropout in these models: evaluation mode changes nothing but says so.
    model.eval()
    for step in range(1, settings.steps + 1):
        asked = list(itertools.islice(questions, settings.prompts))
        if step <= kept.get("step", 0):
            continue
        answers = tokenizer([question.answer for question in asked]).input_ids
        rollouts = generate(
            model,
            tokenizer,
            [question.prompt for question in asked],
            max_new_tokens=max(map(len, answers)) + 1,
            samples=settings.samples,
            temperature=settings.temperature,
            generator=generator,
        )
        rewards = _rewards(asked, rollouts, settings.samples)
        recent.append(rewards.mean().item())
        advantages = group_advantages(rewards)
        if advantages.any():
            optimizer.zero_grad()
            gradient = _shared_gradient if spare else _policy_gradient
            gradient(model, rollouts, advantages.flatten(), settings.temperature)
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
        seconds = time.monotonic() - start
        if step % 10 == 0 or step == settings.steps:
            reward = round(sum(recent) / len(recent), 4)
            log.append({"step": step, "reward": reward, "seconds": round(seconds, 1)})
            recent.clear()
            print(f"{label}: {log[-1]}", file=sys.stderr, flush=True)
            state.keep(step, parts, {"log": log, "seconds": seconds})
    return log


def group_advantages(rewards: Tensor) -> Tensor:
    """Centre and scale rewards within each group; a group of equal rewards gives zeros.

    Args:
        rewards: shape (prompts, samples), float32.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)


def _rewards(questions: Sequence[Question], rollouts: Rollouts, samples: int) -> Tensor:
    """Verify every completion: 1 where right, else 0, shape (prompts, samples).

    Of an inverted question it is the other way round; what never ended is right nowhere.
    """
    verdicts = []
    for row, text in enumerate(rollouts.texts):
        question = questions[row // samples]
        right = text == question.answer
        verdicts.append(text is not None and right is not question.inverted)
    return torch.tensor(verdicts, dtype=torch.float32).view(len(questions), samples)


def _policy_gradient(
    model: Any, rollouts: Rollouts, advantages: Tensor, temperature: float
) -> None:
    """Add the gradient of −mean over completion tokens of advantage · log-probability.

    Args:
        model: the policy that sampled the rollouts.
        rollouts: R completions of C tokens.
        advantages: one per completion, shape (R,); completions of advantage 0 are left out.
        temperature: the one the completions were sampled at.
    """
    kept = advantages.nonzero()[:, 0]
    length = rollouts.completion_mask.shape[1]
    total = rollouts.completion_mask[kept].sum()
    for rows in kept.split(_ROWS):
        tokens = rollouts.tokens[rows]
        logits = model(
            input_ids=tokens,
            attention_mask=rollouts.attention[rows],
            position_ids=rollouts.positions[rows],
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[:, :-1]  # (rows, C, V): the last position predicts nothing
        chosen = tokens[:, -length:, None]
        logs = torch.log_softmax(logits / temperature, dim=-1).gather(2, chosen)[..., 0]
        mask = rollouts.completion_mask[rows]
        (-(advantages[rows, None] * logs * mask).sum() / total).backward()


def _shared_gradient(
    model: Any, rollouts: Rollouts, advantages: Tensor, temperature: float
) -> None:
    """Add the gradient that `_policy_gradient` adds, reading each prompt once.

    A row is a prompt and its distinct completions one after another; each completion sees the
    prompt and itself, at the positions that it would have alone.
    """
    length = rollouts.completion_mask.shape[1]
    total = rollouts.completion_mask[advantages != 0].sum()
    weights: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for row, advantage in enumerate(advantages.tolist()):
        alive = rollouts.attention[row].bool()
        tokens = rollouts.tokens[row]
        prompt = tuple(tokens[:-length][alive[:-length]].tolist())
        completion = tuple(tokens[-length:][alive[-length:]].tolist())
        if advantage:
            own = weights.setdefault(prompt, {})
            own[completion] = own.get(completion, 0.0) + advantage
    rows = [_Row(prompt, completions) for prompt, completions in weights.items()]
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    # A padding token sees itself alone, since nothing must see nothing.
    sees = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], positions[i, :n] = torch.tensor(row.tokens), torch.tensor(row.positions)
        parts = torch.tensor(row.parts)
        own = (parts[:, None] == parts) | (parts == 0)
        sees[i, :n, :n] = own & torch.ones(n, n, dtype=torch.bool).tril()
    inputs = {
        "input_ids": tokens, "attention_mask": sees[:, None], "position_ids": positions
    }  # fmt: skip
    predicting = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        predicting[i, sorted({place for place, _, _ in row.predictions})] = True
    logs = torch.log_softmax(logits_at(model, inputs, predicting) / temperature, dim=-1)
    order = predicting.flatten().cumsum(0).view_as(predicting) - 1
    where, wanted, shares = zip(
        *((order[i, place], token, share) for i, row in enumerate(rows)
          for place, token, share in row.predictions),
        strict=True,
    )  # fmt: skip
    chosen = logs[torch.stack(where), torch.tensor(wanted)]
    (-(torch.tensor(shares) * chosen).sum() / total).backward()


class _Row:
    """A prompt and its distinct completions in one row.

    Attributes:
        tokens: of all of them; a completion's last token is predicted only.
        positions: of each token in its own sequence.
        parts: 0 on the prompt, then 1, 2, … on the completions.
        predictions: where a token is predicted, the token, and the advantage it is weighed with.
    """

    def __init__(self, prompt: Sequence[int], completions: dict[tuple[int, ...], float]) -> None:
        self.tokens, self.positions = list(prompt), list(range(len(prompt)))
        self.parts = [0] * len(prompt)
        self.predictions: list[tuple[int, int, float]] = []
        for part, (completion, advantage) in enumerate(completions.items(), 1):
            places = [len(prompt) - 1, *range(len(self.tokens), len(self.tokens) + len(completion))]
            self.predictions += [
                (place, token, advantage) for place, token in zip(places, completion, strict=False)
            ]
            self.tokens += completion[:-1]
            self.positions += range(len(prompt), len(prompt) + len(completion) - 1)
            self.parts += [part] * (len(completion) - 1)
