"""Recipes: mergekit's vocabulary in and out, and every refusal in words."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.recipe_file import (
    MAX_RECIPE_BYTES,
    load_recipe,
    parse_recipe,
    recipe_from_dict,
)
from resmerge_stream.recipe import DEFAULT_METHOD, ModelRef, Recipe, override, placed

FULL = """
merge_method: resmerge
base_model: Qwen/Qwen2.5-7B
models:
  - model: Qwen/Qwen2.5-7B
  - model: hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo
  - model: Open-Reasoner-Zero/Open-Reasoner-Zero-7B@0123abc
parameters: {variant: paper, rank: 1, rho: 0.2, beta_min: 0.7, beta_max: 1.0}
dtype: bfloat16
"""
LEAST = {"base_model": "o/base", "models": ["o/one"]}
# Each line repeats the one above ten times.
LAUGHS = "models: &l0 [x, x]\n" + "".join(
    f"k{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def test_a_mergekit_recipe_is_read():
    """Every key of the vocabulary is understood, and the base among the models is skipped."""
    recipe = parse_recipe(FULL)

    assert recipe.base == ModelRef("Qwen/Qwen2.5-7B")
    assert [str(expert) for expert in recipe.experts] == [
        "hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo",
        "Open-Reasoner-Zero/Open-Reasoner-Zero-7B@0123abc",
    ]
    assert recipe.experts[1].revision == "0123abc"
    assert recipe.parameters["rho"] == 0.2
    assert recipe.dtype == "bfloat16"


def test_the_least_recipe_has_a_base_and_an_expert():
    """The method is the default unless one is named; its parameters are its own defaults."""
    recipe = recipe_from_dict(LEAST)

    assert recipe == Recipe(ModelRef("o/base"), (ModelRef("o/one"),))
    assert (recipe.method, recipe.chosen_by) == (DEFAULT_METHOD, "default")
    assert recipe.dtype is None


@pytest.mark.parametrize(
    ("alias", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_short_names_of_dtypes_are_understood(alias, dtype):
    """bf16, fp16 and fp32 mean what they mean everywhere."""
    assert recipe_from_dict(LEAST | {"dtype": alias}).dtype == dtype


def test_an_experts_weight_is_kept():
    """A model's own weight is read as a number and written back."""
    models = [{"model": "o/one", "parameters": {"weight": 2}}, "o/two"]

    recipe = recipe_from_dict(LEAST | {"models": models})

    assert [expert.weight for expert in recipe.experts] == [2.0, None]
    assert recipe.to_dict()["models"][0] == {"model": "o/one", "parameters": {"weight": 2.0}}


# Without what parts a name from a revision, an adapter or a subfolder.
words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1
).filter(lambda text: not set("@+:") & set(text) and text.strip() == text)
# A mask of integers has no effect here: it is read, told of, and not kept.
keys = words.filter(lambda key: key != "int8_mask")
revisions = st.none() | st.from_regex(r"[A-Za-z0-9._/\-]{1,20}", fullmatch=True)
refs = st.builds(ModelRef, words, revisions, st.none() | st.floats(-10, 10))


