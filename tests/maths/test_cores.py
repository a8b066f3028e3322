"""Cores that help with another's matrix: the same results, in order, however many there are."""

import contextlib
import threading

import pytest
import torch

from resmerge_stream.maths.cores import Cores
from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods.parts.heads import heads_of, project_heads


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs(count):
    """Whoever does a job, its result stands where the job stood."""
    cores = Cores(count)

    assert cores.each([lambda i=i: i * i for i in range(50)]) == [i * i for i in range(50)]
    blocks = [slice(i, i + 1) for i in range(50)]
    assert cores.each_run(blocks, lambda rows: rows.start) == list(range(50))


def test_an_idle_core_helps():
    """Two jobs that wait for each other end: a second thread does one of them."""
    met = threading.Barrier(2)

    indices = Cores(1).each([lambda: met.wait(60), lambda: met.wait(60)])

    assert sorted(indices) == [0, 1]


def test_a_core_that_is_taken_does_not_help():
    """While all cores have matrices of their own, each thread works alone."""
    cores = Cores(2)

    with cores.taken(), cores.taken():
        threads = cores.each([threading.get_ident for _ in range(20)])

    assert set(threads) == {threading.get_ident()}


def test_who_helps_stops_when_the_core_is_wanted():
    """A helper does the job in hand and no other once its core has a matrix of its own."""
    cores, wanted = Cores(1), threading.Event()
    caller = threading.get_ident()

    def job(number):
        if threading.get_ident() == caller:
            wanted.wait(60)  # until the helper's core is wanted
        else:
            stack.enter_context(cores.taken())
            wanted.set()
        return threading.get_ident()

    with contextlib.ExitStack() as stack:
        threads = cores.each([lambda i=i: job(i) for i in range(20)])

    assert len(set(threads)) == 2
    assert sum(thread != caller for thread in threads) == 1


def test_the_first_error_is_raised_and_nothing_is_left_running():
    """What a job raises is raised where the results were asked for; the core is idle again."""
    cores = Cores(1)

    def fail(number):
        raise ValueError(str(number))

    with pytest.raises(ValueError, match=r"\d"):
        cores.each([lambda i=i: fail(i) for i in range(8)])

    met = threading.Barrier(2)
    assert len(cores.each([lambda: met.wait(60)] * 2)) == 2


def _decided(count):
    """Everything that several cores may do for one matrix, done with so many."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(3000, 1100, generator=generator).bfloat16()
    experts = [
        (base.float() + 0.1 * torch.randn(base.shape, generator=generator)).bfloat16()
        for _ in range(3)
    ]
    workspace = Workspace(torch.device("cpu"), cores=Cores(count))
    vectors = TaskVectors(base, experts, workspace, resident=True)
    lean = TaskVectors(base, experts, workspace, resident=False)
    D = vectors.gram()
    heads = heads_of(vectors, 2, D.diagonal().tolist())
    V, Y = project_heads(vectors, heads, D)
    return [D, lean.gram(), lean.whole_gram(), V, Y, *(head.V for head in heads)]


def test_no_bit_depends_on_the_cores():
    """Gram matrices, heads and projections are the same with one core and with four."""
    for alone, helped in zip(_decided(0), _decided(3), strict=True):
        assert torch.equal(alone, helped)


def test_long_rows_are_worked_block_by_block():
    """Where one row is longer than a block, no other core makes temporaries beside it."""
    workspace = Workspace(torch.device("cpu"), cores=Cores(3))
    rows = [torch.zeros(8, 1 << 19), torch.zeros(1, 1).expand(8, 1 << 19)]
    vectors = TaskVectors(rows[0], rows[1:], workspace, resident=False)

    threads = vectors.cores.each_run(vectors.blocks(), lambda rows: threading.get_ident())

    assert vectors.has_large_blocks
    assert set(threads) == {threading.get_ident()}
