"""The page on quality: its words and its results come together, and nothing is left blank."""

import itertools
import random

import pytest
import torch

from benchmarks.quality.asking import Asker
from benchmarks.quality.groups import RL, SFT
from benchmarks.quality.keep import added, head
from benchmarks.quality.merges import share_of_equal_weights, trimmed
from benchmarks.quality.page import fill, write_page
from benchmarks.quality.regime_page import real_models, section, write_between
from benchmarks.quality.regimes import METHODS, MORE_METHODS, cases_in_words, evidence_of, parts_of
from benchmarks.quality.results import Group
from benchmarks.quality.studies import BUDGETS, FEW, MAIN, RANKS, SCALES, SHARES, UNGATED
from benchmarks.quality.studies import all_methods as every_method
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.studies.advice import evidence
from tests.support.checkpoints import ROOT

SPECTRUM = ("head_energy", "stable_rank", "stable_rank_residual")
PARTS = ("base", "expert", "head", "residual")
GATES = ("c_R", "c_R_floor", "S_H", "s_R")


def results(prompts=40):
    """Return results as a run would keep them, with answers drawn at random."""
    rng = random.Random(1)
    shares = dict.fromkeys(("base", *RL, *SFT), 0.4)
    labels = [*shares, "again:rl-add", "same-length|float32"]
    labels += [f"{m}|{o}" for m in every_method() for o in ("bf16", "stochastic", "float32")]
    labels += [f"{m}|float32" for m in (*RANKS, *BUDGETS, *UNGATED, *SCALES)]
    labels += [f"sft:{method}|bf16" for method in MAIN]
    labels += [
        f"{name}:{part}|{output}"
        for name in (*RL, *SFT)
        for part in ("head", "residual")
        for output in ("float32", "bf16")
    ]
    sets = [f"top-{share:g}:" for share in SHARES]
    sets += ["+".join(tasks) + ":" for n in (2, 3) for tasks in itertools.combinations(TASKS, n)]
    labels += [f"{name}{method}|float32" for name in sets for method in FEW]
    labels += [f"top-{share:g}:{name}" for share in SHARES for name in RL]
    answers = {
        label: {
            task: "".join(rng.choice("0001" if label == "base" else "0111") for _ in range(prompts))
            for task in TASKS
        }
        for label in labels
    }
    fact = {"relative_norm": 0.5, "kept_norm": 1.0, "kept_cosine": 0.9, "changed_fraction": 0.3}
    spectra = [
        {"name": name, "changed": 0.3}
        | {f"{family} {key}": 0.4 for family in ("attention", "ffn") for key in SPECTRUM}
        for name in (*RL, *SFT)
    ]
    gates = {f"{kind} {key}": 0.5 for kind in ("RL", "SFT") for key in GATES}
    trained = {"seconds": 60.0, "parameters": 992128, "change": {"relative_norm": 0.003}}
    group = {
        "answers": answers,
        "facts": dict.fromkeys(labels, fact),
        "spectrum": [*spectra, {"name": "gates", **gates}],
        "log": {"models": dict.fromkeys(("base", *RL, *SFT), trained)},
        "prompts": prompts,
    }
    again = {"expert": "rl-add", "equal_weights": 1.0}
    return {"seed": 3, "again": again, "groups": {"small": group, "wide": group}}


def test_the_page_is_written_whole(tmp_path):
    """Every blank of the page's words is filled, every figure that it shows is drawn."""
    write_page(results(), tmp_path)

    text = (tmp_path / "quality-small.md").read_text("utf-8")
    shown = [part.partition(")")[0] for part in text.split("](images/")[1:]]
    assert "{{" not in text
    assert sorted(shown) == sorted(path.name for path in (tmp_path / "images").iterdir())


def test_a_blank_that_nothing_fills_is_refused():
    """Words that ask for a table, a group or a label that is not there are an error."""
    found = results()
    groups = {name: Group(entry) for name, entry in found["groups"].items()}

    for blank in ("{{mean huge base}}", "{{total small}}", "{{mean small nothing}}"):
        with pytest.raises((ValueError, KeyError), match=r"huge|total|nothing"):
            fill(blank, groups, found)


def test_numbers_come_from_the_answers():
    """A mean, a gain and a gap are those of the answers, prompt by prompt."""
    found = results(prompts=4)
    answers = found["groups"]["small"]["answers"]
    answers["base"] = dict.fromkeys(TASKS, "1000")
    answers["rl-add"] = {task: "1110" if task == "add" else "1000" for task in TASKS}
    group = Group(found["groups"]["small"])

    assert group.mean("rl-add").accuracy == pytest.approx((0.75 + 3 * 0.25) / 4)
    assert group.own_gain("rl-add")[0] == pytest.approx(0.5)
    assert fill("{{gap small rl-add base}}", {"small": group}, found).startswith("+12.5 ± ")


def test_a_trimmed_expert_keeps_its_largest_changes(tmp_path):
    """Of the weights only the asked share stays changed, the others are the base's."""
    group = builtin_group()

    out = trimmed(group["base"], group["rl-sort"], 0.1, tmp_path / "trimmed")

    assert share_of_equal_weights(group["base"], out) == pytest.approx(0.9, abs=1e-5)
    assert share_of_equal_weights(group["base"], group["rl-sort"]) < 0.75


