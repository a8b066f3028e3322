"""transformers' architectures, small: each one's own config with the usual sizes cut down.

Nothing here is written by architecture but what `OWN` says, which is what a general cut breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOCABULARY = 96
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "hidden_dim", "dim",
                     "word_embed_proj_dim", "attention_hidden_size", "embedding_size",
                     "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size",
                     "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim",
                     "shared_intermediate_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads",
                     "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim",
                     "linear_key_head_dim", "linear_value_head_dim", "q_lora_rank",
                     "kv_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size",
                     "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "n_group",
                     "num_experts_per_token", "num_expert_group", "n_groups",
                     "topk_group", "linear_num_value_heads", "linear_num_key_heads",
                     "depth", "encoder_layers", "decoder_layers",
                     "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab",
                     "unpadded_vocab_size"), VOCABULARY),
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers")
OWN: dict[str, dict[str, Any]] = {
    "xlm": {"n_words": VOCABULARY, "emb_dim": 32},
    "xlnet": {"d_head": 8},
    "mamba2": {"num_heads": 8},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
              "n_group": 1, "topk_group": 1},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 0]}}},
    **{
        name: {"text_config": {"rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}}
        for name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v", "glmga",
                     "qwen2_5_omni_thinker")
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "longcat_flash": {"qk_head_dim": 12},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}, "num_key_value_heads": 4},
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 32}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "molmo2": {"adapter_config": {"vision_feature_layers": [1, 0], "vision_feature_layer": [1, 0]}},
    "muse_spark": {"audio_config": {"out_hidden_size": 32}},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16],
                 "axial_pos_shape": [8, 16]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
}  # fmt: skip
# Architectures that are not built here, with the reason: their own checks or defaults refuse a
# config whose sizes are cut, or they need a package of pictures that nothing else here needs.
# tests/test_roles.py fails as soon as one of them can be built.
UNBUILT: dict[str, str] = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "its vision tower needs timm"),
    **dict.fromkeys(("musicgen", "musicgen_melody", "evolla"), "its config alone builds none"),
    **dict.fromkeys(("apertus1p5", "cohere_compass", "cohere_compass_text", 
                     "deepseek_ocr2", "diffusion_gemma", "dory", "dots3_note", "dots3_note_text",
                     "ernie4_5_vl_moe",
                     "gemma4_assistant", "gemma4_unified_assistant", "granite4_vision", "hy_v4_vl", 
                     "qwen4_exp", "qwen4_exp_text", "zamba"),
                    "its sizes cannot be cut down one by one"),
}  # fmt: skip


def buildable() -> list[str]:
    """Return those of `model_types` that are built here."""
    return [name for name in model_types() if name not in UNBUILT]


def model_types() -> list[str]:
    """Return every causal-LM and image-text architecture of the installed transformers."""
    from transformers.models.auto import modeling_auto as auto

    return sorted(
        {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    )


def small_config(model_type: str) -> Any:
    """Return an architecture's config, cut down to a model of some thousand parameters."""
    from transformers import AutoConfig

    values = AutoConfig.for_model(model_type).to_dict()
    _cut(values, Ids())
    _override(values, OWN.get(model_type, {}))
    values.pop("model_type")
    return AutoConfig.for_model(model_type, **values)


def small_model(model_type: str, config: Any) -> Any:
    """Return a model of a config, random, on torch's default device."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    is_causal = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = "AutoModelForCausalLM" if is_causal else "AutoModelForImageTextToText"
    return getattr(transformers, kind).from_config(config)


class Ids:
    """Token ids that are in the small vocabulary, each given once."""

    def __init__(self) -> None:
        self.next = VOCABULARY - 1

    def fresh(self) -> int:
        """Return an id that nobody has yet."""
        self.next = max(self.next - 1, 1)
        return self.next


def _cut(values: dict[str, Any], ids: Ids) -> None:
    layers = next((values[key] for key in LAYERS if isinstance(values.get(key), int)), None)
    if layers is not None:
        kept = _kept_layers(values, layers)
        for key in [k for k, v in values.items() if isinstance(v, list) and len(v) == layers]:
            values[key] = [values[key][index] for index in kept]
        if isinstance(values.get("per_layer_config"), dict):
            every = {int(key): value for key, value in values["per_layer_config"].items()}
            values["per_layer_config"] = {
                new: every[old] for new, old in enumerate(kept) if old in every
            }
        for key in LAYERS:
            if values.get(key) == layers:
                values[key] = len(kept)
    is_latent = isinstance(values.get("kv_lora_rank"), int)
    rotates_heads = values.get("head_dim") == values.get("qk_rope_head_dim")
    for key, value in values.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, dict):
            _cut(value, ids)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and key.endswith(("_token_id", "_token_index")):
            values[key] = value if value < 4 else ids.fresh()
        elif isinstance(value, list) and key == "eos_token_id":
            values[key] = [ids.fresh()]
        elif isinstance(value, int) and key in SIZES:
            values[key] = min(SIZES[key], value) if value > 0 else value
        elif key == "mrope_section" and isinstance(value, list):
            values[key] = [2, 1, 1]
    # Attention through a latent has a key for every query, whatever the config says.
    if is_latent and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if is_latent and rotates_heads and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]


def _kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """Return two layers at least, and one of each kind that per-layer lists tell apart."""
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == layers]
    kinds: dict[str, int] = {}
    for index, kind in enumerate(zip(*lists, strict=True) if lists else ()):
        kinds.setdefault(repr(kind), index)
    kept = sorted(kinds.values())[:4]
    return (kept + [index for index in range(layers) if index not in kept])[: max(2, len(kept))]


def _override(values: dict[str, Any], own: dict[str, Any]) -> None:
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _override(values[key], value)
        else:
            values[key] = value


def modules_of(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each stored tensor of a model: its name, the module that owns it, the tensor."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        yield name, modules[name.rpartition(".")[0]], tensor
