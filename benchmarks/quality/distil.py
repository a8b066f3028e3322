"""Command line: `python -m benchmarks.quality distil`: what training adds to a merge.

A merge, the mean or the base is trained on for some steps to answer as each expert does on that
expert's task: KL(expert ‖ model) over the tokens of answers to unlabelled prompts. Off-policy the
answers are the expert's own, greedy, and its probabilities are computed once, one expert at a time.
On-policy they are the model's, drawn anew at each step (GKD, arXiv 2306.13649). Either all weights
learn or a LoRA adapter. The rate is tuned for each start, on questions that nothing else asks.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experts.asked import logits_at, right
from benchmarks.experts.generate import Rollouts, generate
from benchmarks.experts.groups import ADAPTER_RANK, GROUPS, Group
from benchmarks.experts.model import add_adapter
from benchmarks.experts.optimizers import MAX_GRADIENT_NORM, build_optimizer
from benchmarks.experts.questions import Question
from resmerge_stream.experts.evaluate import load_model, load_tokenizer

from .groups import rl_experts
from .merges import merge_by, recipe_of
from .regime_page import STUDENT
from .tables import table

# Where training starts. The first is what the others are compared with.
STARTS = ("head_regression", "mean", "base")
RATES = (3e-5, 1e-4, 3e-4)
# Steps after which a model is asked.
MARKS = (0, 10, 30, 100)
_BATCH = 16
# Of the questions that rates are tuned on; another seed than any other's.
_TUNING = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """What an expert says of one batch of answers.

    N rows, T tokens, V words; K tokens are predicted in all of them together.

    Attributes:
        inputs: as a decoder takes them, each of shape (N, T).
        chosen: after which tokens a token of an answer comes, shape (N, T), bool, K of them true.
        logarithms: the expert's log-probabilities of what comes next there, shape (K, V).
    """

    inputs: dict[str, Tensor]
    chosen: Tensor
    logarithms: Tensor

    def rows(self, rows: Tensor) -> Lessons:
        """Return these rows of the batch."""
        by_row = self.logarithms.split(self.chosen.sum(dim=1).tolist())
        return Lessons(
            inputs={name: values[rows] for name, values in self.inputs.items()},
            chosen=self.chosen[rows],
            logarithms=torch.cat([by_row[row] for row in rows.tolist()]),
        )


@torch.no_grad()
def taught(expert: Any, rollouts: Rollouts) -> Lessons:
    """Return what an expert says of answers, its own or another model's."""
    inputs = {
        "input_ids": rollouts.tokens,
        "attention_mask": rollouts.attention,
        "position_ids": rollouts.positions,
    }
    chosen = torch.zeros(rollouts.tokens.shape, dtype=torch.bool)
    length = rollouts.completion_mask.shape[1]
    chosen[:, -length - 1 : -1] = rollouts.completion_mask.bool()
    logits = logits_at(expert, inputs, chosen)
    return Lessons(inputs=inputs, chosen=chosen, logarithms=logits.log_softmax(dim=-1))


def divergence(model: Any, lessons: Lessons) -> Tensor:
    """Return KL(expert ‖ model), the mean over tokens of answers, in nats."""
    ours = logits_at(model, lessons.inputs, lessons.chosen).log_softmax(dim=-1)
    theirs = lessons.logarithms
    mean: Tensor = (theirs.exp() * (theirs - ours)).sum(dim=-1).mean()
    return mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How one model is trained on.

    Attributes:
        start: of `STARTS`.
        rate: of AdamW.
        seed: of prompts, batches and sampling.
        on_policy: whether answers are the model's own.
        adapter: whether a LoRA adapter learns, not the weights.
    """

    start: str = STARTS[0]
    rate: float = RATES[0]
    seed: int = 0
    on_policy: bool = False
    adapter: bool = False


_KINDS = (Setting(), Setting(on_policy=True), Setting(adapter=True))


def distil(
    start: Path,
    experts: Mapping[str, Path],
    group: Group,
    setting: Setting,
    *,
    prompts: int,
    steps: int,
) -> Iterator[tuple[int, Any]]:
    """Train a model to answer as experts do, each on its own task.

    Args:
        start: checkpoint folder.
        experts: checkpoint folders, by task.
        group: whose tasks they are.
        setting: how.
        prompts: unlabelled prompts of each task.
        steps: each of a batch of every task.

    Yields:
        After 0 steps and at each of `MARKS`: the steps so far and the model, rounded to bf16.
    """
    model, tokenizer = load_model(start), load_tokenizer(start)
    generator = torch.Generator().manual_seed(setting.seed)
    asked = {
        task: list(
            itertools.islice(
                group.family.stream(task, seed=5000 + setting.seed, split="train"), prompts
            )
        )
        for task in experts
    }
    kept: dict[str, Lessons] = {}
    teachers: dict[str, Any] = {}
    for task, folder in experts.items():
        expert = load_model(folder)
        if setting.on_policy:
            teachers[task] = expert
        else:
            kept[task] = taught(expert, _answers(expert, tokenizer, asked[task]))
    if setting.adapter:
        add_adapter(model, rank=ADAPTER_RANK, seed=setting.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer("adamw", trained, learning_rate=setting.rate)
    for step in range(steps + 1):
        if step in MARKS:
            yield step, copy.deepcopy(model).to(torch.bfloat16).float()
        optimizer.zero_grad()
        for task in experts:
            rows = torch.randperm(prompts, generator=generator)[:_BATCH]
            if setting.on_policy:
                questions = [asked[task][row] for row in rows.tolist()]
                answers = _answers(model, tokenizer, questions, generator)
                lessons = taught(teachers[task], answers)
            else:
                lessons = kept[task].rows(rows)
            (divergence(model, lessons) / len(experts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()


def _answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    generator: torch.Generator | None = None,
) -> Rollouts:
    """Return a model's answers: greedy, or drawn where there is a generator."""
    longest = max(map(len, tokenizer([q.answer for q in questions]).input_ids)) + 1
    return generate(
        model,
        tokenizer,
        [question.prompt for question in questions],
        max_new_tokens=longest,
        temperature=0.0 if generator is None else 1.0,
        generator=generator,
    )


