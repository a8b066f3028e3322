"""Evaluation: the same questions to every model, resumable, refused in one message."""

import json
import shutil

import pytest
import torch

from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.errors import CheckpointFormatError, NotEnoughMemoryError, RecipeError
from resmerge_stream.evaluation import asking, engines, run
from resmerge_stream.evaluation.card import into_card
from resmerge_stream.evaluation.results import evaluation
from resmerge_stream.evaluation.run import Examination, evaluate_models
from resmerge_stream.evaluation.tasks import find_task
from resmerge_stream.evaluation.verifiers import verify
from resmerge_stream.experts.evaluate import load_model, load_tokenizer, right_answers
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import answer, draw_prompts
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.verify import verify_folder

GROUP = builtin_group()
BASE, EXPERT = str(GROUP["base"]), str(GROUP["rl-sort"])
CHECK = "def check(text):\n    return text == sorted(text) or text == ''.join(sorted(text))"


def jsonl(path, rules):
    """Write one object a line, and return the path as text."""
    path.write_text("".join(json.dumps(rule) + "\n" for rule in rules))
    return str(path)


def test_all_models_are_asked_alike_and_differences_are_of_pairs(tmp_path):
    """Accuracies are those of our own evaluation; an expert's lead is that of paired prompts."""
    document = evaluate_models([BASE, EXPERT], Examination(["sort", "add"], out=tmp_path, limit=60))

    prompts = draw_prompts("sort", 60, seed=7, split="held-out")
    right = [
        right_answers(load_model(folder), load_tokenizer(folder), prompts)
        for folder in (BASE, EXPERT)
    ]
    shares = [document["models"][name]["sort"]["accuracy"] for name in (BASE, EXPERT)]
    (row,) = document["differences"]
    assert shares == [sum(bits) / 60 for bits in right]
    assert row["model"] == EXPERT
    assert row["sort"][0] == pytest.approx(shares[1] - shares[0])
    assert {path.name for path in tmp_path.iterdir()} >= {"evaluation.md", "evaluation.png"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["models"] == document["models"]


def test_a_jsonl_asks_by_generation_what_the_built_in_task_asks(tmp_path):
    """The same prompts as a file of exact answers give the same verdicts."""
    prompts = draw_prompts("sort", 40, seed=7, split="held-out")
    rules = [{"prompt": p, "answer": answer(p), "max_new_tokens": 12} for p in prompts]
    path = jsonl(tmp_path / "sorting.jsonl", rules)

    tasks = [find_task(path, 500), find_task("sort", 40)]
    found = dict(asking.ask(EXPERT, tasks, engines.Loading("cpu"), 40, print))

    assert found["sorting"] == found["sort"]
    assert any(found["sort"].right)


@pytest.mark.parametrize(
    ("rule", "text", "right"),
    [
        ({"answer": "abc"}, " abc\n", True),
        ({"answer": "abc"}, "abcd", False),
        ({"verify": "regex", "answer": "^a+b$"}, "aaab", True),
        ({"verify": "regex", "answer": "^a+b$"}, "b", False),
        ({"verify": "number", "answer": 1200}, "so 3 times 400 is 1,200.", True),
        ({"verify": "number", "answer": "1.5"}, "no number", False),
        ({"verify": "python", "function": CHECK}, "abz", True),
        ({"verify": "python", "function": CHECK}, "zab", False),
    ],
)
def test_a_verifier_takes_what_its_rule_says(rule, text, right):
    """Exact, regex, number and function: each with an answer that holds and one that does not."""
    assert verify([rule], [text]) == [right]


@pytest.mark.parametrize(
    "function",
    [
        "def check(text):\n    while True: pass",
        "def check(text):\n    return len('x' * 4_000_000_000)",
        "def check(text):\n    raise ValueError('no')",
    ],
)
def test_a_function_cannot_hold_up_an_evaluation(function, monkeypatch):
    """One that never ends, takes all memory or fails is one message."""
    from resmerge_stream.evaluation import verifiers

    monkeypatch.setattr(verifiers, "_RUNNER", verifiers._RUNNER.replace("(10, 10)", "(1, 1)"))

    with pytest.raises(RecipeError, match="check failed"):
        verify([{"verify": "python", "function": function}], ["a"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not JSON"),
        ('{"answer": "a"}', "with a prompt"),
        ('{"prompt": "a"}', "needs an answer"),
        ('{"prompt": "a", "verify": "taste", "answer": "b"}', "verify must be"),
        ('{"prompt": "a", "verify": "regex", "answer": "("}', "not a regular expression"),
        ('{"prompt": "a", "verify": "number", "answer": "b"}', "holds no number"),
        ('{"prompt": "a", "verify": "python"}', "needs a function"),
        ("", "asks nothing"),
    ],
)
def test_a_wrong_line_is_named(line, words, tmp_path):
    """A malformed question is refused before any model is loaded."""
    (tmp_path / "q.jsonl").write_text(line)

    with pytest.raises(RecipeError, match=words):
        find_task(str(tmp_path / "q.jsonl"), 10)


def test_what_was_answered_is_not_asked_again(tmp_path, monkeypatch):
    """A run that failed at the second model goes on there; a whole one asks nobody again."""
    asked = []

    def failing(name, tasks, *rest):
        asked.append(name)
        if name == EXPERT and asked.count(EXPERT) == 1:
            raise KeyboardInterrupt
        yield from ((task.name, asking.Answers([True, False])) for task in tasks)

    monkeypatch.setattr(run, "ask", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate_models([BASE, EXPERT], Examination(["add"], out=tmp_path, limit=2))
    for _ in range(2):
        evaluate_models([BASE, EXPERT], Examination(["add"], out=tmp_path, limit=2))

    assert asked == [BASE, EXPERT, EXPERT]


def test_a_broken_model_is_one_message(tmp_path):
    """Weights that its architecture lacks, and a folder that is no model, are refused."""
    broken = tmp_path / "broken"
    shutil.copytree(EXPERT, broken)
    config = json.loads((broken / "config.json").read_text())
    more = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    (broken / "config.json").write_text(json.dumps(config | more))

    with pytest.raises(CheckpointFormatError, match="lacks weights"):
        evaluate_models([BASE, str(broken)], Examination(["add"], out=tmp_path / "out", limit=2))
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointFormatError):
        evaluate_models([str(broken)], Examination(["add"], out=tmp_path / "out", limit=2))


def test_a_model_too_large_is_one_message(tmp_path, monkeypatch):
    """Weights that do not fit into free memory are refused before they are read."""
    monkeypatch.setattr(asking, "available_memory", lambda: 3_000_000)

    with pytest.raises(NotEnoughMemoryError, match=r"needs 3\.97 MB"):
        evaluate_models([BASE], Examination(["add"], out=tmp_path, limit=2))


def test_a_gpu_too_small_is_one_message(tmp_path, monkeypatch):
    """A GPU whose memory ends while a model is asked is named as the reason; no bug is shown."""

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines, "right_answers", short)

    with pytest.raises(NotEnoughMemoryError, match="do not fit into the GPU's memory"):
        evaluate_models([BASE], Examination(["add"], out=tmp_path, limit=2))


