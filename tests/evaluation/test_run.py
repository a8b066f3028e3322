"""Evaluation: the same questions to every model, resumable, refused in one message."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.errors import (
    CheckpointFormatError,
    NotEnoughMemoryError,
    RecipeError,
    UnsupportedCheckpointError,
)
from resmerge_stream.evaluation import asking, engines, run
from resmerge_stream.evaluation.card import into_card
from resmerge_stream.evaluation.results import evaluation
from resmerge_stream.evaluation.run import Examination, evaluate_models
from resmerge_stream.evaluation.tasks import find_task
from resmerge_stream.evaluation.verifiers import verify
from resmerge_stream.experts.evaluate import load_model, load_tokenizer, said
from resmerge_stream.experts.group import builtin_adapters, builtin_group
from resmerge_stream.experts.tasks import answer, draw_prompts
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.verify import verify_folder
from tests.support.adapters import LINEAR, Kind, make_adapter, whole

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
        [verdict for _, verdict in said(load_model(folder), load_tokenizer(folder), prompts)]
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
    with engines.loaded(EXPERT, engines.Loading("cpu"), harness=False) as model:
        found = {task.name: answers for task, answers in asking.ask(model, "", tasks, 40, print)}

    verdicts = {name: [one.right for one in answers] for name, answers in found.items()}
    assert verdicts["sorting"] == verdicts["sort"]
    assert any(verdicts["sort"])


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
        ("\udcff", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        (f'{{"prompt": "a", "answer": {"9" * 5_000}}}', "line 1 is not JSON"),
        (f'{{"prompt": "{"a" * 1_000_000}"}}', "larger than"),
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
    (tmp_path / "q.jsonl").write_text(line, errors="surrogateescape")

    with pytest.raises(RecipeError, match=words):
        find_task(str(tmp_path / "q.jsonl"), 10)


@pytest.mark.parametrize("text", ["[" * 5_000, "a: 0x" + "f" * 9_000, "a: 2024-99-99", "\udcff"])
def test_a_task_that_cannot_be_read_is_named(text, tmp_path):
    """A YAML file of a stranger is a task of the harness, or one message."""
    (tmp_path / "t.yaml").write_text(text, errors="surrogateescape")

    with pytest.raises(RecipeError, match=r"t.yaml is not YAML"):
        find_task(str(tmp_path / "t.yaml"), 10)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "---\na: [\n---\n"),
        ("README.md", "---\n- a\n---\n"),
        ("resmerge/report.json", "[" * 9_000),
        ("resmerge/report.json", "[1]"),
    ],
)
def test_a_card_or_report_that_is_none_is_named(name, text, tmp_path):
    """An evaluation goes into the card and report of a merge; other files are left as they are."""
    (tmp_path / "resmerge").mkdir()
    for file, content in {"README.md": "# m\n", "resmerge/report.json": "{}", name: text}.items():
        (tmp_path / file).write_text(content)

    with pytest.raises(RecipeError, match=r"has no README.md and resmerge/report.json of a merge"):
        into_card(tmp_path, BASE, evaluation({BASE: {"add": [True]}}))

    assert (tmp_path / name).read_text() == text


def test_what_was_answered_is_not_asked_again(tmp_path, monkeypatch):
    """A run that failed goes on there; a whole one asks those whose answers are damaged."""
    asked = []

    def failing(model, name, tasks, *rest):
        asked.append(name)
        if name == EXPERT and asked.count(EXPERT) == 1:
            raise KeyboardInterrupt
        yield from ((task, [asking.Answer("1+1=", "2", "2", True)]) for task in tasks)

    monkeypatch.setattr(run, "ask", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate_models([BASE, EXPERT], Examination(["add"], out=tmp_path, limit=2))
    for _ in range(2):
        evaluate_models([BASE, EXPERT], Examination(["add"], out=tmp_path, limit=2))
    next(tmp_path.glob("answers/**/*.jsonl")).write_text("[" * 100)
    evaluate_models([BASE, EXPERT], Examination(["add"], out=tmp_path, limit=2))

    assert asked[:3] == [BASE, EXPERT, EXPERT]
    assert len(asked) == 4  # the one whose answers were damaged


def test_adapters_answer_on_the_base_as_pefts_merged_models_do(tmp_path):
    """Three adapters made by PEFT: text by text what `merge_and_unload` says; each has a file."""
    folders = {}
    for seed in range(3):
        kind = Kind("qwen2", {"r": 2 + seed, "lora_alpha": 4, "target_modules": LINEAR})
        adapter = make_adapter(tmp_path / f"lora-{seed}", Path(BASE), kind, seed=seed)
        folders[f"lora-{seed}"] = adapter
        folders[f"whole-{seed}"] = whole(Path(BASE), adapter, tmp_path / f"whole-{seed}")
        load_tokenizer(BASE).save_pretrained(folders[f"whole-{seed}"])
    prompts = draw_prompts("sort", 12, seed=7, split="held-out")
    rules = [{"prompt": p, "answer": answer(p), "max_new_tokens": 12} for p in prompts]
    tasks = [jsonl(tmp_path / "mine.jsonl", rules)]

    out = tmp_path / "out"
    evaluate_models([BASE, *map(str, folders.values())], Examination(tasks, out=out))

    said_by = {}
    for name in folders:
        (path,) = out.glob(f"answers/*{name}/mine-*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["question"] for line in lines] == prompts
        assert [line["wanted"] for line in lines] == [rule["answer"] for rule in rules]
        said_by[name] = [(line["answer"], line["right"]) for line in lines]
    for seed in range(3):
        assert said_by[f"lora-{seed}"] == said_by[f"whole-{seed}"]
    assert len({str(said_by[f"lora-{seed}"]) for seed in range(3)}) == 3


def test_an_adapter_without_its_base_is_one_message(tmp_path):
    """An adapter that stands first is refused before anyone is asked."""
    adapter = str(builtin_adapters()["lora-add"])

    with pytest.raises(UnsupportedCheckpointError, match="Name the base first"):
        evaluate_models([adapter, BASE], Examination(["add"], out=tmp_path, limit=2))
    assert not (tmp_path / "answers").exists()


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

    monkeypatch.setattr(engines, "said", short)

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
