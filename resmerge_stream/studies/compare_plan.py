"""The plan of a comparison: one plan a method, over the same sources, in one memory. No torch."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import Findings, Notice, PlanRefusedError, RecipeError
from ..planning.costs import fit_memory
from ..planning.plan import Options, Plan, RefusedPlan, plan_merge
from ..recipe import Recipe, parse_method
from ..specs import FP8


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison will do. Made by `plan_comparison`, run by `run_comparison`.

    Attributes:
        out: the folder that gets one folder a method, the table and the picture.
        report_only: whether no weights are written.
        plans: the methods' plans by label, which is also the folder's name; their memory is what
            they take together.
    """

    out: Path
    report_only: bool
    plans: Mapping[str, Plan]

    @property
    def first(self) -> Plan:
        """The first method's plan; the sources and shards are the same in all."""
        return next(iter(self.plans.values()))

    @property
    def peak_memory_bytes(self) -> int:
        """What the whole run may take."""
        return self.first.peak_memory_bytes

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
            for source in tensor.sources
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
    update: bool = False,
    token: str | bool | None = None,
) -> Comparison:
    """Plan several merges of the same models as one run.

    Args:
        recipe: the models; its parameters are those of its own method.
        methods: ``NAME`` or ``NAME:KEY=VALUE:…`` each.
        options: as for `plan_merge`.
        out: the output folder.
        report_only: write no weights.
        update, token: as for `plan_merge`.

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
            replace(recipe, method=name, parameters={**own, **given}, chosen_by="option"),
            options,
            out=None if report_only else folder / label,
            like=next(iter(plans.values()), None),
            update=update,
            token=token,
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
    if recipe.dtype == FP8:
        problems.append(
            Notice(
                f"a comparison is not written in {FP8}; compare in bfloat16, and merge the method "
                f"you choose in {FP8}."
            )
        )
    accepted = {label: plan for label, plan in plans.items() if isinstance(plan, Plan)}
    if problems:
        for one in plans.values():
            one.close()
        raise PlanRefusedError.of(problems)
    found = Findings()
    fitted = fit_memory(list(accepted.values()), found)
    if found.problems:
        fitted[0].close()
        raise PlanRefusedError.of(found.problems)
    return Comparison(folder, report_only, dict(zip(accepted, fitted, strict=True)))
