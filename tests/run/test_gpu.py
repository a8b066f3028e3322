"""The arithmetic on a GPU: the same code as on the CPU, and what happens without enough memory.

Here is no GPU to run out of memory, so `torch.OutOfMemoryError` is raised in its place: the only
thing that is made up in these tests. What needs a real GPU is marked so, and skipped without one.
"""

import functools

import pytest
import torch

from resmerge_stream.device import choose_device
from resmerge_stream.errors import RecipeError
from resmerge_stream.maths import task_vectors
from resmerge_stream.maths.lanes import with_retreat
from resmerge_stream.maths.spectral import top_singular
from resmerge_stream.maths.task_vectors import TaskVectors
from resmerge_stream.planning.plan import Options
from resmerge_stream.run.merging import Merger
from tests.support.checkpoints import file_bytes, make_group, merge, plan_group, read_tensors

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = "the device's memory was short: merged"


@pytest.fixture
def with_lanes(monkeypatch):
    """Give a merge on the CPU the ways that a device has; this CPU stands for all of them."""

    def lanes(device, limit, cores):
        from resmerge_stream.maths.lanes import Lane
        from resmerge_stream.maths.task_vectors import Workspace

        return with_retreat(Lane(Workspace(device, limit, cores)), limit)

    monkeypatch.setattr("resmerge_stream.run.merging.lanes_of", lanes)


def _looked(plan, planned):
    yield from ()
    return False


@pytest.fixture
def fail_first(monkeypatch):
    """Return a function that lets the first so many ways of each matrix run out of memory.

    The look whether anything differs is always on the CPU, so it has no such memory to run out of.
    """
    made = TaskVectors.__init__
    monkeypatch.setattr("resmerge_stream.run.engine.refused_if_equal", _looked)

    def prepare(times):
        tried = {}

        def fail(self, base, experts, workspace, **options):
            made(self, base, experts, workspace, **options)
            key = base.data_ptr()
            tried[key] = tried.get(key, 0) + 1
            if tried[key] <= times:
                self.close()
                raise torch.OutOfMemoryError("CUDA out of memory (made up)")

        monkeypatch.setattr(TaskVectors, "__init__", fail)

    return prepare


@pytest.mark.parametrize(("times", "how"), [(1, "in row blocks"), (2, "on the CPU")])
@pytest.mark.usefixtures("without_picture", "with_lanes")
def test_without_memory_a_tensor_is_merged_another_way_and_reported(
    tmp_path, fail_first, times, how
):
    """Out of memory: row blocks, then the CPU; the bytes are the same and the report says so."""
    models = make_group(tmp_path / "group")
    expected = merge(models, tmp_path / "expected")

    fail_first(times)
    merged = merge(models, tmp_path / "out")

    assert file_bytes(tmp_path / "out") == file_bytes(expected.out)
    rows = [row for row in merged.report["tensors"] if row["rule"] != "carried"]
    assert rows
    assert all(f"{SHORT} {how}" in row["warnings"] for row in rows)
    assert any(SHORT in text for text in merged.report["summary"]["warnings"])


@pytest.mark.usefixtures("without_picture", "with_lanes")
def test_memory_that_suffices_is_not_remarked(tmp_path):
    """A merge that never ran short says nothing about memory."""
    merged = merge(make_group(tmp_path / "group"), tmp_path / "out")

    assert not [row for row in merged.report["tensors"] if row["warnings"]]


def test_what_ran_short_gives_its_buffers_back(tmp_path, with_lanes, monkeypatch):
    """After a way failed, its buffers are free for the next: nothing stays lent."""
    plan = plan_group(make_group(tmp_path / "group"), options=Options(device="cpu"))
    merger = Merger(plan, torch.device("cpu"))

    def fail(vectors, site):
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")

    monkeypatch.setattr(type(plan.method), "merge", lambda self, *args: fail(*args))
    from resmerge_stream.run.reading import reads

    tensor = next(t for t in plan.tensors.values() if t.is_decomposed)
    (_, read), *_ = reads([tensor])
    with pytest.raises(torch.OutOfMemoryError):
        merger.prepare(read())

    assert merger.lanes[0].workspace.lent_bytes == 0


@pytest.mark.usefixtures("without_picture")
def test_a_gpus_larger_blocks_round_as_a_cpus(tmp_path, monkeypatch):
    """Stochastic rounding draws for the same rows from the same seeds, however blocks are cut."""
    monkeypatch.setattr(task_vectors, "BLOCK_ELEMENTS", 64)
    models = make_group(tmp_path / "group")
    options = Options(rounding="stochastic")
    expected = merge(models, tmp_path / "expected", method="mean", options=options)
    of_gpu = functools.partial(task_vectors.block_rows, device="cuda")

    monkeypatch.setattr(task_vectors, "block_rows", lambda m, n, device: of_gpu(m, n))
    merge(models, tmp_path / "out", method="mean", options=options)

    assert file_bytes(tmp_path / "out") == file_bytes(expected.out)


def test_a_device_that_is_not_there_is_refused():
    """`--device cuda:99` names the number of devices; mps is refused with the reason."""
    with pytest.raises(RecipeError, match="such device"):
        choose_device("cuda:99")
    with pytest.raises(RecipeError, match="float64"):
        choose_device("mps")


def test_processes_of_one_machine_get_different_gpus(monkeypatch):
    """Process k gets GPU k; with fewer GPUs than processes they are shared in turn."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    chosen = []
    for number in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        chosen.append(choose_device("auto").index)

    assert chosen == [0, 1, 0]
    assert torch.get_float32_matmul_precision() == "highest"
    assert choose_device("cuda:1").index == 1


@pytest.mark.parametrize("method", ["resmerge", "head_regression", "ties", "tsv_m", "mean"])
class TestOnAGpu:
    pytestmark = gpu

    def test_a_gpu_gives_the_updates_of_the_cpu(self, tmp_path, method):
        """ΔW in float32 within 1e-5 of the CPU's, tensor by tensor."""
        models = make_group(tmp_path / "group")
        options = [Options(device=device) for device in ("cpu", "cuda")]
        merged = [
            merge(models, tmp_path / o.device, options=o, method=method, dtype="float32")
            for o in options
        ]

        base = read_tensors(models.base)
        for name, weights in merged[0].tensors.items():
            delta = weights.double() - base[name].double()
            other = merged[1].tensors[name].double() - base[name].double()
            scale = max(float(delta.norm()), 1e-6 * float(base[name].double().norm()))
            assert float((other - delta).norm()) <= 1e-5 * scale, name


class TestLanczosOnAGpu:
    pytestmark = gpu

    def test_a_step_waits_for_the_device_at_most_once(self):
        """Lanczos looks at the device's numbers no more often than it takes steps."""
        delta = torch.randn(3000, 1500, device="cuda")
        with torch.profiler.profile(acc_events=True) as profile:
            head = top_singular(delta, 1)
        waits = sum("Memcpy DtoH" in event.name for event in profile.events())

        assert waits <= head.steps + 20