@given(
    base=st.builds(ModelRef, words, revisions),
    experts=st.lists(refs, min_size=1, max_size=4).map(tuple),
    parameters=st.dictionaries(keys, st.booleans() | st.integers() | words, max_size=3),
    dtype=st.sampled_from((None, "bfloat16", "float16", "float32")),
)
def test_a_recipe_survives_yaml(base, experts, parameters, dtype):
    """What is written as YAML is read back as the same recipe, whatever the names."""
    experts = tuple(ref for ref in experts if (ref.id, ref.revision) != (base.id, base.revision))
    assume(experts)
    recipe = Recipe(base, experts, "mean", parameters, dtype)

    assert parse_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (None, "mapping"),
        ([], "mapping"),
        ("text", "mapping"),
        (LEAST | {"base_modle": "x"}, "'base_modle'.*Did you mean 'base_model'"),
        (LEAST | {"zzz": 1}, "unknown key 'zzz'.*Known keys"),
        ({"base_model": "o/base", "slices": []}, "one slice over the whole depth"),
        ({"base_model": "o/base", "modules": {}}, "one module"),
        (LEAST | {"slices": [{"sources": ["o/one"]}]}, "'models', 'slices' stand side by side"),
        (LEAST | {"modules": {"default": LEAST}}, "stand side by side"),
        (LEAST | {"normalize": True}, "'normalize' stands at the top .* under 'parameters'"),
        (LEAST | {"pad_to_multiple_of": 8}, "put it under 'tokenizer'"),
        (LEAST | {"experts": []}, "mergekit-moe"),
        (LEAST | {"tokenizer_source": 7}, "a model must be"),
        (LEAST | {"tokenizer": "union"}, "must be a mapping"),
        (LEAST | {"tokenizer": {"sorce": "base"}}, "'sorce'"),
        (LEAST | {"tokenizer": {"pad_to_multiple_of": 0.5}}, "pad_to_multiple_of"),
        (LEAST | {"tokenizer": {}, "tokenizer_source": "base"}, "not both"),
        (LEAST | {"tokenizer": {"tokens": ["<x>"]}}, "tokens must map"),
        (LEAST | {"tokenizer": {"tokens": {1: {}}}}, "put it in quotes"),
        (LEAST | {"tokenizer": {"tokens": {"<x>": {"force": True}}}}, "no 'source'"),
        (LEAST | {"tokenizer": {"tokens": {"<x>": {"source": {"kind": "mean"}}}}}, "kind: zero"),
        (LEAST | {"chat_template": "chat_ml"}, "neither a template nor the name"),
        (LEAST | {"stages": []}, "one after the other"),
        (LEAST | {7: 1}, "unknown key 7"),
        ({"models": ["o/one"]}, "no base_model"),
        ({"base_model": 5, "models": ["o/one"]}, "not 5"),
        ({"base_model": " ", "models": ["o/one"]}, "a model must be"),
        ({"base_model": "a\0b", "models": ["o/one"]}, "a model must be"),
        ({"base_model": "o/base@", "models": ["o/one"]}, "malformed revision"),
        ({"base_model": "@main", "models": ["o/one"]}, "malformed revision"),
        ({"base_model": "o/base@a b", "models": ["o/one"]}, "malformed revision"),
        ({"base_model": "o/base@main\n", "models": ["o/one@x\ny"]}, "malformed revision"),
        ({"base_model": "o/base"}, "'models'"),
        ({"base_model": "o/base", "models": []}, "'models'"),
        ({"base_model": "o/base", "models": "o/one"}, "'models'"),
        ({"base_model": "o/base", "models": {"model": "o/one"}}, "'models'"),
        ({"base_model": "o/base", "models": [{"name": "o/one"}]}, "- model: ID"),
        ({"base_model": "o/base", "models": [3]}, "- model: ID"),
        ({"base_model": "o/base", "models": [{"model": "o/one", "weight": 1}]}, "'weight'"),
        ({"base_model": "o/base", "models": ["o/base"]}, "no expert"),
        (LEAST | {"merge_method": 3}, "merge_method"),
        (LEAST | {"parameters": [1]}, "parameters"),
        (LEAST | {"parameters": {1: 2}}, "parameters"),
        (LEAST | {"dtype": "int8"}, "output dtype"),
        (LEAST | {"dtype": 16}, "output dtype"),
        (LEAST | {"dtype": ["bf16"]}, "output dtype"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(document, reason):
    """The message names what is wrong, and what to write instead where there is something."""
    with pytest.raises(RecipeError, match=reason) as caught:
        recipe_from_dict(document)

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("weight", [True, "one", [], None, float("nan"), float("inf"), 1e9])
def test_a_weight_is_a_finite_number(weight):
    """Words, empty lists, truth values and the infinite are not weights."""
    models = [{"model": "o/one", "parameters": {"weight": weight}}]

    with pytest.raises(RecipeError, match="weight"):
        recipe_from_dict(LEAST | {"models": models})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "not a YAML"),
        ("a: 1\na: 2", "stands twice"),
        ("a: 1\n---\na: 2", "several recipes"),
        ("base_model: &x [*x]", "inside what it repeats"),
        (LAUGHS, "repeat more than"),
        (LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "repeat more than"),
        ("models: !!python/object/apply:os.system ['true']", "not a YAML"),
        ("? [a, b]\n: 1", "plain word"),
        ("a: " + "[" * 5000, "not a YAML"),
        ("base_model: o/b\nmodels: " + "[" * 300 + "]" * 300, "nested"),
        ("\x00", "not a YAML"),
        (b"\xff\xfe\xfa", "not a YAML"),
        ("a: 2001-99-99", ""),
    ],
)  # fmt: skip
def test_a_document_that_is_not_plain_yaml_is_refused(text, reason):
    """Broken, repeated, shared, executable or bottomless YAML is one message, never a traceback."""
    with pytest.raises(RecipeError, match=reason or "recipe") as caught:
        parse_recipe(text)

    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    """A missing file, a folder, and a name that cannot be one are all refused in words."""
    for name in (tmp_path / "none.yml", tmp_path, "a\0b"):
        with pytest.raises(RecipeError, match="cannot read"):
            load_recipe(name)


