"""One tensor from stored bytes to stored bytes: task vectors, the method, the cast, the row."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError
from .methods import Rule, Site, Update
from .methods.base import MergeMethod
from .plan import Plan, PlannedTensor
from .report import combine_slices, tensor_entry
from .rounding import Kept, block_seed, cast
from .specs import DTYPES, TensorSpec
from .task_vectors import NonFiniteValues, TaskVectors, Workspace, as_tensor


@dataclass(frozen=True, slots=True)
class Output:
    """Where merged bytes go.

    Attributes:
        write: takes the next bytes of the file.
        sample: called when much memory is in use.
    """

    write: Callable[[memoryview], None]
    sample: Callable[[], None]


@dataclass(slots=True)
class _Tensor:
    """What is known of a tensor while its pieces come."""

    kept: Kept
    gates: list[dict[str, Any]]
    rules: list[str]
    warnings: list[str]


class Merger:
    """Merges the tensors of a plan, one piece at a time, in file order.

    Args:
        plan: without problems.
        device: where the arithmetic happens.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.device = device
        self._plan = plan
        self._method: MergeMethod = plan.opened[1]
        self._workspace = Workspace(device)
        self._seed = plan.options.seed
        self._state: _Tensor | None = None

    def merge(
        self,
        tensor: PlannedTensor,
        start_row: int,
        stop_row: int,
        buffers: list[memoryview],
        output: Output,
        *,
        last: bool,
    ) -> dict[str, Any] | None:
        """Merge rows of a tensor and write them; return its report row after the last ones.

        Args:
            tensor: as planned.
            start_row, stop_row: which rows the buffers hold.
            buffers: the stored bytes of the base, then of each expert.
            output: where the merged bytes go.
            last: whether these are the tensor's last rows.

        Raises:
            NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        """
        spec, rule = tensor.spec, tensor.rule
        if rule is None:
            output.write(buffers[0])
            return self._carried(spec) if last else None
        if self._state is None:
            self._state = _Tensor(Kept(), [], [], [])
        names = [source.tensors[spec.name].spec.dtype for source in self._plan.checkpoints]
        for base_row, shape, part in _matrices(spec, rule, start_row, stop_row):
            raw = [
                as_tensor(buffer, dtype, shape)
                if part is None
                else _slice(buffer, dtype, shape, part)
                for buffer, dtype in zip(buffers, names, strict=True)
            ]
            try:
                self._merge_matrix(tensor, rule, raw, base_row, output)
            except NonFiniteValues as exc:
                raise self._non_finite(spec, exc.source) from exc
        if not last:
            return None
        state, self._state = self._state, None
        return _entry(spec, rule, state)

    def _merge_matrix(
        self, tensor: PlannedTensor, rule: Rule, raw: list[Tensor], base_row: int, output: Output
    ) -> None:
        spec = tensor.spec
        resident = rule.needs_matrix and tensor.resident
        vectors = TaskVectors(raw[0], raw[1:], self._workspace, resident=resident)
        if rule.needs_matrix and vectors.is_zero():
            update = Update(lambda block, stack: torch.zeros_like(stack[0]), "copy")
        else:
            site = Site(rule, self._plan.weights, block_seed(self._seed, spec.name, -1))
            update = self._method.merge(vectors, site)
        output.sample()
        self._write(spec, vectors, update, raw[0], base_row, output)
        state = self._state_of()
        state.rules.append("copy" if vectors.is_zero() else update.rule)
        state.warnings += [text for text in update.warnings if text not in state.warnings]
        if update.gates:
            state.gates.append(dict(update.gates))

    def _write(
        self,
        spec: TensorSpec,
        vectors: TaskVectors,
        update: Update,
        base_raw: Tensor,
        base_row: int,
        output: Output,
    ) -> None:
        dtype = getattr(torch, DTYPES[spec.dtype].torch_name)
        kept = self._state_of().kept
        stochastic = self._plan.options.rounding == "stochastic"
        for number, rows in enumerate(vectors.blocks()):
            stack = vectors.stack(rows)
            base = vectors.base(rows)
            delta = update.rows(rows, stack)
            if vectors.is_zero(rows):
                merged = base_raw[rows].to(dtype)  # the base's own bits, signed zeros included
            else:
                seed = (
                    block_seed(self._seed, spec.name, base_row + rows.start) if stochastic else None
                )
                merged = cast(base + delta, dtype, seed=seed)
            kept.add(delta, merged.to(base.device, torch.float32) - base)
            if kept.overflowed:
                raise NonFiniteError(
                    f"{spec.name} overflows {DTYPES[spec.dtype].torch_name} after the merge. "
                    "Give --dtype bfloat16 or float32, or smaller parameters."
                )
            output.write(_bytes_of(merged))
            if number == 0:
                output.sample()

    def _state_of(self) -> _Tensor:
        if self._state is None:
            raise RuntimeError("no tensor is being merged")
        return self._state

    def _carried(self, spec: TensorSpec) -> dict[str, Any]:
        role = self._method.rule_for(spec, len(self._plan.experts)).role.value
        return tensor_entry(
            name=spec.name, role=role, shape=list(spec.shape), rule="carried", changed_fraction=0.0
        )

    def _non_finite(self, spec: TensorSpec, source: int) -> NonFiniteError:
        checkpoint = list(self._plan.checkpoints)[source + 1]
        return NonFiniteError(
            f"{spec.name} of {checkpoint.id} holds NaN or infinite values (or differences too "
            "large for float32). A merge would spread them; repair or replace that checkpoint."
        )


def _matrices(
    spec: TensorSpec, rule: Rule, start_row: int, stop_row: int
) -> list[tuple[int, tuple[int, int], int | None]]:
    """Return (first row for seeds, shape, slice number or None) of each matrix to merge."""
    if rule.needs_matrix and len(spec.shape) == 3:
        count, m, n = spec.shape
        return [(e * m, (m, n), e) for e in range(count)]
    _, n = spec.matrix_shape
    return [(start_row, (stop_row - start_row, n), None)]


def _slice(buffer: memoryview, dtype: str, shape: tuple[int, int], part: int) -> Tensor:
    size = shape[0] * shape[1] * DTYPES[dtype].nbytes
    return as_tensor(buffer[part * size : (part + 1) * size], dtype, shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs lack Buffer on 3.11


def _entry(spec: TensorSpec, rule: Rule, state: _Tensor) -> dict[str, Any]:
    kept = state.kept
    gates: dict[str, Any] = {}
    if len(state.gates) == 1 and len(state.rules) == 1:
        gates = state.gates[0]
    elif state.gates:
        gates = combine_slices(state.gates)
    applied = [name for name in state.rules if name != "copy"]
    return tensor_entry(
        **gates,
        name=spec.name,
        role=rule.role.value,
        shape=list(spec.shape),
        rule=Counter(applied).most_common(1)[0][0] if applied else "copy",
        update_norm=kept.update_norm,
        kept_norm=kept.kept_norm,
        kept_cosine=kept.kept_cosine,
        changed_fraction=kept.changed_fraction,
        warnings=state.warnings,
    )
