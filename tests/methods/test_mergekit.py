"""The same recipes, the same numbers: merges here beside what mergekit 0.1.5 itself wrote.

``tests/data/mergekit`` holds models, recipes and mergekit's outputs; ``make.py`` there made them.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import load_recipe
from resmerge_stream.run.engine import run_merge
from tests.support.checkpoints import read_tensors

HERE = Path(__file__).parents[1] / "data" / "mergekit"
RECIPES = sorted(path.stem for path in (HERE / "recipes").glob("*.yml"))

pytestmark = pytest.mark.usefixtures("without_picture")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_mergekits_result(name, tmp_path, monkeypatch):
    """To 1e-5 of the update, beside float32's own rounding of the weights."""
    monkeypatch.chdir(HERE)
    plan = plan_merge(load_recipe(f"recipes/{name}.yml"), out=tmp_path / "out")

    list(run_merge(plan, out=tmp_path / "out"))

    merged = read_tensors(tmp_path / "out")
    base = load_file(HERE / "base" / "model.safetensors")
    assert set(merged) == set(base)
    expected = load_file(HERE / "expected.safetensors")[name].split(
        [base[tensor].numel() for tensor in sorted(base)]
    )
    for tensor, wanted in zip(sorted(base), expected, strict=True):
        found, start = merged[tensor].flatten().double(), base[tensor].flatten().double()
        rounding = 2e-7 * start.norm() + 1e-5 * (wanted - start).norm()
        assert (found - wanted.double()).norm() <= rounding, tensor


def test_every_recipe_has_an_output_to_compare_with():
    """A recipe without mergekit's output would be compared with nothing."""
    assert set(load_file(HERE / "expected.safetensors")) == set(RECIPES)
    assert len(RECIPES) == 33
