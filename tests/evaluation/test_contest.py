"""A contest: merges by several methods, asked the same questions as base and experts."""

import json

import pytest

from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.evaluation import contest as contest_module
from resmerge_stream.evaluation import run
from resmerge_stream.evaluation.contest import run_contest
from resmerge_stream.evaluation.run import Examination, evaluate_models
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.events import Planned
from resmerge_stream.studies.compare_plan import plan_comparison

GROUP = {name: str(folder) for name, folder in builtin_group().items()}
MODELS = [GROUP["base"], GROUP["rl-sort"], GROUP["rl-add"]]
RECIPE = Recipe(ModelRef(MODELS[0]), tuple(ModelRef(text) for text in MODELS[1:]))
METHODS = ["consensus", "task_arithmetic"]


def contest(tmp_path, keep):
    """Run a contest of METHODS, and return the last event."""
    comparison = plan_comparison(RECIPE, METHODS, out=tmp_path / "out")
    examination = Examination(["sort", "add"], out=tmp_path / "out", limit=20)
    *_, last = run_contest(comparison, examination, keep=keep, work_dir=tmp_path / "work")
    comparison.close()
    return last


def test_a_contest_asks_every_model_what_evaluate_asks(tmp_path):
    """Each merge's accuracy is what `evaluate` finds for that folder, and the best has the most."""
    last = contest(tmp_path, "all")

    folders = [str(tmp_path / "out" / label) for label in METHODS]
    alone = evaluate_models(
        [*MODELS, *folders], Examination(["sort", "add"], out=tmp_path / "alone", limit=20)
    )
    found = last.report["evaluation"]["models"]
    assert list(found) == [*MODELS, *METHODS]
    assert list(found.values()) == list(alone["models"].values())
    means = {label: found[label]["mean"]["accuracy"] for label in METHODS}
    assert means[last.report["best"]] == max(means.values())
    assert "## Evaluation" in (tmp_path / "out" / METHODS[0] / "README.md").read_text()


@pytest.mark.slow
def test_only_the_best_model_stays_when_asked(tmp_path):
    """The winner is that of one pass, its bytes are those of `merge`, the others' reports stay."""
    best = contest(tmp_path, "best").report["best"]

    out = tmp_path / "out"
    whole = contest(tmp_path / "all", "all")
    assert best == whole.report["best"]
    assert [path.name for path in out.iterdir() if path.name in METHODS] == [best]
    others = {path.stem for path in (out / "reports").iterdir()}
    assert others == set(METHODS) - {best}
    alone = tmp_path / "alone"
    list(run_merge(plan_merge(Recipe(RECIPE.base, RECIPE.experts, best), out=alone), out=alone))
    weights = "model.safetensors"
    assert (out / best / weights).read_bytes() == (alone / weights).read_bytes()
    assert list(json.loads((out / "evaluation.json").read_text())["models"])[3:] == METHODS


def test_a_contest_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped while the second merge is asked, it merges and asks nothing of before again."""
    asked, merged = [], []
    ask, merge = run.ask, contest_module.run_merge

    def asking(text, *rest):
        asked.append(text)
        if text.endswith("task_arithmetic") and asked.count(text) == 1:
            raise KeyboardInterrupt
        yield from ask(text, *rest)

    def merging(plan, **given):
        for event in merge(plan, **given):
            merged.extend([plan.recipe.method] if isinstance(event, Planned) else [])
            yield event

    monkeypatch.setattr(run, "ask", asking)
    monkeypatch.setattr(contest_module, "run_merge", merging)
    with pytest.raises(KeyboardInterrupt):
        contest(tmp_path, "best")
    contest(tmp_path, "best")
    contest(tmp_path, "best")

    folders = [str(tmp_path / "out" / label) for label in METHODS]
    assert asked == [*MODELS, folders[0], folders[1], *folders[1:]]
    assert merged == METHODS


@pytest.mark.slow
def test_files_of_others_outlive_a_beaten_model(tmp_path, monkeypatch):
    """What the merge did not write stays in its folder."""
    merge = contest_module.run_merge

    def merging(plan, *, out, **given):
        yield from merge(plan, out=out, **given)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(contest_module, "run_merge", merging)

    best = contest(tmp_path, "best").report["best"]

    for label in set(METHODS) - {best}:
        assert [p.name for p in (tmp_path / "out" / label).rglob("*")] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--evaluate"], "need each other"),
        (["--tasks", "add"], "need each other"),
        (["--keep", "best"], "needs the models' answers"),
        (["--evaluate", "--tasks", "add", "--report-only"], "no model to evaluate"),
        (["--evaluate", "--tasks", "no_such_task"], "add, sort, reverse, close"),
        (["--evaluate", "--tasks", "add", "--limit", "0"], "at least one question"),
    ],
)
def test_a_contest_that_cannot_be_is_refused_before_a_merge(arguments, words, tmp_path, capsys):
    """Each is one message, and nothing is written."""
    out = tmp_path / "out"
    sources = ["--base", MODELS[0], "--expert", MODELS[1], "--expert", MODELS[2]]

    code = main(["compare", *sources, "--methods", "mean,ram", "--out", str(out), *arguments])

    assert code == 2
    assert words in capsys.readouterr().err
    assert not out.exists()
