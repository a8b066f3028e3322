"""Which tensors of a checkpoint are codes of a quantisation, and their values as float32.

Told by evidence: stored dtypes, companions of the right shape, and the config. A name alone, or a
config alone, decides nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..specs import DTYPES, TensorSpec
from .assembly import Box, Node, Reading, Source, Turned, whole
from .checkpoint import Checkpoint
from .view import View, source_of

if TYPE_CHECKING:
    from torch import Tensor

    from .assembly import Array

# Values that are made at once: the float32 temporaries stay in the cache.
_BLOCK_ELEMENTS = 1 << 18
_FP8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_POWERS = {"U8", "F8_E8M0"}
_SCALES = {"F32", "BF16", "F16", *_POWERS}
_FP8_SCALES = ("_scale_inv", "_scale")
_DEFAULT_BLOCK = (128, 128)
# Scales of activations and of the key-value cache: single numbers beside 8-bit weights.
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv]|kv|prob)_scale(_inv|_ub)?$")
_MXFP4_BYTES = 16  # of a block of 32 values
# A packed tensor's own name, then one of its companions, with the name of the method.
_PACKED = (
    (r"^(.*)\.qweight$", r"{0}.scales", "GPTQ or AWQ"),
    (r"^(.*)\.qweight$", r"{0}.qzeros", "GPTQ or AWQ"),
    (r"^(.*)\.weight$", r"{0}.weight.absmax", "bitsandbytes"),
    (r"^(.*)\.weight$", r"{0}.weight.quant_map", "bitsandbytes"),
    (r"^(.*)\.weight$", r"{0}.SCB", "bitsandbytes"),
    (r"^(.*)\.weight_packed$", r"{0}.weight_scale", "compressed-tensors, packed"),
    (r"^(.*)$", r"{0}_scale", "integers with scales"),
    (r"^(.*)$", r"{0}_scale_inv", "integers with scales"),
    (r"^(.*)\.weight$", r"{0}.scale", "integers with scales"),
)  # fmt: skip


@dataclass(slots=True)
class Quantised:
    """What was found in a checkpoint.

    Attributes:
        sources: the values of each coded tensor, by the name that it has unquantised.
        codes: the same by the name that holds the codes.
        companions: names of scales, which nothing else is made of.
        forms: what kinds of codes there are, and how many tensors of each.
        problems: what cannot be read, in words that follow the checkpoint's name.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)
    forms: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def in_words(self) -> str:
        """The kinds of codes, for people."""
        return ", ".join(f"{count} × {form}" for form, count in sorted(self.forms.items()))


