"""Command line: `python -m benchmarks.quality keep`: keep one expert exactly, add another.

For each matrix, with V the leading directions of A's update and q their strengths,

    ΔW = Δ_A + α Δ_B (I − P (PᵀP + μI)⁻¹ Pᵀ),    P = V diag(q),

is head regression with A's head as the only constraints and Δ_A + αΔ_B as the backbone: B is added
where A's head does not look. Beside it stands the plain sum Δ_A + αΔ_B. What each leaves of A, and
takes of B, is asked of pairs of RL experts.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.experts.groups import GROUPS
from resmerge_stream.experts.accuracy import paired_difference

from .asking import asker_of, study_parser
from .groups import rl_experts
from .tables import table

_WEIGHTS = "model.safetensors"
# Directions of A that are kept; 0 keeps none: the plain sum.
_RANKS = (0, 16, 64)
_ALPHAS = (0.3, 0.6, 1.0)
_MU = 0.03


def head(update: Tensor, rank: int) -> Tensor:
    """Return P = V diag(q) of an update of shape (m, n), float32: shape (n, rank or fewer)."""
    energies, directions = torch.linalg.eigh(update.T @ update)
    energies, directions = energies.flip(0)[:rank], directions.flip(1)[:, :rank]
    return directions * (energies / energies[0].clamp_min(1e-30)).clamp_min(0).sqrt()


def added(kept: Tensor, other: Tensor, P: Tensor | None, *, alpha: float) -> Tensor:
    """Return the update of one tensor that keeps one expert and adds another.

    Args:
        kept: Δ_A, float32.
        other: Δ_B, of its shape.
        P: A's head, as `head` returns it; None keeps none: the plain sum.
        alpha: α.
    """
    if P is None:
        return kept + alpha * other
    inner = torch.linalg.inv(P.T @ P + _MU * torch.eye(P.shape[1]))
    return kept + alpha * (other - other @ P @ inner @ P.T)


def main(argv: Sequence[str]) -> None:
    """Merge pairs, ask both tasks, and print the table."""
    text = (__doc__ or "").split("\n\n")[0]
    parser = study_parser("keep", text, group="smollm2", prompts=500, seed=2032)
    parser.add_argument(
        "--pair",
        action="append",
        metavar="A+B",
        help="keep A and add B; repeat (default: a ring, each expert kept once and added once)",
    )
    parser.add_argument("--alpha", action="append", type=float, help="only this α; repeat")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    group = GROUPS[arguments.group]
    base, experts = rl_experts(arguments.work / "experts", group)
    asker = asker_of(arguments)
    before = load_file(base / _WEIGHTS)
    updates = {
        task: {n: w.float() - before[n].float() for n, w in load_file(f / _WEIGHTS).items()}
        for task, f in experts.items()
    }
    store = arguments.work / f"keep-{group.name}.json"
    found = json.loads(store.read_text("utf-8")) if store.is_file() else {}
    out = arguments.work / "keep"
    tasks = tuple(experts)
    pairs = list(itertools.pairwise((*tasks, tasks[0])))
    if arguments.pair:
        pairs = [tuple(text.split("+", 1)) for text in arguments.pair]
        unknown = {task for pair in pairs for task in pair} - set(tasks)
        if unknown or any(len(pair) != 2 for pair in pairs):
            parser.error(f"--pair takes A+B, of {', '.join(tasks)}")
    alphas = arguments.alpha or _ALPHAS
    heads: dict[str, Tensor] = {}
    heads_of = ""
    for (first, second), rank, alpha in itertools.product(pairs, _RANKS, alphas):
        key = f"{first}+{second} {rank} {alpha:g}"
        if key in found:
            continue
        if rank and heads_of != first:
            heads = {n: head(u, max(_RANKS)) for n, u in updates[first].items() if u.dim() == 2}
            heads_of = first
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        merged = {}
        for name, weights in before.items():
            P = heads[name][:, :rank] if rank and name in heads else None
            update = added(updates[first][name], updates[second][name], P, alpha=alpha)
            merged[name] = (weights.float() + update).to(weights.dtype)
        save_file(merged, out / _WEIGHTS, metadata={"format": "pt"})
        found[key] = asker.ask(out, (first, second))
        store.write_text(json.dumps(found), encoding="utf-8")
        print(f"{group.name}: {key} asked", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    rows = []
    for rank, alpha in itertools.product(_RANKS, alphas):
        merges = [found[f"{first}+{second} {rank} {alpha:g}"] for first, second in pairs]
        kept = [
            (merge[first], asker.ask(experts[first], (first,))[first])
            for merge, (first, _) in zip(merges, pairs, strict=True)
        ]
        gained = [
            (merge[second], asker.ask(base, (second,))[second])
            for merge, (_, second) in zip(merges, pairs, strict=True)
        ]
        name = f"{rank} directions kept" if rank else "plain sum"
        rows.append([name, f"{alpha:g}", _difference(kept), _difference(gained)])
    print(table(["merge", "α", "A, points from A alone", "B, points from the base"], rows))


def _difference(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the paired difference of answers, over prompts of all tasks."""
    ours, theirs = (
        [[bit == "1" for bit in bits] for bits in side] for side in zip(*pairs, strict=True)
    )
    difference, half = paired_difference(ours, theirs)
    return f"{100 * difference:+.1f} ± {100 * half:.1f}"
