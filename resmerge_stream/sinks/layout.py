"""Output shards: which tensor goes into which file, at which byte."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..sources.format import serialise_header
from ..specs import DTYPES, TensorSpec

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file, down to its bytes.

    Attributes:
        name: final file name.
        tensors: in file order: by dtype rank descending, then by name, as `save_file` does; codes
            in FP8 behind their scales.
        header: the file's first bytes.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors)


def plan_shards(groups: Sequence[Sequence[TensorSpec]], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Return the output files for groups of tensors.

    A group is never joined with another; one over the limit is cut. A single tensor over the limit
    gets a file of its own.

    Args:
        groups: tensors that belong together, such as those of one shard of the base.
        max_shard_bytes: limit on the tensors' bytes in one file.
    """
    parts = [part for group in groups for part in _cut(group, max_shard_bytes) if part]
    count = len(parts)
    return tuple(
        shard_of(
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors",
            part,
        )
        for number, part in enumerate(parts, start=1)
    )


def index_json(shards: Sequence[Shard]) -> bytes:
    """Return ``model.safetensors.index.json`` as transformers writes it."""
    import json

    weight_map = {spec.name: shard.name for shard in shards for spec in shard.tensors}
    specs = [spec for shard in shards for spec in shard.tensors]
    metadata = {
        "total_parameters": sum(spec.numel for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def _cut(group: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    parts: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in group:
        if parts[-1] and size + spec.nbytes > limit and not is_behind(spec, parts[-1][-1]):
            parts.append([])
            size = 0
        parts[-1].append(spec)
        size += spec.nbytes
    return parts


def is_behind(codes: TensorSpec, scales: TensorSpec) -> bool:
    """Return whether a tensor is written right behind its scales."""
    return scales.scaled == codes.name


def shard_of(name: str, tensors: Sequence[TensorSpec]) -> Shard:
    """Return one output file with these tensors."""
    scaled = {spec.scaled for spec in tensors}
    codes = {spec.name for spec in tensors if spec.dtype == "F8_E4M3"} & scaled

    def place(spec: TensorSpec) -> tuple[int, str, bool]:
        if spec.name in codes or spec.scaled in codes:
            # Both are known at once: the scales first, and so that they lie at multiples of four.
            return -DTYPES["F32"].rank, spec.scaled or spec.name, not spec.scaled
        return -DTYPES[spec.dtype].rank, spec.name, True

    ordered = sorted(tensors, key=place)
    offset, placed = 0, []
    for spec in ordered:
        placed.append((spec, offset))
        offset += spec.nbytes
    return Shard(name, tuple(ordered), serialise_header(placed))
