"""Command line: `python -m benchmarks.quality adapters`: two papers on merging LoRA adapters.

Both are about N adapters of one matrix, Δ_t = B_t A_t (their scales are in B_t), and take any merge
M. **Pico** (arXiv 2604.16826, sections 4.1 and 4.2) damps what the B_t share, before the merge:

    [B_1 … B_N] = U Σ Vᵀ     s_j = σ_j² / Σ σ²     α_j = 1 / (1 + (N − 1) s_j)
    S = I + U diag(α − 1) Uᵀ     ΔW = γ M(S Δ_1, …, S Δ_N)     γ = mean ‖Δ_t‖ / ‖M(…)‖

**Compress-then-Merge** (arXiv 2606.03723; formulas of its code, ZhengbaoHe/compress-then-merge)
merges in r × r coordinates, so that the result has the rank r:

    X_t = (β + (1 − β) mean ‖Δ‖ / ‖Δ_t‖) Δ_t     U, V = argmax Σ ‖Uᵀ X_t V‖²  (HOSVD, then HOOI)
    ΔW = U M(Uᵀ Δ_1 V, …, Uᵀ Δ_N V) Vᵀ

Beside them stands the merge itself, cut to the best approximation of the rank, as `--adapter-rank`
writes it. Every result is put on the base in float32 and asked the same held-out prompts.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from resmerge_stream.experts.accuracy import paired_difference
from resmerge_stream.experts.group import builtin_adapters, builtin_group
from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.maths.changes import Factored
from resmerge_stream.maths.low_rank import LowRank
from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods import MergeMethod, Site, build_method
from resmerge_stream.specs import TensorSpec

from .asking import Answers, asker_of, study_parser
from .tables import points, table

_WEIGHTS = "model.safetensors"
# These methods treat all linear layers alike.
_MATRIX = "model.layers.0.mlp.up_proj.weight"
# Without counting passes: each merges a matrix by itself.
RULES: Mapping[str, Mapping[str, float]] = {
    "mean": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "tsv_m": {},
    "head_regression": {},
}
# Those that are also merged in few coordinates.
COMPRESSED = ("task_arithmetic", "ties", "head_regression")
RANKS = (4, 8, 16, 32)
# Of Compress-then-Merge: what its README runs; its code searches 0, 0.25, 0.5 and 0.75.
_BETA = 0.25
_MOST_STEPS = 1000
_TOLERANCE = 1e-12

# Of one matrix: what each adapter adds to it.
Updates = Sequence[LowRank]


def merged(rule: MergeMethod, updates: Updates) -> Tensor:
    """Return ΔW of one matrix by a method of the library, float64, shape (m, n).

    Args:
        rule: the method; without counting passes.
        updates: Δ_t of each adapter, shape (m, n).
    """
    shape = updates[0].shape
    workspace = Workspace(torch.device("cpu"))
    changes = [Factored(update) for update in updates]
    vectors = TaskVectors(torch.zeros(shape), changes, workspace, resident=False)
    spec = TensorSpec(_MATRIX, "F32", shape)
    update = rule.merge(vectors, Site(rule.rule_for(spec, len(updates)), (1.0,) * len(updates)))
    rows = [update.rows(block, vectors.stack(block)).double() for block in vectors.blocks()]
    return torch.cat(rows)


def calibrated(updates: Updates) -> list[LowRank]:
    """Return Pico's S Δ_t.

    Args:
        updates: Δ_t = B_t A_t of each adapter, as its files have B_t and A_t.
    """
    stacked = torch.cat([update.left for update in updates], dim=1)
    U, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    share = sigma.square() / sigma.square().sum()
    alpha = 1 / (1 + (len(updates) - 1) * share)
    return [LowRank(one.left + (U * (alpha - 1)) @ (U.T @ one.left), one.right) for one in updates]


def at_mean_length(update: Tensor, updates: Updates) -> Tensor:
    """Return Pico's γ ΔW: an update as long as the adapters' are on average."""
    lengths = [torch.linalg.vector_norm(one.left @ one.right.T) for one in updates]
    wanted = torch.stack(lengths).mean()
    return update * (wanted / torch.linalg.vector_norm(update).clamp_min(1e-300))


def shared_bases(updates: Updates, rank: int, *, beta: float) -> tuple[Tensor, Tensor]:
    """Return Compress-then-Merge's U (m × r) and V (n × r), or fewer columns where there are fewer.

    Args:
        updates: Δ_t of each adapter.
        rank: r.
        beta: how much of the adapters' own lengths counts, 0 to 1.
    """
    # All Δ_t lie between these bases: HOOI needs only their small cores.
    left, _ = torch.linalg.qr(torch.cat([one.left for one in updates], dim=1))
    right, _ = torch.linalg.qr(torch.cat([one.right for one in updates], dim=1))
    cores = torch.stack([(left.T @ one.left) @ (one.right.T @ right) for one in updates])
    lengths = torch.linalg.vector_norm(cores, dim=(1, 2))
    scales = beta + (1 - beta) * lengths.mean() / lengths.clamp_min(1e-300)
    cores = cores * scales[:, None, None]

    def leading(stack: Tensor) -> Tensor:
        """Return the r leading left singular vectors of matrices side by side."""
        return torch.linalg.eigh(torch.einsum("tik,tjk->ij", stack, stack))[1].flip(1)[:, :rank]

    U, V = leading(cores), leading(cores.mT)
    held = torch.zeros((), dtype=cores.dtype)
    for _ in range(_MOST_STEPS):
        U = leading(cores @ V)
        V = leading(cores.mT @ U)
        now = (U.T @ cores @ V).square().sum()
        if now - held <= _TOLERANCE * now:
            break
        held = now
    return left @ U, right @ V


def compressed(rule: MergeMethod, updates: Updates, *, rank: int, beta: float) -> Tensor:
    """Return Compress-then-Merge's ΔW of one matrix, float64, of rank r at most."""
    U, V = shared_bases(updates, rank, beta=beta)
    eye = torch.eye(V.shape[1], dtype=V.dtype)
    inside = [LowRank((U.T @ one.left) @ (one.right.T @ V), eye) for one in updates]
    return U @ merged(rule, inside) @ V.T


