"""An adapter as output: which modules it changes, by which rank, in which file. No torch."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import Findings, Remedy, listed
from ..methods.base import is_matrix
from ..roles import Role, role_of
from ..sinks.layout import shard_of
from ..sources.adapter import Adapter
from ..sources.adapter_config import WEIGHTS
from ..sources.adapter_layout import CONV1D
from ..sources.quantised import Unread
from ..specs import FP8, OUTPUT_DTYPES, TensorSpec
from .planned import OutputFactors, Plan, PlannedTensor

_PREFIX = "base_model.model."
_OWN_MODULE = re.compile(r"(?P<module>.+)\.lora_(embedding_)?A(\.default)?(\.weight)?")


def as_adapter(plan: Plan, found: Findings) -> Plan:
    """Return a plan that writes an adapter instead of a whole model.

    Args:
        plan: with the tensors of a whole model.
        found: takes what cannot be an adapter.
    """
    if plan.recipe.tokenizer is not None:
        found.problem(
            "the recipe says which tokens the merge has, but an adapter fits the base's own rows.",
            Remedy.AS_MODEL,
        )
        return plan
    if plan.recipe.dtype == FP8:
        found.problem(
            f"{FP8} is asked for, but an adapter's factors are written in bfloat16, float16 or "
            "float32.",
            Remedy.AS_MODEL,
        )
        return plan
    output = _Output(plan)
    tensors = {}
    for name, tensor in plan.tensors.items():
        factored = output.factored(name, tensor)
        if factored is not None:
            tensors[name] = factored
    output.tell(found)
    unread = [
        name
        for name, tensor in tensors.items()
        if tensor.reads_layout and isinstance(plan.layout.trees[name], Unread)
    ]
    if unread:
        found.problem(
            f"{plan.method.title} needs the base's values of {len(unread)} tensor(s) that are "
            f"packed codes in {plan.layout.id}: {listed(unread, limit=3)}. Take a method whose "
            "update keeps to the adapters' factors, such as head_regression or mean, or give the "
            "original base."
        )
    if not tensors and not found.problems:
        found.problem("no expert changes a matrix of the base, so an adapter would be empty.")
    if found.problems:
        return plan
    modules = [t.factors for t in tensors.values() if t.factors is not None]
    specs = [spec for factors in modules for spec in (factors.down, factors.up)]
    return replace(
        plan,
        tensors=tensors,
        shards=(shard_of(WEIGHTS, specs),),
        config=_config(plan, tensors, fan_in_fan_out=output.is_transposed),
    )


class _Output:
    """Decides for each tensor how an adapter holds its update, and why it cannot."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._most = plan, plan.options.adapter_rank
        self._dtype = OUTPUT_DTYPES[plan.recipe.dtype or "float32"]
        self._whole: dict[str, list[str]] = {}  # reason → tensors that keep an adapter from it
        self._left_out: list[str] = []
        self.is_transposed = False

    def factored(self, name: str, tensor: PlannedTensor) -> PlannedTensor | None:
        """Return the tensor as a module of the adapter; None where it is not changed or held."""
        if tensor.rule is None or tensor.rule.name == "base":
            return None
        ranks = tensor.ranks
        if not any(rank != 0 for rank in ranks):
            return None
        spec = tensor.spec
        if len(spec.shape) != 2 or not name.endswith(".weight"):
            what = "fused experts" if len(spec.shape) == 3 else "vectors and the like"
            self._cannot_hold(f"are {what}, which are not written as factors", name)
            return None
        exact = tensor.is_low_rank
        if not exact and self._most is None:
            self._whole.setdefault(self._why(tensor, ranks), []).append(name)
            return None
        role = role_of(name, spec.shape)
        if None in ranks and not is_matrix(spec, role):
            self._left_out.append(name)  # tables of whole experts: too large, and hardly moved
            return None
        rank = min(sum(rank or 0 for rank in ranks) if exact else self._most or 0, *spec.shape)
        return replace(
            tensor,
            factors=self._factors(name, spec, min(rank, self._most or rank), role),
            reads_layout=not exact,
        )

    def tell(self, found: Findings) -> None:
        """Report what no adapter can hold."""
        for reason, names in self._whole.items():
            found.problem(
                f"{len(names)} tensor(s) {reason}: {listed(names)}.",
                Remedy.AS_MODEL,
                *([Remedy.ADAPTER_RANK] if self._most is None else []),
            )
        if self._left_out:
            found.warning(
                f"an adapter holds linear layers only: {len(self._left_out)} other tensor(s) keep "
                f"the base's values: {listed(self._left_out)}"
            )

    def _cannot_hold(self, reason: str, name: str) -> None:
        if self._most is None:
            self._whole.setdefault(reason, []).append(name)
        else:
            self._left_out.append(name)

    def _why(self, tensor: PlannedTensor, ranks: list[int | None]) -> str:
        if None not in ranks:
            return (
                f"cannot be written as an exact adapter: {tensor.method.title} decides weight by "
                "weight, or moves the base itself"
            )
        culprit = tensor.sources[1 + ranks.index(None)]
        if isinstance(culprit, Adapter):
            return (
                f"are changed by {culprit.id} beyond its factors (DoRA, saved weights or trained "
                "tokens)"
            )
        return f"have no factors in {culprit.id}, which is a whole model"

    def _factors(self, name: str, spec: TensorSpec, rank: int, role: Role) -> OutputFactors:
        module, is_embedding, flipped = self._module(name, role)
        self.is_transposed |= flipped and not is_embedding
        m, n = spec.shape
        ins, outs = (m, n) if flipped else (n, m)
        kind = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
        return OutputFactors(
            rank=rank,
            module=module,
            down=TensorSpec(f"{_PREFIX}{module}.{kind.format('A')}", self._dtype, (rank, ins)),
            up=TensorSpec(f"{_PREFIX}{module}.{kind.format('B')}", self._dtype, (outs, rank)),
            flipped=flipped,
        )

    def _module(self, name: str, role: Role) -> tuple[str, bool, bool]:
        """Return what PEFT calls the module of a weight, and how its factors are stored.

        As an expert has it where one is an adapter: what the model calls the module when it runs
        may differ from what its checkpoint says.
        """
        for expert in self._plan.experts:
            edit = expert.edits.get(name) if isinstance(expert, Adapter) else None
            for term in edit.terms if edit is not None else ():
                keys = (term.left.key, term.right.key)
                found = [match for key in keys if (match := _OWN_MODULE.fullmatch(key))]
                if found and term.is_whole:
                    own = found[0]
                    flipped = own.string == term.left.key
                    return own["module"].removeprefix(_PREFIX), bool(own[2]), flipped
        module = name.removesuffix(".weight")
        if role is Role.EMBEDDING:
            return module, True, True
        conv = self._plan.layout.config.get("model_type") in CONV1D
        return module, False, conv and role is not Role.HEAD


