"""The recipes of public groups: read, and planned against headers of the shapes that they have."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import load_recipe
from resmerge_stream.recipe import ModelRef
from tests.support.checkpoints import ROOT

FOLDER = ROOT / "docs" / "public-groups"
# From the published config.json of each base.
CONFIGS = {
    "open-mopd": {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "olmo-3-rl-zero": {
        "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 100278, "tie_word_embeddings": False,
    },
    "qwen2.5-agents": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
# Vectors of a layer, by model type; the widths that are not the hidden size.
VECTORS = {
    "smollm3": ("input_layernorm.weight", "post_attention_layernorm.weight"),
    "olmo3": (
        "self_attn.q_norm.weight", "self_attn.k_norm.weight", "post_attention_layernorm.weight",
        "post_feedforward_layernorm.weight",
    ),
    "qwen2": (
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.bias",
        "self_attn.k_proj.bias", "self_attn.v_proj.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_public_groups_recipe_is_planned(tmp_path, name):
    """It has three experts, nothing stops its plan, and the page says what is read and written."""
    recipe = load_recipe(FOLDER / f"{name}.yml")
    shapes = dict(tensor_shapes(CONFIGS[name]))
    for i, ref in enumerate((recipe.base, *recipe.experts)):
        write_headers(tmp_path / f"{i}", shapes, CONFIGS[name])
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", str(ref))

    folders = [ModelRef(str(tmp_path / f"{i}")) for i in range(1 + len(recipe.experts))]
    plan = plan_merge(replace(recipe, base=folders[0], experts=tuple(folders[1:])))
    size = 2 * sum(map(math.prod, shapes.values()))

    assert len(recipe.experts) == 3
    assert recipe.method == "head_regression"
    assert not plan.problems
    assert plan.write_bytes == pytest.approx(size, rel=0.001)
    row = next(
        line for line in (FOLDER.parent / "public-groups.md").read_text().splitlines()
        if f"public-groups/{name}.yml" in line and line.startswith("|")
    )  # fmt: skip
    assert f"| {plan.read_bytes / 1e9:.1f} GB | {plan.write_bytes / 1e9:.1f} GB |" in row
    plan.close()


def test_every_public_recipe_has_its_shapes_here():
    """A recipe that is added is planned as well."""
    assert sorted(path.stem for path in FOLDER.glob("*.yml")) == sorted(CONFIGS)


def tensor_shapes(config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a checkpoint's tensors."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    widths = {"self_attn.k_proj.bias": narrow, "self_attn.v_proj.bias": narrow}
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for part, rows in zip("qkvo", (hidden, narrow, narrow, hidden), strict=True):
            yield f"{at}.self_attn.{part}_proj.weight", (rows, hidden)
        for part, shape in zip(("gate", "up", "down"), 2 * [(middle, hidden)] + [(hidden, middle)],
                               strict=True):  # fmt: skip
            yield f"{at}.mlp.{part}_proj.weight", shape
        for part in VECTORS[config["model_type"]]:
            yield f"{at}.{part}", (widths.get(part, hidden),)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_headers(folder, shapes, config):
    """Write a checkpoint whose weights are a hole in the file: a plan reads no byte of them."""
    folder.mkdir()
    header, at = {}, 0
    for tensor, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))