@pytest.mark.slow
def test_an_unknown_task_is_one_message(capsys, tmp_path):
    """A name that nobody knows is refused with the names that there are."""
    code = main(["evaluate", BASE, "--tasks", "no_such_task", "--out", str(tmp_path)])

    assert code == 2
    assert "add, sort, reverse, close" in capsys.readouterr().err


def test_results_go_into_the_card_and_the_merge_still_verifies(tmp_path):
    """README.md gets a section and a model-index, once however often; the report a key."""
    recipe = Recipe(ModelRef(BASE), (ModelRef(EXPERT), ModelRef(str(GROUP["rl-add"]))))
    merged = tmp_path / "merged"
    for _ in run_merge(plan_merge(recipe, out=merged), out=merged):
        pass
    name = str(merged)
    document = evaluation({BASE: {"add": [True, False]}, name: {"add": [True, True]}})

    into_card(merged, name, document)
    once = (merged / "README.md").read_bytes()
    into_card(merged, name, document)

    text = once.decode()
    assert (merged / "README.md").read_bytes() == once
    assert "model-index:" in text.split("---")[1]
    assert "## Evaluation" in text
    assert "Nobody has evaluated" not in text
    kept = json.loads((merged / "resmerge" / "report.json").read_text())["evaluation"]
    assert list(kept["models"]) == ["base", "merged"]
    assert kept["models"]["merged"] == document["models"][name]
    assert str(tmp_path) not in text
    assert not [check for check in verify_folder(merged, recipe=recipe) if check.problems]
