"""A recipe's levels: where a setting is looked for, and what of each level is read."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.recipe_file import parse_recipe, recipe_from_dict
from resmerge_stream.planning.resolve import Resolver
from resmerge_stream.recipe import ModelRef

LAYERS = 3
NAMES = ["model.embed_tokens.weight"] + [
    f"model.layers.{layer}.{part}.weight"
    for layer in range(LAYERS)
    for part in ("attn.q", "mlp.up")
]
WHOLE = [0, LAYERS]

values = st.floats(0.0, 1.0, width=16)
gradients = values | st.lists(values, min_size=1, max_size=3)
filters = st.fixed_dictionaries(
    {"value": gradients}, optional={"filter": st.sampled_from(("mlp", "attn.q", "layers.1", "*"))}
)
settings = gradients | filters | st.lists(filters, min_size=1, max_size=3)
levels = st.dictionaries(st.sampled_from(("density", "weight", "lambda")), settings, max_size=3)


def looked_up(key, levels, name, t, default):
    """Return a setting's value as mergekit's config.py finds it, level by level."""
    for level in levels:
        if key in level and (found := evaluated(level[key], name, t)) is not None:
            return found
    return default


def evaluated(setting, name, t):
    """Return a setting's value at depth t, or None where no filter fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], dict):
        fitting = [c for c in setting if c.get("filter") in (None, "*") or c["filter"] in name]
        return evaluated(fitting[0]["value"], name, t) if fitting else None
    place = t * (len(setting) - 1)
    low = int(place)
    high = min(low + 1, len(setting) - 1)
    return (1 - place + low) * setting[low] + (place - low) * setting[high]


@given(recipe=levels, module=levels, piece=levels, sources=st.tuples(levels, levels))
def test_a_setting_is_looked_for_level_by_level(recipe, module, piece, sources):
    """Source, slice, module, recipe: the first that has a value for a tensor counts."""
    models = [
        {"model": f"o/{i}", "layer_range": WHOLE, "parameters": own}
        for i, own in enumerate(sources)
    ]
    document = {
        "merge_method": "ties", "base_model": "o/base", "parameters": recipe,
        "modules": {"default": {
            "parameters": module, "slices": [{"parameters": piece, "sources": models}],
        }},
    }  # fmt: skip

    read = recipe_from_dict(document)

    assert parse_recipe(read.to_yaml()) == recipe_from_dict(read.to_dict())
    for again in (read, parse_recipe(read.to_yaml())):
        chosen = Resolver(again).each(NAMES)
        for name in NAMES:
            t = 0.0 if "embed" in name else int(name.split(".")[2]) / (LAYERS - 1)
            shared = (piece, module, recipe)
            found = chosen[name].among((0, 1))
            density = found.density if isinstance(found.density, tuple) else (found.density,) * 2
            for i, own in enumerate(sources):
                wanted = looked_up("weight", (own, *shared), name, t, 1.0)
                assert found
                assert chosen[name].weights[i] == pytest.approx(wanted, abs=1e-9)
                wanted = looked_up("density", (own, *shared), name, t, 1.0)
                assert density[i] == pytest.approx(wanted, abs=1e-9)
            wanted = looked_up("lambda", shared, name, t, 1.0)
            assert found.lambda_ == pytest.approx(wanted, abs=1e-9)


def test_a_presets_value_counts_where_no_filter_fits():
    """What stands behind the method's name is one more level, the last."""
    document = {
        "merge_method": "ties:density=0.3", "base_model": "o/base", "models": ["o/a"],
        "parameters": {"density": [{"filter": "mlp", "value": 0.5}]},
    }  # fmt: skip

    chosen = Resolver(recipe_from_dict(document)).each(NAMES)

    assert {chosen[name].method.density for name in NAMES if "mlp" in name} == {0.5}
    assert {chosen[name].method.density for name in NAMES if "mlp" not in name} == {0.3}


def sliced(**more):
    """Return a recipe with all levels, keys added where their names say."""
    source = {"model": "o/a", "layer_range": WHOLE, **more.get("source", {})}
    piece = {"sources": [source], **more.get("slice", {})}
    module = {"slices": [piece], **more.get("module", {})}
    return {"base_model": "o/base", "modules": {"default": module}, **more.get("recipe", {})}


@pytest.mark.parametrize(
    ("level", "key", "value"),
    [
        ("module", "merge_method", "karcher"),
        ("module", "dtype", "float16"),
        ("module", "base_model", "o/other"),
        ("module", "tokenizer_source", "union"),
        ("slice", "merge_method", "ties"),
        ("slice", "dtype", "float16"),
        ("slice", "residual_weight", 0.5),
        ("source", "base_model", "o/other"),
        ("source", "out_dtype", "float16"),
        ("recipe", "name", "mine"),
    ],
)
def test_what_mergekit_ignores_at_a_level_is_named(level, key, value):
    """It changes nothing, and the notes say so."""
    read = recipe_from_dict(sliced(**{level: {key: value}}))

    assert read == recipe_from_dict(sliced())
    (note,) = read.notes
    assert note.startswith(f"{key} ")
    assert "has no effect" in note
    assert repr(value) in note


@pytest.mark.parametrize("level", ["recipe", "module", "slice", "source"])
def test_a_misspelt_key_is_refused_at_every_level(level):
    """Nothing passes unread, however deep it stands."""
    for key, reason in (
        ("base_modle", "'base_modle'.*Did you mean 'base_model'"),
        ("paramters", "'paramters'.*Did you mean 'parameters'"),
        ("qqq", "unknown key 'qqq'.*Known keys"),
        ("weight", "'weight' stands .* put it under 'parameters'"),
    ):
        with pytest.raises(RecipeError, match=reason):
            recipe_from_dict(sliced(**{level: {key: 1}}))
    with pytest.raises(RecipeError, match=r"'densty'.*Did you mean 'density'"):
        Resolver(recipe_from_dict({
            **sliced(**{"module": {"parameters": {"densty": 1}}}), "merge_method": "ties",
        }))  # fmt: skip


def test_a_slices_base_is_the_base_of_the_merge():
    """It counts before the recipe's, whose tokenizer is still the one that `base` means."""
    alone = recipe_from_dict(sliced(recipe={"base_model": None}, slice={"base_model": "o/base"}))
    both = sliced(slice={"base_model": "o/inner"}, recipe={"tokenizer_source": "base"})

    read = recipe_from_dict(both)

    assert alone == recipe_from_dict(sliced())
    assert read.base == ModelRef("o/inner")
    assert read.tokenizer is not None
    assert read.tokenizer.source == ModelRef("o/base")
    assert "o/base, gives no weights" in read.notes[0]
    assert replace(parse_recipe(read.to_yaml()), layers=LAYERS) == read
