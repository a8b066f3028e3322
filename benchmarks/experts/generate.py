"""Batched generation with a key-value cache, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """Completions of a batch of prompts, ready to be trained on.

    R rows (prompts times samples, a prompt's samples side by side), P prompt tokens after left
    padding, C completion tokens.

    Attributes:
        tokens: prompts and completions, shape (R, P + C), int64.
        attention: 1 where `tokens` holds a prompt or completion token, shape (R, P + C), int64.
        positions: position of each token in its own sequence, shape (R, P + C), int64.
        completion_mask: 1 on completion tokens, the end token included, shape (R, C), float32.
        texts: the completions without the end token; None where it never came.
    """

    tokens: Tensor
    attention: Tensor
    positions: Tensor
    completion_mask: Tensor
    texts: tuple[str | None, ...]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """Complete a batch of prompts.

    Args:
        model: any causal language model of transformers; its mode is left as it is.
        tokenizer: its tokenizer, with a pad and an end token.
        prompts: texts to complete, at least one.
        max_new_tokens: completions stop here at the latest.
        samples: completions per prompt; the prompt is read once for all of them.
        temperature: 0 takes the likeliest token, else tokens are sampled.
        generator: source of randomness for sampling.

    Returns:
        The completions, row `i * samples + j` being sample j of prompt i.
    """
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=_positions(batch.attention_mask),
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
    tokens = batch.input_ids.repeat_interleave(samples, dim=0)
    attention = batch.attention_mask.repeat_interleave(samples, dim=0)
    logits = logits.repeat_interleave(samples, dim=0)
    alive = torch.ones(len(tokens), dtype=torch.bool)
    for _ in range(max_new_tokens):
        chosen = _choose(logits, temperature, generator)
        chosen = torch.where(alive, chosen, tokenizer.pad_token_id)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        attention = torch.cat([attention, alive[:, None].long()], dim=1)
        alive = alive & (chosen != tokenizer.eos_token_id)
        if not alive.any() or tokens.shape[1] - batch.input_ids.shape[1] == max_new_tokens:
            break
        logits = model(
            input_ids=chosen[:, None],
            attention_mask=attention,
            position_ids=_positions(attention)[:, -1:],
            cache=cache,
            use_cache=True,
        ).logits[:, -1]
    start = batch.input_ids.shape[1]
    return Rollouts(
        tokens=tokens,
        attention=attention,
        positions=_positions(attention),
        completion_mask=attention[:, start:].float(),
        texts=tuple(_text(tokenizer, row) for row in tokens[:, start:].tolist()),
    )


def _positions(attention: Tensor) -> Tensor:
    return (attention.cumsum(dim=1) - 1).clamp(min=0)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Choose one token per row of logits, shape (R, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _text(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> str | None:
    if tokenizer.eos_token_id not in row:
        return None
    return tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
