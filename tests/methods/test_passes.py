"""How often a method looks at all rows of its tensors: what decides how long a merge takes."""

import threading
from collections import Counter

import pytest

from resmerge_stream import Options
from resmerge_stream.maths.task_vectors import TaskVectors
from resmerge_stream.sources.checkpoint import Checkpoint
from tests.support.checkpoints import make_group, merge

DOWN = "model.layers.{}.mlp.down_proj.weight"
SHAPE = (16, 48)  # of these, and of no other tensor of the group


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters", "passes"),
    [
        ("linear", {}, 1),
        ("model_stock", {}, 2),
        ("model_stock", {"filter_wise": True}, 1),
        ("karcher", {}, 2),
        ("dare_linear", {"density": 0.5}, 2),
        ("sce", {}, 2),
        ("sce", {"select_topk": 0.5}, 3),
        ("nuslerp", {}, 2),
        ("nuslerp", {"nuslerp_flatten": False}, 1),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    ],
    ids=str,
)
def test_rows_are_looked_at_no_oftener_than_needed(
    tmp_path, monkeypatch, method, parameters, passes
):
    """Once to merge them, once more where a number of the whole tensor comes first, and for a
    selection whose energies are wanted a third time; files are read once all the same."""
    group = make_group(tmp_path, experts=2)
    looked, read = Counter(), Counter()

    inside = threading.local()

    def counting(look):
        def counted(vectors, rows, *more, **named):
            is_inside, inside.look = getattr(inside, "look", False), True
            looked[vectors.shape] += 0 if is_inside else rows.stop - rows.start
            try:
                return look(vectors, rows, *more, **named)
            finally:
                inside.look = is_inside

        return counted

    def reading(checkpoint, name, rows=None, own=Checkpoint.read):
        begin, stop, _ = (rows or slice(None)).indices(SHAPE[0])
        read[checkpoint.id, name] += stop - begin
        return own(checkpoint, name, rows)

    looks = ("stack", "block", "summed", "write_sum", "dropped_lengths", "_sum", "_products")
    for look in looks:
        monkeypatch.setattr(TaskVectors, look, counting(getattr(TaskVectors, look)))
    monkeypatch.setattr(Checkpoint, "read", reading)

    # The rows that tell whether the models are of one base are looked at before the merge.
    options = Options(unrelated="merge")
    merge(group, tmp_path / "out", method=method, parameters=parameters, options=options)

    assert looked[SHAPE] == passes * 2 * SHAPE[0]
    for folder in group.folders:
        assert [read[str(folder), DOWN.format(layer)] for layer in range(2)] == [SHAPE[0]] * 2
