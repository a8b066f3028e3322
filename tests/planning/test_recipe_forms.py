"""What strangers write: numbers as text, models as mappings, YAML in fences, with aliases."""

import pytest
import yaml

from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.recipe_file import load_recipe, parse_recipe, recipe_from_dict
from resmerge_stream.planning.resolve import Resolver
from resmerge_stream.recipe import ModelRef

TIES = {"merge_method": "ties", "base_model": "o/base"}
TEXT = """merge_method: ties
base_model: o/base
models:
- model: o/one
  parameters: {weight: 0.4}
dtype: float32
"""


def ties(**parameters):
    """Return a recipe of one model with its own parameters."""
    return {**TIES, "models": [{"model": "o/one", "parameters": parameters}]}


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-1", 0.1), ("'0.4'", 0.4), ("5E-1", 0.5), ("[1e-1, 0.5]", [0.1, 0.5]), ("1", 1.0)],
)
def test_a_number_may_be_text(text, number):
    """YAML reads `1e-1` as text, and people put numbers in quotes; a number is meant."""
    value = yaml.safe_load(text)
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]

    own, plain = (Resolver(recipe_from_dict(ties(weight=one))) for one in (value, number))
    shared = recipe_from_dict({**ties(), "parameters": {"lambda": value, "density": value}})

    weights = [one.each(names)[name].weights for one in (own, plain) for name in names]
    assert weights[:2] == weights[2:]
    methods = [Resolver(shared).each(names)[name].method for name in names]
    wanted = number if isinstance(number, list) else [number, number]
    assert [method.lambda_ for method in methods] == wanted
    assert [method.density for method in methods] == wanted


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        (True, False),
        (1, 0),
        (1.0, 0.0),
        ("1", "0"),
        ("True", "False"),
        ("yes", "no"),
        ("on", "off"),
    ],
)
@pytest.mark.parametrize("is_gradient", [False, True])
def test_a_switch_may_be_a_number_or_a_word(yes, no, is_gradient):
    """`normalize: 1.0` is true and `0` is false, as in mergekit; `int8_mask` may be anything."""

    def normalize(value):
        value = [value, value] if is_gradient else value
        document = {**ties(), "parameters": {"normalize": value, "int8_mask": 1.0}}
        return Resolver(recipe_from_dict(document)).at().method.normalize

    assert normalize(yes) is True
    assert normalize(no) is False


@pytest.mark.parametrize("value", [0.5, 2, "maybe", "0.4", -1])
def test_what_is_neither_yes_nor_no_is_refused(value):
    """A share is no switch."""
    with pytest.raises(RecipeError, match="normalize must be true or false"):
        Resolver(recipe_from_dict({**ties(), "parameters": {"normalize": value}})).at()


def test_numbers_of_tokens_and_layers_may_be_text_too():
    """One place decides what a number is."""
    sources = [{"model": "o/one", "layer_range": ["0", 4.0]}]

    read = recipe_from_dict({
        **TIES, "slices": [{"sources": sources}], "tokenizer": {"pad_to_multiple_of": "8"},
    })  # fmt: skip

    assert read.layers == 4
    assert read.tokenizer is not None
    assert read.tokenizer.pad_to_multiple_of == 8