def test_a_file_too_large_for_a_recipe_is_refused(tmp_path):
    """Nobody's weights are parsed as YAML."""
    path = tmp_path / "big.yml"
    path.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))

    with pytest.raises(RecipeError, match="is it a recipe"):
        load_recipe(path)


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    """A name that exists as a folder is a folder, whatever is in it."""
    folder = tmp_path / "model@home"
    folder.mkdir()

    assert ModelRef.parse(str(folder)) == ModelRef(str(folder))
    assert ModelRef.parse("o/model@home") == ModelRef("o/model", "home")


def test_options_win_over_the_recipe():
    """Experts replace the models, parameters are added one by one, and the base stays."""
    recipe = parse_recipe(FULL)

    changed = override(recipe, experts=["o/x", "o/y@v1"], parameters={"rho": 0.5}, dtype="float32")

    assert [str(ref) for ref in changed.experts] == ["o/x", "o/y@v1"]
    assert changed.parameters == {**recipe.parameters, "rho": 0.5}
    assert (changed.base, changed.dtype) == (recipe.base, "float32")


def test_as_many_experts_as_the_recipe_has_take_their_weights():
    """In its order; another number of experts has none of them, and that is said."""
    models = [{"model": f"o/{n}", "parameters": {"weight": n}} for n in (1, 2)]
    recipe = recipe_from_dict(
        {"merge_method": "task_arithmetic", "base_model": "o/base", "models": models}
    )

    same = override(recipe, base="o/b", experts=["o/x", "o/y"])
    more = override(recipe, experts=["o/x", "o/y", "o/z"])

    assert [(ref.id, ref.weight) for ref in same.models] == [("o/b", None), ("o/x", 1), ("o/y", 2)]
    assert same.notes == ()
    assert [(ref.id, ref.weight) for ref in more.experts] == [
        ("o/x", None), ("o/y", None), ("o/z", None),
    ]  # fmt: skip
    assert "no effect: there are 2, and 3 are named" in more.notes[0]


def test_a_model_that_lies_elsewhere_does_so_wherever_it_is_named():
    """The tokenizer, a token's row and the generation config are taken from there too."""
    document = {
        "merge_method": "linear",
        "models": [{"model": "a"}, {"model": "b"}],
        "tokenizer": {
            "source": "a",
            "tokens": {
                "<x>": {"source": "b"},
                "<y>": {"source": {"kind": "model_token", "model": "a", "token": "<z>"}},
            },
        },
        "generation_config": "b",
    }

    moved = placed(recipe_from_dict(document), {"a": ModelRef("/far/a"), "b": ModelRef("/far/b")})

    told = json.loads(json.dumps(document).replace('"a"', '"/far/a"').replace('"b"', '"/far/b"'))
    assert moved == recipe_from_dict(told)


def test_another_method_drops_the_recipes_parameters():
    """Parameters belong to the method that they were written for."""
    changed = override(parse_recipe(FULL), method="mean")

    assert (changed.method, changed.parameters) == ("mean", {})


def test_options_alone_make_a_recipe():
    """A base and an expert are enough, and experts alone where the method needs no base."""
    assert override(None, base="o/b", experts=["o/x"]).experts == (ModelRef("o/x"),)
    assert override(None, experts=["o/x", "o/y"], method="linear").base is None
    for base, experts in ((None, []), ("o/b", []), ("o/b", ["o/b"])):
        with pytest.raises(RecipeError):
            override(None, base=base, experts=experts)


def test_a_new_base_among_the_experts_is_skipped():
    """Changing the base to one of the experts leaves the other experts."""
    recipe = parse_recipe(FULL)

    changed = override(recipe, base="hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo")

    assert changed.base not in changed.experts


def test_one_slice_over_the_whole_depth_is_read_as_models():
    """The slice's own parameters count before the recipe's; the depth is kept to be checked."""
    sources = [{"model": "o/one", "layer_range": [0, 4], "parameters": {"density": 0.4}}]
    document = {
        "merge_method": "ties",
        "base_model": "o/base",
        "slices": [{"sources": sources, "parameters": {"lambda": 2}}],
        "parameters": {"lambda": 1, "normalize": True},
    }

    recipe = recipe_from_dict(document)

    assert recipe.layers == 4
    assert recipe.parameters == {"lambda": 2, "normalize": True}
    assert recipe.experts == (ModelRef("o/one", parameters={"density": 0.4}),)


