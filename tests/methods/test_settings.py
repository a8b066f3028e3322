"""Settings by layer, module and model: what a list, a filter and both together come to."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.errors import RecipeError
from resmerge_stream.methods.settings import check_setting, depths, evaluate
from resmerge_stream.planning.recipe_file import recipe_from_dict
from resmerge_stream.planning.resolve import Resolver
from tests.support.checkpoints import make_group, merge

NUMBERS = st.floats(-4, 4, width=32)


def names(layers):
    """Return a tensor outside the layers, and two of each layer."""
    parts = ("self_attn.q_proj", "mlp.up_proj")
    inside = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts]
    return ["model.embed_tokens.weight", *inside]


@given(values=st.lists(NUMBERS, min_size=1, max_size=6), layers=st.integers(2, 40))
def test_a_list_runs_from_the_first_layer_to_the_last(values, layers):
    """Its values stand evenly over the depth, straight lines between; outside counts the first."""
    places = depths(names(layers))

    found = [evaluate(values, n, places.get(n, 0.0), lambda value: value) for n in names(layers)]

    wanted = np.interp(np.arange(layers) / (layers - 1), np.linspace(0, 1, len(values)), values)
    assert found == pytest.approx([values[0], *np.repeat(wanted, 2)], abs=1e-9)


@given(
    attention=st.lists(NUMBERS, min_size=1, max_size=4),
    other=NUMBERS,
    weights=st.lists(st.lists(NUMBERS, min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_a_filter_goes_by_the_name_and_may_hold_a_list(attention, other, weights):
    """The first filter that is part of the name counts, one without is for the rest; each model's
    weight is its own."""
    layers = 5
    recipe = recipe_from_dict({
        "merge_method": "task_arithmetic", "base_model": "o/b",
        "models": [{"model": f"o/{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)],
        "parameters": {"lambda": [{"filter": "self_attn", "value": attention}, {"value": other}]},
    })  # fmt: skip

    found = Resolver(recipe).each(names(layers))

    depth = np.arange(layers) / (layers - 1)
    lines = [np.interp(depth, np.linspace(0, 1, len(w)), w) for w in [attention, *weights]]
    for i in range(layers):
        attn, mlp = (found[name] for name in names(layers)[1 + 2 * i : 3 + 2 * i])
        assert attn.method.lambda_ == pytest.approx(lines[0][i], abs=1e-9)
        assert mlp.method.lambda_ == other
        assert attn.weights == pytest.approx([line[i] for line in lines[1:]], abs=1e-9)


@pytest.mark.usefixtures("without_picture")
@pytest.mark.parametrize(
    ("method", "key", "values"),
    [
        ("resmerge", "rho", [0.1, 0.6]),
        ("resmerge", "rank", [1, 3]),
        ("karcher", "scale", [0.5, 2.0]),
        ("tsv_m", "scale", [0.5, 2.0]),
    ],
)
def test_our_own_methods_take_a_value_for_each_layer(tmp_path, method, key, values):
    """Each layer is that of a merge with its value alone, bit by bit."""
    group = make_group(tmp_path / "group", dtype=torch.float32)
    more = {"around": "base"} if method == "karcher" else {}
    several = [{"filter": "mlp", "value": values}, {"value": values[0]}]

    mixed = merge(group, tmp_path / "mixed", method=method, parameters={key: several, **more})
    plain = [
        merge(group, tmp_path / str(value), method=method, parameters={key: value, **more}).tensors
        for value in values
    ]

    assert any(not torch.equal(plain[0][name], plain[1][name]) for name in plain[0])
    for name, tensor in mixed.tensors.items():
        is_second = "layers.1.mlp" in name
        assert torch.equal(tensor, plain[is_second][name]), name


@pytest.mark.parametrize(
    "setting",
    [1 << 20_000, [1 << 20_000, 1], {"value": 1 << 20_000}],
    ids=["one", "list", "filter"],
)
def test_a_number_of_thousands_of_digits_is_refused(setting):
    """As YAML reads it from hexadecimal digits; it could not be written into a recipe again."""
    with pytest.raises(RecipeError, match=r"must be one value|too long to show"):
        check_setting("density", setting)
