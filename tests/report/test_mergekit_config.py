"""What mergekit would be told of a merge: the same recipe, or why not."""

from pathlib import Path

import pytest
import yaml

from resmerge_stream.planning.options import Options
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import load_recipe, parse_recipe
from resmerge_stream.run.engine import run_merge
from tests.support.checkpoints import make_group, merge, read_tensors

DATA = Path(__file__).parents[1] / "data"
RECIPES = sorted((DATA / "mergekit" / "recipes").glob("*.yml"))
TOKENS = sorted((DATA / "mergekit_tokens" / "recipes").glob("*.yml"))

pytestmark = pytest.mark.usefixtures("without_picture")


@pytest.mark.parametrize("recipe", [*RECIPES[::4], *TOKENS], ids=lambda path: path.stem)
def test_it_is_the_same_merge(recipe, tmp_path, monkeypatch):
    """Read again, in mergekit's keys alone, it gives the same bytes."""
    monkeypatch.chdir(recipe.parents[1])
    list(run_merge(plan_merge(load_recipe(recipe)), out=tmp_path / "first"))
    written = tmp_path / "first" / "mergekit_config.yml"

    again = load_recipe(written)
    list(run_merge(plan_merge(again), out=tmp_path / "again"))

    first, second = read_tensors(tmp_path / "first"), read_tensors(tmp_path / "again")
    assert all(first[name].equal(second[name]) for name in first)
    asked = yaml.safe_load(recipe.read_text())
    told = yaml.safe_load(written.read_text())
    assert told["dtype"] == told["out_dtype"] == "float32"
    assert told["merge_method"] == asked["merge_method"]


def test_words_are_said_as_mergekit_says_them(tmp_path):
    """`rescale` is true or false there; the arithmetic is float32, the output's dtype its own."""
    group = make_group(tmp_path / "group", experts=2)

    merge(group, tmp_path / "out", method="dare_ties", parameters={"rescale": "none"})

    told = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
    assert told["parameters"] == {
        "normalize": False, "lambda": 1.0, "density": 1.0, "rescale": False,
    }  # fmt: skip
    assert (told["dtype"], told["out_dtype"]) == ("float32", "bfloat16")
    text = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert "random numbers are others" in text
    assert parse_recipe(text).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("method", "parameters", "reason"),
    [
        ("resmerge", {}, "has no method resmerge"),
        ("ties", {"preset": "paper"}, "trim: model"),
        ("dare_ties", {"rescale": "inverse"}, "rescale: inverse"),
    ],
)
def test_what_mergekit_cannot_run_is_said_in_the_card(method, parameters, reason, tmp_path):
    """No file pretends to be the same merge; the card has the reason."""
    group = make_group(tmp_path / "group", experts=2)

    merge(group, tmp_path / "out", method=method, parameters=parameters, options=Options())

    assert not (tmp_path / "out" / "mergekit_config.yml").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("mergekit cannot run it"))
    assert reason in line.replace("\\", "")
