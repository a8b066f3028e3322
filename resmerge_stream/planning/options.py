"""How to run a merge; the recipe says what to merge."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..device import DEVICE
from ..errors import RecipeError, shown

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run a merge; the recipe says what to merge.

    Attributes:
        rounding: ``nearest`` or ``stochastic``.
        seed: of stochastic rounding and of methods that draw random numbers.
        max_shard_bytes: None mirrors the base's shards, cut at 5 GB.
        tokenizer_from: where tokenizer files come from instead of the base.
        device: as ``--device``; not part of what makes a run the same run.
        memory_budget: bytes of private memory on this machine, likewise; processes of one run
            share it. None keeps to what the largest matrix calls for, and to 80 % of what is free.
        max_header_bytes: of indexes and headers that are read of one repository, where those who
            name it are not trusted; None leaves it at the format's limit for each file.
    """

    rounding: str = "nearest"
    seed: int = 0
    max_shard_bytes: int | None = None
    tokenizer_from: str | None = None
    device: str = "auto"
    memory_budget: int | None = None
    max_header_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise RecipeError(
                f"rounding must be nearest or stochastic, not {self.rounding!r}.", field="rounding"
            )
        if not DEVICE.fullmatch(self.device):
            raise RecipeError(
                f"the device must be auto, cpu, cuda, cuda:N or mps, not {shown(self.device)}.",
                field="device",
            )
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise RecipeError(
                "a shard's size must be more than zero, such as 5GB.", field="max_shard_size"
            )
