"""Files mapped into memory: as they were first seen, or an error; never a signal that kills.

A mapped file that is cut short in place has pages with nothing behind them. A read of one sends
SIGBUS, which ends the process without a word. Here such pages read as zeros, and what was made of
them is refused: whoever reads calls `FileMap.check` before it uses what it made.
"""

import ctypes
import functools
import mmap
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import NamedTuple, Self

from .errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    SourceChangedError,
    StoppedError,
)

_SIGBUS = 7  # on Linux, save on processors that nobody merges on
_SA_SIGINFO = 4
_ANONYMOUS, _PRIVATE, _FIXED = 0x20, 0x02, 0x10
# Where `siginfo_t` holds the address, with 64-bit pointers.
_ADDRESS_AT = 16


class Stamp(NamedTuple):
    """What tells that a file is the one that was seen before: nobody sets the last of them.

    Attributes:
        size: bytes.
        mtime_ns: when its content was written, as its writer says.
        ctime_ns: when the file system last saw a change of it, its name or its time.
    """

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the stamp in what the file system says of a file."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class FileMap:
    """A file, mapped when it is first read.

    Args:
        path: of the file.
        shown: what to call it in errors.
        stamp: of the file as it was when its header was read.
    """

    def __init__(self, path: Path, shown: str, stamp: Stamp) -> None:
        self._path, self._shown, self._stamp = path, shown, stamp
        self._mapped: mmap.mmap | None = None
        self._failed = False

    def view(self, begin: int, end: int) -> memoryview:
        """Return the bytes [begin, end) without copying them.

        Raises:
            SourceChangedError: the file is not the one that was seen.
            CheckpointNotFoundError: it is gone.
            CheckpointFormatError: it cannot be mapped.
        """
        if begin == end:
            return memoryview(bytearray())
        return memoryview(self.mapped())[begin:end]

    def mapped(self) -> mmap.mmap:
        """Return the whole file; see `view`."""
        if self._mapped is None:
            with _guarding:
                _install()
            try:
                with self._path.open("rb") as handle:
                    self._compare(os.fstat(handle.fileno()))
                    # Copy-on-write, so that torch takes the buffer as writable; never written.
                    self._mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            except FileNotFoundError as exc:
                raise self._gone() from exc
            except (OSError, ValueError) as exc:
                raise CheckpointFormatError(f"cannot map {self._shown}: {exc}.") from exc
            start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
            _watched[start] = (start, start + len(self._mapped), weakref.ref(self))
            weakref.finalize(self._mapped, _watched.pop, start, None)
        return self._mapped

    def check(self) -> None:
        """See that the file is still the one that was seen, and that each read of it succeeded.

        Raises:
            SourceChangedError: it was written, replaced or cut short.
            CheckpointNotFoundError: it is gone.
            StoppedError: the disk failed.
        """
        try:
            self._compare(os.stat(self._path))
        except FileNotFoundError as exc:
            raise self._gone() from exc
        except OSError as exc:
            raise StoppedError(f"cannot read {self._shown}: {exc.strerror}.") from exc
        if self._failed:
            raise StoppedError(f"cannot read {self._shown}: its disk failed.")

    def close(self) -> None:
        """Forget the map; it goes when the last view of it is gone."""
        self._mapped = None

    def _compare(self, status: os.stat_result) -> None:
        now = Stamp.of(status)
        if now != self._stamp:
            what = (
                "has another size"
                if now.size != self._stamp.size
                else "was written, replaced or linked"
            )
            raise SourceChangedError(
                f"{self._shown} {what} since this command first looked at it, so what was read "
                "of it may be of two models. Run it again when nobody writes there."
            )

    def _gone(self) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(
            f"{self._shown} is gone since this command first looked at it. Put it back."
        )

    def fail(self) -> None:
        """Note that a read found nothing behind a page."""
        self._failed = True


# Of each map in memory: where it begins and ends, and whose it is.
_watched: dict[int, tuple[int, int, "weakref.ref[FileMap]"]] = {}
_guarding = threading.Lock()


class _Action(ctypes.Structure):
    """``struct sigaction`` of the C libraries of Linux on 64 bits."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@functools.cache
def _install() -> object:
    """Install the handler of SIGBUS; return what has to live as long as the process."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None  # a file that is cut short ends the process there
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    before = _Action()

    # The fault is one of a read of weights, by code that holds none of Python's state in the
    # middle of a change: so Python may run here, on the thread that reads.
    def handle(number: int, info: int, context: int) -> None:
        address = ctypes.c_size_t.from_address(info + _ADDRESS_AT).value
        for start, end, file in tuple(_watched.values()):
            if start <= address < end:
                if (found := file()) is not None:
                    found.fail()
                page = address - address % mmap.PAGESIZE
                access = mmap.PROT_READ | mmap.PROT_WRITE
                flags = _ANONYMOUS | _PRIVATE | _FIXED
                if libc.mmap(page, end - page, access, flags, -1, 0) == page:
                    return
        # Not ours: as it was before; the read is repeated when this returns.
        libc.sigaction(number, ctypes.byref(before), None)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(handle)
    action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    libc.sigaction(_SIGBUS, ctypes.byref(action), ctypes.byref(before))
    return handler