def cut(update: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank."""
    U, sigma, Vh = torch.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


# What is compared with the merge itself. The second is the control of the third: its length alone.
PICO: Mapping[str, Callable[[MergeMethod, Updates], Tensor]] = {
    "exact": merged,
    "exact, at the mean length": lambda rule, own: at_mean_length(merged(rule, own), own),
    "Pico": lambda rule, own: at_mean_length(merged(rule, calibrated(own)), own),
    "Pico, not rescaled": lambda rule, own: merged(rule, calibrated(own)),
}


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """Return what an adapter adds to each weight, float64: its B with the scale, and its A."""
    config = PeftConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        f"{key.removeprefix('base_model.model.').split('.lora_A.')[0]}.weight": LowRank(
            tensors[key.replace(".lora_A.", ".lora_B.")].double() * config.lora_alpha / config.r,
            tensors[key].double().T,
        )
        for key in tensors
        if ".lora_A." in key
    }


def main(argv: Sequence[str]) -> None:
    """Merge, ask, and print the tables; what was asked is not asked again."""
    text = (__doc__ or "").split("\n\n")[0]
    parser = study_parser("adapters", text, group="small", prompts=1000, seed=2033)
    arguments = parser.parse_args(argv)
    if arguments.group != "small":
        parser.error("only the group small has adapters that are built in.")
    torch.set_num_threads(arguments.threads)
    base = builtin_group()["base"]
    adapters = {t: read_adapter(f) for t, f in zip(TASKS, builtin_adapters().values(), strict=True)}
    updates = {
        name: [adapter[name] for adapter in adapters.values()] for name in adapters[TASKS[0]]
    }
    asker = asker_of(arguments)
    before = load_file(base / _WEIGHTS)
    out = arguments.work / "adapters-merge"

    def ask(way: Callable[[Updates], Tensor], tasks: Sequence[str] | None = None) -> Answers:
        """Return the answers of the base with an update of every matrix."""
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        after = {name: weights.float() for name, weights in before.items()}
        for name, own in updates.items():
            after[name] = (before[name].double() + way(own)).float()
        save_file(after, out / _WEIGHTS, metadata={"format": "pt"})
        return asker.ask(out, tasks or TASKS)

    def add(rows: list[list[str]], name: str, results: Sequence[Answers]) -> None:
        """Add a row: the first result, and how far the others are from it."""
        shares = [f"{_percent(found):.1f}" for found in results]
        gaps = [_points(found, results[0]) for found in results[1:]]
        cells = [f"{share} ({gap})" for share, gap in zip(shares[1:], gaps, strict=True)]
        rows.append([name, shares[0], *cells])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)

    alone = {
        task: ask(lambda own, i=i: own[i].left @ own[i].right.T, (task,))[task]
        for i, task in enumerate(adapters)
    }
    at_start = _percent(asker.ask(base, TASKS))
    print(
        f"Right in percent: base {at_start:.1f}, each adapter on its task {_percent(alone):.1f}\n"
    )
    rules = {name: build_method(name, settings) for name, settings in RULES.items()}
    rows: list[list[str]] = []
    for name, rule in rules.items():
        add(rows, f"`{name}`", [ask(partial(way, rule)) for way in PICO.values()])
    print(table(["merge", *PICO], rows), end="\n\n", flush=True)
    rows = []
    for rank, name in itertools.product(RANKS, COMPRESSED):
        exact = ask(partial(_cut_after, rules[name], rank))
        found = ask(partial(compressed, rules[name], rank=rank, beta=_BETA))
        add(rows, f"{rank}, `{name}`", [exact, found])
    print(table(["rank, merge", "exact, then cut", "Compress-then-Merge"], rows))
    shutil.rmtree(out)


def _cut_after(rule: MergeMethod, rank: int, own: Updates) -> Tensor:
    """Return the library's update of a matrix, cut to a rank."""
    return cut(merged(rule, own), rank)


def _percent(answers: Answers) -> float:
    """Return the share of right answers, the mean over tasks."""
    return 100 * sum(bits.count("1") / len(bits) for bits in answers.values()) / len(answers)


def _points(ours: Answers, theirs: Answers) -> str:
    """Return by how many points the first are more often right, with half of the interval."""
    sides = [[[bit == "1" for bit in bits] for bits in found.values()] for found in (ours, theirs)]
    return points(*paired_difference(*sides))
