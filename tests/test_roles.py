"""Roles from names: current architectures, and the substring rules of the authors' release.

What transformers makes of each architecture says what its tensors are: an independent reference.
"""

import re

import pytest
import torch
from torch import nn

from resmerge_stream.roles import (
    MATRIX_ROLES,
    Role,
    layer_of,
    module_of,
    release_role_of,
    role_of,
)
from tests.zoo import architectures as zoo

M, V = (8, 8), (8,)
ARCHITECTURES = {
    "qwen2": {
        "model.embed_tokens.weight": (M, "embedding"),
        "model.layers.3.self_attn.q_proj.weight": (M, "attention"),
        "model.layers.3.self_attn.q_proj.bias": (V, "vector"),
        "model.layers.3.self_attn.o_proj.weight": (M, "attention"),
        "model.layers.3.mlp.gate_proj.weight": (M, "ffn"),
        "model.layers.3.input_layernorm.weight": (V, "norm"),
        "model.norm.weight": (V, "norm"),
        "lm_head.weight": (M, "head"),
    },
    "qwen3 and its mixture": {
        "model.layers.0.self_attn.q_norm.weight": (V, "norm"),
        "model.layers.0.mlp.gate.weight": (M, "router"),
        "model.layers.0.mlp.experts.7.down_proj.weight": (M, "ffn"),
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 8, 8), "ffn"),
        "model.layers.0.mlp.shared_expert_gate.weight": ((1, 8), "router"),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (M, "ffn"),
    },
    "mixtral": {
        "model.layers.0.block_sparse_moe.gate.weight": (M, "router"),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": (M, "ffn"),
    },
    "deepseek": {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (M, "attention"),
        "model.layers.0.self_attn.kv_a_layernorm.weight": (V, "norm"),
        "model.layers.0.self_attn.q_b_proj.weight": (M, "attention"),
        "model.layers.3.mlp.gate.e_score_correction_bias": (V, "vector"),
    },
    "gpt2": {
        "wte.weight": (M, "embedding"),
        "wpe.weight": (M, "other"),
        "h.0.attn.c_attn.weight": (M, "attention"),
        "h.0.attn.bias": ((1, 1, 8, 8), "buffer"),
        "h.0.mlp.c_fc.weight": (M, "ffn"),
        "h.0.ln_1.weight": (V, "norm"),
        "ln_f.bias": (V, "norm"),
    },
    "gpt-neox": {
        "gpt_neox.embed_in.weight": (M, "embedding"),
        "gpt_neox.layers.0.attention.query_key_value.weight": (M, "attention"),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (V, "buffer"),
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (M, "ffn"),
        "embed_out.weight": (M, "head"),
    },
    "llama, its own names": {
        "tok_embeddings.weight": (M, "embedding"),
        "layers.0.attention.wq.weight": (M, "attention"),
        "layers.0.feed_forward.w2.weight": (M, "ffn"),
        "output.weight": (M, "head"),
    },
    "t5 and bert": {
        "shared.weight": (M, "embedding"),
        "bert.embeddings.position_embeddings.weight": (M, "other"),
        "bert.encoder.layer.0.attention.self.query.weight": (M, "attention"),
        "bert.embeddings.LayerNorm.weight": (V, "norm"),
    },
    "anything else": {
        "adapter.weight": (M, "matrix"),
        "conv.weight": ((4, 3, 3, 2), "other"),
        "scale": ((), "vector"),
    },
    "no linear maps": {
        "model.layers.0.mlp.experts.gate_up_proj_bias": ((4, 16), "other"),
        "backbone.layers.0.mixer.A_log": (M, "other"),
        "backbone.layers.0.mixer.conv1d.weight": ((8, 1, 4), "other"),
        "vision_model.embeddings.position_embedding": ((1, 8, 8), "other"),
        "vision_tower.patch_embed.proj.weight": (M, "other"),
        "query_tokens": ((1, 8, 8), "other"),
        "model.layers.0.attn_hc.fn": (M, "other"),
    },
    "heads and tables under other names": {
        "transformer.tokens_embed.weight": (M, "embedding"),
        "model.llm.embed.weight": (M, "embedding"),
        "model.llm.unembed.weight": (M, "head"),
        "cls.predictions.decoder.weight": (M, "head"),
        "pred_layer.proj.weight": (M, "head"),
        "lm_head.dense.weight": (M, "matrix"),
    },
}
CASES = [(n, *case) for tensors in ARCHITECTURES.values() for n, case in tensors.items()]


