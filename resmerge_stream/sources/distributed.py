"""Models as the processes of a trainer saved them, in parts: which parts make a tensor, and how.

Each function takes the files of one format and returns the tensors, put together as torch, verl
and DeepSpeed put them together. Values stay where they are.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointFormatError, UnsupportedCheckpointError, listed
from .assembly import Joined, Source
from .format import check_count
from .pickled import MAX_BYTES, Made, Pairs, loads, numbers, texts
from .store import Store
from .torch_files import TorchFile

METADATA = ".metadata"
_RANK = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")
_UNIVERSAL = re.compile(r"(?:^|/)zero/([^/]+)/fp32\.pt$")
_PARTS = "torch.distributed.checkpoint.metadata"
# Of a file that holds one tensor: as much at its head and its tail says what is in it.
_END_BYTES = 2048


def of_torch(store: Store, sizes: Mapping[str, int], top: str, where: str) -> dict[str, Source]:
    """Return the model in a distributed checkpoint of torch: what `dcp_to_torch_save` makes of it.

    Of a state that holds a model beside an optimizer, it is the model.

    Args:
        store: where its files are.
        sizes: of the files, by name.
        top: what their names begin with.
        where: what to call the folder in errors.

    Raises:
        CheckpointFormatError: its metadata, or a part, breaks the format.
        UnsupportedCheckpointError: it is of a kind that is not read.
        StoppedError: the bytes cannot be had right now.
    """
    name = top + METADATA
    if sizes[name] > MAX_BYTES:
        raise CheckpointFormatError(f"{where}/{METADATA} is larger than {MAX_BYTES} bytes.")
    data = bytes(store.read(name, 0, sizes[name]))
    metadata = loads(data, where=f"{where}/{METADATA}")
    if not isinstance(metadata, Made) or metadata.what != f"{_PARTS}.Metadata":
        raise CheckpointFormatError(f"{where}/{METADATA} is no metadata of torch's checkpoints.")
    said = metadata.fields
    tensors = {
        key: held.fields
        for key, held in texts(said.get("state_dict_metadata")).items()
        if isinstance(held, Made) and held.what == f"{_PARTS}.TensorStorageMetadata"
    }
    check_count(len(tensors), where=where)
    places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    stored = said.get("storage_data")
    for index, info in stored if isinstance(stored, Pairs) else ():
        if isinstance(index, Made) and isinstance(info, Made):
            own = index.fields
            places[str(own.get("fqn")), numbers(own.get("offset")) or ()] = info.fields
    made: dict[str, Source] = {}
    of_model = _of_model(tensors, texts(said.get("planner_data")))
    turn = {key: number for number, key in enumerate(of_model)}
    in_turn = sorted((key for key in places if key[0] in turn), key=lambda key: turn[key[0]])
    spans = [_span(places[key], sizes, top) for key in in_turn]
    store.expect(end for span in spans if span is not None for end in _ends(*span))
    for key, name in of_model.items():
        shape, chunks = numbers(tensors[key].get("size")), tensors[key].get("chunks")
        if shape is None or not isinstance(chunks, list):
            raise CheckpointFormatError(f"{where}/{METADATA} gives {key[:200]!r} no shape.")
        parts: dict[tuple[int, ...], Source] = {}
        for chunk in chunks:
            own = chunk.fields if isinstance(chunk, Made) else {}
            first, extent = numbers(own.get("offsets")), numbers(own.get("sizes"))
            if first is None or extent is None or not len(first) == len(extent) == len(shape):
                raise CheckpointFormatError(
                    f"{where}/{METADATA} misplaces a part of {key[:200]!r}."
                )
            if first in parts or (0 in extent and 0 not in shape):
                continue
            place = places.get((key, first))
            part = None if place is None else _part(store, sizes, top, where, place, name)
            if part is None or part.shape != extent:
                raise CheckpointFormatError(
                    f"{where} lacks a part of {key[:200]!r}, or has another in its place."
                )
            parts[first] = part
        made[name] = _put_together(name, shape, parts, where)
    return made


def of_ranks(store: Store, sizes: Mapping[str, int], top: str, where: str) -> dict[str, Source]:
    """Return the model in verl's files, one a process: what its `model_merger` makes of them.

    Values keep the dtype that they are stored in; verl's own merger rounds them to bfloat16.
    Args and errors are those of `of_torch`.
    """
    files: dict[int, str] = {}
    worlds = set()
    for name in sizes:
        if found := _RANK.search(name):
            worlds.add(int(found[1]))
            files[int(found[2])] = name
    world = max(worlds)
    if len(worlds) != 1 or sorted(files) != list(range(world)):
        raise CheckpointFormatError(
            f"{where} has the parts of {len(files)} processes, of {listed(sorted(worlds))}: "
            "download it again."
        )
    opened = [
        TorchFile.read(store, file, 0, sizes[file], where=f"{where}/{file.removeprefix(top)}")
        for file in map(files.__getitem__, range(world))
    ]
    states = [texts(one.content) for one in opened]
    check_count(len(states[0]), where=where)
    made: dict[str, Source] = {}
    for name, value in states[0].items():
        every = [state.get(name) for state in states]
        if world == 1 and (plain := opened[0].tensor(value, name)) is not None:
            made[name] = plain
            continue
        if not isinstance(value, Made):
            continue  # such as a counter
        split = [_distributed(one) for one in every]
        if any(one is None for one in split):
            raise UnsupportedCheckpointError(
                f"{where} holds {name[:200]!r} as torch's DTensor does not."
            )
        shape, axis, is_copied = split[0] or ((), None, False)
        locals_ = [
            part
            for one, value in zip(opened, every, strict=True)
            if (part := one.tensor(_local(value), name)) is not None
        ]
        if len(locals_) != world or any(one != split[0] for one in split):
            raise CheckpointFormatError(f"the parts of {name[:200]!r} in {where} do not agree.")
        made[name] = (
            locals_[0]
            if axis is None
            else _along(name, shape, axis, locals_, where, is_copied=is_copied)
        )
    return made


def of_universal(store: Store, sizes: Mapping[str, int], top: str, where: str) -> dict[str, Source]:
    """Return the model in DeepSpeed's universal checkpoint: a folder a tensor, in float32.

    Args and errors are those of `of_torch`.
    """
    made: dict[str, Source] = {}
    store.expect(end for file, size in sizes.items() for end in _ends(file, 0, size))
    for file, size in sizes.items():
        if not (found := _UNIVERSAL.search(file)):
            continue
        name = found[1].removeprefix("module.")
        opened = TorchFile.read(store, file, 0, size, where=f"{where}/{file.removeprefix(top)}")
        param = texts(opened.content).get("param", opened.content)
        tensor = opened.tensor(param, name)
        if tensor is None:
            raise CheckpointFormatError(f"{opened.where} holds no tensor.")
        made[name] = tensor
    check_count(len(made), where=where)
    return made


def of_states(store: Store, sizes: Mapping[str, int], top: str, where: str) -> dict[str, Source]:
    """Return the 16-bit weights in DeepSpeed's states of a model, or in its ``pytorch_model.bin``.

    Args and errors are those of `of_torch`.
    """
    made: dict[str, Source] = {}
    for file, size in sizes.items():
        opened = TorchFile.read(store, file, 0, size, where=f"{where}/{file.removeprefix(top)}")
        content = texts(opened.content)
        for name, value in texts(content.get("module", opened.content)).items():
            tensor = opened.tensor(value, name)
            if tensor is None:
                continue
            name = name.removeprefix("module.")
            if name in made:  # a part each, or two steps
                raise UnsupportedCheckpointError(f"{name[:200]!r} is in several files of {where}.")
            made[name] = tensor
    check_count(len(made), where=where)
    if not made or any(0 in one.shape for one in made.values()):
        raise UnsupportedCheckpointError(
            f"{where} has its weights in parts that only DeepSpeed puts together."
        )
    return made


def _of_model(tensors: Iterable[str], paths: Mapping[str, Any]) -> dict[str, str]:
    """Return the tensors of the model in a state, each with its name in the model.

    Args:
        tensors: flattened names.
        paths: of each, where in the state it was, as torch notes it.
    """
    places: dict[str, tuple[Any, ...]] = {}
    for key in tensors:
        path = paths.get(key)
        is_path = isinstance(path, tuple) and all(isinstance(part, str) for part in path)
        places[key] = path if path and is_path else (key,)
    folders = Counter(path[:-1] for path in places.values())
    of_model = [one for one in folders if one and one[-1] in ("model", "state_dict", "module")]
    chosen: tuple[Any, ...] = min(of_model, key=len) if of_model else ()
    if not of_model and chosen not in folders:
        chosen = folders.most_common(1)[0][0] if folders else ()
    return {key: str(path[-1]) for key, path in places.items() if path[:-1] == chosen}


def _part(
    store: Store,
    sizes: Mapping[str, int],
    top: str,
    where: str,
    place: Mapping[str, Any],
    name: str,
) -> Source | None:
    """Return a part of a tensor that lies where torch's metadata says."""
    span = _span(place, sizes, top)
    if span is None:
        return None
    if place.get("transform_descriptors"):
        raise UnsupportedCheckpointError(f"{where} is compressed.")
    file, begin, end = span
    shown = f"{where}/{file.removeprefix(top)}"
    if end > sizes[file]:
        raise CheckpointFormatError(f"{shown} is cut short.")
    opened = TorchFile.read(store, file, begin, end, where=shown)
    return opened.tensor(opened.content, name)


