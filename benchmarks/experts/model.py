"""Small Qwen2 models: their shape, and their bf16 checkpoint folders."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from .tokenizer import EOS_ID, PAD_ID, VOCABULARY

WEIGHTS = "model.safetensors"

_PROJECTIONS = r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The size of a model.

    Attributes:
        width: hidden size; a multiple of 32, the size of one attention head.
        layers: decoder layers.
        feed_forward: intermediate size of the MLP.
        context: longest sequence, in tokens.
    """

    width: int
    layers: int
    feed_forward: int
    context: int = 64


def build_config(shape: Shape) -> Qwen2Config:
    """Return the Qwen2 configuration of a shape: grouped-query attention, tied embeddings."""
    heads = shape.width // 32
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=shape.context,
        max_window_layers=shape.layers,
        # 1/sqrt(width) keeps the variance of a layer's output at this width; the 0.02 of large
        # models would start a small one with almost no signal.
        initializer_range=round(shape.width**-0.5, 4),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def build_model(shape: Shape, *, seed: int) -> Qwen2ForCausalLM:
    """Build a float32 model with random weights from a seed."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(build_config(shape)).float()


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint folder in bf16; it appears under its name only when complete.

    Args:
        model: float32 weights; left as they are.
        tokenizer: its tokenizer.
        folder: where to; replaced where an earlier run left it incomplete.
    """
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        do_sample=False,
        max_length=model.config.max_position_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rounded.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def add_adapter(model: Any, *, rank: int, seed: int) -> None:
    """Freeze a model and give each of its projections a LoRA adapter, in place, of scale 1."""
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_PROJECTIONS), model)


def save_adapter(model: Any, folder: Path) -> None:
    """Write the folder of a model's adapter in float32; it appears only when complete."""
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    weights = {
        f"base_model.model.{name.replace('.default', '')}": weight.contiguous()
        for name, weight in model.state_dict().items()
        if ".lora_" in name
    }
    (config,) = model.peft_config.values()
    config.save_pretrained(staged)
    save_file(weights, staged / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)
