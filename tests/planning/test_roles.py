"""Roles from names: current architectures, and the substring rules of the authors' release."""

import pytest

from resmerge_stream.roles import Role, layer_of, module_of, release_role_of, role_of

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
        "wpe.weight": (M, "embedding"),
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
        "bert.embeddings.position_embeddings.weight": (M, "embedding"),
        "bert.encoder.layer.0.attention.self.query.weight": (M, "attention"),
        "bert.embeddings.LayerNorm.weight": (V, "norm"),
    },
    "anything else": {
        "adapter.weight": (M, "matrix"),
        "conv.weight": ((4, 3, 3, 2), "matrix"),
        "scale": ((), "vector"),
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