def _span(
    place: Mapping[str, Any], sizes: Mapping[str, int], top: str
) -> tuple[str, int, int] | None:
    """Return which file holds a part, and from where to where; None where there is no such file."""
    file, begin, length = (place.get(key) for key in ("relative_path", "offset", "length"))
    span = numbers((begin, length))
    if span is None or not isinstance(file, str) or top + file not in sizes:
        return None
    return top + file, span[0], sum(span)


def _ends(file: str, begin: int, end: int) -> list[tuple[str, int, int]]:
    """Return the ranges of a file, or of a part of one, that say what is in it."""
    middle = min(begin + _END_BYTES, end)
    return [(file, begin, middle), (file, max(end - _END_BYTES, middle), end)]


def _put_together(
    name: str, shape: tuple[int, ...], parts: Mapping[tuple[int, ...], Source], where: str
) -> Source:
    """Return a tensor made of parts that lie in a grid: whole rows, columns, or both."""
    cuts = [sorted({first[axis] for first in parts}) for axis in range(len(shape))]
    count = math.prod(map(len, cuts))
    ends = [
        dict(zip(starts, [*starts[1:], size], strict=True))
        for starts, size in zip(cuts, shape, strict=True)
    ]
    fits = len(parts) == count and all(
        first + extent == end[first]
        for place, part in parts.items()
        for first, extent, end in zip(place, part.shape, ends, strict=True)
    )
    if not parts or not fits or any(starts[0] for starts in cuts if starts):
        raise UnsupportedCheckpointError(
            f"the parts of {name[:200]!r} in {where} do not make a tensor of shape {list(shape)}."
        )
    if len({part.dtype for part in parts.values()}) != 1:
        raise CheckpointFormatError(f"the parts of {name[:200]!r} in {where} differ in dtype.")

    def joined(axis: int, place: tuple[int, ...]) -> Source:
        if axis == len(shape):
            return parts[place]
        inner = [joined(axis + 1, (*place, start)) for start in cuts[axis]]
        return inner[0] if len(inner) == 1 else Joined(inner, axis)

    return joined(0, ())


