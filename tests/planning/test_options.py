"""What is asked for is one thing: as data, as a command line and as a plan it stays the same."""

import json
from dataclasses import replace

import pytest

from resmerge_stream.cli.main import _parser
from resmerge_stream.cli.options import request_of
from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.options import Options, declared
from resmerge_stream.planning.parts import Part
from resmerge_stream.planning.planned import hash_of
from resmerge_stream.planning.request import Request
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.sinks.publication import Publication
from tests.support.checkpoints import make_group, plan_group

# For every option, by the user's word: a value that is not its default, and what it becomes.
OTHER = {
    "rounding": ("stochastic", "stochastic"),
    "seed": ("7", 7),
    "max_shard_size": ("2GB", 2_000_000_000),
    "missing": ("refuse", "refuse"),
    "as": ("adapter", "adapter"),
    "adapter_rank": ("32", 32),
    "tokenizer_from": ("org/math", "org/math"),
    "device": ("cuda:1", "cuda:1"),
    "memory_budget": ("3GB", 3_000_000_000),
    "unrelated": ("merge", "merge"),
    "check_sources": ("full", "full"),
    "patience": ("20m", 1200),
    "part": ("1/4", Part(1, 4)),
}


def words_of(key):
    """Return how a user gives an option another value."""
    known = next(known for known in declared() if known.key == key)
    return [known.flag] if isinstance(OTHER[key][0], bool) else [known.flag, OTHER[key][0]]


OUTPUT = [known.key for known in declared() if known.changes != "nothing"]


def a_request(**options):
    """Return a request with a weight, a dtype and a target."""
    experts = (ModelRef("org/math", "0123abc"), ModelRef("org/code", weight=0.5))
    return Request(
        recipe=Recipe(ModelRef("org/base"), experts, "task_arithmetic", {"scale": 0.5}, "float32"),
        options=Options(**options),
        publication=Publication(
            repo_id="me/merged", public=True, update=True, collection="me/merges-1", discuss=True
        ),
    )


def named(keys):
    """Return other values than the defaults, by attribute, for some options."""
    return {known.name: OTHER[known.key][1] for known in declared() if known.key in keys}


def test_a_request_survives_as_data():
    """Written as JSON and read again, it asks for the same, every output option included."""
    asked = a_request(**named(OUTPUT))
    offered = replace(asked, publication=Publication(repo_id="org/theirs", create_pr=True))

    for request in (asked, offered, replace(asked, publication=None)):
        assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_options_of_a_machine_are_not_part_of_the_data():
    """What changes nothing that is written stays where it was asked for, and is refused as data."""
    asked = a_request(device="cpu", memory_budget=5)

    assert asked.to_dict() == a_request().to_dict()
    with pytest.raises(RecipeError, match="unknown option 'device'"):
        Request.from_dict({**asked.to_dict(), "options": {"device": "cpu"}})


@pytest.mark.parametrize("key", [known.key for known in declared()])
def test_an_option_is_the_same_in_words_and_as_a_user_gives_it(key, tmp_path):
    """Its flag takes the user's text; the words made of the value mean that value again."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(a_request().recipe.to_yaml())
    asked = a_request(**named([key]))
    given = ["plan", str(recipe), *words_of(key)]
    again = ["plan", str(recipe), *asked.publication.words(), *asked.options.words()]

    assert request_of(_parser().parse_args(given)).options == asked.options
    assert request_of(_parser().parse_args(again)) == asked


@pytest.mark.parametrize("key", [known.key for known in declared()])
def test_what_changes_the_output_makes_another_run(key, tmp_path):
    """A run is told from others by the options that change its output, and by no other."""
    plan = plan_group(make_group(tmp_path))

    other = replace(plan, options=replace(plan.options, **named([key])))

    assert (hash_of(other) != plan.plan_hash) == (key in OUTPUT)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", None), ("seed", "many"), ("seed", True), ("seed", 1.5), ("rounding", "up"),
     ("rounding", ["nearest"]), ("max_shard_size", "5XB"), ("max_shard_size", {}),
     ("missing", "drop"), ("tokenizer_from", 5)],
)  # fmt: skip
def test_a_wrong_value_is_refused(key, value):
    """A value of the wrong kind is refused by its name, wherever it comes from."""
    with pytest.raises(RecipeError, match=key.replace("_", ".").replace("max.shard.size", "size")):
        Options.from_dict({key: value})


@pytest.mark.parametrize("known", [known for known in declared() if known.choices])
def test_an_option_takes_its_choices_and_no_other_word(known):
    """What is declared is all that may be said, and the refusal says it."""
    for choice in known.choices:
        assert getattr(Options.parsed({known.key: choice}), known.name) == choice

    with pytest.raises(RecipeError, match=f"^{known.key} must be .* or {known.choices[-1]}, not"):
        Options.parsed({known.key: known.choices[0].upper()})


@pytest.mark.parametrize("known", [known for known in declared() if known.least is not None])
def test_an_option_has_a_least_number(known):
    """One less is refused."""
    assert getattr(Options.parsed({known.key: known.least}), known.name) == known.least

    with pytest.raises(RecipeError, match=f"{known.key} must be {known.least} or more"):
        Options(**{known.name: known.least - 1})
