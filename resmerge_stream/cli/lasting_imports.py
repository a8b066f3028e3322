"""Imports that last as long as the process, kept from Python's garbage collector."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Import inside this: what is imported is searched for garbage neither now, later nor at exit.

    torch makes some 300,000 objects. Searching them takes half a second of a short merge, most of
    it when the process ends. For a process that runs one command.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