@pytest.mark.parametrize(("name", "shape", "role"), CASES)
def test_names_of_current_architectures_have_their_role(name, shape, role):
    """A parameter's role follows from its name and shape."""
    assert role_of(name, shape) is Role(role)


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.embed_tokens.weight", M, "embedding"),
        ("lm_head.weight", M, "head"),
        ("transformer.wte.weight", M, "embedding"),
        ("model.layers.0.self_attn.q_norm.weight", V, "norm"),
        ("model.layers.0.self_attn.q_proj.bias", V, "vector"),
        ("model.layers.0.self_attn.Q_PROJ.weight", M, "attention"),
        ("model.layers.0.mlp.gate.weight", M, "ffn"),
        ("wpe.weight", M, "matrix"),
        ("gpt_neox.embed_in.weight", M, "matrix"),
        ("output.weight", M, "matrix"),
        ("bert.attention.output.LayerNorm.weight", V, "norm"),
        ("norm.projection.weight", M, "norm"),
    ],
)
def test_the_releases_substrings_are_repeated_word_for_word(name, shape, role):
    """The release's rules are tested in its order, hazards included."""
    assert release_role_of(name, shape) is Role(role)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("h.0.attn.c_attn.weight", 0),
        ("model.layers.3.mlp.experts.7.down_proj.weight", 3),
        ("lm_head.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_the_layer_of_a_parameter_is_its_blocks_number(name, layer):
    """The number after layers, h or blocks is the layer; outside of them there is none."""
    assert layer_of(name) == layer


def test_the_module_of_a_parameter_is_its_last_word():
    """Weight, bias and numbers are not words."""
    assert module_of("model.layers.3.self_attn.q_proj.weight") == "q_proj"
    assert module_of("model.layers.3.mlp.experts.7.down_proj.bias") == "down_proj"
    assert module_of("weight") == "weight"


DOZEN = ("qwen2", "mixtral", "gpt_oss", "deepseek_v3", "mamba2", "nemotron_h", "gemma3", "qwen3_5",
         "gpt2", "xlnet", "rwkv", "blip-2")  # fmt: skip
REST = tuple(name for name in zoo.buildable() if name not in DOZEN)
# Modules whose parameters are matrices or stacks of them, and parameters of modules that hold
# something else beside them.
MAPS = re.compile(r"^(Conv1D|LSTM|GRU|MultiheadAttention|\w+(Experts|ExpertGLU|Router))$")
OWN_MAPS = re.compile(
    r"(multi_modal_projector\.mm_input_projection_weight|rg_lru\.(input|recurrent)_gate_weight|"
    r"mamba\.(x|dt)_proj_weight|(rel_logits_proj|relative_position_bias)\.proj)$"
)
# Linear maps that are convolutions elsewhere, or that mix whole streams by a few numbers: not
# decomposed on purpose.
LEFT_TO_OTHER = re.compile(
    r"patch_(proj|embed(?!ding_proj))|vision_embed_tokens|hyper_connection|relative_pos_embeddings"
)


def _is_a_map(module, name, is_parameter):
    kind = type(module)
    leaf = name.rpartition(".")[2]
    if not is_parameter or "bias" in leaf or LEFT_TO_OTHER.search(name):
        return False
    if isinstance(module, nn.Linear) or MAPS.match(kind.__name__):
        return True
    return OWN_MAPS.search(name) is not None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", zoo.UNBUILT)
@pytest.mark.filterwarnings("ignore")
def test_what_is_left_out_cannot_be_built(architecture):
    """An architecture that is not tried is one that transformers refuses to build small."""
    with pytest.raises(Exception), torch.device("meta"):  # noqa: B017, PT011  # each its own
        zoo.small_model(architecture, zoo.small_config(architecture))


@pytest.mark.parametrize(
    "architecture",
    [*DOZEN, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)],
)
@pytest.mark.filterwarnings("ignore")
def test_linear_maps_are_decomposed_and_nothing_else_is(architecture):
    """What transformers calls a linear map has a matrix role, or is the head; what else has not."""
    with torch.device("meta"):
        model = zoo.small_model(architecture, zoo.small_config(architecture))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings()

    wrong = {}
    for name, module, tensor in zoo.modules_of(model):
        if tensor.ndim < 2:
            continue
        role = role_of(name, tuple(tensor.shape))
        if module is head:
            fits = role is Role.HEAD
        elif _is_a_map(module, name, name in parameters):
            fits = role in MATRIX_ROLES or role is Role.HEAD
        else:
            fits = role not in MATRIX_ROLES and role is not Role.HEAD
        if not fits:
            wrong[name] = (type(module).__name__, str(role))
    assert wrong == {}


@pytest.mark.parametrize("architecture", ["gpt2", "ctrl", "openai-gpt", "mamba", "bloom"])
def test_the_table_of_tokens_is_the_embedding(architecture):
    """A model's input embeddings have that role, and no table of positions has."""
    with torch.device("meta"):
        model = zoo.small_model(architecture, zoo.small_config(architecture))

    tables = [
        name
        for name, _, tensor in zoo.modules_of(model)
        if role_of(name, tuple(tensor.shape)) is Role.EMBEDDING
    ]

    (name,) = tables
    assert model.get_submodule(name.rpartition(".")[0]) is model.get_input_embeddings()