def test_intervals_over_bases_are_students():
    """Leads of 1, 2 and 3 points on three bases are 2 ± 4.303 / √3; a base's pairs are one."""
    leads = {"narrow-1": (1.0,), "narrow-2": (2.0,), "narrow-3": (2.0, 4.0), "small": (9.0,)}
    cases = [
        {
            "group": group,
            "case": f"{group} {number}",
            "regime": "two tasks",
            "model": None,
            "prompts": 5,
            "best": "mean",
            "base": 40.0,
            "accuracy": {method: 50.0 + lead * (method != "mean") for method in METHODS},
            "points": dict.fromkeys(METHODS, (0.0, 1.0)),
        }
        for group, found in leads.items()
        for number, lead in enumerate(found)
    ]

    text = section({"cases": cases})

    assert "over 3 fresh bases (narrow-1, narrow-2, narrow-3)" in text
    row = text.strip().splitlines()[-1]
    assert row.count("+2.0 ± 2.5") == len(METHODS) - 1


def test_the_regimes_on_the_page_are_those_that_the_advice_goes_by():
    """The page of the small groups has tables of the evidence in the package, no more, no less."""
    assert section(evidence()) in (ROOT / "docs" / "quality-small.md").read_text("utf-8")


def test_a_real_models_cases_are_of_the_experts_that_are_there(tmp_path):
    """RL, SFT, and both by turns; an expert that is missing is in none, nor is its task."""
    for name in ("rl-a", "rl-b", "rl-c", "sft-b", "sft-c", "rl-d.state"):
        (tmp_path / name).mkdir()

    found = {case.name: case for case in cases_in_words(tmp_path, ("a", "b", "c", "d"))}

    assert {name: [path.name for path in case.experts] for name, case in found.items()} == {
        "rl": ["rl-a", "rl-b", "rl-c"],
        "sft": ["sft-b", "sft-c"],
        "mixed": ["rl-b", "sft-c"],
        "rl-2": ["rl-a", "rl-b"],
    }
    assert found["mixed"].tasks == ("b", "c")
    assert set(found["rl"].methods) == {*METHODS, *MORE_METHODS}


def test_a_real_models_table_has_every_method_best_first():
    """Shares by task, their mean, and the paired difference to the mean of the task vectors."""
    answers = {method: {"a": "0001", "b": "0000"} for method in METHODS} | {
        "mean": {"a": "1100", "b": "1000"},
        "ties": {"a": "1110", "b": "1100"},
        "base": {"a": "0000", "b": "1000"},
        "experts": {"a": "1111", "b": "1111"},
    }
    case = {"regime": "2 RL experts", "kind": "orthogonal", "experts": 2, "cosine": 0.0}
    case["text"] = {"ties": {"perplexity": 30.04, "kept": 0.976}}
    parts = {"rl-a": dict(zip(PARTS, ("0000", "1110", "1000", "1100"), strict=True))}
    found = evidence_of(
        {
            "prompts": 4,
            "seed": 1,
            "groups": {"smollm2": {"rl": {**case, "answers": answers}}},
            "parts": {"smollm2": parts},
        }
    )

    text = real_models(found)

    rows = text.splitlines()
    start = rows.index("| --- | --- | --- | --- | --- | --- | --- |") + 1
    assert rows[start].startswith("| *each expert on its own task* | 100 | 100 | 100.0 | ")
    assert rows[start + 1] == "| `ties` | 75 | 50 | 62.5 | – | 30.0 | 98 |"
    assert rows[start + 2].startswith("| `mean` | 50 | 25 | 37.5 | -25.0 ± ")
    assert rows[-1].startswith("| `rl-a` | 0 | 75 | 25 | 50 | +75 ± ")


def test_the_real_models_tables_on_the_page_are_those_of_the_evidence():
    """The tables of docs/quality.md are made of the evidence in the package, no more, no less."""
    assert real_models(evidence()) in (ROOT / "docs" / "quality.md").read_text("utf-8")


def test_tables_are_put_between_the_marks_of_a_page(tmp_path):
    """What stands before and after stays."""
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n", "utf-8")

    write_between(page, "x", "new\n")

    assert page.read_text("utf-8") == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"


def test_a_model_asked_after_another_answers_as_if_it_were_alone(tmp_path):
    """Weights put into the model that is loaded are all replaced."""
    group = builtin_group()
    one = Asker(tmp_path / "one", n_prompts=30, seed=5)
    in_turn = [one.ask(group[name]) for name in ("base", "rl-add", "base")]

    assert in_turn[0] == in_turn[2] != in_turn[1]
    assert in_turn[1] == Asker(tmp_path / "other", n_prompts=30, seed=5).ask(group["rl-add"])


def test_an_experts_parts_are_asked_its_task(tmp_path):
    """Head and residual alone, beside base and expert; the parts' weights do not stay."""
    group = builtin_group()
    asker = Asker(tmp_path / "answers", n_prompts=30, seed=5)

    found = parts_of(group["base"], group["rl-sort"], "sort", tmp_path, asker)

    assert tuple(found) == PARTS
    assert len(set(found.values())) > 2
    assert not list(tmp_path.glob("rl-*"))


def test_what_an_expert_does_with_its_heads_inputs_another_leaves_alone():
    """Along P the other's update is cut to μ/(μ + σ²) of itself; across it, it is added whole."""
    generator = torch.Generator().manual_seed(3)
    kept, other = torch.randn(2, 12, 8, generator=generator)
    P = head(kept, 2)

    found = (added(kept, other, P, alpha=0.5) - kept) / 0.5

    _, strengths, directions = torch.linalg.svd(kept)
    left = [0.03 / (0.03 + (strengths[r] / strengths[0]) ** 2) if r < 2 else 1.0 for r in range(8)]
    wanted = torch.tensor(left)[:, None] * (directions @ other.T)
    torch.testing.assert_close(directions @ found.T, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(added(kept, other, None, alpha=0.5), kept + other / 2)
