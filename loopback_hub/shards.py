"""Which files a Xet store holds, read from its shard files (MDB) without opening its database."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER_BYTES = 48
_FILE = struct.Struct("<32sII8x")  # Xet hash, flags, number of segments
_SEGMENT = struct.Struct("<32sIIII")  # xorb hash, flags, bytes, first chunk, last chunk
_BOOKEND = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class XetFile:
    """A file in a Xet store: SHA-256 of its content, Xet hash, size in bytes."""

    sha256: str
    hash: str
    size: int


def read_shard(path: Path) -> Iterator[XetFile]:
    """The files with a known SHA-256 that a shard describes."""
    content = path.read_bytes()
    position = _HEADER_BYTES
    while True:
        file_hash, flags, segments = _FILE.unpack_from(content, position)
        if file_hash == _BOOKEND:
            return
        position += _FILE.size
        size = sum(
            _SEGMENT.unpack_from(content, position + i * _SEGMENT.size)[2] for i in range(segments)
        )
        position += segments * _SEGMENT.size * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_SHA256:
            yield XetFile(
                sha256=_hex(content[position : position + 32]), hash=_hex(file_hash), size=size
            )
            position += _SEGMENT.size


def _hex(digest: bytes) -> str:
    # Xet keeps a hash as four little-endian 64-bit words and prints each as a number.
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