def _config(plan: Plan, tensors: Mapping[str, PlannedTensor], *, fan_in_fan_out: bool) -> bytes:
    """Return ``adapter_config.json`` as PEFT reads it: s = α/r is 1, whatever the module's rank."""
    factors = [tensor.factors for tensor in tensors.values() if tensor.factors is not None]
    # The largest, since vLLM makes room for this rank in every module.
    most = max(one.rank for one in factors)
    others = {one.module: one.rank for one in factors if one.rank != most}
    architecture = str((plan.layout.config.get("architectures") or [""])[0])
    is_causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": _base_name(plan),
        "revision": None if plan.base is None else plan.base.revision,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": _targets(plan, [one.module for one in factors]),
        "rank_pattern": {re.escape(module): rank for module, rank in others.items()},
        "alpha_pattern": {re.escape(module): rank for module, rank in others.items()},
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _targets(plan: Plan, modules: list[str]) -> list[str]:
    """Return how PEFT finds the modules: by their last names where these mean no other module."""
    there = Counter(
        name.removesuffix(".weight").rpartition(".")[2]
        for name, stored in plan.layout.tensors.items()
        if name.endswith(".weight") and len(stored.spec.shape) == 2
    )
    ours = Counter(module.rpartition(".")[2] for module in modules)
    if all(there[leaf] == count for leaf, count in ours.items()):
        return sorted(ours)
    return sorted(modules)


def _base_name(plan: Plan) -> str | None:
    """Return where PEFT finds the base; None where what is published may not say it."""
    base = plan.layout
    if base.revision is None:
        return base.id if plan.publication is None else None
    return base.id if plan.name_private or not (base.is_private or base.gated) else None
