"""Made-up expert groups with Qwen2 names and shapes: for the tests and the benchmarks.

Each expert's update of a matrix is a direction that all experts share, a direction of its own, and
noise; some elements stay unchanged, as after reinforcement learning. No model of any use.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resmerge_stream.maths.rounding import block_seed
from resmerge_stream.sinks.layout import index_json, plan_shards
from resmerge_stream.specs import DTYPES, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Qwen2 model, named as in its config.

    Attributes:
        tied: whether the LM head is the embedding.
    """

    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 256
    tied: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


QWEN25_05B = Shape(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151_936,
)

QWEN25_15B = Shape(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151_936,
)

QWEN25_3B = Shape(
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151_936,
)

QWEN25_7B = Shape(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
    tied=False,
)

QWEN25_72B = Shape(
    hidden_size=8192,
    intermediate_size=29_568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=152_064,
    tied=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """What the experts' updates look like.

    Attributes:
        gap: σ₁/σ₂ of every matrix's update, or None for noise alone (no gap).
        noise: standard deviation of the noise in an update.
        unchanged: share of elements that an expert leaves as they are.
    """

    gap: float | None = 2.0
    noise: float = 2e-4
    unchanged: float = 0.0


def write_group(
    folder: Path,
    shape: Shape,
    *,
    experts: int = 3,
    updates: Updates | None = None,
    dtype: str = "BF16",
    max_shard_bytes: int = 5_000_000_000,
    seed: int = 0,
    goes_on: bool = False,
) -> None:
    """Write ``base`` and ``expert0`` … below a folder, one tensor in memory at a time.

    Args:
        folder: made when missing; existing models in it are replaced.
        shape: sizes of the models.
        experts: how many.
        updates: what the experts changed.
        dtype: of the stored tensors.
        max_shard_bytes: where to cut the files.
        seed: of everything; a tensor depends on it and on its name only.
        goes_on: whether files that an earlier call finished are kept.
    """
    updates = updates or Updates()
    specs = [TensorSpec(name, dtype, size) for name, size in tensor_shapes(shape)]
    shards = plan_shards([specs], max_shard_bytes)
    for model in ("base", *(f"expert{i}" for i in range(experts))):
        target = folder / model
        target.mkdir(parents=True, exist_ok=True)
        number = None if model == "base" else int(model.removeprefix("expert"))
        for shard in shards:
            if goes_on and (target / shard.name).exists():
                continue
            part = target / f"{shard.name}.part"
            with part.open("wb") as file:
                file.write(shard.header)
                for spec in shard.tensors:
                    values = _values(spec, number, updates, seed)
                    stored = values.to(getattr(torch, DTYPES[dtype].torch_name))
                    file.write(stored.flatten().view(torch.uint8).numpy().data)
            part.replace(target / shard.name)
        if len(shards) > 1:
            (target / "model.safetensors.index.json").write_bytes(index_json(shards))
        _write_small_files(target, shape, dtype)


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a Qwen2 model, in its order."""
    hidden, middle = shape.hidden_size, shape.intermediate_size
    kv = shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (middle, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (middle, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, middle)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def _values(spec: TensorSpec, expert: int | None, updates: Updates, seed: int) -> Tensor:
    base = 0.02 * _normal(spec.shape, seed, spec.name, "base")
    if "norm" in spec.name:
        base = base + 1.0
    base = base.to(getattr(torch, DTYPES[spec.dtype].torch_name)).float()
    if expert is None:
        return base
    delta = updates.noise * _normal(spec.shape, seed, spec.name, f"noise {expert}")
    if len(spec.shape) == 2 and updates.gap is not None and "embed" not in spec.name:
        # Twice the largest singular value of the noise, about noise · (√m + √n), and so on.
        sigma = updates.gap * updates.noise * sum(size**0.5 for size in spec.shape)
        delta += 0.8 * sigma * _direction(spec, seed, "shared")
        delta += 0.6 * sigma * _direction(spec, seed, f"own {expert}")
    if updates.unchanged > 0:
        generator = torch.Generator().manual_seed(_seed(seed, spec.name, f"mask {expert}"))
        delta[torch.rand(spec.shape, generator=generator) < updates.unchanged] = 0
    return base.add_(delta)


def _direction(spec: TensorSpec, seed: int, kind: str) -> Tensor:
    rows, columns = spec.shape
    left = _normal((rows,), seed, spec.name, f"left {kind}")
    right = _normal((columns,), seed, spec.name, f"right {kind}")
    return torch.outer(left / left.norm(), right / right.norm())


def _normal(shape: tuple[int, ...], seed: int, name: str, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(seed, name, kind))
    return torch.randn(shape, generator=generator)


def _seed(seed: int, name: str, kind: str) -> int:
    return block_seed(seed, f"{name} {kind}", 0)


def _write_small_files(target: Path, shape: Shape, dtype: str) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 2048,
        "dtype": DTYPES[dtype].torch_name,
    }
    generation = {"do_sample": False, "max_new_tokens": 16}
    # Bytes without merges: transformers reads any Qwen2 tokenizer as byte-level BPE.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_vocabulary(shape.vocab_size), "merges": []},
    }
    tokenizer_config = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}
    for name, document in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ):
        text = json.dumps(document, indent=2) + "\n"
        (target / name).write_text(text, encoding="utf-8")


def _byte_vocabulary(size: int) -> dict[str, int]:
    """Return the characters that byte-level BPE writes for bytes, printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len(set(range(256)) - set(printable))
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]
    return {character: number for number, character in enumerate(characters[:size])}
