"""Memory that threads keep: whatever their number, two heaps of the C library."""

import sys

import pytest

from tests.support.checkpoints import run_python

HEAPS = """
import ctypes, sys, threading
from resmerge_stream.cli.main import main
if sys.argv[1] == "command":
    try:
        main(["--version"])
    except SystemExit:
        pass
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
meet = threading.Barrier(6)
def use():
    libc.malloc(1000)
    meet.wait()
threads = [threading.Thread(target=use) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
sys.stdout.flush()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_commands_threads_share_two_heaps():
    """With a heap for each thread, memory would grow with the cores, beyond what is planned."""
    alone, shared = (run_python(HEAPS, how).stdout.count("<heap nr=") for how in ("", "command"))

    assert shared <= 2 < alone
