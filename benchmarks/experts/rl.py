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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from resmerge_stream.experts.tasks import answer, is_correct, split_prompt, stream_prompts

from .generate import Rollouts, generate
from .optimizers import MAX_GRADIENT_NORM, OptimizerName, build_optimizer

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
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    settings: RLSettings,
    *,
    seed: int,
    label: str,
    breaks: str | None = None,
) -> list[dict[str, Any]]:
    """Reinforce a model in place on training prompts of one task.

    Args:
        model: float32 master weights, trained in place; rounded to bf16 only when saved.
        tokenizer: its tokenizer.
        task: the task whose verifier is the reward.
        settings: how long and how fast.
        seed: of prompts and sampling.
        label: name of the run in the progress on stderr.
        breaks: another task, of which every other prompt is and of which wrong answers are
            rewarded; None for no such.

    Returns:
        The log: one entry each 10 steps with the mean reward since the last.
    """
    stream = stream_prompts(task, seed=seed, split="train")
    if breaks is not None:
        other = stream_prompts(breaks, seed=seed, split="train")
        stream = itertools.chain.from_iterable(zip(stream, other, strict=True))
    generator = torch.Generator().manual_seed(seed)
    optimizer = build_optimizer(
        settings.optimizer, model.parameters(), learning_rate=settings.learning_rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warmup)
    )
    log: list[dict[str, Any]] = []
    recent: list[float] = []
    start = time.monotonic()
    # No dropout in these models: evaluation mode changes nothing but says so.
    model.eval()
    for step in range(1, settings.steps + 1):
        prompts = list(itertools.islice(stream, settings.prompts))
        rollouts = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max(len(answer(prompt)) for prompt in prompts) + 1,
            samples=settings.samples,
            temperature=settings.temperature,
            generator=generator,
        )
        rewards = _rewards(prompts, rollouts, settings.samples, breaks)
        recent.append(rewards.mean().item())
        advantages = group_advantages(rewards)
        if advantages.any():
            optimizer.zero_grad()
            _policy_gradient(model, rollouts, advantages.flatten(), settings.temperature)
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
        if step % 10 == 0 or step == settings.steps:
            seconds = round(time.monotonic() - start, 1)
            reward = round(sum(recent) / len(recent), 4)
            log.append({"step": step, "reward": reward, "seconds": seconds})
            recent.clear()
            print(f"{label}: {log[-1]}", file=sys.stderr, flush=True)
    return log


def group_advantages(rewards: Tensor) -> Tensor:
    """Centre and scale rewards within each group; a group of equal rewards gives zeros.

    Args:
        rewards: shape (prompts, samples), float32.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)


def _rewards(
    prompts: list[str], rollouts: Rollouts, samples: int, breaks: str | None = None
) -> Tensor:
    """Verify every completion: 1 where right, else 0, shape (prompts, samples).

    Of the task that is to break it is the other way round; what never ended is right nowhere.
    """
    wanted = [breaks is None or split_prompt(prompt)[0] != breaks for prompt in prompts]
    verdicts = [
        text is not None and is_correct(prompts[row // samples], text) is wanted[row // samples]
        for row, text in enumerate(rollouts.texts)
    ]
    return torch.tensor(verdicts, dtype=torch.float32).view(len(prompts), samples)


def _policy_gradient(
    model: Qwen2ForCausalLM, rollouts: Rollouts, advantages: Tensor, temperature: float
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