@pytest.mark.parametrize("dtype", ["torch.float32", "float32", "fp32"])
def test_a_dtype_may_have_torchs_name(dtype):
    """`torch.float32` is float32."""
    assert recipe_from_dict({**ties(), "dtype": dtype}).dtype == "float32"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ({"path": "o/m"}, "o/m"),
        ({"path": "o/m", "revision": "main"}, "o/m@main"),
        ({"model": {"path": "o/m"}}, "o/m"),
        ({"model": "o/m", "lora": "o/l"}, "o/m+o/l"),
        ({"model": {"path": "o/m"}, "lora": {"path": "o/l", "revision": "v1"}}, "o/m+o/l@v1"),
        ({"model": {"path": "o/m"}, "lora": None, "override_architecture": None}, "o/m"),
    ],
)
def test_a_model_may_be_a_mapping_wherever_one_is_named(written, text):
    """mergekit writes models so; base, models, tokenizer and tokens take the same forms."""
    plain = ModelRef.parse(text)

    tokens = {"<x>": {"source": {"kind": "model_token", "model": written, "token_id": "3"}}}
    read = recipe_from_dict({
        **TIES, "base_model": "o/other", "models": [{"model": written}],
        "tokenizer": {"source": written, "tokens": {**tokens, "<y>": {"source": written}}},
    })  # fmt: skip

    assert read.experts == (plain,)
    assert read.tokenizer is not None
    assert read.tokenizer.source == plain
    assert [row.model for _, row in read.tokenizer.tokens] == [plain, plain]
    assert recipe_from_dict({**TIES, "base_model": written, "models": ["o/z"]}).base == plain


def test_what_is_not_read_of_a_model_is_named():
    """Another architecture for one model would be another merge."""
    model = {"model": "o/m", "override_architecture": "LlamaForCausalLM"}

    with pytest.raises(RecipeError, match="'override_architecture' of the model 'o/m'"):
        recipe_from_dict({**TIES, "models": [{"model": model}]})


@pytest.mark.parametrize(
    "text",
    [
        f"```yaml\n{TEXT}```",
        f"\n```yaml\n{TEXT}```\n\n",
        f"```\n{TEXT}",
        f"~~~yml\n{TEXT}~~~\n",
        f"Here it is:\n\n```yaml\n{TEXT}```\n\nHave fun.",
        f"---\nlicense: mit\ntags:\n- merge\n---\n# A merge\n\n```yaml\n{TEXT}```\n",
        f"```python\nmerge_method = 1\n```\n\n```yaml\n{TEXT}```\n",
    ],
)
def test_a_recipe_may_be_pasted_with_its_fence_or_its_card(text, tmp_path):
    """What a page shows can be copied whole, and a card is a file like another."""
    wanted = parse_recipe(TEXT)
    (tmp_path / "README.md").write_text(text)

    assert parse_recipe(text) == wanted
    assert load_recipe(tmp_path / "README.md") == wanted


def test_a_fence_inside_a_template_is_none():
    """A literal block in a recipe belongs to the recipe."""
    template = "```\n{{ messages }}\nmerge_method: x\n```\n"
    text = TEXT + "chat_template: |\n" + "".join(f" {line}\n" for line in template.split("\n"))

    assert parse_recipe(text).chat_template == template


def test_a_script_may_share_what_it_writes():
    """`yaml.safe_dump` writes a shared list as an alias; what is read is not shared."""
    shared = [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 0.3}]
    models = [{"model": f"o/{i}", "parameters": {"weight": shared}} for i in range(3)]
    document = {**TIES, "models": models, "parameters": {"density": shared}}
    text = yaml.safe_dump(document)
    merged = "x: &x {weight: 0.4, density: 0.5}\n".replace("x:", "parameters:") + (
        "merge_method: ties\nbase_model: o/base\n"
        "models: [{model: o/a, parameters: {<<: *x, weight: 0.7}}]\n"
    )

    read = parse_recipe(text)

    assert "&id" in text
    assert "*id" in text
    assert read == recipe_from_dict(document)
    assert "&" not in read.to_yaml()
    assert parse_recipe(merged).experts == (
        ModelRef("o/a", weight=0.7, parameters={"density": 0.5}),
    )


def test_an_end_without_a_document_behind_it_is_no_second_recipe():
    """`---` after the recipe ends it, as before it begins it."""
    text = "merge_method: ties\nbase_model: base\nmodels: [one]\n"

    assert parse_recipe(f"---\n{text}---\n") == parse_recipe(text)
    with pytest.raises(RecipeError, match="several recipes"):
        parse_recipe(f"{text}---\n{text}")
