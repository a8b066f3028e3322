"""Memory for merged bytes."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from resmerge_stream.maths.stored_bytes import Gathered, Recycled, bytes_of


def address_of(memory: memoryview) -> int:
    """Return where memory lies."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def test_memory_is_lent_again_once_nobody_refers_to_it() -> None:
    """The next bytes of that length lie where the last ones lay; other lengths elsewhere."""
    memory = Recycled(kept_bytes=1000)
    lent = memory.take(100)
    place = address_of(lent)
    del lent

    other, same = memory.take(101), memory.take(100)

    assert address_of(same) == place
    assert len(other) == 101


def test_memory_that_a_part_refers_to_is_not_lent() -> None:
    """A slice, an array and a tensor of lent memory keep it from being lent."""
    memory = Recycled(kept_bytes=1000)
    gathered = Gathered(64, memory)
    part = gathered.part(32, 32)
    part[:] = bytes(range(32))
    tensor = torch.frombuffer(part, dtype=torch.uint8)
    rest = bytes_of(tensor)[8:]
    del gathered, part, tensor
    gc.collect()

    np.frombuffer(memory.take(64), np.uint8)[:] = 255

    assert rest.tobytes() == bytes(range(8, 32))


def test_no_more_memory_is_kept_than_allowed() -> None:
    """Of memory that came back only so much waits; the oldest goes first."""
    memory = Recycled(kept_bytes=250)
    held = [memory.take(100) for _ in range(5)]
    places = [address_of(lent) for lent in held]
    while held:
        held.pop(0)
    memory.take(0)

    kept = [lent.ctypes.data for lent in memory._free]

    assert kept == places[3:]


def test_threads_never_share_memory() -> None:
    """What a thread writes into memory it holds stays as it wrote it."""
    memory, wrong = Recycled(kept_bytes=10_000), []

    def work(number: int) -> None:
        for _ in range(500):
            lent = np.frombuffer(memory.take(512), np.uint8)
            lent[:] = number
            if not (lent == number).all():
                wrong.append(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))

    assert not wrong


def test_what_is_lent_is_counted_and_what_is_large_is_not_kept() -> None:
    """Bytes count until nobody refers to them; more than may wait goes back at once."""
    memory = Recycled(kept_bytes=250)
    small, large = memory.take(200), memory.take(300)
    assert memory.lent_bytes == 500

    del small, large

    assert memory.lent_bytes == 0
    assert [lent.nbytes for lent in memory._free] == [200]
