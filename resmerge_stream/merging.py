"""One tensor from stored bytes to stored bytes: task vectors, the method, the cast, the row."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
            return self.carried(spec) if last else None
        for base_row, raw in matrices(self._plan, spec, rule, start_row, stop_row, buffers):
            try:
                resident = rule.needs_matrix and tensor.resident
                vectors = TaskVectors(raw[0], raw[1:], self._workspace, resident=resident)
                self.merge_matrix(tensor, rule, vectors, raw[0], base_row, output)
            except NonFiniteValues as exc:
                raise self.non_finite(spec, exc.source) from exc
        return self.entry(tensor, rule) if last else None

    def merge_matrix(
        self,
        tensor: PlannedTensor,
        rule: Rule,
        vectors: TaskVectors,
        base_raw: Tensor,
        base_row: int,
        output: Output,
    ) -> None:
        """Merge and write one matrix, or some rows of one.

        Args:
            tensor: as planned.
            rule: its rule, which is not None.
            vectors: the task vectors, shared by all methods of a comparison.
            base_raw: the base's rows as stored.
            base_row: which row of the tensor is their first.
            output: where the merged bytes go.

        Raises:
            NonFiniteValues: some task vector is not finite.
            NonFiniteError: the output dtype overflows.
        """
        spec = tensor.spec
        if self._state is None:
            self._state = _Tensor(Kept(), [], [], [])
        if rule.needs_matrix and vectors.is_zero():
            update = Update(lambda block, stack: torch.zeros_like(stack[0]), "copy")
        else:
            update = self._method.merge(vectors, self.site(tensor, rule, base_row))
        output.sample()
        self._write(spec, vectors, update, base_raw, base_row, output)
        state = self._state_of()
        state.rules.append("copy" if vectors.is_zero() else update.rule)
        state.warnings += [text for text in update.warnings if text not in state.warnings]
        if update.gates:
            state.gates.append(dict(update.gates))

    def site(self, tensor: PlannedTensor, rule: Rule, base_row: int) -> Site:
        """Return where rows of a tensor are, as its method sees it."""
        return site_of(self._plan, tensor.spec, rule, base_row)

    def entry(self, tensor: PlannedTensor, rule: Rule) -> dict[str, Any]:
        """Return the row of the report of the tensor that was merged last, and forget it."""
        state, self._state = self._state_of(), None
        return _entry(tensor.spec, rule, state)

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

    def carried(self, spec: TensorSpec) -> dict[str, Any]:
        """Return the row of the report of a tensor that is not merged."""
        role = self._method.rule_for(spec, len(self._plan.experts)).role.value
        return tensor_entry(
            name=spec.name, role=role, shape=list(spec.shape), rule="carried", changed_fraction=0.0
        )

    def non_finite(self, spec: TensorSpec, source: int) -> NonFiniteError:
        """Return the error that names a tensor and its checkpoint (−1: the base)."""
        checkpoint = list(self._plan.checkpoints)[source + 1]
        return NonFiniteError(
            f"{spec.name} of {checkpoint.id} holds NaN or infinite values (or differences too "
            "large for float32). A merge would spread them; repair or replace that checkpoint."
        )


def site_of(plan: Plan, spec: TensorSpec, rule: Rule, base_row: int) -> Site:
    """Return where rows of a tensor are, as a method sees it."""
    return Site(
        rule,
        plan.weights,
        block_seed(plan.options.seed, spec.name, -1),
        spec=spec,
        start_row=base_row,
        layers=plan.layers,
        counted=plan.counted,
    )


def matrices(
    plan: Plan,
    spec: TensorSpec,
    rule: Rule,
    start_row: int,
    stop_row: int,
    buffers: Sequence[memoryview],
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each matrix to merge: its first row, and the stored tensors of base and experts.

    A stack [E, m, n] that is decomposed comes slice by slice, everything else as one.
    """
    dtypes = [source.tensors[spec.name].spec.dtype for source in plan.checkpoints]
    stored = list(zip(buffers, dtypes, strict=True))
    if rule.needs_matrix and len(spec.shape) == 3:
        count, m, n = spec.shape
        for e in range(count):
            yield e * m, [_slice(buffer, dtype, (m, n), e) for buffer, dtype in stored]
    else:
        shape = (stop_row - start_row, spec.matrix_shape[1])
        yield start_row, [as_tensor(buffer, dtype, shape) for buffer, dtype in stored]


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
