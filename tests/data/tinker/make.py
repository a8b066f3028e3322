"""Makes adapters in Tinker's names and has tinker-cookbook merge them.

Run with the folder of an unpacked tinker-cookbook 0.6.1 wheel. Writes for each family of models
``base`` (zeros, so that what is merged is the update itself), ``adapter`` and
``expected.safetensors``, the tensors that tinker-cookbook changes.
"""

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
HIDDEN, INNER, VOCAB, EXPERTS, RANK, ALPHA = 8, 12, 20, 3, 2, 3
ATTENTION = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
MATRICES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
TINKERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
Shapes = dict[str, tuple[int, ...]]


def attention(layer: str, name: str = "self_attn") -> Shapes:
    """Return the shapes of a layer's attention."""
    return {f"{layer}.{name}.{part}": shape for part, shape in ATTENTION.items()}


def dense(parent: str) -> Shapes:
    """Return the shapes of gate, up and down."""
    return {f"{parent}.{part}": shape for part, shape in MATRICES.items()}


def experts(parent: str) -> Shapes:
    """Return the shapes of experts as Tinker stacks them: (E, out, in)."""
    return {f"{parent}.{w}": (EXPERTS, *MATRICES[own]) for w, own in TINKERS.items()}


def apart(parent: str) -> Shapes:
    """Return the shapes of experts that lie apart in the checkpoint."""
    return {
        f"{parent}.{e}.{part}.weight": shape
        for e in range(EXPERTS)
        for part, shape in MATRICES.items()
    }


def weights(modules: Shapes) -> Shapes:
    """Return modules as their weights."""
    return {f"{name}.weight": shape for name, shape in modules.items()}


L0, L1, TEXT = "model.layers.0", "model.layers.1", "model.language_model.layers.0"
HEAD = {"lm_head.weight": (VOCAB, HIDDEN)}
UNEMBED = {"model.unembed_tokens": (VOCAB, HIDDEN)}
SPLIT = {
    f"{L0}.linear_attn.in_proj_{x}": (n, HIDDEN) for x, n in zip("qkv", (4, 4, 6), strict=True)
}
# Of each family: what the checkpoint says it is, its tensors, and the modules that are trained.
FAMILIES: dict[str, tuple[dict[str, object], Shapes, Shapes]] = {
    "qwen3": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        weights(attention(L0) | dense(f"{L0}.mlp") | attention(L1)) | HEAD,
        attention(L0) | dense(f"{L0}.mlp") | attention(L1) | UNEMBED,
    ),
    "qwen3_moe": (
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
        weights(attention(L0)) | apart(f"{L0}.mlp.experts") | HEAD,
        attention(L0) | experts(f"{L0}.mlp.experts") | UNEMBED,
    ),
    "deepseek_v3": (
        {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
        weights({f"{L0}.self_attn.q_a_proj": (6, 8)} | dense(f"{L0}.mlp.shared_experts"))
        | apart(f"{L0}.mlp.experts"),
        {f"{L0}.self_attn.q_a_proj": (6, 8)}
        | dense(f"{L0}.mlp.shared_experts")
        | experts(f"{L0}.mlp.experts"),
    ),
    # The down projections are square, as the published models' are.
    "gpt_oss": (
        {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]},
        weights(attention(L0))
        | {
            f"{L0}.mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * HIDDEN),
            f"{L0}.mlp.experts.down_proj": (EXPERTS, HIDDEN, HIDDEN),
        }
        | HEAD,
        attention(L0, "attn")
        | {f"{L0}.mlp.experts.{w}": (EXPERTS, HIDDEN, HIDDEN) for w in TINKERS}
        | UNEMBED,
    ),
    "qwen3_vl_moe": (
        {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]},
        weights(attention(TEXT))
        | {
            f"{TEXT}.mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
            f"{TEXT}.mlp.experts.down_proj": (EXPERTS, INNER, HIDDEN),
            "model.visual.blocks.0.attn.proj.weight": (8, 8),
        }
        | HEAD,
        attention(L0) | experts(f"{L0}.mlp.experts") | UNEMBED,
    ),
    "qwen3_5_moe": (
        {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]},
        {
            f"{TEXT}.linear_attn.in_proj_qkv.weight": (14, HIDDEN),
            f"{TEXT}.linear_attn.out_proj.weight": (HIDDEN, 6),
            f"{TEXT}.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
            f"{TEXT}.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
        }
        | weights(dense(f"{TEXT}.mlp.shared_expert"))
        | HEAD,
        SPLIT
        | {f"{L0}.linear_attn.out_proj": (HIDDEN, 6)}
        | dense(f"{L0}.mlp.shared_expert")
        | experts(f"{L0}.mlp.experts")
        | UNEMBED,
    ),
    "nemotron_h": (
        {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]},
        {
            "backbone.layers.0.mixer.in_proj.weight": (17, HIDDEN),
            "backbone.layers.1.mixer.q_proj.weight": (8, HIDDEN),
        }
        | {
            f"backbone.layers.2.mixer.experts.{e}.{part}.weight": MATRICES[part]
            for e in range(EXPERTS)
            for part in ("up_proj", "down_proj")
        }
        | HEAD,
        {
            "model.layers.0.mixer.gate_proj": (6, HIDDEN),
            "model.layers.0.mixer.x_proj": (5, HIDDEN),
            "model.layers.1.mixer.q_proj": (8, HIDDEN),
            "model.layers.2.mixer.experts.w1": (EXPERTS, INNER, HIDDEN),
            "model.layers.2.mixer.experts.w2": (EXPERTS, HIDDEN, INNER),
            "model.layers.2.mixer.experts.w3": (0, 0, 0),
        }
        | UNEMBED,
    ),
}


