"""What a merge takes: memory, and what is read ahead in it."""

import pytest

from resmerge_stream.planning import costs
from resmerge_stream.planning.plan import Options
from tests.support.checkpoints import make_group, plan_group


def test_too_little_memory_is_refused_with_what_is_needed(group):
    """A budget below the least is refused; the budget that the message names is enough."""
    plan = plan_group(group, options=Options(memory_budget=10_000_000))

    assert plan.refused
    assert len(plan.problems) == 1, plan.problems
    assert "--memory-budget" in plan.problems[0]
    needed = plan.peak_memory_bytes
    again = plan_group(group, options=Options(memory_budget=-(-needed // 10**6) * 10**6))
    assert not again.refused
    assert f"{-(-needed // 1_000_000)}MB" in plan.problems[0]


def test_planned_memory_does_not_grow_with_layers(tmp_path):
    """Four times the layers need the same memory."""
    small = make_group(tmp_path / "small", layers=1)
    large = make_group(tmp_path / "large", layers=4)

    few, many = plan_group(small), plan_group(large)

    assert few.peak_memory_bytes == many.peak_memory_bytes
    assert many.read_bytes > 2 * few.read_bytes


@pytest.mark.parametrize(
    ("asked", "budget", "pieces"), [(True, 10**9, 2), (False, 10**9, 1), (True, 440_000_000, 1)]
)
def test_a_second_large_piece_is_read_ahead_in_memory_that_was_asked_for(
    group, monkeypatch, asked, budget, pieces
):
    """With a budget that has room for it, the line need not wait while a large matrix is merged."""
    large = costs._Ahead(largest=150_000_000, window=16_000_000)
    monkeypatch.setattr(costs, "_read_ahead", lambda plans, room, elsewhere: large)
    plan = plan_group(group, options=Options(memory_budget=budget if asked else None))

    fitted = costs.fit([plan], budget)

    assert fitted.read_ahead_bytes == pieces * large.largest + large.window
    assert fitted.worst <= fitted.room
