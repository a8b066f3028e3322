"""What of mergekit's language is refused, as docs/recipes.md says it."""

import re
from pathlib import Path

import pytest
import yaml

from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.recipe_file import parse_recipe, recipe_from_dict
from resmerge_stream.planning.resolve import Resolver

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)
FRAGMENTS, _, FILES = (
    DOCS.read_text().partition("## What is refused")[2].partition("Whole files that are refused:")
)
TABLE, FILE_TABLE = ROW.findall(FRAGMENTS), ROW.findall(FILES)
RECIPE = {"merge_method": "ties", "base_model": "org/base", "models": ["org/a", "org/b"]}


@pytest.mark.parametrize(("fragment", "message"), TABLE, ids=lambda text: text[:30])
def test_the_table_of_refusals_is_true(fragment, message):
    """Each fragment is refused in just these words."""
    said = yaml.safe_load(fragment)
    kept = {
        k: v for k, v in RECIPE.items() if k != "models" or not {"slices", "modules"} & set(said)
    }

    with pytest.raises(RecipeError) as caught:
        Resolver(recipe_from_dict(kept | said)).at()

    told, rest, _ = message.partition("…")
    assert str(caught.value).startswith(told)
    assert rest or str(caught.value) == told


@pytest.mark.parametrize(("text", "message"), FILE_TABLE, ids=lambda text: text[:30])
def test_the_table_of_refused_files_is_true(text, message):
    """Each file is refused in just these words."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.replace("\\n", "\n").encode(), where="recipe")

    assert str(caught.value) == message


def test_the_table_is_found():
    """A table that nothing matches would pass."""
    assert len(TABLE) >= 15
    assert len(FILE_TABLE) == 4
