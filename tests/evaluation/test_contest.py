"""A contest: merges by several methods, asked the same questions as base and experts."""

import contextlib
import json
import random

import pytest

from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.errors import CheckpointFormatError
from resmerge_stream.evaluation import candidates, run
from resmerge_stream.evaluation.choice import choose, falls_short, reported
from resmerge_stream.evaluation.contest import run_contest
from resmerge_stream.evaluation.results import sentence
from resmerge_stream.evaluation.run import Examination, evaluate_models
from resmerge_stream.experts.group import builtin_adapters, builtin_group
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.events import Progressed
from resmerge_stream.studies.compare_plan import plan_comparison

GROUP = {name: str(folder) for name, folder in builtin_group().items()}
MODELS = [GROUP["base"], GROUP["rl-sort"], GROUP["rl-add"]]
NAMES = ["built-in/base", "built-in/rl-sort", "built-in/rl-add"]
RECIPE = Recipe(ModelRef(MODELS[0]), tuple(ModelRef(text) for text in MODELS[1:]))
METHODS = ["consensus", "task_arithmetic"]


def contest(tmp_path, keep, *, recipe=RECIPE, methods=METHODS, limit=20, seen=None, **how):
    """Run a contest, and return the last event; `seen` is given every event."""
    comparison = plan_comparison(recipe, methods, out=tmp_path / "out")
    examination = Examination(["sort", "add"], out=tmp_path / "out", limit=limit)
    with contextlib.closing(comparison):
        events = run_contest(comparison, examination, keep=keep, work_dir=tmp_path / "work", **how)
        for event in events:
            if seen is not None:
                seen.append(event)
    return event


@pytest.fixture
def on_disk(monkeypatch):
    """Memory that holds no candidate beside the model."""
    monkeypatch.setattr(candidates, "available_memory", lambda: 0)


def test_a_contest_asks_every_model_what_evaluate_asks(tmp_path):
    """Each merge's accuracy is what `evaluate` finds for that folder, and the best has the most."""
    last = contest(tmp_path, "all")

    folders = [str(tmp_path / "out" / label) for label in METHODS]
    alone = evaluate_models(
        [*MODELS, *folders], Examination(["sort", "add"], out=tmp_path / "alone", limit=20)
    )
    found = last.report["evaluation"]["models"]
    assert list(found) == [*NAMES, *METHODS]
    assert list(found.values()) == list(alone["models"].values())
    means = {label: found[label]["mean"]["accuracy"] for label in METHODS}
    assert means[last.report["best"]] == max(means.values())
    assert "## Evaluation" in (tmp_path / "out" / METHODS[0] / "README.md").read_text()


def test_candidates_in_memory_answer_as_from_their_folders(tmp_path, monkeypatch):
    """Asked in one loaded model or loaded from disk, each says the same, and the same is chosen."""
    inside = contest(tmp_path / "memory", "best").report
    monkeypatch.setattr(candidates, "available_memory", lambda: 0)
    written = contest(tmp_path / "disk", "best").report

    assert inside["evaluation"] == written["evaluation"]
    said = [
        sorted(path.read_text() for path in (tmp_path / place).glob("out/answers/*/*.jsonl"))
        for place in ("memory", "disk")
    ]
    assert said[0] == said[1]
    assert len(said[0]) == 2 * len(MODELS) + 2 * len(METHODS) + 2


@pytest.mark.slow
def test_a_contest_may_keep_none(tmp_path):
    """All are asked everything, with the answers of merges that are kept, and none is written."""
    none = contest(tmp_path / "none", "none").report
    kept = contest(tmp_path / "all", "all").report

    assert none["evaluation"] == kept["evaluation"]
    assert not list((tmp_path / "none").rglob("*.safetensors"))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_only_the_best_model_stays_when_asked(tmp_path, place, request):
    """The winner is that of one pass, its bytes are those of `merge`, the others' reports stay."""
    if place == "disk":
        request.getfixturevalue("on_disk")
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
    assert list(json.loads((out / "evaluation.json").read_text())["models"])[3:] == [best]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_contest_goes_on_where_it_was_stopped(tmp_path, monkeypatch, place, request):
    """Stopped while the second merge is asked, it asks nothing of before again."""
    if place == "disk":
        request.getfixturevalue("on_disk")
    asked, ask = [], run.ask

    def asking(model, name, *rest):
        asked.append(name)
        if name == METHODS[1] and asked.count(name) == 1:
            raise KeyboardInterrupt
        yield from ask(model, name, *rest)

    monkeypatch.setattr(run, "ask", asking)
    with pytest.raises(KeyboardInterrupt):
        contest(tmp_path, "best")
    best = contest(tmp_path, "best").report["best"]
    contest(tmp_path, "best")

    assert asked == [*NAMES, METHODS[0], METHODS[1], METHODS[1], best]


def test_eight_candidates_cost_less_than_twice_one(tmp_path, monkeypatch):
    """Counted: questions asked, bytes read, bytes of weights written."""
    asked, ask = [], run.ask

    def asking(model, name, tasks, *rest):
        asked.append(sum(len(task.prompts) for task in tasks))
        yield from ask(model, name, tasks, *rest)

    monkeypatch.setattr(run, "ask", asking)
    monkeypatch.setattr(candidates, "available_memory", lambda: 2_000_000_000)
    cost = {}
    for count in (1, 8):
        asked.clear()
        seen = []
        methods = [f"task_arithmetic:lambda=0.{n}" for n in range(2, 2 + count)]
        contest(tmp_path / str(count), "best", methods=methods, limit=8, seen=seen)
        told = [event.bytes_read for event in seen if isinstance(event, Progressed)]
        starts = [a for a, b in zip(told, [*told[1:], 0], strict=True) if b < a]
        written = sum(p.stat().st_size for p in (tmp_path / str(count)).rglob("*.safetensors"))
        cost[count] = (sum(asked), sum(starts), written)

    assert min(cost[1]) > 0
    for one, eight in zip(cost[1], cost[8], strict=True):
        assert eight < 2 * one


