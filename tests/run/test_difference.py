"""A merge in which nothing differs is refused before anything is written; one value is enough."""

import shutil

import pytest

from resmerge_stream.errors import PlanRefusedError
from resmerge_stream.planning.compat import NOTHING_DIFFERS
from resmerge_stream.run.difference import is_begun, refused_if_equal
from resmerge_stream.run.engine import run_merge
from resmerge_stream.run.events import Planned, Progressed
from resmerge_stream.studies.compare import run_comparison
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support.checkpoints import Group, edit_tensors, make_group, merge, plan_group, recipe_of

pytestmark = pytest.mark.usefixtures("without_picture")
LAST = "model.norm.weight"


@pytest.fixture
def copies(tmp_path):
    """A base and two copies of it in other folders."""
    base = make_group(tmp_path / "group", experts=0).base
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        shutil.copytree(base, folder)
    return Group(base, folders)


def refusal(plan, out):
    """Return why a merge does not start, after checking that it left nothing behind."""
    with pytest.raises(PlanRefusedError, match="nothing differs") as refused:
        list(run_merge(plan, out=out, work_dir=out.parent / "work"))

    assert not out.exists()
    assert not (out.parent / "work").exists()
    return refused.value


@pytest.mark.parametrize("method", ["resmerge", "mean", "ties"])
def test_copies_of_the_base_are_refused(copies, tmp_path, method):
    """Equal copies in other folders: the plan cannot tell, the merge does, with nothing made."""
    plan = plan_group(copies, out=tmp_path / "out", method=method)

    error = refusal(plan, tmp_path / "out")

    assert error.notices[0].kind == NOTHING_DIFFERS
    assert "were trained from this base" in str(error)


def test_copies_in_another_dtype_and_in_shards_are_refused(copies, tmp_path):
    """Values decide, not bytes: the base as float32 and a copy in two files are still the base."""
    in_shards = make_group(tmp_path / "shards", experts=0, sharded=True).base

    def widened(tensors):
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    edit_tensors(copies.experts[0], widened)
    same = Group(copies.base, (copies.experts[0], in_shards))

    refusal(plan_group(same, out=tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("method", ["resmerge", "mean"])
def test_one_value_anywhere_is_a_difference(copies, tmp_path, method):
    """A single element of the last tensor of the last expert: whole tensors are read to find it."""
    edit_tensors(copies.experts[1], lambda tensors: tensors[LAST][-1:].add_(1))

    merged = merge(copies, tmp_path / "out", method=method)

    changed = {row["name"] for row in merged.report["tensors"] if row["rule"] != "copy"}
    assert changed == {LAST}


def test_what_takes_its_time_is_told(copies):
    """Before whole tensors are read the run says that it starts; rows that differ say nothing."""
    plan = plan_group(copies)
    events = refused_if_equal(plan, Planned(plan={}))

    told = []
    with pytest.raises(PlanRefusedError):
        told.extend(events)

    assert isinstance(told[0], Planned)
    assert all(isinstance(event, Progressed) for event in told[1:])


def test_a_comparison_of_copies_is_refused(copies, tmp_path):
    """Several methods in one pass are refused alike, with nothing made."""
    out = tmp_path / "compared"
    comparison = plan_comparison(recipe_of(copies), ["resmerge", "mean"], out=out)

    with pytest.raises(PlanRefusedError, match="nothing differs"):
        list(run_comparison(comparison, work_dir=tmp_path / "work"))

    assert not out.exists()


def test_a_continued_merge_is_not_looked_at_again(tmp_path):
    """Shards of an earlier run say that something differed: nothing is read twice for that."""
    group, out = make_group(tmp_path / "group", experts=2, sharded=True), tmp_path / "out"
    plan = plan_group(group, out=out)
    events = run_merge(plan, out=out, work_dir=tmp_path / "work")
    next(event for event in events if event.name == "shard")
    events.close()

    assert is_begun(plan, out)
    assert not is_begun(plan, tmp_path / "elsewhere")


def test_a_base_among_experts_is_no_reason(copies, tmp_path):
    """One expert that is the base beside one that differs is merged as ever."""
    other = make_group(tmp_path / "other", experts=1).experts[0]

    merged = merge(Group(copies.base, (copies.experts[0], other)), tmp_path / "out")

    assert any(row["rule"] != "copy" for row in merged.report["tensors"])