@pytest.mark.parametrize("ranges", [[[1, 4]], [[0, 4], [0, 3]], [[0, 4.5]], [[0, -1]], [None]])
def test_slices_that_are_not_the_whole_depth_are_refused(ranges):
    """Stacking layers is left to mergekit, which the message names."""
    sources = [{"model": f"o/{i}", "layer_range": pair} for i, pair in enumerate(ranges)]

    with pytest.raises(RecipeError, match="left to mergekit"):
        recipe_from_dict({"base_model": "o/base", "slices": [{"sources": sources}]})


def test_a_base_that_is_listed_takes_part_where_a_method_merges_whole_models():
    """In `linear` it counts with its weight, elsewhere it is skipped; both survive YAML."""
    models = [{"model": "o/base", "parameters": {"weight": 2}}, "o/one"]
    document = {"base_model": "o/base", "models": models}

    linear = recipe_from_dict(document | {"merge_method": "linear"})
    mean = recipe_from_dict(document | {"merge_method": "mean"})

    assert linear.base_listed
    assert linear.base == ModelRef("o/base", weight=2.0)
    assert mean.base == ModelRef("o/base")
    assert parse_recipe(linear.to_yaml()) == linear
    assert parse_recipe(mean.to_yaml()) == mean


def test_what_has_no_effect_is_said_once():
    """mergekit's hints about storage and names are accepted; the plan's warnings say them."""
    models = [{"model": f"o/{i}", "parameters": {"int8_mask": True}} for i in range(2)]

    recipe = recipe_from_dict(LEAST | {"models": models, "name": "my merge"})

    assert [note.split()[0] for note in recipe.notes] == ["name", "int8_mask"]
    assert recipe.experts[0].parameters == {}


def test_a_preset_may_stand_behind_the_methods_name():
    """`ties:paper` is `ties` with the settings of its paper."""
    recipe = recipe_from_dict(LEAST | {"merge_method": "ties:paper"})

    assert (recipe.method, recipe.parameters) == ("ties", {"preset": "paper"})


def test_an_option_names_a_preset_like_a_recipe():
    """`--method ties:paper` is the recipe's `ties:paper`; `--set` has the last word."""
    recipe = override(
        None,
        base="o/base",
        experts=["o/a"],
        method="ties:density=0.2:lambda=0.5",
        parameters={"density": "0.1"},
    )

    assert (recipe.method, recipe.parameters) == ("ties", {"density": "0.1", "lambda": "0.5"})

    preset = override(recipe, method="ties:paper")

    assert (preset.method, preset.parameters) == ("ties", {"preset": "paper"})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name:runs/step-100", ("org/name", None, "runs/step-100")),
        ("org/name@v1:step 100", ("org/name", "v1", "step 100")),
        ("org/name@refs/pr/7", ("org/name", "refs/pr/7", None)),
        ("https://huggingface.co/org/name", ("org/name", None, None)),
        ("https://huggingface.co/org/name/tree/main", ("org/name", "main", None)),
        ("https://hf.co/org/name/tree/refs%2Fpr%2F7", ("org/name", "refs/pr/7", None)),
        (
            "https://huggingface.co/org/name/tree/main/a%20b/c/?x=1",
            ("org/name", "main", "a b/c"),
        ),
    ],
)
def test_a_place_on_the_hub_is_read_and_written(text, place):
    """Revision, folder and page of the Hub are taken apart, and the words made of them agree."""
    ref = ModelRef.parse(text)

    assert ref.place == place
    assert ModelRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    "text", ["org/name@main:../other", "org/name:", "org/name@main:/etc", "org/name@main:a//b"]
)
def test_a_folder_outside_of_the_repository_is_refused(text):
    """A folder is a path below the repository's top."""
    with pytest.raises(RecipeError, match="subfolder"):
        ModelRef.parse(text)


def test_what_models_share_is_written_for_each():
    """YAML has a short form for shared lists that recipes do not use; none is ever written."""
    weight = [0.1, {"filter": "mlp", "value": [1, 2]}][1:]
    experts = tuple(ModelRef(f"o/{i}", parameters={"weight": weight}) for i in range(2))

    recipe = Recipe(ModelRef("o/base"), experts, "task_arithmetic")

    assert parse_recipe(recipe.to_yaml()) == recipe
