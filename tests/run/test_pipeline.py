"""The chain that all runs share: order, bytes in flight, errors, and an end at any moment."""

import threading

import pytest

from resmerge_stream.maths.cores import Cores
from resmerge_stream.run.pipeline import blocks_ahead, worked_ahead


class Piece:
    """Something read, of so many bytes, that knows whether it was let go."""

    def __init__(self, number, nbytes=1):
        self.number, self.nbytes, self.closed = number, nbytes, False

    def close(self):
        """Let the bytes go."""
        self.closed = True


def chain(pieces, work, **settings):
    """Return the chain over some pieces, with room for all unless said otherwise."""
    limits = {"read_bytes": 10**6, "work_bytes": 10**6, "workers": 3, **settings}
    reads = ((piece.nbytes, lambda piece=piece: piece) for piece in pieces)
    return worked_ahead(reads, work, cost=lambda piece: piece.nbytes, cores=Cores(0), **limits)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("limit", [1, 10**6])
def test_results_come_in_the_order_of_the_reads(workers, limit):
    """However many threads and however little room, every piece comes once and in order."""
    pieces = [Piece(number) for number in range(50)]

    found = chain(
        pieces, lambda piece: piece.number, workers=workers, read_bytes=limit, work_bytes=limit
    )

    assert list(found) == list(range(50))
    assert all(piece.closed for piece in pieces)


def test_what_was_read_is_let_go_when_the_next_is_asked_for():
    """A result may use its piece until the caller asks for the next one, and no longer."""
    pieces = [Piece(number) for number in range(3)]
    found = chain(pieces, lambda piece: piece)

    first = next(found)
    assert not first.closed
    next(found)

    assert first.closed
    found.close()


def test_no_more_is_read_than_fits():
    """Reading waits until the bytes before are let go."""
    read = []
    pieces = [Piece(number, nbytes=4) for number in range(9)]
    found = chain(pieces, lambda piece: piece.number, read_bytes=8, on_read=read.append)

    next(found)

    assert sum(read) <= 8
    found.close()


def test_an_error_of_the_work_comes_in_its_turn():
    """Results before the failing piece come first, then the error itself."""
    found = chain([Piece(number) for number in (2, 1, 0)], lambda piece: 2 // piece.number)

    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_closing_ends_every_thread():
    """A chain that is left in the middle leaves no thread behind, whatever waits for room."""
    before = set(threading.enumerate())
    found = chain([Piece(n, nbytes=4) for n in range(99)], lambda piece: piece, read_bytes=8)
    next(found)

    found.close()

    assert not [t for t in threading.enumerate() if t not in before and t.is_alive()]


def test_row_blocks_are_merged_at_the_same_time_and_come_in_order():
    """Two threads merge two blocks at once: each waits here for the other."""
    both = threading.Barrier(2, timeout=300)
    blocks = [slice(i, i + 1) for i in range(6)]

    found = list(blocks_ahead(blocks, lambda rows: (both.wait(), rows.start)[1], 2))

    assert found == [(rows, rows.start) for rows in blocks]