class Fp8Values(Node):
    """FP8 codes times the scales of their blocks, in float32."""

    def __init__(self, codes: Source, scales: Source, block: tuple[int, int]) -> None:
        self.codes, self.scales, self.block = codes, scales, block
        self.shape, self.dtype = codes.shape, "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the codes and their scales."""
        yield from self.codes.readings(box)
        yield from self.scales.readings(self._grid(box))

    def fill(self, box: Box, out: Array) -> None:
        """Write the values, some rows at a time."""
        import torch

        from ..maths.dequantise import fp8_values

        codes = _as_torch(self.codes.array(box), self.codes.dtype)
        grid = self._grid(box)
        scales = _scale_values(self.scales.array(grid), self.scales.dtype)
        values = torch.from_numpy(out)
        rows, columns = codes.shape[-2:]
        first = (box[-2][0] % self.block[0], box[-1][0])
        height, width = scales.shape[-2:] if scales.ndim >= 2 else (scales.numel(), 1)
        step = max(_BLOCK_ELEMENTS // max(columns, 1), 1)
        for index in _indices(codes.shape[:-2]):
            of_matrix = scales[index] if scales.ndim > 2 else scales
            of_matrix = of_matrix.reshape(height, width)
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                fp8_values(
                    codes[index][part],
                    of_matrix,
                    self.block,
                    (first[0] + start, first[1]),
                    values[index][part],
                )

    def _grid(self, box: Box) -> Box:
        """Return the box of scales: their rows for some rows of codes, all their columns."""
        shape = self.scales.shape
        first, last = box[-2]
        rows = (first // self.block[0], max(-(-last // self.block[0]), 1))
        if len(shape) < 2:
            return (rows,) if shape and shape[0] > 1 else whole(shape)
        return (*box[:-2][: len(shape) - 2], rows, (0, shape[-1]))


class Mxfp4Values(Node):
    """Blocks of 32 four-bit values with a power of two each, in float32; shape (…, 32 · g)."""

    def __init__(self, blocks: Source, scales: Source) -> None:
        self.blocks, self.scales = blocks, scales
        *lead, groups, _ = blocks.shape
        self.shape, self.dtype = (*lead, groups * 32), "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the blocks and their scales."""
        blocks, scales = self._boxes(box)
        yield from self.blocks.readings(blocks)
        yield from self.scales.readings(scales)

    def fill(self, box: Box, out: Array) -> None:
        """Write the values, some rows at a time."""
        import torch

        from ..maths.dequantise import mxfp4_values

        in_blocks, in_scales = self._boxes(box)
        blocks = _as_torch(self.blocks.array(in_blocks), "U8")
        scales = _as_torch(self.scales.array(in_scales), "U8")
        values = torch.from_numpy(out)
        rows, groups = scales.shape[-2:]
        skip, width = box[-1][0] % 32, box[-1][1] - box[-1][0]
        step = max(_BLOCK_ELEMENTS // max(groups * 32, 1), 1)
        for index in _indices(scales.shape[:-2]):
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                made = torch.empty(part.stop - part.start, groups * 32)
                mxfp4_values(blocks[index][part], scales[index][part], made)
                values[index][part].copy_(made[:, skip : skip + width])

    def _boxes(self, box: Box) -> tuple[Box, Box]:
        groups = (box[-1][0] // 32, -(-box[-1][1] // 32))
        return (*box[:-1], groups, (0, _MXFP4_BYTES)), (*box[:-1], groups)


def inspect(checkpoint: Checkpoint) -> Quantised:
    """Return what is quantised in a checkpoint, from its headers and its config."""
    found = Quantised()
    block = _block_size(checkpoint.config)
    for name, stored in checkpoint.tensors.items():
        spec = stored.spec
        if spec.dtype in _FP8:
            _inspect_fp8(checkpoint, spec, block, found)
        elif spec.dtype == "U8" and name.endswith("_blocks"):
            _inspect_mxfp4(checkpoint, spec, found)
        elif DTYPES[spec.dtype].name[0] in "UI":
            _inspect_packed(checkpoint, spec, found)
    if found.sources:
        found.companions |= {
            name
            for name, stored in checkpoint.tensors.items()
            if stored.spec.numel == 1 and _OF_ACTIVATIONS.search(name)
        }
    return found


def dequantised(checkpoint: Checkpoint, found: Quantised) -> Checkpoint:
    """Return a checkpoint with its codes as float32 values, and a config that says so."""
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("quantization_config", "compression_config")
    }
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    sources: dict[str, Source] = {}
    for name in checkpoint.tensors:
        if name in found.codes:
            plain = found.codes[name]
            sources[plain] = found.sources[plain]
        elif name not in found.companions:
            sources[name] = source_of(checkpoint, name)
    return View(checkpoint, sources, config=config)


def _inspect_fp8(
    checkpoint: Checkpoint, spec: TensorSpec, block: tuple[int, int], found: Quantised
) -> None:
    name = spec.name
    scales = next((name + end for end in _FP8_SCALES if name + end in checkpoint.tensors), None)
    if scales is None:
        found.problems.append(
            f"holds {name} in {spec.dtype} without scales ({name}_scale_inv or {name}_scale), so "
            "its values are not known"
        )
        return
    grid = checkpoint.tensors[scales].spec
    if grid.dtype not in _SCALES or len(spec.shape) < 2:
        found.problems.append(f"holds {name} in {spec.dtype}, with scales in {grid.dtype}")
        return
    size = _block_of(spec.shape, grid.shape, block)
    if size is None:
        m, n = spec.shape[-2:]
        found.problems.append(
            f"has scales of shape {list(grid.shape)} for {name} of shape {list(spec.shape)}; "
            f"blocks of {block[0]} × {block[1]} make {[-(-m // block[0]), -(-n // block[1])]}"
        )
        return
    found.sources[name] = Fp8Values(
        source_of(checkpoint, name), source_of(checkpoint, scales), size
    )
    found.codes[name] = name
    found.companions.add(scales)
    found.forms[f"FP8, {_kind_of(size, spec.shape)}"] += 1


def _inspect_mxfp4(checkpoint: Checkpoint, spec: TensorSpec, found: Quantised) -> None:
    plain = spec.name.removesuffix("_blocks")
    scales = plain + "_scales"
    grid = checkpoint.tensors[scales].spec if scales in checkpoint.tensors else None
    if grid is None or grid.dtype not in _POWERS:
        return  # bytes that are called blocks, and nothing else that says what they are
    if len(spec.shape) != 4 or spec.shape[-1] != _MXFP4_BYTES or spec.shape[:-1] != grid.shape:
        found.problems.append(
            f"has {spec.name} of shape {list(spec.shape)} and {scales} of shape "
            f"{list(grid.shape)}; MXFP4 has [experts, rows, groups, 16] and [experts, rows, groups]"
        )
        return
    values = Mxfp4Values(source_of(checkpoint, spec.name), source_of(checkpoint, scales))
    # gpt-oss computes x · W, so that its weights are [experts, in, out]; the blocks lie along `in`.
    found.sources[plain] = Turned(values, (0, 2, 1))
    found.codes[spec.name] = plain
    found.companions.add(scales)
    found.forms["MXFP4"] += 1


def _inspect_packed(checkpoint: Checkpoint, spec: TensorSpec, found: Quantised) -> None:
    for pattern, companion, method in _PACKED:
        matched = re.match(pattern, spec.name)
        if matched and companion.format(matched[1]) in checkpoint.tensors and spec.numel > 1:
            if not any(method in problem for problem in found.problems):
                found.problems.append(
                    f"is quantised ({method}: {spec.name} in {spec.dtype}): its tensors are codes "
                    "that cannot be read here. Give the original checkpoint in bfloat16, float16, "
                    "float32 or FP8"
                )
            return


def _block_of(
    shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, int] | None:
    """Return rows and columns that share a scale, None where the grid fits nothing."""
    m, n = shape[-2:]
    if len(grid) <= 1:
        by_row = {m: (1, n)} if len(shape) == 2 else {}
        return ({1: (m, n)} | by_row).get(grid[0] if grid else 1)
    if grid[:-2] != shape[:-2]:
        return None
    if grid[-2:] == (-(-m // block[0]), -(-n // block[1])):
        return block
    return {(1, 1): (m, n), (m, 1): (1, n), (1, n): (m, 1)}.get((grid[-2], grid[-1]))


def _kind_of(size: tuple[int, int], shape: tuple[int, ...]) -> str:
    m, n = shape[-2:]
    kinds = {(m, n): "a scale a tensor", (1, n): "a scale a row", (m, 1): "a scale a column"}
    return kinds.get(size, f"a scale a block of {size[0]} × {size[1]}")


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the block that a config names, or the usual one."""
    quantisation = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(quantisation, dict):
        return _DEFAULT_BLOCK
    groups = quantisation.get("config_groups")
    weights = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
    ]
    sizes = [w.get("block_structure") for w in weights if isinstance(w, dict)]
    for size in (quantisation.get("weight_block_size"), *sizes):
        if (
            isinstance(size, list)
            and len(size) == 2
            and all(type(s) is int and s > 0 for s in size)
        ):
            return size[0], size[1]
    return _DEFAULT_BLOCK


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _indices(lead: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    import itertools

    yield from itertools.product(*map(range, lead))


def _as_torch(array: Array, dtype: str) -> Tensor:
    import torch

    writable = array if array.flags.writeable else array.copy()  # torch knows no others
    return torch.from_numpy(writable).view(getattr(torch, DTYPES[dtype].torch_name))


def _scale_values(array: Array, dtype: str) -> Tensor:
    from ..maths.dequantise import power_scales

    scales = _as_torch(array.copy(), dtype)
    import torch

    return power_scales(scales) if dtype in _POWERS else scales.to(torch.float32)
