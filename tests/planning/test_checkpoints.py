"""Checkpoints of one run: which fit a pattern, in which order, and what their average is."""

import json
import math
import shutil

import pytest
import torch

from resmerge_stream.cli.main import main
from resmerge_stream.errors import RecipeError
from resmerge_stream.methods.average import coefficients
from resmerge_stream.planning.checkpoints import step_of, with_checkpoints
from resmerge_stream.planning.options import Options
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import parse_recipe
from resmerge_stream.recipe import ModelRef, Recipe
from tests.support.checkpoints import make_group, read_tensors

STEPS = (5, 10, 20, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints, written in another order than their steps."""
    folder = tmp_path_factory.mktemp("run")
    group = make_group(folder / "group", experts=len(STEPS), dtype=torch.float32)
    for step, expert in zip(STEPS, group.experts, strict=True):
        shutil.move(expert, folder / f"checkpoint-{step}")
    shutil.copytree(folder / "checkpoint-20", folder / "checkpoint-best")
    return folder


def average_of(run, by_step):
    """Return Σ c θ in float64."""
    models = {step: read_tensors(run / f"checkpoint-{step}") for step in by_step}
    names = next(iter(models.values()))
    return {n: sum(c * models[s][n].double() for s, c in by_step.items()) for n in names}


def steps_of(recipe):
    """Return the steps of a recipe's checkpoints, in its order."""
    return [step_of(ref) for ref in recipe.experts]


@pytest.mark.parametrize("weights", ["uniform", "linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_later_coefficients_add_up_to_the_decayed_rate(weights, count):
    """Step i is in all later checkpoints, so that its weight is w(i/N): WSM's Theorem 3.1."""
    rate = {
        "uniform": lambda x: 1 - x,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
        "1-sqrt": lambda x: 1 - x**0.5,
    }[weights]
    c = coefficients(weights, count)

    for i in range(count):
        assert sum(c[i:]) == pytest.approx(rate(i / count), abs=1e-12)


def test_coefficients_are_megatrons():
    """Its `minus-sqrt` of four checkpoints, worked out by hand: 1 - √(j/4) and the differences."""
    assert coefficients("1-sqrt", 4) == pytest.approx([0.5, 0.20711, 0.15892, 0.13397], abs=1e-5)


def test_ema_is_the_moving_average():
    """Each checkpoint takes 1 - decay of the average, from the first on."""
    values, average = [3.0, -1.0, 4.0, 1.0], 3.0
    for value in values[1:]:
        average = 0.75 * average + 0.25 * value

    c = coefficients("ema", 4, 0.75)

    assert sum(a * b for a, b in zip(c, values, strict=True)) == pytest.approx(average)


@pytest.mark.parametrize(
    ("options", "by_step"),
    [
        ([], dict.fromkeys(STEPS, 0.25)),
        (["--last", "2"], {20: 0.5, 100: 0.5}),
        (["--window", "6:"], {10: 1 / 3, 20: 1 / 3, 100: 1 / 3}),
        (["--window", ":20", "--last", "2"], {10: 0.5, 20: 0.5}),
        (["--last", "3", "--weights", "ema:0.5"], {10: 0.25, 20: 0.25, 100: 0.5}),
    ],
)
def test_the_command_averages_what_fits(run, tmp_path, options, by_step):
    """Checkpoints in the order of their steps, by the weights that are asked for."""
    pattern = str(run / "checkpoint-*")

    assert main(["average", pattern, *options, "--out", str(tmp_path / "out")]) == 0

    made = read_tensors(tmp_path / "out")
    for name, expected in average_of(run, by_step).items():
        torch.testing.assert_close(made[name].double(), expected, rtol=0, atol=2e-7)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_recipe_over_a_pattern_is_the_command(run, tmp_path):
    """`merge_method: average` gives the command's bytes, and its report lists the checkpoints."""
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: average\nmodels: [{{model: '{run}/checkpoint-*'}}]\n"
        "parameters: {last: 3, weights: cosine}\n"
    )
    chosen = ["--last", "3", "--weights", "cosine", "--out", str(tmp_path / "a")]
    assert main(["average", f"{run}/checkpoint-*", *chosen]) == 0
    assert main(["merge", str(tmp_path / "recipe.yml"), "--out", str(tmp_path / "b")]) == 0

    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in "ab"]
    assert files[0] == files[1]
    recorded = parse_recipe((tmp_path / "b" / "resmerge" / "recipe.yml").read_bytes())
    assert steps_of(recorded) == [10, 20, 100]


def test_listed_checkpoints_are_taken_by_step(run):
    """What a shell makes of a pattern is in the order of letters; a list of strangers stays."""
    listed = sorted(str(run / f"checkpoint-{step}") for step in STEPS)
    others = [str(run / "checkpoint-100"), str(run / "group" / "base")]

    made = with_checkpoints(Recipe(None, tuple(map(ModelRef, listed)), "average"))
    kept = with_checkpoints(Recipe(None, tuple(map(ModelRef, others)), "average"))

    assert steps_of(made) == list(STEPS)
    assert [ref.id for ref in kept.experts] == others


def test_what_has_no_step_is_left_out_and_said(run):
    """`checkpoint-best` is one of the others under another name: it does not count twice."""
    plan = plan_merge(Recipe(None, (ModelRef(str(run / "checkpoint-*")),), "average"))

    assert len(plan.experts) == len(STEPS)
    assert any("checkpoint-best" in warning for warning in plan.warnings)
    plan.close()


def test_a_pattern_stands_for_no_more_than_is_allowed(run):
    """Who serves strangers says how many; `last` keeps an average below it."""
    pattern = (ModelRef(str(run / "checkpoint-*")),)
    limited = Options(max_experts=3)

    refused = plan_merge(Recipe(None, pattern, "average"), limited)
    ready = plan_merge(Recipe(None, pattern, "average", {"last": 3}), limited)

    assert "stand for 4 models" in str(refused.problems)
    assert not ready.problems
    ready.close()


def test_a_pattern_is_as_many_experts_of_any_method(run):
    """Weights of a pattern are those of each checkpoint."""
    pattern = ModelRef(str(run / "checkpoint-*"), weight=0.5)
    made = with_checkpoints(Recipe(ModelRef(str(run / "group" / "base")), (pattern,), "ties"))

    assert [ref.weight for ref in made.experts] == [0.5] * len(STEPS)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(None, (ModelRef("nowhere/step_*/x"),), "average"), "no checkpoint fits"),
        (Recipe(ModelRef("runs/*"), (ModelRef("a"),), "ties"), "can only be an expert"),
        (Recipe(None, (ModelRef("a"),), "average", {"window": "1-2"}), "FIRST:LAST"),
        (Recipe(None, (ModelRef("a"),), "average", {"window": "1:2"}), "tells none"),
        (Recipe(None, (ModelRef("a1"),), "average", {"window": "2:"}), "no checkpoint lies"),
        (Recipe(None, (ModelRef("a1"),), "average", {"last": -1}), "last must be"),
    ],
)
def test_what_leaves_nothing_is_refused(recipe, words):
    """A pattern or a window that fits nothing, or that is none, is a problem of the recipe."""
    with pytest.raises(RecipeError, match=words):
        with_checkpoints(recipe)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("stage1-step1000-tokens5B", 1000),
        ("global_step_40/actor", None),
        ("iter_0000300", 300),
        ("v2-final", 2),
        ("best", None),
    ],
)
def test_a_step_is_read_from_a_name(name, step):
    """Behind a word for it, or the last number; of the last folder's name."""
    assert step_of(ModelRef("org/run", revision=name)) == step


def test_two_hundred_checkpoints_take_little_memory(run, tmp_path):
    """They are read block by block: what is planned is below a GB, and kept."""
    for number in range(200):
        there = tmp_path / "run" / f"step_{number}"
        shutil.copytree(run / f"checkpoint-{STEPS[number % 4]}", there)
    out = tmp_path / "out"

    assert main(["average", str(tmp_path / "run" / "step_*"), "--out", str(out)]) == 0

    summary = json.loads((out / "resmerge" / "report.json").read_bytes())["summary"]
    assert summary["peak_private_bytes"] < 1e9
    expected = average_of(run, dict.fromkeys(STEPS, 0.25))
    for name, value in read_tensors(out).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)


def test_models_without_a_base_are_merged_by_a_method_that_needs_none(run, tmp_path):
    """`--expert … --method linear` asks for no --base."""
    experts = [word for step in (5, 10) for word in ("--expert", str(run / f"checkpoint-{step}"))]

    assert main(["merge", *experts, "--method", "linear", "--out", str(tmp_path / "out")]) == 0

    expected = average_of(run, {5: 0.5, 10: 0.5})
    for name, value in read_tensors(tmp_path / "out").items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=2e-7)
