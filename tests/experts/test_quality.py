"""The page on quality: its words and its results come together, and nothing is left blank."""

import itertools
import random

import pytest

from benchmarks.quality.groups import RL, SFT
from benchmarks.quality.merges import share_of_equal_weights, trimmed
from benchmarks.quality.page import fill, write_page
from benchmarks.quality.regime_page import section
from benchmarks.quality.regimes import METHODS
from benchmarks.quality.results import Group
from benchmarks.quality.studies import BUDGETS, FEW, MAIN, RANKS, SCALES, SHARES, UNGATED
from benchmarks.quality.studies import all_methods as every_method
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.studies.advice import evidence
from tests.support.checkpoints import ROOT

SPECTRUM = ("head_energy", "stable_rank", "stable_rank_residual")
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

    text = (tmp_path / "quality.md").read_text("utf-8")
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
            "best": "mean",
            "base": 40.0,
            "accuracy": {method: 50.0 + lead * (method != "mean") for method in METHODS},
            "points": dict.fromkeys(METHODS, (0.0, 1.0)),
        }
        for group, found in leads.items()
        for number, lead in enumerate(found)
    ]

    text = section({"prompts": 5, "cases": cases})

    assert "over 3 fresh bases (narrow-1, narrow-2, narrow-3)" in text
    row = text.strip().splitlines()[-1]
    assert row.count("+2.0 ± 2.5") == len(METHODS) - 1


def test_the_regimes_on_the_page_are_those_that_the_advice_goes_by():
    """The tables of docs/quality.md are made of the evidence in the package, no more, no less."""
    assert section(evidence()) in (ROOT / "docs" / "quality.md").read_text("utf-8")
