"""Command line: `python -m benchmarks.quality rivals`: head regression against its rivals.

All of them choose the update of a matrix by one regression:

    ΔW = argmin Σ ‖(ΔW − Δ_i) C_i^½‖² + μ ‖ΔW − A‖²  =  (Σ Δ_i C_i + μ A)(Σ C_i + μ I)⁺

They differ in what stands for the inputs of expert i, in the anchor A and in μ, which is a share of
the mean of the diagonal of ΣC_i. RegMean has true inputs: activations of the expert on prompts of
its own task with their answers. The others take the update itself, C_i = Δ_iᵀΔ_i. Only matrices of
linear layers differ between two rivals: all else is what head regression makes of it.

Of RL experts; each rival is stored in bf16 and asked the same held-out prompts as head regression.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.experts.groups import GROUPS
from benchmarks.experts.questions import Family
from resmerge_stream.experts.accuracy import paired_difference
from resmerge_stream.experts.evaluate import encode_answers, load_model, load_tokenizer

from .asking import Answers, asker_of, study_parser
from .groups import rl_experts
from .merges import merge_by, recipe_of
from .tables import table

OURS = "head_regression"
# Merged by the library, for comparison and as anchors.
MERGED = (OURS, "mean", "task_arithmetic", "swudi", "tsv_m")
_WEIGHTS = "model.safetensors"
# Prompts from which RegMean's activations are read; another seed than any training's.
_SEED = 91
_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """One closed form.

    Attributes:
        inputs: what stands for an expert's inputs: its update, or so many of its task's prompts.
        normalised: whether each expert's C_i is divided by its trace.
        anchor: the merge that the ridge pulls to.
        ridge: μ as a share of the mean diagonal of ΣC_i; 0 takes the pseudo-inverse.
    """

    inputs: Literal["update"] | int
    normalised: bool = True
    anchor: str = "task_arithmetic"
    ridge: float = 0.0


RIVALS = {
    "ACTMat (2604.01329)": Rival(inputs="update", normalised=False),
    "ACTMat, normalised": Rival(inputs="update"),
    "BMM (2605.12843), anchor: sum": Rival(inputs="update", ridge=0.3),
    "BMM, not normalised": Rival(inputs="update", normalised=False, ridge=0.3),
    "BMM, anchor: TSV-M": Rival(inputs="update", anchor="tsv_m", ridge=0.3),
    "BMM, anchor: head regression": Rival(inputs="update", anchor=OURS, ridge=0.3),
    **{
        f"RegMean, {prompts} prompts, {text}": Rival(inputs=prompts, anchor=anchor, ridge=ridge)
        for prompts in (16, 200)
        for text, anchor, ridge in (
            ("ridge 0.001", "task_arithmetic", 0.001),
            ("ridge 0.1", "task_arithmetic", 0.1),
            ("ridge 0.1 to head regression", OURS, 0.1),
        )
    },
}


def regression(
    updates: Sequence[Tensor], grams: Sequence[Tensor], anchor: Tensor, rival: Rival
) -> Tensor:
    """Return the update of one matrix.

    Args:
        updates: of each expert, shape (m, n), float64.
        grams: C_i of each expert, shape (n, n), float64, positive semidefinite.
        anchor: shape (m, n), float64; of no effect where there is no ridge.
        rival: which closed form.
    """
    if rival.normalised:
        grams = [gram / gram.trace().clamp_min(1e-300) for gram in grams]
    total = torch.stack(list(grams)).sum(dim=0)
    wanted = sum((d @ c for d, c in zip(updates, grams, strict=True)), torch.zeros_like(anchor))
    if rival.ridge == 0.0:
        return wanted @ torch.linalg.pinv(total, hermitian=True)
    mu = rival.ridge * total.diagonal().mean()
    left = total + mu * torch.eye(len(total), dtype=total.dtype)
    solved: Tensor = torch.linalg.solve(left, (wanted + mu * anchor).T).T
    return solved


def input_grams(expert: Path, family: Family, task: str, prompts: int) -> dict[str, Tensor]:
    """Return XᵀX of the inputs of each linear layer, by the name of its weight, float64.

    Args:
        expert: checkpoint folder.
        family: of the task.
        task: the expert's own.
        prompts: how many training prompts are read, with their answers.
    """
    model, tokenizer = load_model(expert), load_tokenizer(expert)
    found: dict[str, Tensor] = {}
    kept = torch.zeros(0, dtype=torch.bool)

    def reader(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def read(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0][kept].double()
            found[name] = found.get(name, 0) + rows.T @ rows

        return read

    for name, module in model.get_decoder().named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(reader(f"{name}.weight"))
    questions = list(itertools.islice(family.stream(task, seed=_SEED, split="train"), prompts))
    with torch.no_grad():
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            tokens, _ = encode_answers(
                tokenizer, [q.prompt for q in batch], [q.answer for q in batch]
            )
            kept = tokens != tokenizer.pad_token_id
            model.get_decoder()(input_ids=tokens, use_cache=False)
    return found


def merge_by_regression(
    base: Path,
    experts: Sequence[Path],
    merged: Mapping[str, Path],
    rival: Rival,
    inputs: Sequence[Mapping[str, Tensor]],
    out: Path,
) -> Path:
    """Write a rival's merge in bf16, and return its folder.

    Args:
        base: checkpoint folder.
        experts: checkpoint folders.
        merged: by method, the library's merges of them in float32.
        rival: which closed form.
        inputs: of each expert, as `input_grams` returns them; of no effect where the rival takes
            the updates.
        out: gets the checkpoint.
    """
    before = load_file(base / _WEIGHTS)
    after = [load_file(folder / _WEIGHTS) for folder in experts]
    anchor = load_file(merged[rival.anchor] / _WEIGHTS)
    result = load_file(merged[OURS] / _WEIGHTS)
    for name in inputs[0]:
        start = before[name].double()
        updates = [weights[name].double() - start for weights in after]
        grams = (
            [d.T @ d for d in updates]
            if rival.inputs == "update"
            else [found[name] for found in inputs]
        )
        update = regression(updates, grams, anchor[name].double() - start, rival)
        result[name] = (start + update).float()
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out)
    rounded = {name: tensor.bfloat16() for name, tensor in result.items()}
    save_file(rounded, out / _WEIGHTS, metadata={"format": "pt"})
    return out


def main(argv: Sequence[str]) -> None:
    """Merge by every rival, ask, and print the table; what was asked is not asked again."""
    text = (__doc__ or "").split("\n\n")[0]
    parser = study_parser("rivals", text, group="small", prompts=1000, seed=2028)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    group = GROUPS[arguments.group]
    base, experts = rl_experts(arguments.work / "experts", group)
    asker = asker_of(arguments)
    work = arguments.work / "rivals" / group.name
    recipe = recipe_of(base, tuple(experts.values()))
    exact = merge_by(recipe, MERGED, work / "float32", output="float32")
    merged = {method: found.folder for method, found in exact.items()}
    stored = merge_by(recipe, MERGED, work / "bf16")
    tasks = tuple(experts)
    answers: dict[str, Answers] = {"base": asker.ask(base, tasks)}
    answers["experts"] = {t: asker.ask(expert, (t,))[t] for t, expert in experts.items()}
    answers |= {method: asker.ask(found.folder, tasks) for method, found in stored.items()}
    inputs: dict[int, list[dict[str, Tensor]]] = {}
    for label, rival in RIVALS.items():
        prompts = rival.inputs if rival.inputs != "update" else 16
        if prompts not in inputs:
            inputs = {
                prompts: [input_grams(e, group.family, t, prompts) for t, e in experts.items()]
            }
        out = merge_by_regression(
            base, list(experts.values()), merged, rival, inputs[prompts], work / "rival"
        )
        answers[label] = asker.ask(out, tasks)
        print(f"{group.name}: {label} asked", file=sys.stderr, flush=True)
    shutil.rmtree(work)
    (arguments.work / f"rivals-{group.name}.json").write_text(json.dumps(answers), "utf-8")
    print(_table(answers))


def _table(answers: Mapping[str, Answers]) -> str:
    """Return every rival's accuracy and its paired difference to head regression."""
    bits = {
        label: [[bit == "1" for bit in found] for found in by_task.values()]
        for label, by_task in answers.items()
    }
    shares = {
        label: 100 * sum(sum(row) / len(row) for row in rows) / len(rows)
        for label, rows in bits.items()
    }
    rows = []
    for label in sorted(shares, key=lambda label: -shares[label]):
        difference, half = paired_difference(bits[label], bits[OURS])
        gap = "–" if label == OURS else f"{100 * difference:+.2f} ± {100 * half:.2f}"
        rows.append([label, f"{shares[label]:.2f}", gap])
    return table(["merge", "right, %", "points from `head_regression`"], rows)