def main(argv: Sequence[str]) -> None:
    """Tune, train from every start, ask, and print the table; what was trained is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality distil", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models, answers")
    parser.add_argument("--group", choices=GROUPS, default="small", help="whose RL experts")
    parser.add_argument("--prompts", type=int, default=64, help="unlabelled prompts of a task")
    parser.add_argument("--asked", type=int, default=500, help="held-out prompts a task")
    parser.add_argument("--seed", type=int, default=2029, help="of the held-out prompts")
    parser.add_argument("--seeds", type=int, choices=STUDENT, default=5, help="of each setting")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    group = GROUPS[arguments.group]
    base, experts = rl_experts(arguments.work / "experts", group)
    store = arguments.work / f"distil-{group.name}.json"
    found: dict[str, dict[str, list[str]]] = (
        json.loads(store.read_text("utf-8")) if store.is_file() else {}
    )
    work = arguments.work / "distil" / group.name
    merged = merge_by(recipe_of(base, tuple(experts.values())), STARTS[:2], work)
    starts = {name: merge.folder for name, merge in merged.items()} | {"base": base}

    def run(setting: Setting, held_out: int) -> dict[str, list[str]]:
        """Return by step the answers to each task's questions, "1" for each right one."""
        key = f"{setting} {held_out}"
        if key not in found:
            tokenizer = load_tokenizer(base)
            questions = [group.family.held_out(t, arguments.asked, seed=held_out) for t in experts]
            found[key] = {
                str(step): [
                    "".join("01"[verdict] for verdict in right(model, tokenizer, asked))
                    for asked in questions
                ]
                for step, model in distil(
                    starts[setting.start],
                    experts,
                    group,
                    setting,
                    prompts=arguments.prompts,
                    steps=MARKS[-1],
                )
            }
            store.write_text(json.dumps(found), encoding="utf-8")
            print(f"{group.name}: {setting} done", file=sys.stderr, flush=True)
        return found[key]

    rows = []
    for kind in _KINDS:
        for start in STARTS:
            tried = {
                rate: _mean(run(replace(kind, start=start, rate=rate), _TUNING)[str(MARKS[-1])])
                for rate in RATES
            }
            best = replace(kind, start=start, rate=max(tried, key=lambda rate: tried[rate]))
            runs = [run(replace(best, seed=n + 1), arguments.seed) for n in range(arguments.seeds)]
            how = "on-policy" if best.on_policy else "off-policy"
            what = f"LoRA, rank {ADAPTER_RANK}" if best.adapter else "all weights"
            cells = [_over_seeds(runs, str(step)) for step in MARKS]
            rows.append([f"`{start}`, {how}, {what}", f"{best.rate:g}", *cells])
    shutil.rmtree(work)
    print(table(["start", "rate", *(f"{step} steps" for step in MARKS)], rows))


def _mean(answers: Sequence[str]) -> float:
    return 100 * statistics.mean(bits.count("1") / len(bits) for bits in answers)


def _over_seeds(runs: Sequence[Mapping[str, Sequence[str]]], step: str) -> str:
    """Return the mean accuracy at a step, and how far it is above that of no step."""
    mean = statistics.mean(_mean(run[step]) for run in runs)
    if step == "0":
        return f"{mean:.1f}"
    # By question, on average over seeds: what another set of questions could make of it.
    by_task = [
        [
            statistics.mean(
                (run[step][task][i] == "1") - (run["0"][task][i] == "1") for run in runs
            )
            for i in range(len(runs[0]["0"][task]))
        ]
        for task in range(len(runs[0]["0"]))
    ]
    variance = sum(statistics.variance(gains) / len(gains) for gains in by_task)
    within = 1.96 * variance**0.5 / len(by_task)
    gains = [_mean(run[step]) - _mean(run["0"]) for run in runs]
    between = STUDENT[len(runs)] * statistics.stdev(gains) / len(runs) ** 0.5
    half = math.hypot(100 * within, between)
    return f"{mean:.1f} ({statistics.mean(gains):+.1f} ± {half:.1f})"
