"""Small Qwen2 models: their shape, and their bf16 checkpoint folders."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .tokenizer import EOS_ID, PAD_ID, VOCABULARY, write_tokenizer

WEIGHTS = "model.safetensors"


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


def save_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a checkpoint folder in bf16; it appears under its name only when complete.

    Args:
        model: float32 weights; left as they are.
        folder: where to; replaced where an earlier run left it incomplete.
    """
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    rounded = Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        do_sample=False,
        max_length=model.config.max_position_embeddings,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    rounded.save_pretrained(staged)
    write_tokenizer(staged, model_max_length=model.config.max_position_embeddings)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)
