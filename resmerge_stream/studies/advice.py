"""Which methods to compare for a group of experts, and on what evidence.

The evidence is the tables of docs/quality.md and docs/quality-small.md, kept beside this file as
data: how far each method's merge was from the best one, by the kind of group that its weights show.
Where the tables have no group of a kind, there is no advice.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..device import choose_device
from ..planning.plan import Plan
from ..run.difference import refuse_unrelated
from ..run.merging import Merger
from ..run.pieces import Piece
from ..specs import DTYPES
from .regime import KINDS, Pairs, Regime, sampled

# How many methods are named at most, and how far the third may be behind the first, in points.
_NAMED, _BEHIND = 3, 2.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method worth comparing.

    Attributes:
        method: as ``compare`` names it.
        points: how far its merges were from the best one of each case, the mean, 0 or less.
        worst: the same in the case where it was worst.
    """

    method: str
    points: float
    worst: float


@dataclass(frozen=True, slots=True)
class Advice:
    """What to compare, and why.

    Attributes:
        candidates: two or three, best first; none where there is no evidence.
        cases: how many groups of experts of this kind the evidence has.
        prompts: held-out prompts that were asked of each model and task.
        reason: one sentence.
    """

    candidates: tuple[Candidate, ...]
    cases: int
    prompts: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def evidence() -> dict[str, Any]:
    """Return the measured cases; see `benchmarks/quality/regimes.py`, which writes them."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("evidence.json").read_text("utf-8"))
    return found


def advise(regime: Regime, known: Mapping[str, Any] | None = None) -> Advice:
    """Return which methods to compare for such experts.

    Args:
        regime: what their weights say.
        known: the evidence; what is bundled when None.
    """
    known = evidence() if known is None else known
    count = sum(length > 0 for length in regime.lengths)
    same = [case for case in known["cases"] if case["kind"] == regime.kind]
    # Two experts leave each other more room than four: prefer groups of the same size.
    same = [case for case in same if (case["experts"] == 2) == (count == 2)] or same
    words, prompts = KINDS[regime.kind], min((case["prompts"] for case in same), default=0)
    if not same:
        reason = f"{words}. docs/quality.md has measured no such group, so nothing is advised."
        return Advice((), 0, prompts, reason)
    ranked = sorted(_candidates(same), key=lambda found: -found.points)
    near = [found for found in ranked if ranked[0].points - found.points <= _BEHIND]
    chosen = tuple(ranked[: min(max(len(near), 2), _NAMED)])
    groups = f"{len(same)} group{'s' * (len(same) != 1)} of this kind"
    reason = (
        f"{words}. Measured in {groups}, {_sizes(same)}, {prompts} prompts a task or more. "
        "Compare them on your own tasks."
    )
    return Advice(chosen, len(same), prompts, reason)


def _sizes(cases: Sequence[Mapping[str, Any]]) -> str:
    """Say how large the models were that the evidence is of."""
    real = [case["model"] for case in cases if case["model"]]
    small = "made of small experts (1 million weights)"
    if not real:
        return small
    models = f"{len(real)} of them {' and '.join(sorted(set(real)))}'s"
    return models if len(real) == len(cases) else f"{models}, the others {small}"


def _candidates(cases: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    methods = set.intersection(*(set(case["points"]) for case in cases))
    found = []
    for method in sorted(methods):
        behind = [case["points"][method][0] for case in cases]
        found.append(Candidate(method, math.fsum(behind) / len(behind), min(behind)))
    return found


def read_regime(plan: Plan, share: float = 1.0) -> Iterator[tuple[str, int, Regime | None]]:
    """Read experts tensor by tensor, without any decomposition.

    Args:
        plan: whose experts are read.
        share: of the layers that are read.

    Yields:
        Tensor, bytes read so far and None; at the end "", all bytes and the regime.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        PlanRefusedError: an expert was not trained from the base.

    Memory: as a merge by ``mean``, a few row blocks beside the stored bytes.
    """
    tensors = [tensor for tensor in plan.tensors.values() if tensor.rule]
    chosen = sampled(tensors, share)
    merger = Merger(plan, choose_device(plan.options.device))
    refuse_unrelated(plan, merger, tensors)
    total, nbytes = Pairs(len(plan.experts)), 0
    measured = merger.each(chosen, lambda piece: pairs_of(merger, piece, len(plan.experts)))
    with contextlib.closing(measured):
        for piece, pairs in filter(None, measured):
            total.absorb(pairs)
            nbytes += piece.nbytes
            if piece.is_last:
                yield piece.tensor.spec.name, nbytes, None
    weights = sum(math.prod(tensor.spec.shape) for tensor in tensors)
    yield "", nbytes, total.regime(total.numel / max(weights, 1))


def pairs_of(merger: Merger, piece: Piece, count: int) -> Pairs:
    """Return the sums of one piece of a plan of `count` experts."""
    found = Pairs(count)
    with merger.naming(piece.tensor):
        _, vectors = merger.open(piece)
        dtype = DTYPES[piece.tensor.spec.dtype].torch_name
        for block in vectors.blocks():
            base, stack = vectors.base(block), vectors.stack(block)
            found.add_block(base, stack, piece.tensor.experts, dtype)
            piece.release(block)
        found.add_gram(vectors.gram(), piece.tensor.experts)
        vectors.close()
    return found