def test_on_noise_no_winner_is_declared():
    """Eight merges answer by chance: the best is set apart from none of them in 95 runs of 100."""
    declared = 0
    for seed in range(100):
        rng = random.Random(seed)
        names = ["base", *(f"m{i}" for i in range(8))]
        verdicts = {
            name: {task: [rng.random() < 0.5 for _ in range(50)] for task in ("a", "b")}
            for name in names
        }
        choice = choose(verdicts, names[1:])
        declared += any(lead - half > 0 for lead, half in choice["against"].values())

    assert declared <= 5


def test_a_merge_that_is_better_is_set_apart():
    """Of one that answers 40 points more than seven others, it is said."""
    rng = random.Random(1)
    verdicts = {f"m{i}": {"a": [rng.random() < 0.4 for _ in range(100)]} for i in range(7)}
    verdicts["good"] = {"a": [rng.random() < 0.8 for _ in range(100)]}

    choice = choose(verdicts, list(verdicts))

    assert choice["best"] == "good"
    assert all(lead - half > 0 for lead, half in choice["against"].values())


def test_the_last_line_says_what_is_kept_and_how_sure_that_is():
    """The score is of the questions that did not choose; who answers more is warned of."""
    chosen = choose(
        {"base": {"a": [True] * 4}, "ties": {"a": [True] * 4}, "tsv_m": {"a": [True] * 4}},
        ["ties", "tsv_m"],
    )

    choice = reported(chosen, {"base": {"a": [True] * 4}, "ties": {"a": [True, False] * 2}}, "best")

    assert choice["best"] == "ties"
    assert sentence(choice).startswith("kept ties (50.0); tsv_m is not distinguishable (+0.0 ± ")
    assert choice["below"] == {"base": pytest.approx([-0.5, 0.49], abs=0.01)}
    assert falls_short(choice, "base")


def test_a_best_below_the_base_is_refused_where_that_is_asked(tmp_path, capsys):
    """With --at-least it ends with 2 and no model; without, the best is kept with a warning."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "sort:cab=", "answer": "abc"}\n' * 4)
    sources = ["--base", MODELS[1], "--expert", MODELS[0], "--expert", MODELS[2]]
    asked = ["--evaluate", "--tasks", "sort", "--limit", "40", "--keep", "best"]
    words = ["compare", *sources, "--methods", "task_arithmetic:lambda=0.9,mean", *asked]
    out = tmp_path / "out"

    refused = main([*words, "--out", str(out), "--at-least", "base"])
    message = capsys.readouterr().err
    kept = main([*words, "--out", str(out)])

    assert refused == 2
    assert "nothing kept; the best is" in message
    assert kept == 0
    told = capsys.readouterr().out
    assert "answers less than the base" in told
    assert told.splitlines()[-1].startswith("kept ")


def test_an_expert_that_cannot_be_asked_is_named(tmp_path, monkeypatch):
    """Adapters are asked; one that fails is left out of the scores, and its reason is written."""
    adapters = builtin_adapters()
    loras = [str(adapters["lora-sort"]), str(adapters["lora-add"])]
    recipe = Recipe(RECIPE.base, tuple(ModelRef(text) for text in loras))
    opening = Examination.open

    def open_but_one(self, model, base=None):
        if model == loras[1]:
            raise CheckpointFormatError("it has other rows.")
        return opening(self, model, base)

    monkeypatch.setattr(Examination, "open", open_but_one)
    document = contest(tmp_path, "best", recipe=recipe).report["evaluation"]

    assert "built-in/lora-sort" in document["models"]
    assert document["unasked"] == {"built-in/lora-add": "it has other rows."}
    assert (
        "Not asked: `built-in/lora-add`. it has" in (tmp_path / "out" / "evaluation.md").read_text()
    )


@pytest.mark.slow
def test_files_of_others_outlive_a_beaten_model(tmp_path, monkeypatch, on_disk):
    """What the merge did not write stays in its folder."""
    merge = candidates.run_merge

    def merging(plan, *, out, **given):
        yield from merge(plan, out=out, **given)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(candidates, "run_merge", merging)

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
        (["--evaluate", "--tasks", "add", "--limit", "1"], "give two or more"),
        (["--evaluate", "--tasks", "add", "--at-least", "base"], "give --keep best"),
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


def test_the_command_merges_asks_and_keeps_without_more_options(tmp_path, capsys):
    """As README has it: no device is named, the best model stays, and the answers are told."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "sort:cab>", "answer": "abc"}\n' * 3)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPE.to_yaml())
    out = tmp_path / "best"

    how = ["--evaluate", "--tasks", str(questions), "--keep", "best"]
    where = ["--out", str(out), "--work-dir", str(tmp_path / "work")]
    code = main(["compare", str(recipe), "--methods", "ties,mean", *where, *how])

    assert code == 0, capsys.readouterr().err
    assert len([name for name in ("ties", "mean") if (out / name).is_dir()]) == 1
    last = [path.read_text().splitlines()[-1] for path in out.glob("*.md")]
    assert len(last) == 2
    assert {capsys.readouterr().out.splitlines()[-1], *last} == {last[0]}
