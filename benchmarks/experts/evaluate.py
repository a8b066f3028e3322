"""Accuracy on held-out prompts, with Wilson intervals."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generate import generate
from .model import load_model, load_tokenizer
from .tasks import TASKS, answer, draw_prompts, is_correct

# Standard normal quantile of a two-sided 95 % interval.
_Z = 1.959964

_BATCH = 500


class Accuracy(NamedTuple):
    """Share of correct answers with its 95 % Wilson interval.

    Attributes:
        accuracy: correct answers among `n`, 0 to 1.
        low: lower end of the interval.
        high: upper end of the interval.
        n: prompts asked.
    """

    accuracy: float
    low: float
    high: float
    n: int


def wilson(correct: int, n: int) -> Accuracy:
    """Return a share and its 95 % Wilson score interval."""
    share = correct / n
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    centre = share + _Z**2 / (2 * n)
    scale = 1 + _Z**2 / n
    return Accuracy(share, (centre - spread) / scale, (centre + spread) / scale, n)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_prompts: int,
    seed: int,
    tasks: Sequence[str] = TASKS,
) -> dict[str, Accuracy]:
    """Measure a loaded model's accuracy by greedy decoding on held-out prompts.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        n_prompts: distinct held-out prompts per task.
        seed: of the prompts.
        tasks: which tasks.
    """
    accuracies: dict[str, Accuracy] = {}
    for task in tasks:
        prompts = draw_prompts(task, n_prompts, seed=seed, split="held-out")
        accuracies[task] = wilson(_count_correct(model, tokenizer, prompts), n_prompts)
    return accuracies


def evaluate(model_dir: Path | str, n_prompts: int, seed: int) -> dict[str, Accuracy]:
    """Measure a checkpoint folder's accuracy on every task; see `evaluate_model`."""
    return evaluate_model(
        load_model(model_dir).eval(), load_tokenizer(model_dir), n_prompts=n_prompts, seed=seed
    )


def _count_correct(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> int:
    # Sorted by length, a batch needs little padding.
    ordered = sorted(prompts, key=len)
    correct = 0
    for start in range(0, len(ordered), _BATCH):
        batch = ordered[start : start + _BATCH]
        # A completion with more tokens than the longest answer and its end is wrong anyway.
        longest = max(len(answer(prompt)) for prompt in batch) + 1
        rollouts = generate(model, tokenizer, batch, max_new_tokens=longest)
        correct += sum(
            text is not None and is_correct(prompt, text)
            for prompt, text in zip(batch, rollouts.texts, strict=True)
        )
    return correct


def main() -> None:
    """Print the accuracy of checkpoint folders on held-out prompts, one line of JSON each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts.evaluate")
    parser.add_argument("folders", nargs="+", type=Path, help="checkpoint folders")
    parser.add_argument("--prompts", type=int, default=1000, help="held-out prompts per task")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        accuracies = evaluate(folder, arguments.prompts, arguments.seed)
        rounded = {task: [round(x, 4) for x in accuracies[task]] for task in accuracies}
        print(json.dumps({"model": folder.name, "accuracy": rounded}), flush=True)


if __name__ == "__main__":
    main()
