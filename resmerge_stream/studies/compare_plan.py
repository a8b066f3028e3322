"""The plan of a comparison: one plan a method, over the same sources, in one memory. No torch."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import Notice, PlanRefusedError, RecipeError, Remedy
from ..memory import SPARE_BYTES, block_bytes, matrix_bytes
from ..planning.plan import Options, Plan, RefusedPlan, plan_merge
from ..recipe import Recipe, parse_method
from ..units import format_size


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison will do. Made by `plan_comparison`, run by `run_comparison`.

    Attributes:
        out: the folder that gets one folder a method, the table and the picture.
        report_only: whether no weights are written.
        plans: the methods' plans by label, which is also the folder's name.
        working_bytes: of matrices that may be in work at once.
        peak_memory_bytes: what the whole run may take.
    """

    out: Path
    report_only: bool
    plans: Mapping[str, Plan]
    working_bytes: int = 0
    peak_memory_bytes: int = 0
    resident: bool = True

    @property
    def first(self) -> Plan:
        """The first method's plan; the sources and shards are the same in all."""
        return next(iter(self.plans.values()))

    def working_bytes_of(self, name: str) -> int:
        """Return bytes held while a tensor is in work: its task vectors, every method's scratch."""
        return _working_bytes(self.plans.values(), name, resident=self.resident)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data; sizes are those of the whole run."""
        plans = {label: plan.to_dict() for label, plan in self.plans.items()}
        shards = [
            {**shard, "name": f"{label}/{shard['name']}"}
            for label, plan in plans.items()
            for shard in plan["shards"]
        ]
        passes = max(plan.method.counting_passes() for plan in self.plans.values())
        stored = sum(
            source.read_cost(name)
            for name, tensor in self.first.tensors.items()
            for source in self.first.sources_of(tensor)
        )
        return {
            "refused": False,
            "problems": [],
            "warnings": list(self.first.warnings),
            "methods": {label: plan["by_rule"] for label, plan in plans.items()},
            "shards": shards,
            "read_bytes": stored * (1 + passes),
            "write_bytes": 0 if self.report_only else sum(p["write_bytes"] for p in plans.values()),
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def close(self) -> None:
        """Close every source."""
        for plan in self.plans.values():
            plan.close()


def plan_comparison(
    recipe: Recipe,
    methods: Sequence[str],
    options: Options | None = None,
    *,
    out: str | Path,
    report_only: bool = False,
) -> Comparison:
    """Plan several merges of the same models as one run.

    Args:
        recipe: the models; its parameters are those of its own method.
        methods: ``NAME`` or ``NAME:KEY=VALUE:…`` each.
        options: as for `plan_merge`.
        out: the output folder.
        report_only: write no weights.

    Raises:
        RecipeError: no method, one named twice, or not of this form.
        PlanRefusedError: a method's plan has problems, or all together need too much memory.
    """
    folder = Path(os.path.expanduser(out))
    plans: dict[str, Plan | RefusedPlan] = {}
    for text in methods:
        label = re.sub(r"[^\w.=+-]+", "-", text.strip())
        if label in plans:
            raise RecipeError(f"{text!r} is named twice.", field="methods")
        name, given = parse_method(text)
        own = dict(recipe.parameters) if name == recipe.method else {}
        plan = plan_merge(
            replace(recipe, method=name, parameters={**own, **given}),
            options,
            out=None if report_only else folder / label,
            like=next(iter(plans.values()), None),
        )
        plans[label] = plan
    if not plans:
        raise RecipeError(
            "there is no method to compare. Name some, such as resmerge,ties,tsv_m.",
            field="methods",
        )
    problems = [one.prefixed(label) for label, plan in plans.items() for one in plan.problems]
    if options is not None and options.output != "model":
        problems.append(
            Notice("a comparison writes whole models; merge the method you choose as an adapter.")
        )
    accepted = {label: plan for label, plan in plans.items() if isinstance(plan, Plan)}
    if problems:
        for one in plans.values():
            one.close()
        raise PlanRefusedError.of(problems)
    return _fitted(Comparison(folder, report_only, accepted))


def _fitted(comparison: Comparison) -> Comparison:
    """Choose whether float32 copies of all experts are kept; refuse what cannot fit."""
    first = comparison.first
    fixed = first.peak_memory_bytes - first.working_bytes
    room = first.memory_budget - fixed
    plans, worst, resident = comparison.plans, (0, ""), True
    for resident in (True, False):
        sizes = {n: _working_bytes(plans.values(), n, resident=resident) for n in first.tensors}
        worst = max((size, name) for name, size in sizes.items())
        if worst[0] <= room:
            break
    if worst[0] > room:
        comparison.close()
        raise PlanRefusedError(
            f"comparing {len(plans)} methods on {worst[1]} needs "
            f"{format_size(fixed + worst[0])} of memory, but the budget is "
            f"{format_size(first.memory_budget)}. Compare fewer SVD methods at once.",
            Remedy.MORE_MEMORY,
            needed=f"{-(-(fixed + worst[0]) // 1_000_000)}MB",
        )
    # While the largest tensor is written the next ones are decided, where the budget has room.
    working = max(worst[0], min(room, SPARE_BYTES + 2 * worst[0]))
    return replace(
        comparison,
        plans={label: _with_memory(plan, working, resident) for label, plan in plans.items()},
        working_bytes=working,
        peak_memory_bytes=fixed + working,
        resident=resident,
    )


def _with_memory(plan: Plan, working: int, resident: bool) -> Plan:
    tensors = {name: replace(one, resident=resident) for name, one in plan.tensors.items()}
    return replace(plan, tensors=tensors, working_bytes=working)


def _working_bytes(plans: Collection[Plan], name: str, *, resident: bool) -> int:
    by_rows, scratch, matrix = 0, 0, (0, 0, 0)
    for plan in plans:
        tensor = plan.tensors[name]
        if tensor.rule is None or not tensor.rule.needs_matrix:
            by_rows = max(by_rows, plan.working_bytes_of(tensor))
            continue
        matrix = (*tensor.matrix, len(tensor.experts))
        scratch += tensor.method.scratch_bytes(*matrix)
    m, n, experts = matrix
    block = block_bytes(experts + len(plans), m, n)
    return max(by_rows, block + matrix_bytes(*matrix, scratch, resident=resident))
