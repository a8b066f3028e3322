"""Which questions a model answers rightly, and the logits that deciding or learning it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resmerge_stream.experts.evaluate import IGNORED, encode_answers

from .questions import Question

_BATCH = 64


def logits_at(model: Any, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Return the logits after chosen tokens only: a vocabulary of words is costly to score.

    Args:
        model: a causal language model of transformers.
        inputs: as its decoder takes them, tokens of shape (B, T).
        chosen: shape (B, T), bool.

    Returns:
        Shape (chosen tokens, V), row by row.
    """
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[chosen])


@torch.no_grad()
def right(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[bool]:
    """Return for each question whether greedy decoding gives its answer, and then ends.

    The answer is the likeliest exactly where each of its tokens is, after the right ones before
    it: one forward pass over prompt and answer decides what generation would token by token.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    found = [False] * len(questions)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        asked = [questions[i] for i in rows]
        tokens, labels = encode_answers(
            tokenizer, [q.prompt for q in asked], [q.answer for q in asked]
        )
        wanted = labels.roll(-1, 1) != IGNORED
        # Padding stands on the right, where a causal model does not look.
        likeliest = logits_at(model, {"input_ids": tokens}, wanted).argmax(dim=-1)
        wrong = torch.zeros(tokens.shape, dtype=torch.bool)
        wrong[wanted] = likeliest != labels.roll(-1, 1)[wanted]
        for i, bad in zip(rows, wrong.any(dim=1).tolist(), strict=True):
            found[i] = not bad
    return found