def _along(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    parts: list[Source],
    where: str,
    *,
    is_copied: bool,
) -> Source:
    """Return a tensor whose parts lie along an axis, in the order of the processes."""
    needed: dict[tuple[int, ...], Source] = {}
    at = 0
    for part in parts:
        if is_copied and at == shape[axis]:
            break  # the others are copies of these
        if part.shape[axis]:
            needed[(*[0] * axis, at, *[0] * (len(shape) - axis - 1))] = part
        at += part.shape[axis]
    return _put_together(name, shape, needed, where)


def _distributed(value: object) -> tuple[tuple[int, ...], int | None, bool] | None:
    """Return a DTensor's shape, the axis it is cut along, and whether there are copies of that.

    Of one that is cut along several axes, or is none: None.
    """
    if not isinstance(value, Made) or value.what != "torch._tensor._rebuild_from_type_v2":
        return None
    if len(value.args) < 4 or not isinstance(value.args[2], tuple) or len(value.args[2]) < 3:
        return None
    shape = numbers(value.args[2][2])
    spec = _state(value).get("_spec")
    placements = spec.fields.get("placements") if isinstance(spec, Made) else None
    if shape is None or not isinstance(placements, tuple | list):
        return None
    axes: list[int] = []
    for one in placements:
        kind = one.what.rpartition(".")[2] if isinstance(one, Made) else ""
        if kind == "Shard":
            axis = one.fields.get("dim", one.args[0] if one.args else None)
            if type(axis) is not int or not 0 <= axis < len(shape):
                return None
            axes.append(axis)
        elif kind != "Replicate":
            return None
    if len(axes) > 1:
        return None
    return shape, axes[0] if axes else None, len(placements) > 1


def _state(value: Made) -> dict[str, Any]:
    state = value.args[3]
    return texts(state[-1] if isinstance(state, tuple) and state else state)


def _local(value: object) -> object:
    return _state(value).get("_local_tensor") if isinstance(value, Made) else None
