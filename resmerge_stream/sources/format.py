"""The safetensors format from bytes: a header, an index and a config, every rule checked.

The rules are those of the safetensors library (https://github.com/huggingface/safetensors); what
it rejects is rejected here. Stricter in four points: duplicate keys, dtypes that this tool cannot
copy (4 and 6 bits), sizes that no file has, and an index that points anywhere but beside it.
"""

import itertools
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from ..documents import load_json
from ..errors import CheckpointFormatError, listed
from ..specs import DTYPES, TensorSpec
from .store import StoredTensor

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_CONFIG_BYTES = 4_000_000
# Kimi-K2-Thinking has the most: 60 layers of 384 experts, of nine tensors each, are 207,360.
MAX_TENSORS = 400_000
_LIMIT = 2**63
_MAX_DEPTH = 126
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,200}\.safetensors")
_NUMBERED = re.compile(r"model-\d+-of-(\d+)\.safetensors")
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md; a header's length is never as large.
_POINTER = b"version https://git-lfs"


def header_length(prefix: bytes, file_size: int, *, where: str) -> int:
    """Return the length in bytes of the header that follows the first eight bytes.

    Args:
        prefix: the first eight bytes of the file.
        file_size: bytes of the whole file.
        where: what to call the file in errors.

    Raises:
        CheckpointFormatError: the file is too short, or the length is impossible.
    """
    refuse_pointer(prefix, where=where)
    if len(prefix) < 8 or file_size < 8:
        _refuse(where, f"has {file_size} bytes; a safetensors file has at least 8")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(where, f"announces a header of {length} bytes; at most {MAX_HEADER_BYTES}")
    if length + 8 > file_size:
        _refuse(where, f"announces a header of {length} bytes in a file of {file_size}")
    return length


def refuse_pointer(start: bytes, *, where: str) -> None:
    """Refuse what git-lfs leaves in the place of a file that was not downloaded.

    Args:
        start: the first eight bytes of the file, or more.
        where: what to call the file in errors.

    Raises:
        CheckpointFormatError: it is such a pointer.
    """
    if len(start) >= 8 and start.startswith(_POINTER[: len(start)]):
        _refuse(
            where,
            "is a git-lfs pointer, a few lines of text in the place of the file. Run "
            "'git lfs pull' in that clone, or download the model with 'hf download'",
        )


def parse_header(
    header: bytes, file_size: int, *, file: str, where: str
) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file, in the order of their bytes.

    Args:
        header: the header's JSON bytes, without the eight bytes before them.
        file_size: bytes of the whole file.
        file: the file's name inside the checkpoint, kept in the result.
        where: what to call the file in errors.

    Raises:
        CheckpointFormatError: any rule of the format is broken.
    """
    check_count(header.count(b"{") - 2, where=where)  # before gigabytes are made of them
    document = parse_json(header, where=where, what="header", must_start=b"{")
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(_is_text(value) for value in metadata.values())
    ):
        _refuse(where, "has a __metadata__ that is not a mapping of text to text")
    data_start = 8 + len(header)
    entries = [_entry(name, info, where) for name, info in document.items()]
    entries.sort(key=lambda entry: (entry[1], entry[2]))
    end = 0
    for spec, begin, stop in entries:
        if begin != end:
            kind = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            _refuse(where, f"tensor {spec.name!r} begins at {begin}, not at {end}: it {kind}")
        end = stop
    if data_start + end != file_size:
        _refuse(
            where,
            f"describes {data_start + end} bytes but the file has {file_size}; "
            "it is cut short or damaged, download it again",
        )
    return {spec.name: StoredTensor(spec, file, data_start + begin) for spec, begin, _ in entries}


def check_count(count: int, *, where: str) -> None:
    """Refuse more tensors than any model has.

    Args:
        count: of the tensors.
        where: what to call the file or the checkpoint in errors.

    Raises:
        CheckpointFormatError: they are more than `MAX_TENSORS`.
    """
    if count > MAX_TENSORS:
        _refuse(where, f"has more than {MAX_TENSORS:,} tensors, which no model has")


def parse_index(data: bytes, *, where: str) -> dict[str, str]:
    """Return the weight map of an index file: tensor name → shard file beside it.

    Raises:
        CheckpointFormatError: it is not JSON, has no weight map, or names a file elsewhere.
    """
    check_count(data.count(b":") - 4, where=where)
    document = parse_json(data, where=where, what="index")
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(where, "has no 'weight_map' of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            _refuse(where, f"maps {name[:200]!r} to {type(file).__name__}, not to a file name")
        if not _SHARD_NAME.fullmatch(file):
            _refuse(
                where,
                f"maps {name[:200]!r} to {file[:200]!r}; only *.safetensors files beside the "
                "index are read",
            )
    return weight_map


def collect_tensors(
    shards: Mapping[str, Mapping[str, StoredTensor]],
    weight_map: Mapping[str, str],
    *,
    where: str,
    beside: Iterable[str] = (),
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return the tensors that an index's shards hold, and in words how the index differs.

    As transformers loads them: whatever a shard holds is there, and of a tensor that several hold,
    the last file's.

    Args:
        shards: by file, what it holds; every file that the index names.
        weight_map: the index's.
        where: what to call the index in errors.
        beside: names of the files in its folder.

    Raises:
        CheckpointFormatError: no shard holds a tensor of the index, or the index does not name a
            file that is one of its shards by its number.
    """
    last = {name: file for file in sorted(shards) for name in shards[file]}
    for name, file in weight_map.items():
        if name not in last:
            _refuse(where, f"says that {name[:200]!r} is in {file!r}, which does not hold it")
    tensors = {
        name: tensor
        for file in sorted(shards)
        for name, tensor in shards[file].items()
        if last[name] == file
    }
    unlisted = [name for name in tensors if name not in weight_map]
    elsewhere = [name for name, file in weight_map.items() if name not in shards[file]]
    times = Counter(name for held in shards.values() for name in held)
    twice = [name for name, count in times.items() if count > 1]
    totals = {found[1] for file in shards if (found := _NUMBERED.fullmatch(file))}
    numbered = {file: found[1] for file in beside if (found := _NUMBERED.fullmatch(file))}
    loose = [file for file in numbered if file not in shards]
    if of_the_set := [file for file in loose if numbered[file] in totals]:
        _refuse(
            where,
            f"does not name {listed(of_the_set)}, which by its number is one of its shards: half "
            "of a model would be merged. Save or download the checkpoint again",
        )
    differences = (
        (unlisted, "lists {count} tensor(s) less than its shards hold, and transformers reads "
         "them all the same, so they are merged too: {names}"),
        (elsewhere, "names another file than the one that holds {count} tensor(s): {names}; they "
         "are read from where they are"),
        (twice, "has two shards that hold {count} tensor(s): {names}; the last file is read, "
         "as transformers does"),
        (loose, "does not name {count} file(s) that look like its shards: {names}; they are not "
         "read, as transformers does not read them"),
    )  # fmt: skip
    return tensors, tuple(
        f"its index {text.format(count=len(names), names=listed(names))}"
        for names, text in differences
        if names
    )


