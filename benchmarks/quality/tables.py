"""The tables of docs/quality-small.md, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resmerge_stream.experts.accuracy import Accuracy
from resmerge_stream.experts.tasks import TASKS

from .groups import RL, SFT
from .results import Group, task_of
from .studies import ABLATIONS, BUDGETS, FEW, RANKS, SCALES, SHARES, UNGATED

BASELINE = "task_arithmetic"
_ABLATION_NAMES = {
    "resmerge:ablation=head_only": "head-only mean",
    "resmerge:ablation=residual_only": "residual-only mean",
    "resmerge:ablation=no_head": "SRC-A without head",
    "resmerge:ablation=ungated": "SRC-A with ungated head",
    "resmerge:variant=release-2026-06": "ResMerge, release of June",
    "resmerge:variant=release-2026-07": "ResMerge, release of July",
    "resmerge": "**ResMerge** (paper)",
}


def models(group: Group) -> str:
    """Base and experts on every task."""
    rows = []
    for name in ("base", *RL, *SFT):
        cells = [percent(group.accuracy(name, task)) for task in TASKS]
        own = TASKS.index(task_of(name)) if name != "base" else None
        cells = [f"**{cell}**" if i == own else cell for i, cell in enumerate(cells)]
        rows.append([name, *cells, percent(group.mean(name))])
    return table(["model", *TASKS, "mean"], rows)


def experts(group: Group) -> str:
    """What each expert gained, and what that changed in its weights."""
    spectra = {row["name"]: row for row in group.spectrum}
    rows = []
    for name in (*RL, *SFT):
        row, change = spectra[name], group.log["models"][name]["change"]
        keys = ("head_energy", "stable_rank", "stable_rank_residual")
        values = [
            f"{row[f'{family} {key}']:.2f}" for key in keys for family in ("attention", "ffn")
        ]
        gain = points(*group.own_gain(name))
        rows.append(
            [name, gain, f"{100 * row['changed']:.1f}", f"{change['relative_norm']:.4f}", *values]
        )
    header = ["expert", "own gain, points", "changed weights, %", "‖Δ‖/‖W₀‖"]
    for what in ("head energy", "stable rank", "stable rank of residual"):
        header += [f"{what}, attention", "FFN"]
    return table(header, rows)


def methods(group: Group, output: str = "bf16", prefix: str = "") -> str:
    """Every method on every task, best first, each against the sum of the task vectors."""
    rows = []
    for label in group.labels(output, prefix=prefix):
        method = label.removeprefix(prefix).partition("|")[0]
        if method.partition(":")[0] == "resmerge" and method not in (*_ABLATION_NAMES,):
            continue
        cells = [f"{100 * group.accuracy(label, task).accuracy:.1f}" for task in TASKS]
        gap = group.gap(label, f"{prefix}{BASELINE}|{output}")
        kept = group.retained(label, SFT if prefix.startswith("sft") else RL)
        length = group.facts[label]["relative_norm"]
        rows.append(
            [
                _ABLATION_NAMES.get(method, f"`{method}`"),
                *cells,
                percent(group.mean(label)),
                points(*gap),
                f"{100 * kept:.0f}",
                f"{length:.2f}" if length else "–",
            ]
        )
    header = ["method", *TASKS, "mean", "against the sum", "gain kept, %", "length"]
    return table(header, rows)


def ablations(group: Group, output: str = "bf16") -> str:
    """The structure of ResMerge, each part left out (the paper's Table 2)."""
    chosen = (BASELINE, *ABLATIONS[:3], ABLATIONS[3], "resmerge")
    rows = []
    for method in chosen:
        label = f"{method}|{output}"
        cells = [f"{100 * group.accuracy(label, task).accuracy:.1f}" for task in TASKS]
        gap = points(*group.gap(label, f"{BASELINE}|{output}"))
        name = _ABLATION_NAMES.get(method, f"`{method}`")
        rows.append([name, *cells, percent(group.mean(label)), gap])
    return table(["method", *TASKS, "mean", "against the sum"], rows)


def outputs(group: Group) -> str:
    """Mean accuracy of every method by how its result was stored."""
    rows = []
    for label in group.labels("bf16"):
        method = label.partition("|")[0]
        if f"{method}|stochastic" not in group.answers:
            continue
        facts = group.facts[label]
        gap = points(*group.gap(f"{method}|float32", label))
        rows.append(
            [
                _ABLATION_NAMES.get(method, f"`{method}`"),
                *(percent(group.mean(f"{method}|{kind}")) for kind in OUTPUT_NAMES),
                gap,
                number(facts["kept_norm"]),
                number(facts["kept_cosine"]),
            ]
        )
    header = ["method", *OUTPUT_NAMES.values(), "float32 − nearest", "kept norm", "kept cosine"]
    return table(header, rows)


OUTPUT_NAMES = {"bf16": "bf16, nearest", "stochastic": "bf16, stochastic", "float32": "float32"}


def components(group: Group) -> str:
    """How much of an expert's own gain its head and its residual have alone."""
    rows = []
    for name in (*RL, *SFT):
        task = task_of(name)
        row = [name, *(f"{100 * group.accuracy(m, task).accuracy:.1f}" for m in ("base", name))]
        for output in ("float32", "bf16"):
            for part in ("head", "residual"):
                label = f"{name}:{part}|{output}"
                if label not in group.answers:
                    row.append("–")
                    continue
                share = group.accuracy(label, task).accuracy
                row.append(f"{100 * share:.1f} ({100 * recovered(group, name, label):.0f} %)")
        rows.append(row)
    header = ["expert", "base", "expert", "head alone", "residual alone"]
    return table([*header, "head alone, bf16", "residual alone, bf16"], rows)


def recovered(group: Group, expert: str, label: str) -> float:
    """Return the share of an expert's own gain that one of its components has; 1 is all."""
    return group.gap(label, "base", (task_of(expert),))[0] / group.own_gain(expert)[0]


def knobs(group: Group) -> str:
    """The rank k of the head and the budget ρ of its correction."""
    rows = []
    for what, chosen in (("rank", RANKS), ("rho", BUDGETS), ("rho, ungated", UNGATED)):
        for method in chosen:
            label = f"{method}|float32"
            gap = points(*group.gap(label, "resmerge|float32"))
            rows.append([what, method.rpartition("=")[2], percent(group.mean(label)), gap])
    return table(["what", "value", "mean", "against k = 1, ρ = 0.2"], rows)


def scales(group: Group) -> str:
    """The sum of the task vectors at several lengths, beside ResMerge."""
    chosen = [f"{method}|float32" for method in SCALES]
    rows = [_scale_row(group, label, label.partition("|")[0]) for label in chosen]
    rows.append(_scale_row(group, "resmerge|float32", "**ResMerge**"))
    rows.append(_scale_row(group, "same-length|float32", "the sum at ResMerge's length"))
    return table(["update", "length", "mean", "against ResMerge"], rows)


def _scale_row(group: Group, label: str, name: str) -> list[str]:
    gap = points(*group.gap(label, "resmerge|float32"))
    name = name.replace("task_arithmetic:lambda=", "the sum × ")
    return [name, number(group.facts[label]["relative_norm"]), percent(group.mean(label)), gap]


def subsets(group: Group) -> str:
    """How much of the gains is kept by number of experts: the mean over all choices of them."""
    import itertools

    rows = []
    for count in (2, 3, 4):
        kept: dict[str, list[float]] = {method: [] for method in FEW}
        for tasks in itertools.combinations(TASKS, count):
            prefix = "" if count == len(TASKS) else "+".join(tasks) + ":"
            for method in FEW:
                names = [f"rl-{task}" for task in tasks]
                kept[method].append(group.retained(f"{prefix}{method}|float32", names))
        cells = [f"{100 * sum(values) / len(values):.0f}" for values in kept.values()]
        rows.append([str(count), *cells])
    return table(["experts", *(f"`{method}`" for method in FEW)], rows)


def sparsity(group: Group) -> str:
    """Experts that keep their largest changes only, and how merges of them do."""
    rows = []
    for share in (1, *SHARES):
        prefix = "" if share == 1 else f"top-{share:g}:"
        alone = [group.gap(f"{prefix}{name}", "base", (task_of(name),))[0] for name in RL]
        full = [group.own_gain(name)[0] for name in RL]
        cells = [percent(group.mean(f"{prefix}{method}|float32")) for method in FEW]
        name = "all" if share == 1 else f"largest {100 * share:g} %"
        rows.append([name, f"{100 * sum(alone) / sum(full):.0f}", *cells])
    header = ["changes", "gain kept by the experts alone, %", *(f"`{m}`" for m in FEW)]
    return table(header, rows)


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        models, experts, methods, ablations, outputs, components, knobs, scales, subsets, sparsity
    )
}  # fmt: skip


def percent(result: Accuracy) -> str:
    """Return an accuracy in percent with half of its 95 % interval."""
    return f"{100 * result.accuracy:.1f} ± {50 * (result.high - result.low):.1f}"


def points(difference: float, half: float) -> str:
    """Return a difference of accuracies in points with half of its 95 % interval."""
    return f"{100 * difference:+.1f} ± {100 * half:.1f}"


def number(value: float | None) -> str:
    """Return a number with two digits, or a dash for none."""
    return "–" if value is None else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
