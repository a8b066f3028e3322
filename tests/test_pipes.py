"""Threads around a loop: order, bounds, errors and cancelling."""

import threading

import pytest

from resmerge_stream.pipes import WorkAhead, WriteBehind, heard, meanwhile


def jobs(count, size=1, started=None):
    """Yield jobs that return their number, and note which have been started."""
    for number in range(count):

        def job(number=number):
            if started is not None:
                started.append(number)
            return number

        yield size, job


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("limit", [1, 3, 10**9])
def test_results_come_in_the_order_of_the_jobs(workers, limit):
    """However many threads, the consumer sees the jobs' order, and every job once."""
    ahead = WorkAhead(jobs(200), limit, workers=workers)
    got = []

    for held in ahead:
        got.append(held.value)
        held.free()

    ahead.close()
    assert got == list(range(200))


def test_no_more_is_started_than_fits():
    """Jobs wait until the bytes before them are released; one larger than all passes alone."""
    started = []
    ahead = WorkAhead(jobs(10, size=4, started=started), 8)
    results = iter(ahead)
    first, second = next(results), next(results)
    assert started == [0, 1]

    first.free()
    third = next(results)

    assert started == [0, 1, 2]
    assert (second.value, third.value) == (1, 2)
    ahead.close()
    large = WorkAhead(jobs(2, size=100), 8)
    for held in large:
        held.free()
    large.close()


def test_releasing_twice_gives_back_once():
    """A second release does not make room that is not there."""
    started = []
    ahead = WorkAhead(jobs(10, size=4, started=started), 8)
    results = iter(ahead)
    held, _ = next(results), next(results)

    held.free()
    held.free()
    next(results)

    assert started == [0, 1, 2]
    ahead.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_where_its_result_would_have(workers):
    """Results before a failing job are handed over first, then its error."""

    def all_jobs():
        yield 1, lambda: "one"
        yield 1, lambda: 1 / 0
        yield 1, lambda: "three"

    ahead = WorkAhead(all_jobs(), 10, workers=workers)
    results = iter(ahead)

    assert next(results).value == "one"
    with pytest.raises(ZeroDivisionError):
        next(results)
    ahead.close()


def test_an_error_of_the_source_of_jobs_is_raised():
    """What breaks while jobs are listed reaches the consumer too."""

    def all_jobs():
        yield 1, lambda: "one"
        raise LookupError("no more")

    ahead = WorkAhead(all_jobs(), 10)
    results = iter(ahead)

    assert next(results).value == "one"
    with pytest.raises(LookupError, match="no more"):
        next(results)
    ahead.close()


def test_closing_early_ends_the_threads():
    """A consumer that stops leaves no thread and starts no further job."""
    before = threading.active_count()
    started = []
    ahead = WorkAhead(jobs(1000, started=started), 4, workers=2)
    next(iter(ahead))

    ahead.close()

    count = len(started)
    assert threading.active_count() == before
    assert count < 1000


def test_writes_happen_in_order():
    """What was put first is written first, and drained means written."""
    written = []
    queue = WriteBehind(5)
    for number in range(100):
        queue.put(2, lambda number=number: written.append(number))

    queue.drain()

    assert written == list(range(100))
    queue.close()


def test_several_writes_may_be_under_way():
    """A second thread begins the next write while the first one still waits."""
    gate, begun = threading.Event(), threading.Event()
    queue = WriteBehind(None, threads=2)
    queue.put(1, gate.wait)
    queue.put(1, begun.set)

    assert begun.wait(120)

    gate.set()
    queue.drain()
    queue.close()


def test_nothing_is_begun_after_an_error():
    """Where one write failed, what waits is not begun by another thread either."""
    gate, written = threading.Event(), []
    queue = WriteBehind(None, threads=2)
    queue.put(1, gate.wait)
    queue.put(1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        queue.drain()
    with pytest.raises(ZeroDivisionError):
        queue.put(1, lambda: written.append(1))
    gate.set()

    queue.close()

    assert written == []


def test_a_producer_waits_while_the_window_is_full():
    """No more bytes wait than the limit allows."""
    gate, waiting, first = threading.Event(), [], threading.Event()
    queue = WriteBehind(10)
    queue.put(6, gate.wait)

    def produce():
        for number in range(4):
            queue.put(4, lambda number=number: None)
            waiting.append(number)
            first.set()

    producer = threading.Thread(target=produce)
    producer.start()
    assert first.wait(120)
    producer.join(0.1)  # time enough to do what it must not
    assert len(waiting) == 1

    gate.set()
    producer.join()
    queue.drain()

    assert waiting == [0, 1, 2, 3]
    queue.close()


def test_an_error_of_a_write_reaches_the_producer():
    """A failed write is raised by the next put or by drain, and again by every later one."""
    queue = WriteBehind(10)
    queue.put(1, lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        queue.drain()
    with pytest.raises(ZeroDivisionError):
        queue.put(1, lambda: None)
    queue.close()


def test_closing_drops_what_waits():
    """After a close nothing more is written."""
    gate, written = threading.Event(), []
    queue = WriteBehind(100)
    queue.put(1, gate.wait)
    queue.put(1, lambda: written.append(1))
    closer = threading.Thread(target=queue.close)
    closer.start()

    gate.set()
    closer.join()

    assert len(written) <= 1
    before = list(written)
    assert written == before


def test_a_late_result_is_told_of():
    """While a result is not ready, the consumer hears so, and then gets it."""
    ready = threading.Event()
    ahead = WorkAhead([(1, lambda: ready.wait() and "there")], 8)
    results = ahead.within(0.01)

    assert next(results) is None
    ready.set()

    assert next(held.value for held in results if held is not None) == "there"
    ahead.close()


def test_ticks_come_until_the_call_is_done():
    """While a call runs there is a tick every so often, and none afterwards."""
    done = threading.Event()
    ticks = meanwhile(done.wait, 0.01, lambda: "tick")

    assert [next(ticks), next(ticks)] == ["tick", "tick"]
    done.set()
    assert set(ticks) <= {"tick"}


def test_an_error_of_the_call_is_raised():
    """What the call raises is raised to who waits for it."""

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(meanwhile(fail, 1.0, lambda: None))


def test_closing_ends_a_wait_for_writes():
    """Whoever waits for writes to be done is let go when they are given up."""
    go_on = threading.Event()
    writes = WriteBehind(None)
    writes.put(1, go_on.wait)
    waiting = meanwhile(writes.drain, 0.01, lambda: "tick")
    assert next(waiting) == "tick"

    writes.close(wait=False)

    assert set(waiting) <= {"tick"}
    go_on.set()


def test_what_a_thread_reads_comes_in_order():
    """Every item once, in order, and then the end."""
    assert list(heard(iter(range(50)))) == list(range(50))


def test_an_error_of_the_reader_comes_after_its_items():
    """What was read before is not lost, and the error is the reader's own."""

    def items():
        yield 1
        raise ValueError("broken")

    reading = heard(items())

    assert next(reading) == 1
    with pytest.raises(ValueError, match="broken"):
        next(reading)
