"""Files that torch.save wrote: where in them the values of each tensor lie. Nothing is unpickled.

Such a file is a zip without compression: ``data.pkl`` says what is there, and ``data/0``,
``data/1`` and so on are the bytes that its tensors are views of.
"""

import io
import math
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointFormatError, UnsupportedCheckpointError
from ..specs import DTYPES, TensorSpec
from .assembly import Source, Stored, Transposed
from .pickled import MAX_BYTES, Made, loads, numbers
from .store import Store, StoredTensor

# https://docs.pytorch.org/docs/2.13/notes/serialization.html: in the order of a local header.
_LOCAL = struct.Struct("<4s22xHH")
_DTYPES = {f"torch.{dtype.torch_name}": name for name, dtype in DTYPES.items()}
_STORAGES = {
    "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": "U8",
}  # fmt: skip
_OF_STORAGE = {f"torch.{kind}Storage": dtype for kind, dtype in _STORAGES.items()} | {
    "torch.storage.UntypedStorage": "U8"
}
_REBUILT = "torch._utils._rebuild_"


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file of torch.save, or a part of a larger file that is one.

    Attributes:
        store: where it is.
        file: its name there.
        where: what to call it in errors.
        begin: of a part: where it begins.
        content: what it holds, as `pickled.loads` reads it.
        records: where in the file each storage begins, and its bytes.
    """

    store: Store
    file: str
    where: str
    begin: int
    content: Any
    records: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, store: Store, file: str, begin: int, end: int, *, where: str) -> "TorchFile":
        """Read what lies where.

        Args:
            store: where the file is.
            file: its name there.
            begin, end: which bytes of it torch.save wrote.
            where: what to call it in errors.

        Raises:
            CheckpointFormatError: it is no such file, or is damaged.
            StoppedError: the bytes cannot be had right now.
        """
        part = _Part(store, file, begin, end)
        try:
            with zipfile.ZipFile(part) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, *_DAMAGED) as exc:
            raise CheckpointFormatError(
                f"{where} is not a file of torch.save, or is damaged or cut short."
            ) from exc
        top = next((e.filename.partition("/")[0] for e in entries if "/" in e.filename), "")
        heads = (begin + entry.header_offset for entry in entries)
        store.expect(
            (file, head, min(head + _LOCAL.size, end)) for head in heads if begin <= head < end
        )
        places = {
            entry.filename.removeprefix(f"{top}/"): _place(part, entry, where) for entry in entries
        }

        def record(name: str) -> bytes:
            first, size = places[name]
            return bytes(store.read(file, begin + first, begin + first + size))

        if "data.pkl" not in places or places["data.pkl"][1] > MAX_BYTES:
            raise CheckpointFormatError(f"{where} holds no data.pkl that torch.save writes.")
        if "byteorder" in places and record("byteorder") != b"little":
            raise UnsupportedCheckpointError(f"{where} was written on a big-endian machine.")
        content = loads(record("data.pkl"), where=f"{where} (data.pkl)")
        records = {
            name.removeprefix("data/"): place
            for name, place in places.items()
            if name.startswith("data/")
        }
        return cls(store, file, where, begin, content, records)

    def tensor(self, value: object, name: str) -> Source | None:
        """Return where a tensor's values are; None where the value is no plain tensor.

        Args:
            value: of the content.
            name: what the tensor is called.

        Raises:
            CheckpointFormatError: it lies outside of what is stored.
            UnsupportedCheckpointError: its values are not side by side.
        """
        if isinstance(value, Made) and value.what == f"{_REBUILT}parameter" and value.args:
            value = value.args[0]
        if not isinstance(value, Made) or len(value.args) < 4:
            return None
        if value.what not in (f"{_REBUILT}tensor_v2", f"{_REBUILT}tensor_v3", f"{_REBUILT}tensor"):
            return None
        stored, offset, shape, strides = value.args[:4]
        sizes, steps = numbers(shape), numbers(strides)
        reference = stored.args[0] if isinstance(stored, Made) and stored.args else None
        if (
            not isinstance(reference, tuple)
            or len(reference) != 5
            or sizes is None
            or steps is None
            or len(sizes) != len(steps)
            or numbers((offset,)) is None
        ):
            raise CheckpointFormatError(f"{self.where} describes {name[:200]!r} as torch does not.")
        _, kind, key, _, _ = reference
        dtype = _OF_STORAGE.get(getattr(kind, "name", ""), "")
        if value.what == f"{_REBUILT}tensor_v3":
            dtype = (
                _DTYPES.get(getattr(value.args[6], "name", ""), "") if len(value.args) > 6 else ""
            )
        if not dtype:
            raise UnsupportedCheckpointError(
                f"{self.where} holds {name[:200]!r} in a dtype that cannot be read here."
            )
        first, size = self.records.get(str(key), (0, 0))
        item = DTYPES[dtype].nbytes
        extent = 1 + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
        if math.prod(sizes) and (offset + extent) * item > size:
            raise CheckpointFormatError(
                f"{self.where}: {name[:200]!r} needs more bytes than are stored for it."
            )
        axes = list(range(len(sizes)))
        if not _side_by_side(sizes, steps):
            axes.sort(key=lambda axis: (-steps[axis], axis))
        if not _side_by_side([sizes[a] for a in axes], [steps[a] for a in axes]):
            raise UnsupportedCheckpointError(
                f"{self.where} holds {name[:200]!r} as a view whose values are not side by side."
            )
        spec = TensorSpec(name, dtype, tuple(sizes[axis] for axis in axes))
        place = StoredTensor(spec, self.file, self.begin + first + offset * item)
        source = Stored(self.store, place)
        if axes == sorted(axes):
            return source
        return Transposed(source, tuple(axes.index(axis) for axis in range(len(axes))))


# What a zip that is none makes Python's reader raise.
_DAMAGED = (
    ValueError, OSError, EOFError, IndexError, KeyError, NotImplementedError, OverflowError,
    struct.error,
)  # fmt: skip


class _Part(io.RawIOBase):
    """Some bytes of a store's file, as a file."""

    def __init__(self, store: Store, file: str, begin: int, end: int) -> None:
        self._store, self._file, self._begin, self.size = store, file, begin, end - begin
        self._at = 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as every file does."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError("before the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return bytes from the place on."""
        stop = self.size if size is None or size < 0 else min(self._at + size, self.size)
        if stop <= self._at:
            return b""
        data = bytes(self._store.read(self._file, self._begin + self._at, self._begin + stop))
        self._at = stop
        return data


def _place(part: _Part, entry: zipfile.ZipInfo, where: str) -> tuple[int, int]:
    """Return where in a zip an entry's bytes begin, and how many there are."""
    part.seek(entry.header_offset)
    local = part.read(_LOCAL.size)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointFormatError(f"{where} is compressed or encrypted, as torch writes none.")
    if len(local) < _LOCAL.size or not local.startswith(b"PK\3\4"):
        raise CheckpointFormatError(f"{where} is damaged: an entry of it is not where it says.")
    _, name, extra = _LOCAL.unpack(local)
    first = entry.header_offset + _LOCAL.size + name + extra
    if first + entry.file_size > part.size:
        raise CheckpointFormatError(f"{where} is cut short: an entry of it ends behind its end.")
    return first, entry.file_size


def _side_by_side(sizes: Sequence[int], steps: Sequence[int]) -> bool:
    """Return whether values in this order of axes leave no hole and share no place."""
    expected = 1
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if size > 1 and step != expected:
            return math.prod(sizes) == 0
        expected *= size
    return True
