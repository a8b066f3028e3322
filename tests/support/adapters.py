"""Small models of several architectures, and LoRA adapters on them, made by PEFT itself."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods import build_method
from resmerge_stream.planning.plan import PlannedTensor
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.changes import change_of
from resmerge_stream.run.pieces import Piece
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.adapter import Adapter

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """A model's architecture and how it is adapted.

    Attributes:
        model: transformers' name of the architecture.
        lora: arguments of `peft.LoraConfig`.
        sizes: of the model, where they differ from `SMALL`.
    """

    model: str
    lora: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "plain": Kind("qwen2", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "all-linear": Kind("qwen2", {"r": 3, "lora_alpha": 3, "target_modules": "all-linear"}),
    "rslora": Kind(
        "qwen2", {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR}
    ),
    "patterns": Kind(
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": LINEAR,
            "rank_pattern": {r"^model\.layers\.0\..*q_proj": 2, "down_proj": 7},
            "alpha_pattern": {r"layers.1.self_attn.v_proj": 5, "self_attn.v_proj": 11},
        },
    ),
    "embeddings": Kind(
        "qwen2",
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "tied embedding": Kind(
        "qwen2",
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]},
        {"tie_word_embeddings": True},
    ),
    "modules_to_save": Kind(
        "qwen2",
        {"r": 3, "lora_alpha": 5, "target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
    ),
    "tokens": Kind(
        "qwen2",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": LINEAR,
            "trainable_token_indices": [3, 7, 40],
        },
    ),
    "lora_bias": Kind(
        "qwen2",
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "bias": Kind("qwen2", {"r": 3, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "dora": Kind(
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": [*LINEAR, "embed_tokens"],
            "use_dora": True,
        },
    ),
    "gpt2": Kind(
        "gpt2",
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc", "wte"]},
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "tie_word_embeddings": True},
    ),
    "gpt2 dora": Kind(
        "gpt2",
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "use_dora": True},
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "tie_word_embeddings": True},
    ),
    "fused experts": Kind(
        "llama4_text",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 24,
            "head_dim": 4,
            "interleave_moe_layer_step": 1,
            "attn_temperature_tuning": False,
        },
    ),
    "experts by themselves": Kind(
        "qwen3_moe",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "head_dim": 4,
            "decoder_sparse_step": 1,
        },
    ),
}


def make_base(
    folder: Path, kind: Kind, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a small model of an architecture."""
    config = transformers.AutoConfig.for_model(kind.model, **{**SMALL, **kind.sizes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    kind: Kind,
    *,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    **save: Any,
) -> Path:
    """Write an adapter of a base with random factors, as PEFT saves it; `save` says how."""
    with quiet():
        model = peft.get_peft_model(loaded(base, torch.float32), peft.LoraConfig(**kind.lora))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                if dtype is not None:
                    parameter.copy_(parameter.to(dtype))
    with quiet():
        model.save_pretrained(folder, **save)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let PEFT and transformers warn of each other's ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """Return a model in a dtype."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def whole(base: Path, adapter: Path, folder: Path) -> Path:
    """Write what PEFT's `merge_and_unload` makes of base and adapter, in float64."""
    with quiet():
        model = peft.PeftModel.from_pretrained(
            loaded(base, torch.float64), adapter, autocast_adapter_dtype=False
        )
        model = model.to(torch.float64).merge_and_unload()
    model.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder with one file of them."""
    return load_file(folder / "model.safetensors")


def deltas(base_folder: Path, adapter_folder: Path) -> dict[str, Tensor]:
    """Return ΔW of every tensor that an adapter changes, as it is read."""
    base = opened(base_folder)
    adapter = Adapter.of(opened(adapter_folder), base)
    method = build_method("mean", {})
    found = {}
    before = weights(base_folder)
    for name, edit in adapter.edits.items():
        rule = method.rule_for(edit.spec, 1)
        rows, columns = edit.spec.matrix_shape
        piece = Piece(PlannedTensor(edit.spec, rule, method), slice(0, rows), None, True, [])
        change = change_of(adapter.read_edit(name), piece, base, lambda tensor: tensor)
        W0 = before[name].reshape(rows, columns)
        vectors = TaskVectors(W0, [change], Workspace(torch.device("cpu")), resident=False)
        found[name] = vectors.matrix(0).clone().reshape(edit.spec.shape)
        adapter.done_with(name)
    return found


def opened(folder: Path) -> Any:
    """Return a folder as a merge opens it."""
    return open_checkpoint(ModelRef(str(folder)))


def written(folder: Path, factors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write an adapter by hand: what no trainer here would write."""
    folder.mkdir()
    kept = {key: tensor.contiguous() for key, tensor in factors.items()}
    save_file(kept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def changed(
    folder: Path, adapter: Path, *, config: Mapping[str, Any] | None = None, rename: Any = None
) -> Path:
    """Write an adapter with other settings, or under other keys."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / "adapter_model.safetensors")
    keys = {key: rename(key) if rename else key for key in stored}
    return written(
        folder, {new: stored[key] for key, new in keys.items()}, **{**settings, **(config or {})}
    )
