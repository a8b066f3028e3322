"""Which of the Hub's machines an evaluation fits, and how long it takes there. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from ..hub.flavors import Flavor
from ..planning.costs import SHARE
from ..planning.machines import Speed
from ..specs import TensorSpec
from ..units import format_size
from .tasks import BATCH, NEW_TOKENS, Questions, Task

# Assumed, never measured on the Hub. A step of decoding reads the weights once: an L4's memory
# gives 300 GB/s, which is the least of the GPUs here; what a step takes beside that; a core.
_GPU_RATE, _STEP_SECONDS, _CORE_FLOPS = 300e9, 0.05, 5e9
_GB = 1_000_000_000
# The T4 emulates bf16, slowly.
_NO_BF16 = "t4-"


@dataclass(frozen=True, slots=True)
class EvaluationCost:
    """What models and their questions take of a machine; the models come one after another.

    Attributes:
        numel: elements of the largest model.
        gpu_bytes: of the largest model on a GPU: 2 an element, or as stored where that is more.
        stored_bytes: of all models, as they are downloaded.
        count: how many models.
        steps: tokens that one model makes, a batch at a time.
        device: as ``--device``; ``auto`` asks for a GPU.
        taken_bytes: of the disk, by what runs before in the same Job.
    """

    numel: int
    gpu_bytes: int
    stored_bytes: int
    count: int
    steps: int
    device: str = "auto"
    taken_bytes: int = 0

    @classmethod
    def of(
        cls,
        models: Sequence[Iterable[TensorSpec]],
        tasks: Sequence[Task],
        limit: int,
        device: str = "auto",
        taken_bytes: int = 0,
    ) -> Self:
        """Return what it takes to ask models tasks.

        Args:
            models: the tensors of each.
            tasks: from `find_task`.
            limit: questions a task of the harness; each is taken for 256 tokens of answer.
            device: as ``--device``.
            taken_bytes: of the disk, by what runs before.
        """
        listed = [list(specs) for specs in models]
        numels = [[math.prod(spec.shape) for spec in specs] for specs in listed]
        on_gpu = [
            sum(max(2 * n, spec.nbytes) for n, spec in zip(counts, specs, strict=True))
            for counts, specs in zip(numels, listed, strict=True)
        ]
        return cls(
            numel=max(map(sum, numels)),
            gpu_bytes=max(on_gpu),
            stored_bytes=sum(spec.nbytes for specs in listed for spec in specs),
            count=len(listed),
            steps=sum(
                math.ceil(len(task.prompts) / BATCH) * task.new_tokens
                if isinstance(task, Questions)
                else math.ceil(limit / BATCH) * NEW_TOKENS
                for task in tasks
            ),
            device=device,
            taken_bytes=taken_bytes,
        )

    def seconds(self, flavor: Flavor, speed: Speed) -> float:
        """Return how long it would take on a machine of a speed, once it has begun."""
        if self._on_cpu:
            step = 2 * self.numel * BATCH / (flavor.vcpu * _CORE_FLOPS)
        else:
            step = self.gpu_bytes / _GPU_RATE
        return self.stored_bytes / speed.line + self.count * self.steps * (step + _STEP_SECONDS)

    def shortage(self, flavor: Flavor) -> str:
        """Return what a machine lacks for it, or an empty string."""
        kind = self.device.partition(":")[0]
        if kind == "mps" or not (self._on_cpu or flavor.gpu_gb):
            return f"it has no {'device of the kind mps' if kind == 'mps' else 'GPU'}"
        if not self._on_cpu and flavor.name.startswith(_NO_BF16):
            return "its GPU does not support bf16"
        # One GPU holds the whole model: it is not spread over several.
        gpu_gb = flavor.gpu_gb / flavor.gpus
        if not self._on_cpu and self.gpu_bytes > gpu_gb * _GB * SHARE:
            return (
                f"the largest model takes {format_size(self.gpu_bytes)} on a GPU, and "
                f"{format_size(int(gpu_gb * _GB * SHARE))} of {gpu_gb:g} GB may be weights"
            )
        machine, needed = flavor.machine, 4 * self.numel if self._on_cpu else self.gpu_bytes
        if needed > machine.memory_bytes * SHARE:
            return (
                f"the largest model takes {format_size(needed)} of memory, and "
                f"{format_size(int(machine.memory_bytes * SHARE))} of its "
                f"{flavor.memory_gb:g} GB may be used"
            )
        if self.stored_bytes + self.taken_bytes > machine.disk_bytes:
            return (
                f"the models take {format_size(self.stored_bytes + self.taken_bytes)} of the "
                f"disk, and of its {flavor.disk_gb:g} GB {format_size(machine.disk_bytes)} are "
                "left beside the packages"
            )
        return ""

    @property
    def _on_cpu(self) -> bool:
        return self.device == "cpu"


def cpu_seconds(numel: int, models: int, questions: int, tokens: int, cores: int) -> float:
    """Return about how long models take to answer on a CPU, once they are in memory.

    Args:
        numel: elements of all models together.
        models: how many.
        questions: that each is asked.
        tokens: of an answer.
        cores: at work.
    """
    batches, asked = math.ceil(questions / BATCH), min(questions, BATCH)
    return batches * tokens * (2 * numel * asked / (cores * _CORE_FLOPS) + models * _STEP_SECONDS)