def factors(modules: Shapes, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Return A and B of each module as Tinker stores them: what experts share is stored once."""
    found = {}
    for name, shape in modules.items():
        m, n = shape[-2:]
        down, up = (RANK, n), (m, RANK)
        if len(shape) == 3:
            own = shape[0] and (1, EXPERTS) if not name.endswith("w2") else (EXPERTS, 1)
            down, up = ((own[0], *down), (own[1], *up)) if own else ((0, 0, 0), (0, 0, 0))
        for side, size in (("A", down), ("B", up)):
            key = f"base_model.model.{name}.lora_{side}.weight"
            found[key] = torch.randn(size, generator=random)
    return found


def main() -> None:
    """Write everything."""
    cookbook = Path(sys.argv[1])
    for name in ("tinker_cookbook", "tinker_cookbook.weights"):
        package = types.ModuleType(name)  # its own __init__ wants the training service's client
        package.__path__ = [str(cookbook / name.replace(".", "/"))]
        sys.modules[name] = package
    from tinker_cookbook.weights._merge import apply_merge_op, detect_merge_profile, plan_merge_ops

    random = torch.Generator().manual_seed(20261126)
    for family, (config, shapes, modules) in FAMILIES.items():
        base = {name: torch.zeros(shape) for name, shape in shapes.items()}
        adapter = factors(modules, random)
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        for part, tensors, said in (
            ("base", base, config),
            ("adapter", adapter, settings),
        ):
            folder = HERE / family / part
            folder.mkdir(parents=True, exist_ok=True)
            weights_file = "model" if part == "base" else "adapter_model"
            save_file(tensors, folder / f"{weights_file}.safetensors")
            config_file = "config" if part == "base" else "adapter_config"
            text = json.dumps(said, indent=2) + "\n"
            (folder / f"{config_file}.json").write_text(text, encoding="utf-8")
        profile = detect_merge_profile(config, set(base))
        planned = plan_merge_ops(adapter, settings, set(base), profile)
        for operations in planned.values():
            for operation in operations:
                apply_merge_op(base, operation)
        save_file({name: base[name] for name in planned}, HERE / family / "expected.safetensors")
        print(family, profile.model_family, len(planned), "of", len(base), "tensors")


if __name__ == "__main__":
    main()
