"""Which tensors of a checkpoint are codes of a quantisation, and their values as float32.

Told by evidence: stored dtypes, companions of the right shape, and the config. A name alone, or a
config alone, decides nothing.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from ..documents import load_json
from ..errors import UnsupportedCheckpointError
from ..maths.lazy import Tensor, dequantise, np, torch
from ..roles import Role, role_of
from ..specs import DTYPES, TensorSpec
from .assembly import Box, Node, Reading, Source, Stored, Transposed, whole
from .checkpoint import Checkpoint
from .grouped import BLOCK_ELEMENTS, POWERS, ByInputs, GroupedValues, Nf4Values

if TYPE_CHECKING:
    from .assembly import Array

_FP8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_SCALES = {"F32", "BF16", "F16", *POWERS}
_FP8_SCALES = ("_scale_inv", "_scale")
_DEFAULT_BLOCK = (128, 128)
# Scales of activations and of the key-value cache: single numbers beside 8-bit weights.
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv]|kv|prob)_scale(_inv|_ub)?$")
_MXFP4_BYTES = 16  # of a block of 32 values
_STATE_BYTES = 4096  # of bitsandbytes' JSON: it has 200
_MX_GROUP = 32  # values of a row that share a power of two, in MXFP8
# What lies beside codes whose scales belong to groups.
_OF_GROUPS = (
    "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "weight_scale_2", "input_global_scale",
)  # fmt: skip
# What integers are stored in when they are codes; nobody takes eight bytes for one.
_CODES = {"U8", "I8", "U16", "I16", "U32", "I32"}
# What codes have beside them: scales, offsets, tables, the group of each input.
_COMPANION = re.compile(
    r"scale|zero|g_idx|absmax|codebook|centroid|quant_|(^|[._])(biases|shift|SCB|tables?)$",
    re.IGNORECASE,
)
# How a method calls its codes, or what only it has beside them; whatever dtype they are stored in.
_METHODS = (
    (re.compile(r"\.qweight$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors, packed"),
    (re.compile(r"_qdata$"), "torchao"),
    (re.compile(r"\._data$"), "quanto"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.codes$"), "AQLM"),
)
_BITSANDBYTES = re.compile(r"(^|\.)(absmax|quant_map|quant_state\.[\w.]+|SCB)$")
# Config keys that speak of a quantisation; the last is MLX's.
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")


@dataclass(slots=True)
class Quantised:
    """What was found in a checkpoint.

    Attributes:
        sources: the values of each coded tensor, by the name that it has unquantised.
        codes: the same by the name that holds the codes.
        companions: names of scales, which nothing else is made of.
        forms: what kinds of codes there are, and how many tensors of each.
        packed: tensors whose codes cannot be read: their method, by the name that holds them.
        problems: what cannot be read, in words that follow the checkpoint's name.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)
    forms: Counter[str] = field(default_factory=Counter)
    packed: dict[str, str] = field(default_factory=dict)
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

        codes = _as_torch(self.codes.array(box), self.codes.dtype)
        grid = self._grid(box)
        dtype = self.scales.dtype
        scales = _as_torch(self.scales.array(grid).copy(), dtype)
        scales = dequantise.power_scales(scales) if dtype in POWERS else scales.to(torch.float32)
        values = torch.from_numpy(out)
        rows, columns = codes.shape[-2:]
        first = (box[-2][0] % self.block[0], box[-1][0])
        height, width = scales.shape[-2:] if scales.ndim >= 2 else (scales.numel(), 1)
        step = max(BLOCK_ELEMENTS // max(columns, 1), 1)
        for index in itertools.product(*map(range, codes.shape[:-2])):
            of_matrix = scales[index] if scales.ndim > 2 else scales
            of_matrix = of_matrix.reshape(height, width)
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                dequantise.fp8_values(
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

        in_blocks, in_scales = self._boxes(box)
        blocks = _as_torch(self.blocks.array(in_blocks), "U8")
        scales = _as_torch(self.scales.array(in_scales), "U8")
        values = torch.from_numpy(out)
        rows, groups = scales.shape[-2:]
        skip, width = box[-1][0] % 32, box[-1][1] - box[-1][0]
        step = max(BLOCK_ELEMENTS // max(groups * 32, 1), 1)
        for index in itertools.product(*map(range, scales.shape[:-2])):
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                made = torch.empty(part.stop - part.start, groups * 32)
                dequantise.mxfp4_values(blocks[index][part], scales[index][part], made)
                values[index][part].copy_(made[:, skip : skip + width])

    def _boxes(self, box: Box) -> tuple[Box, Box]:
        groups = (box[-1][0] // 32, -(-box[-1][1] // 32))
        return (*box[:-1], groups, (0, _MXFP4_BYTES)), (*box[:-1], groups)


class Unread(Node):
    """Codes that cannot be read, in the shape that their values would have."""

    def __init__(self, codes: Source, shape: tuple[int, ...]) -> None:
        self.codes, self.shape, self.dtype = codes, shape, "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield all codes: which of them a box needs is not known."""
        yield from self.codes.readings(whole(self.codes.shape))

    def fill(self, box: Box, out: Array) -> None:
        """Refuse.

        Raises:
            UnsupportedCheckpointError: always.
        """
        raise UnsupportedCheckpointError("the base holds codes that cannot be read as numbers.")


class Alike(Node):
    """A tensor that several models must have to the byte: codes that are carried, or their scales.

    Args:
        of: as the first model stores it.
        others: the same of the other models, by what the model is called.
    """

    def __init__(self, of: Stored, others: Mapping[str, Source]) -> None:
        self.of, self.others = of, others
        self.shape, self.dtype = of.shape, of.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the rows of every model."""
        for one in (self.of, *self.others.values()):
            yield from one.readings(box)

    def array(self, box: Box) -> Array:
        """Return the first model's values.

        Raises:
            UnsupportedCheckpointError: another model has others.
        """
        own = self.of.array(box)
        expected = np.ascontiguousarray(own).reshape(-1).view(np.uint8)
        for where, other in self.others.items():
            held = np.ascontiguousarray(other.array(box)).reshape(-1).view(np.uint8)
            if not np.array_equal(expected, held):
                raise UnsupportedCheckpointError(
                    f"{self.of.name} of {where} is packed, and differs from the base's: codes can "
                    "be carried, but not merged. Give models in bfloat16, float16 or float32."
                )
        return own


def unpacked_name(name: str) -> str:
    """Return what a tensor of codes is called unquantised."""
    while name.endswith("._data"):
        name = name.removesuffix("._data")
    module, _, leaf = name.rpartition(".")
    return name if leaf == "weight" else f"{module}.weight"


def inspect(checkpoint: Checkpoint) -> Quantised:
    """Return what is quantised in a checkpoint, from its headers and its config."""
    found = Quantised()
    block = _block_size(checkpoint.config)
    beside = _beside(checkpoint)
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    methods = {name: _packed_by(spec, beside) for name, spec in specs.items()}
    # NVFP4's scales are FP8 too, and no weights.
    of_codes = {
        f"{name.rpartition('.')[0]}.{leaf}"
        for name, method in methods.items()
        if method
        for leaf in _OF_GROUPS
    }
    for name, spec in specs.items():
        if method := methods[name]:
            if not _inspect_groups(checkpoint, spec, found):
                _refuse_codes(spec, method, found)
        elif spec.dtype in _FP8 and name not in of_codes:
            _inspect_fp8(checkpoint, spec, block, found)
        elif spec.dtype == "U8" and name.endswith("_blocks"):
            _inspect_mxfp4(checkpoint, spec, found)
    if not found.sources and not found.problems and (method := quantised_by(checkpoint.config)):
        for stored in checkpoint.tensors.values():
            if _may_be_codes(stored.spec) and len(stored.spec.shape) > 1:
                _refuse_codes(stored.spec, method, found)
    if found.sources:
        found.companions |= {
            name
            for name, stored in checkpoint.tensors.items()
            if stored.spec.numel == 1 and _OF_ACTIVATIONS.search(name)
        }
    return found


def quantised_by(config: Mapping[str, Any]) -> str:
    """Return which method of quantisation a config speaks of; empty where it speaks of none."""
    for key in _CONFIG_KEYS:
        said = config.get(key)
        if isinstance(said, dict) and said:
            named = said.get("quant_method")
            return "MLX" if key == "quantization" else str(named or "not named")[:80]
    return ""


def dequantised(checkpoint: Checkpoint, found: Quantised) -> Checkpoint:
    """Return a checkpoint with its codes as float32 values, and a config that says so."""
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in _CONFIG_KEYS or not isinstance(value, dict)
    }
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    trees: dict[str, Source] = {}
    for name, tree in checkpoint.trees.items():
        if name in found.codes:
            plain = found.codes[name]
            trees[plain] = found.sources[plain]
        elif name not in found.companions:
            trees[name] = tree
    return checkpoint.with_trees(trees, config=config)


def _inspect_fp8(
    checkpoint: Checkpoint, spec: TensorSpec, block: tuple[int, int], found: Quantised
) -> None:
    name = spec.name
    scales = next((name + end for end in _FP8_SCALES if name + end in checkpoint.tensors), None)
    if scales is None:
        found.problems.append(
            f"holds {name} in {spec.dtype} without scales ({name}_scale_inv or {name}_scale), so "
            "its values are not known. Give a checkpoint that has them, or one in bfloat16"
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
    found.sources[name] = Fp8Values(checkpoint.trees[name], checkpoint.trees[scales], size)
    found.codes[name] = name
    found.companions.add(scales)
    m, n = spec.shape[-2:]
    kinds = {(m, n): "a scale a tensor", (1, n): "a scale a row", (m, 1): "a scale a column"}
    found.forms[f"FP8, {kinds.get(size, f'a scale a block of {size[0]} × {size[1]}')}"] += 1


def _inspect_mxfp4(checkpoint: Checkpoint, spec: TensorSpec, found: Quantised) -> None:
    plain = spec.name.removesuffix("_blocks")
    scales = plain + "_scales"
    grid = checkpoint.tensors[scales].spec if scales in checkpoint.tensors else None
    if grid is None or grid.dtype not in POWERS:
        return  # bytes that are called blocks, and nothing else that says what they are
    if len(spec.shape) != 4 or spec.shape[-1] != _MXFP4_BYTES or spec.shape[:-1] != grid.shape:
        found.problems.append(
            f"has {spec.name} of shape {list(spec.shape)} and {scales} of shape "
            f"{list(grid.shape)}; MXFP4 has [experts, rows, groups, 16] and [experts, rows, groups]"
        )
        return
    values = Mxfp4Values(checkpoint.trees[spec.name], checkpoint.trees[scales])
    # gpt-oss computes x · W, so that its weights are [experts, in, out]; the blocks lie along `in`.
    found.sources[plain] = Transposed(values, (0, 2, 1))
    found.codes[spec.name] = plain
    found.companions.add(scales)
    found.forms["MXFP4"] += 1


def _inspect_groups(checkpoint: Checkpoint, spec: TensorSpec, found: Quantised) -> bool:
    """Take codes whose scales belong to groups; return whether they are of a kind that is read."""
    module, _, leaf = spec.name.rpartition(".")
    there = {
        name: checkpoint.trees[f"{module}.{name}"]
        for name in _OF_GROUPS
        if f"{module}.{name}" in checkpoint.trees
    }
    if len(spec.shape) != 2:
        return False
    if leaf == "qweight":
        return _inspect_by_inputs(checkpoint, spec, found)
    if leaf == "weight" and spec.dtype == "U8" and spec.shape[1] == 1:
        return _inspect_nf4(checkpoint, spec, found)
    scales = there.get("weight_scale")
    if scales is None or len(scales.shape) != 2 or "weight_g_idx" in there:
        return False
    total = there.get("weight_global_scale") or there.get("weight_scale_2")
    made = None
    if spec.dtype == "U8" and leaf in ("weight", "weight_packed"):
        made = _four_bit_floats(checkpoint.trees[spec.name], scales, total)
        form = "MXFP4" if total is None else "NVFP4"
        divides = "weight_global_scale" in there
        if made is not None and total is not None:
            made = replace(made, total=total, divides=divides)
    elif spec.dtype == "I32" and leaf == "weight_packed":
        zeros = there.get("weight_zero_point")
        made = _integers(checkpoint, spec, scales, zeros)
        form = f"INT{made.bits}" if made is not None else ""
    if made is None:
        return False
    plain = unpacked_name(spec.name)
    found.sources[plain] = made
    found.codes[spec.name] = plain
    found.companions |= {f"{module}.{name}" for name in there}
    found.forms[form] += 1
    return True


def _four_bit_floats(codes: Source, scales: Source, total: Source | None) -> GroupedValues | None:
    """Return e2m1 numbers in groups of 16 with FP8 scales and one for all, or of 32 with powers."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    size = 32 if total is None else 16
    kinds = POWERS if total is None else {"F8_E4M3"}
    if scales.dtype not in kinds or scales.shape != (rows, columns // size) or columns % size:
        return None
    if total is not None and math.prod(total.shape) != 1:
        return None
    return GroupedValues(codes, scales, (rows, columns))


def _integers(
    checkpoint: Checkpoint, spec: TensorSpec, scales: Source, zeros: Source | None
) -> GroupedValues | None:
    """Return packed integers of compressed-tensors: as many bits and groups as a config fits."""
    rows, words = spec.shape
    groups = scales.shape[1]
    for said in _weights_of(checkpoint.config):
        bits, size = said.get("num_bits"), said.get("group_size")
        if bits not in (4, 8) or scales.dtype not in _SCALES or scales.shape[0] != rows:
            continue
        held = words * 32 // bits
        columns = groups * size if _is_count(size) and groups > 1 else held
        if -(-columns * bits // 32) != words or columns % groups:
            continue
        of_zeros = "I32", (-(-rows * bits // 32), groups)
        if zeros is not None and (zeros.dtype, zeros.shape) != of_zeros:
            continue
        codes = checkpoint.trees[spec.name]
        return GroupedValues(codes, scales, (rows, columns), bits, zeros)
    return None


def _inspect_by_inputs(checkpoint: Checkpoint, spec: TensorSpec, found: Quantised) -> bool:
    """Take codes of AWQ or GPTQ: what is packed along which axis, their shapes say."""
    module = spec.name.removesuffix(".qweight")
    names = {part: f"{module}.{part}" for part in ("scales", "qzeros", "g_idx")}
    own = {part: checkpoint.trees.get(name) for part, name in names.items()}
    scales, zeros, groups = own["scales"], own["qzeros"], own["g_idx"]
    said = checkpoint.config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    bits = said.get("bits", said.get("w_bit"))
    if spec.dtype != "I32" or scales is None or zeros is None or bits not in (4, 8):
        return False
    if len(scales.shape) != 2 or scales.dtype not in _SCALES:
        return False
    count, outputs = scales.shape
    packed = 32 // bits
    is_awq = spec.shape[1] * packed == outputs
    inputs = spec.shape[0] * (1 if is_awq else packed)
    is_known = str(said.get("version", "gemm")).lower() == "gemm" and bits == 4
    if (
        (not is_known if is_awq else spec.shape[1] != outputs)
        or (zeros.dtype, zeros.shape) != ("I32", (count, -(-outputs // packed)))
        or outputs % packed
        or (groups is not None and (groups.dtype, groups.shape) != ("I32", (inputs,)))
        or (groups is None and inputs % count)
    ):
        return False
    # GPTQ wrote zeros less one; its second format writes them as they are.
    shift = 0 if is_awq or said.get("checkpoint_format") == "gptq_v2" else 1
    codes = checkpoint.trees[spec.name]
    shape = (inputs, outputs)
    values = ByInputs(shape, codes, scales, zeros, bits, is_awq, shift, groups)
    plain = unpacked_name(spec.name)
    found.sources[plain] = Transposed(values, (1, 0))
    found.codes[spec.name] = plain
    found.companions |= {names[part] for part, tree in own.items() if tree is not None}
    found.forms["AWQ" if is_awq else f"GPTQ, {bits} bits"] += 1
    return True


def _inspect_nf4(checkpoint: Checkpoint, spec: TensorSpec, found: Quantised) -> bool:
    """Take bitsandbytes' four-bit codes, whose state is JSON in a tensor."""
    own = {
        name.removeprefix(f"{spec.name}."): tree
        for name, tree in checkpoint.trees.items()
        if name.startswith(f"{spec.name}.")
    }
    kind = next((k for k in ("nf4", "fp4") if f"quant_state.bitsandbytes__{k}" in own), None)
    if kind is None or math.prod(own[f"quant_state.bitsandbytes__{kind}"].shape) > _STATE_BYTES:
        return False
    if not {"absmax", "quant_map"} <= own.keys():
        return False
    try:
        state = load_json(
            bytes(checkpoint.read(f"{spec.name}.quant_state.bitsandbytes__{kind}")),
            max_bytes=_STATE_BYTES,
        )
    except ValueError:
        return False
    if not isinstance(state, dict):
        return False
    shape, block = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape))):
        return False
    count = math.prod(shape)
    if not _is_count(block) or count != 2 * spec.numel or shape[1] % 2:
        return False
    blocks = -(-count // block)
    if own["absmax"].shape != (blocks,):
        return False
    nested = None
    if "nested_absmax" in own:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not (_is_count(size) and type(offset) is float and math.isfinite(offset)):
            return False
        if "nested_quant_map" not in own or own["nested_quant_map"].shape != (256,):
            return False
        if own["absmax"].dtype != "U8" or own["nested_absmax"].shape != (-(-blocks // size),):
            return False
        nested = own["nested_quant_map"], own["nested_absmax"], size, offset
    elif own["absmax"].dtype != "F32":
        return False
    if own["quant_map"].shape != (16,):
        return False
    codes = checkpoint.trees[spec.name]
    found.sources[spec.name] = Nf4Values(
        codes, own["quant_map"], own["absmax"], tuple(shape), block, nested
    )
    found.codes[spec.name] = spec.name
    found.companions |= {f"{spec.name}.{name}" for name in own}
    found.forms[kind.upper()] += 1
    return True


def _weights_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each group of compressed-tensors' config says of weights."""
    said = config.get("quantization_config") or config.get("compression_config") or {}
    groups = said.get("config_groups") if isinstance(said, dict) else None
    every = groups.values() if isinstance(groups, dict) else ()
    found = [group.get("weights") for group in every if isinstance(group, dict)]
    return [weights for weights in found if isinstance(weights, dict)]


def _beside(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return what each module holds of companions: their last names, by the module's name."""
    found: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if _COMPANION.search(leaf):
            found.setdefault(module, []).append(leaf)
        if "quant_state." in name:
            module, _, leaf = name.partition(".quant_state.")
            found.setdefault(module, []).append(f"quant_state.{leaf}")
    return found


def _may_be_codes(spec: TensorSpec) -> bool:
    is_buffer = role_of(spec.name, spec.shape) is Role.BUFFER
    return spec.dtype in _CODES and spec.numel > 1 and not is_buffer


def _packed_by(spec: TensorSpec, beside: Mapping[str, list[str]]) -> str:
    """Return which method a tensor is packed codes of; empty where it is not."""
    module, _, leaf = spec.name.rpartition(".")
    own = beside.get(spec.name, [])
    # quanto's are two deep: weight._data._data has weight._scale.
    near = [*own, *beside.get(module, []), *beside.get(module.removesuffix("._data"), [])]
    if not near or leaf in near:
        return ""
    if any(map(_BITSANDBYTES.search, own)) or (leaf == "weight" and "SCB" in near):
        return "bitsandbytes"
    method = next((name for pattern, name in _METHODS if pattern.search(spec.name)), "")
    if method or not _may_be_codes(spec) or (spec.dtype == "U8" and leaf.endswith("_blocks")):
        return method
    is_mlx = spec.dtype == "U32" and "scales" in near
    return "MLX" if is_mlx else "integers with scales"


def _refuse_codes(spec: TensorSpec, method: str, found: Quantised) -> None:
    found.packed[spec.name] = method
    if not any(method in problem for problem in found.problems):
        found.problems.append(
            f"is quantised ({method}: {spec.name} in {spec.dtype}): its tensors are codes "
            "that cannot be read here. Give the original checkpoint in bfloat16, float16, "
            "float32 or FP8"
        )


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
    if grid[-2] == m and grid[-1] * _MX_GROUP == n:
        return 1, _MX_GROUP
    return {(1, 1): (m, n), (m, 1): (1, n), (1, n): (m, 1)}.get((grid[-2], grid[-1]))


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the block that a config names, or the usual one."""
    quantisation = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(quantisation, dict):
        return _DEFAULT_BLOCK
    sizes = [weights.get("block_structure") for weights in _weights_of(config)]
    for size in (quantisation.get("weight_block_size"), *sizes):
        if (
            isinstance(size, list)
            and len(size) == 2
            and all(type(s) is int and s > 0 for s in size)
        ):
            return size[0], size[1]
    return _DEFAULT_BLOCK


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _as_torch(array: Array, dtype: str) -> Tensor:
    writable = array if array.flags.writeable else array.copy()  # torch knows no others
    return torch.from_numpy(writable).view(getattr(torch, DTYPES[dtype].torch_name))
