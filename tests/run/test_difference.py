"""A merge in which nothing differs is refused before anything is written; one value is enough."""

import shutil
from dataclasses import replace

import pytest
import torch

from resmerge_stream.cli.main import main
from resmerge_stream.errors import PlanRefusedError
from resmerge_stream.planning.compat import IDLE, NOTHING_DIFFERS, UNRELATED
from resmerge_stream.planning.plan import Options, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe, Tokenizer
from resmerge_stream.run.difference import is_begun, refused_if_equal
from resmerge_stream.run.engine import run_merge
from resmerge_stream.run.events import Planned, Progressed
from resmerge_stream.studies.advice import read_regime
from resmerge_stream.studies.compare import run_comparison
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support.adapters import written
from tests.support.checkpoints import (
    Group,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
    recipe_of,
)

pytestmark = pytest.mark.usefixtures("without_picture")
LAST = "model.norm.weight"
ADAPTED = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """A base and two copies of it in other folders, as if too large to be hashed while planning."""
    monkeypatch.setattr("resmerge_stream.sources.local.HASHED_BYTES", 0)
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


@pytest.fixture
def strangers(tmp_path):
    """A base, an expert of it, and a model of the same shapes that began elsewhere."""
    group = make_group(tmp_path / "group", experts=1, hidden=32)
    other = make_group(tmp_path / "other", experts=0, hidden=32, seed=7).base
    return Group(group.base, (*group.experts, other))


@pytest.mark.parametrize("method", ["ties", "head_regression", "resmerge", "linear", "karcher"])
def test_an_expert_of_another_base_is_refused(strangers, tmp_path, method):
    """Shapes alone say nothing: its matrices have no direction in common with the base's."""
    out = tmp_path / "out"

    with pytest.raises(PlanRefusedError, match=r"other/base.*not trained from") as refused:
        merge(strangers, out, method=method)

    assert refused.value.notices[0].kind == UNRELATED
    assert not out.exists()


def test_without_a_base_models_are_compared_with_the_first(strangers, tmp_path):
    """An average of models that began apart is none: refused, with the same way out."""
    models = tuple(ModelRef(str(folder)) for folder in strangers.experts)
    plan = plan_merge(Recipe(None, models, "linear"), out=tmp_path / "out")

    with pytest.raises(PlanRefusedError, match=r"other/base: not trained from .*trained from one"):
        list(run_merge(plan, out=tmp_path / "out"))


def test_of_many_models_without_a_base_those_that_began_apart_are_named(tmp_path):
    """However many there are, each is compared with the first."""
    models = [make_group(tmp_path / str(n), experts=0, hidden=32, seed=n).base for n in range(11)]
    recipe = Recipe(None, tuple(ModelRef(str(folder)) for folder in models), "linear")
    plan = plan_merge(recipe, out=tmp_path / "out")

    with pytest.raises(PlanRefusedError, match=f"{models[1]}, .*{models[10]}: not trained from"):
        list(run_merge(plan, out=tmp_path / "out"))


def test_no_advice_is_given_on_an_expert_of_another_base(strangers):
    """Advice on a merge that would be refused is refused."""
    with pytest.raises(PlanRefusedError, match=r"other/base: not trained from"):
        list(read_regime(plan_group(strangers, method="ties")))


def test_tokens_matched_by_union_hide_no_stranger(strangers, tmp_path):
    """A union differs from the base in any case; its experts are still to be the base's."""
    recipe = replace(recipe_of(strangers, method="ties"), tokenizer=Tokenizer("union"))
    plan = plan_merge(recipe, out=tmp_path / "out")

    with pytest.raises(PlanRefusedError, match=r"other/base.*not trained from"):
        list(run_merge(plan, out=tmp_path / "out"))


def test_a_merge_without_matrices_has_nothing_to_compare(tmp_path):
    """Where all matrices are whole numbers, which are kept, the rest is merged."""
    group = make_group(tmp_path / "group", experts=2)

    def in_codes(tensors):
        matrices = [name for name in tensors if name.endswith("_proj.weight")]
        tensors.update({name: tensors[name].to(torch.int8) for name in matrices})

    for folder in (group.base, *group.experts):
        edit_tensors(folder, in_codes)

    assert merge(group, tmp_path / "out", method="mean").events[-1].name == "finished"


def test_an_expert_of_another_base_is_merged_on_request(strangers, tmp_path):
    """The way out that the refusal names leads to a merge."""
    merged = merge(strangers, tmp_path / "out", method="mean", options=Options(unrelated="merge"))

    assert merged.events[-1].name == "finished"


@pytest.mark.parametrize("factor", [1, 10, 100])
def test_a_long_trained_expert_is_an_expert(tmp_path, factor):
    """However long its update, an expert keeps the direction of the base's matrices."""
    group = make_group(tmp_path / "group", experts=2, hidden=32)
    base = read_tensors(group.base)

    def trained(tensors):
        for name, tensor in tensors.items():
            start = base[name].float()
            tensor.copy_(start + factor * (tensor.float() - start))

    edit_tensors(group.experts[0], trained)
    edit_tensors(group.experts[1], lambda tensors: [t.mul_(10) for t in tensors.values()])

    assert merge(group, tmp_path / "out", method="mean").events[-1].name == "finished"