def parse_json(data: bytes, *, where: str, what: str, must_start: bytes = b"") -> dict[str, Any]:
    """Return a JSON object, strictly: UTF-8, no duplicate keys, no NaN, no lone surrogates.

    Raises:
        CheckpointFormatError: the bytes are not such an object.
    """
    refuse_pointer(data, where=where)
    if must_start and not data.startswith(must_start):
        _refuse(where, f"has a {what} that does not start with '{{'")
    try:
        document = load_json(
            data,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except ValueError as exc:
        raise CheckpointFormatError(f"{where} has a {what} that is not valid: {exc}.") from exc
    if not isinstance(document, dict):
        _refuse(where, f"has a {what} that is not a JSON object")
    return document


def parse_object(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the JSON object in a stranger's side file, whatever its bytes are.

    Lenient where transformers is: NaN, Infinity and -0 are numbers, and a key may stand twice.

    Raises:
        CheckpointFormatError: the bytes are not a JSON object in UTF-8.
    """
    refuse_pointer(data, where=where)
    try:
        document = load_json(data)
    except ValueError as exc:
        raise CheckpointFormatError(f"{where} is not valid JSON: {exc}.") from exc
    if not isinstance(document, dict):
        _refuse(where, "is not a JSON object")
    return document


def serialise_header(
    tensors: Iterator[tuple[TensorSpec, int]] | list[tuple[TensorSpec, int]],
) -> bytes:
    """Return the first bytes of a safetensors file: eight of length, then the padded header.

    Args:
        tensors: specs in file order, each with its offset in the data.

    Source: byte for byte what ``safetensors.torch.save_file(…, metadata={"format": "pt"})``
    writes (compact JSON, padded with spaces to a multiple of eight).
    """
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec, offset in tensors:
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
    header = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _entry(name: str, info: object, where: str) -> tuple[TensorSpec, int, int]:
    shown = repr(name[:200])
    if not isinstance(info, dict):
        _refuse(where, f"describes tensor {shown} by {type(info).__name__}, not by an object")
    try:
        for value in info.values():
            _check_unknown(value, 2)
    except ValueError as exc:
        _refuse(where, f"describes tensor {shown} with text or nesting that is not valid: {exc}")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(where, f"tensor {shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        _refuse(where, f"tensor {shown} has a shape that is not a list of sizes")
    # Partial products from the left, as the library checks them: a zero behind does not save it.
    partial = [1, *itertools.accumulate(shape, operator.mul)]
    if len(shape) > 64 or max(*partial, partial[-1] * DTYPES[dtype].nbytes) >= _LIMIT:
        _refuse(where, f"tensor {shown} is larger than any file")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _refuse(where, f"tensor {shown} has data_offsets that are not two positions")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        _refuse(
            where,
            f"tensor {shown} of dtype {dtype} and shape {tuple(shape)} needs {spec.nbytes} bytes, "
            f"but its offsets span {offsets[1] - offsets[0]}",
        )
    return spec, offsets[0], offsets[1]


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    for key in result:
        key.encode("utf-8")  # a lone surrogate is not text
    return result


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # the library reads -0 as a float


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _check_unknown(value: object, depth: int) -> None:
    """Check a value under a key that the format does not know, as the library's parser does."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_unknown(item, depth + 1)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _refuse(where: str, problem: str) -> NoReturn:
    raise CheckpointFormatError(f"{where} {problem}.")
