"""GGUF files: what a header says, and its tensors under transformers' names, as float32 numbers.

The package gguf has llama.cpp's own tables: names by architecture, and what codes stand for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointFormatError, UnsupportedCheckpointError, listed
from ..maths.lazy import np
from ..specs import TensorSpec
from .assembly import Box, Node, Reading, Source, Stored
from .format import check_count
from .grouped import BLOCK_ELEMENTS
from .store import Store, StoredTensor

if TYPE_CHECKING:
    from types import ModuleType

    from .assembly import Array

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: scalars by the number of their type.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 10_000_000  # of a vocabulary, or of all that a header says
# Read first; most headers have several MB, as they hold the vocabulary.
_FIRST_BYTES = 1_000_000
_MOST_BYTES = 256_000_000
_MOST_NAME = 65_535
# Architectures by whether llama.cpp's converter interleaves the halves of each head of query and
# key; their tensors have Llama's names in transformers.
_INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False}
_TOP = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_HEADS = {"self_attn.q_proj": "head_count", "self_attn.k_proj": "head_count_kv"}
_MATRICES = (*_HEADS, "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
             "mlp.down_proj")  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
# Made of the config by the converter, and by transformers when it loads a model.
_DERIVED = ("rope_freqs.weight",)
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}


class _CutShortError(CheckpointFormatError):
    """The header goes on behind the bytes that are there."""


@dataclass(slots=True)
class Header:
    """What a GGUF file says before its values.

    Attributes:
        said: its metadata: numbers, truths and texts; None for lists.
        tensors: shape, outermost first, number of the type, and first byte behind `begin`, by name.
        begin: where in the file the values begin.
    """

    said: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], int, int]] = field(default_factory=dict)
    begin: int = 0


class GgmlValues(Node):
    """A matrix of llama.cpp's blocks, or numbers of its plain types, as float32."""

    def __init__(self, codes: Stored, kind: Any, shape: tuple[int, ...]) -> None:
        self.codes, self.kind, self.shape, self.dtype = codes, kind, shape, "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the rows of codes."""
        yield from self.codes.readings((box[0], (0, self.codes.shape[1])))

    def fill(self, box: Box, out: Array) -> None:
        """Write the values, some rows at a time; the codes are one reading, as on the Hub."""
        (begin, end), *inner = box
        codes = self.codes.array(((begin, end), (0, self.codes.shape[1])))
        step = max(BLOCK_ELEMENTS // max(math.prod(self.shape[1:]), 1), 1)
        for first in range(0, end - begin, step):
            some = codes[first : first + step]
            values = _gguf().dequantize(some, self.kind).reshape(len(some), *self.shape[1:])
            out[first : first + step] = values[(slice(None), *(slice(*i) for i in inner))]


class HalvesApart(Node):
    """Rows of query or key in transformers' order: of each head all even ones, then all odd ones.

    Attributes:
        of: as llama.cpp's converter interleaves them.
        size: rows of a head.
    """

    def __init__(self, of: Source, size: int) -> None:
        self.of, self.size, self.shape, self.dtype = of, size, of.shape, of.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the heads that the rows are in."""
        yield from self.of.readings(self._heads(box))

    def array(self, box: Box) -> Array:
        """Return the rows, taken from whole heads."""
        heads = self._heads(box)
        stored = self.of.array(heads)
        pairs = stored.reshape(-1, self.size // 2, 2, *stored.shape[1:])
        begin, end = (row - heads[0][0] for row in box[0])
        rows: Array = pairs.swapaxes(1, 2).reshape(stored.shape)[begin:end]
        return rows

    def _heads(self, box: Box) -> Box:
        begin, end = box[0]
        return (begin // self.size * self.size, -(-end // self.size) * self.size), *box[1:]


def of_gguf(store: Store, sizes: Mapping[str, int], top: str, where: str) -> dict[str, Source]:
    """Return the model in a GGUF file: what transformers makes of it, in float32.

    Plain float16 and bfloat16 tensors stay so, and plain float32 ones where no tensor has codes.

    Args:
        store: where the file is.
        sizes: of the file, by its name.
        top: what the name begins with.
        where: what to call the folder in errors.

    Raises:
        CheckpointFormatError: the file breaks the format.
        UnsupportedCheckpointError: it is of an architecture or type that is not read, there are
            several, or the package gguf is missing.
        StoppedError: the bytes cannot be had right now.
    """
    if len(sizes) != 1:
        raise UnsupportedCheckpointError(
            f"there are {len(sizes)} GGUF files in {where}: {listed(sorted(sizes))}. Give the path "
            "of one of them; join a split one with llama.cpp's llama-gguf-split."
        )
    ((file, size),) = sizes.items()
    shown = f"{where}/{file.removeprefix(top)}"
    data, header = bytearray(), None
    while header is None:
        data += store.read(file, len(data), min(max(4 * len(data), _FIRST_BYTES), size))
        try:
            header = read_header(memoryview(bytes(data)), shown)
        except _CutShortError:
            if len(data) >= min(size, _MOST_BYTES):
                raise
    check_count(len(header.tensors), where=shown)
    architecture = header.said.get("general.architecture")
    if architecture not in _INTERLEAVED:
        raise UnsupportedCheckpointError(
            f"{shown} is of the architecture {str(architecture)[:80]!r}; those that are read are "
            f"{listed(sorted(_INTERLEAVED))}."
        )
    names = _names(header, architecture, shown)
    has_codes = any(kind not in _PLAIN for _, kind, _ in header.tensors.values())
    made: dict[str, Source] = {}
    for name, (shape, kind, offset) in header.tensors.items():
        if name in _DERIVED:
            continue
        if name not in names:
            raise UnsupportedCheckpointError(
                f"{shown} holds {name[:200]!r}, which transformers' {architecture} has not."
            )
        place = (file, header.begin + offset, size)
        tree = _values(store, place, names[name], shape, kind, has_codes=has_codes, where=shown)
        made[names[name]] = _turned(tree, names[name], header, architecture, shown)
    return made


def read_header(data: memoryview, where: str) -> Header:
    """Read what a GGUF file says before its values.

    Args:
        data: the file, or as much of its beginning as holds that.
        where: what to call it in errors.

    Raises:
        CheckpointFormatError: it is none, or is damaged or cut short.
        UnsupportedCheckpointError: it is of a version that is not read.
    """
    at = 0

    def number(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def count(most: int = _MOST_ENTRIES) -> int:
        found = number("Q")
        if found > most:
            raise ValueError(f"{found} entries")
        return int(found)

    def text(most: int = _MOST_BYTES) -> str:
        nonlocal at
        size = count(most)
        if at + size > len(data):
            raise EOFError
        at += size
        return bytes(data[at - size : at]).decode("utf-8", errors="replace")

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return number(_SCALARS[kind])
        kind, entries = number("I"), count()
        if kind == _STRING:
            for _ in range(entries):
                size = number("Q")
                at += size
                if at > len(data):
                    raise EOFError
        else:
            at += entries * struct.calcsize(f"<{_SCALARS[kind]}")
        return None

    header = Header()
    try:
        if bytes(data[:4]) != b"GGUF":
            raise ValueError("no GGUF")
        at = 4
        version = number("I")
        if version not in (2, 3):
            raise UnsupportedCheckpointError(
                f"{where} is of version {version} of GGUF, or of a big-endian machine; versions 2 "
                "and 3 are read."
            )
        tensors, entries = count(), count()
        for _ in range(entries):
            key = text(_MOST_NAME)
            header.said[key] = value(number("I"))
        for _ in range(tensors):
            name = text(_MOST_NAME)
            axes = number("I")
            if axes > 4 or name in header.tensors:
                raise ValueError("axes")
            shape = tuple(count(1 << 40) for _ in range(axes))[::-1]
            header.tensors[name] = (shape, number("I"), count(1 << 60))
        alignment = header.said.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("alignment")
    except (EOFError, struct.error) as exc:
        raise _CutShortError(f"{where} is cut short, or is damaged.") from exc
    except (ValueError, KeyError) as exc:
        raise CheckpointFormatError(f"{where} is no GGUF file, or is damaged.") from exc
    header.begin = -(-at // alignment) * alignment
    return header


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as exc:
        raise UnsupportedCheckpointError(
            "a GGUF file is read with llama.cpp's package, which is not installed: pip install "
            "gguf."
        ) from exc
    return gguf


def _names(header: Header, architecture: str, where: str) -> dict[str, str]:
    """Return transformers' name of each tensor that an architecture has, by llama.cpp's name."""
    gguf = _gguf()
    layers = header.said.get(f"{architecture}.block_count")
    if type(layers) is not int or not 0 < layers <= len(header.tensors):
        raise CheckpointFormatError(f"{where} does not say how many layers it has.")
    (kind,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    theirs = list(_TOP)
    for layer in range(layers):
        inside = [f"{name}.{part}" for name in _MATRICES for part in ("weight", "bias")]
        inside += [f"{name}.weight" for name in _NORMS]
        theirs += [f"model.layers.{layer}.{name}" for name in inside]
    names = {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in theirs}
    return {name: ours for name, ours in names.items() if name is not None}


def _values(
    store: Store,
    place: tuple[str, int, int],
    name: str,
    shape: tuple[int, ...],
    kind: int,
    *,
    has_codes: bool,
    where: str,
) -> Source:
    """Return where a tensor's values are.

    Args:
        store, name, shape: of the tensor.
        place: its file, its first byte, and the bytes of the file.
        kind: the number of its type.
        has_codes: whether some tensors of the file are codes.
        where: what to call the file in errors.
    """
    gguf = _gguf()
    try:
        ggml = gguf.GGMLQuantizationType(kind)
        *_, row_bytes = gguf.quant_shape_to_byte_shape(shape, ggml)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[ggml][1]), np.uint8), ggml)
    except (ValueError, KeyError, NotImplementedError, IndexError) as exc:
        raise UnsupportedCheckpointError(
            f"{where} holds {name!r} in a type that the package gguf does not read ({kind}), or in "
            f"a shape that the type has not ({list(shape)})."
        ) from exc
    file, begin, size = place
    rows = math.prod(shape[:-1])
    if begin + rows * row_bytes > size:
        raise CheckpointFormatError(f"{where} is cut short: {name!r} ends behind its end.")
    if kind in _PLAIN and not (has_codes and _PLAIN[kind] == "F32"):
        return Stored(store, StoredTensor(TensorSpec(name, _PLAIN[kind], shape), file, begin))
    if len(shape) > 2:
        raise UnsupportedCheckpointError(f"{where} holds {name!r} as a stack of matrices.")
    if len(shape) == 1 and kind in _PLAIN:  # a row for each number, so that rows can be taken
        rows, row_bytes = shape[0], row_bytes // max(shape[0], 1)
    elif len(shape) == 1:
        raise UnsupportedCheckpointError(f"{where} holds the vector {name!r} as codes.")
    spec = TensorSpec(name, "U8", (rows, row_bytes))
    return GgmlValues(Stored(store, StoredTensor(spec, file, begin)), ggml, shape)


def _turned(tree: Source, name: str, header: Header, architecture: str, where: str) -> Source:
    """Return a tensor of query or key with the halves of each head apart; others as they are."""
    key = next((key for part, key in _HEADS.items() if f".{part}." in name), None)
    if key is None or not _INTERLEAVED[architecture]:
        return tree
    every = header.said.get(f"{architecture}.attention.head_count")
    heads = header.said.get(f"{architecture}.attention.{key}", every)
    if type(heads) is not int or heads < 1 or tree.shape[0] % (2 * heads):
        raise UnsupportedCheckpointError(
            f"{where} does not say of how many heads {name!r} is, or has another number in each "
            "layer."
        )
    return HalvesApart(tree, tree.shape[0] // heads)