def test_an_expert_that_changes_nothing_is_named(tmp_path):
    """A copy of the base beside an expert: the plan says it where files are hashed."""
    group = make_group(tmp_path / "group", experts=2)
    copy = shutil.copytree(group.base, tmp_path / "copy")
    twin = shutil.copytree(group.experts[0], tmp_path / "twin")

    told = plan_group(Group(group.base, (*group.experts, copy, twin, group.base))).warnings

    words = [str(warning) for warning in told if warning.kind == IDLE]
    assert len(words) == 3
    assert f"{copy} has the weight files of {group.base}: it changes nothing" in words[0]
    assert f"{twin} has the weight files of {group.experts[0]}: it counts twice" in words[1]
    assert "changes nothing" in words[2]


def test_a_run_names_experts_that_are_equal(tmp_path, monkeypatch, capsys):
    """Copies too large to be hashed are named by report, card and log, also when continued."""
    monkeypatch.setattr("resmerge_stream.sources.local.HASHED_BYTES", 0)
    group, out = make_group(tmp_path / "group", experts=0, sharded=True), tmp_path / "out"
    first, second = make_group(tmp_path / "trained", experts=2).experts
    copies = [shutil.copytree(first, tmp_path / name) for name in ("copy", "copy too")]
    nearly = shutil.copytree(second, tmp_path / "nearly")
    edit_tensors(nearly, lambda tensors: tensors["model.norm.weight"].view(-1)[-1:].add_(1))
    group = Group(group.base, (first, copies[0], second, nearly, copies[1]))
    events = run_merge(plan_group(group, out=out), out=out, work_dir=tmp_path / "w")
    next(event for event in events if event.name == "shard")
    events.close()
    words = ["--base", str(group.base), "--out", str(out), "--work-dir", str(tmp_path / "w")]

    *_, last = run_merge(plan_group(group, out=out), out=out, work_dir=tmp_path / "w")

    summary = last.report["summary"]
    assert summary["change_alike"] == {str(copy): str(first) for copy in copies}
    assert summary["change_nothing"] == []
    assert sum("it counts twice" in text for text in summary["warnings"]) == 2
    card = (out / "README.md").read_text().replace("`", "")
    assert "copy changes every value as expert0 does: it counts twice" in card
    for expert in group.experts:
        words += ["--expert", str(expert)]
    assert main(["merge", *words, "--method", "resmerge"]) == 0
    assert f"warning: {copies[0].name} changes every value as" in capsys.readouterr().out


def test_equal_adapters_are_named_too(tmp_path, monkeypatch):
    """Their factors are compared; one whose factors differ in one value is another."""
    monkeypatch.setattr("resmerge_stream.sources.local.HASHED_BYTES", 0)
    group = make_group(tmp_path / "group", experts=0)
    random = torch.Generator().manual_seed(3)
    rows, columns = read_tensors(group.base)[f"{ADAPTED}.weight"].shape
    factors = {
        f"base_model.model.{ADAPTED}.lora_A.weight": torch.randn(2, columns, generator=random),
        f"base_model.model.{ADAPTED}.lora_B.weight": torch.randn(rows, 2, generator=random),
    }
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    lora = written(tmp_path / "lora", factors, **settings)
    copy = written(tmp_path / "copy", factors, **settings)
    list(factors.values())[1].view(-1)[-1] += 1
    other = written(tmp_path / "other", factors, **settings)

    made = merge(Group(group.base, (lora, copy, other)), tmp_path / "out", method="mean")

    assert made.report["summary"]["change_alike"] == {str(copy): str(lora)}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_run_names_an_expert_that_changed_nothing(dtype, tmp_path, capsys):
    """Where the plan cannot tell, report, card and log do, also after the merge was continued."""
    group = make_group(tmp_path / "group", experts=1, sharded=True)
    copy = make_group(tmp_path / "again", experts=0, dtype=dtype or torch.bfloat16).base
    if dtype is not None:  # the same values, stored otherwise
        values = {name: tensor.float() for name, tensor in read_tensors(group.base).items()}
        edit_tensors(copy, lambda tensors: tensors.update(values))
    group, out = Group(group.base, (*group.experts, copy)), tmp_path / "out"
    events = run_merge(plan_group(group, out=out), out=out, work_dir=tmp_path / "w")
    next(event for event in events if event.name == "shard")
    events.close()
    words = ["--base", str(group.base), "--out", str(out), "--work-dir", str(tmp_path / "w")]

    *_, last = run_merge(plan_group(group, out=out), out=out, work_dir=tmp_path / "w")

    assert last.report["summary"]["change_nothing"] == [str(copy)]
    assert any("changes nothing" in text for text in last.report["summary"]["warnings"])
    assert "base-2 changes nothing" in (out / "README.md").read_text().replace("`", "")
    for expert in group.experts:
        words += ["--expert", str(expert)]
    assert main(["merge", *words, "--method", "resmerge"]) == 0
    assert "warning: base-2 changes nothing" in capsys.readouterr().out


def test_the_base_given_as_an_expert_is_named(tmp_path, capsys):
    """It is left out, and the plan says so."""
    group = make_group(tmp_path / "group", experts=1)
    words = ["--base", str(group.base), "--expert", str(group.experts[0])]

    assert main(["plan", *words, "--expert", str(group.base)]) == 0

    assert f"{group.base} is the base: as an expert it changes nothing" in capsys.readouterr().out
