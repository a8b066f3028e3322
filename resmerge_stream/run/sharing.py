"""Reading once for several plans over the same sources: the coarsest cut serves all of them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ..planning.plan import Plan, PlannedTensor
from .pieces import Piece

Reads = Callable[[Plan, list[PlannedTensor]], Iterator[tuple[int, Callable[[], Piece]]]]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Shared(Generic[K]):
    """A piece that was read once, as each plan sees it.

    Attributes:
        lead: the plan whose cut it is.
        pieces: the piece by plan, with that plan's rule.
    """

    lead: K
    pieces: Mapping[K, Piece]

    @property
    def lead_piece(self) -> Piece:
        """The piece as the leading plan sees it."""
        return self.pieces[self.lead]

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        return self.lead_piece.nbytes

    def close(self) -> None:
        """Let the bytes go."""
        self.lead_piece.close()


def shared_reads(
    plans: Mapping[K, Plan], names: Sequence[str], reads: Reads
) -> Iterator[tuple[int, Callable[[], Shared[K]]]]:
    """Yield what to read, in order: bytes and a function that reads them.

    A tensor of which not all plans merge the same experts is read once for each choice.
    Stacks [E, m, n] and fused matrices are read one by one for the methods that decompose them and
    once more for those that do not; everything else is read once.
    """
    for members, lead, tensor in _led(plans, names):
        for size, read in reads(plans[lead], [tensor]):

            def load(
                members: Mapping[K, Plan] = members,
                lead: K = lead,
                read: Callable[[], Piece] = read,
                name: str = tensor.spec.name,
            ) -> Shared[K]:
                piece = read()
                pieces = {
                    key: replace(piece, tensor=plan.tensors[name]) for key, plan in members.items()
                }
                return Shared(lead, pieces)

            yield size, load


def shared_order(plans: Mapping[K, Plan], names: Iterable[str]) -> Iterator[PlannedTensor]:
    """Yield the tensors whose cut `shared_reads` follows, in its order."""
    return (tensor for _, _, tensor in _led(plans, names))


def _led(
    plans: Mapping[K, Plan], names: Iterable[str]
) -> Iterator[tuple[dict[K, Plan], K, PlannedTensor]]:
    """Yield plans that share a reading of a tensor, whose cut it is, and the tensor there."""
    for name in names:
        for members in _groups(plans, name):
            lead = max(members, key=lambda key: _coarseness(members[key].tensors[name]))
            yield members, lead, members[lead].tensors[name]


def _groups(plans: Mapping[K, Plan], name: str) -> list[dict[K, Plan]]:
    """Return the plans that can share task vectors of a tensor."""
    groups: dict[Hashable, dict[K, Plan]] = {}
    for key, plan in plans.items():
        tensor = plan.tensors[name]
        groups.setdefault((tensor.is_stack, tensor.fused, tensor.experts), {})[key] = plan
    return list(groups.values())


def _coarseness(tensor: PlannedTensor) -> int:
    rule = tensor.rule
    if rule is None:
        return 0
    return 2 if rule.needs_matrix else int(not rule.in_pieces)
