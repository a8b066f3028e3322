"""Small Qwen2 checkpoints on disk, and merges of them: what most tests begin with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "reference"


@dataclass(frozen=True)
class Group:
    """A base and its experts, as folders."""

    base: Path
    experts: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The base, then the experts."""
        return (self.base, *self.experts)


@dataclass(frozen=True)
class Merged:
    """What a merge left behind: the folder, its weights, its report, and the events on the way."""

    out: Path
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    events: list[Any]

    def row(self, name: str) -> dict[str, Any]:
        """The report's row of a tensor."""
        return next(row for row in self.report["tensors"] if row["name"] == name)


def make_group(
    folder: Path,
    *,
    experts: int = 3,
    layers: int = 2,
    hidden: int = 16,
    vocab: int = 48,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
    tied: bool = True,
    sparse: float = 0.0,
    seed: int = 0,
    extra: Mapping[str, Tensor] | None = None,
) -> Group:
    """Write a base and experts that transformers can load as Qwen2.

    Args:
        folder: gets the sub-folders ``base``, ``expert0`` and so on.
        experts, layers, hidden, vocab, dtype: sizes and type of the weights.
        sharded: write two shards and an index rather than one file.
        tied: leave the LM head out, as a tied model does.
        sparse: share of elements in which an expert equals the base.
        seed: of all values.
        extra: further tensors, the same in the base and in every expert.
    """
    random = torch.Generator().manual_seed(seed)
    base = {
        name: _base_values(name, shape, random)
        for name, shape in qwen2_shapes(layers, hidden, vocab, tied).items()
    }
    shared = {name: _direction(tensor.shape, random) for name, tensor in base.items()}
    every = [base]
    for _ in range(experts):
        every.append(
            {n: t + _task_vector(t.shape, shared[n], sparse, random) for n, t in base.items()}
        )
    names = ["base", *(f"expert{i}" for i in range(experts))]
    config = qwen2_config(layers, hidden, vocab, tied, dtype)
    for name, tensors in zip(names, every, strict=True):
        stored = {key: value.to(dtype) for key, value in tensors.items()} | dict(extra or {})
        write_checkpoint(folder / name, stored, config, vocab=vocab, sharded=sharded)
    return Group(folder / "base", tuple(folder / name for name in names[1:]))


def qwen2_shapes(layers: int, hidden: int, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a Qwen2 model with two heads that share one key head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, width in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (width, hidden)
            shapes[f"{layer}.self_attn.{part}_proj.bias"] = (width,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (3 * hidden, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (3 * hidden, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, 3 * hidden)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def qwen2_config(
    layers: int, hidden: int, vocab: int, tied: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the config.json of such a model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    vocab: int = 48,
    sharded: bool = False,
) -> None:
    """Write weights, config, generation config and a word-level tokenizer."""
    folder.mkdir(parents=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if sharded:
        names = list(stored)
        half = len(names) // 2
        files = {
            "model-00001-of-00002.safetensors": names[:half],
            "model-00002-of-00002.safetensors": names[half:],
        }
        for file, part in files.items():
            save_file({name: stored[name] for name in part}, folder / file, {"format": "pt"})
        weight_map = {name: file for file, part in files.items() for name in part}
        total = sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    else:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, **special},
    )


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(document, indent=1))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config."""
    document = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", document | changes)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Load a checkpoint's single weight file, change its tensors in place, and save it again."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the weight files in a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def recipe_of(
    group: Group,
    *,
    method: str = "resmerge",
    parameters: Mapping[str, Any] | None = None,
    weights: Sequence[float | None] | None = None,
    dtype: str | None = None,
):
    """Return the recipe that merges a group."""
    from resmerge_stream.recipe import ModelRef, Recipe

    factors = weights or [None] * len(group.experts)
    experts = tuple(
        ModelRef(str(folder), None, weight)
        for folder, weight in zip(group.experts, factors, strict=True)
    )
    return Recipe(ModelRef(str(group.base)), experts, method, dict(parameters or {}), dtype)


def as_many_as(method: str, group: Group) -> Group:
    """Return a group of as many experts as a method merges, the first of them where too many."""
    from resmerge_stream.methods import method_class

    return Group(group.base, group.experts[: method_class(method).models[1]])


def plan_group(group: Group, *, out: Path | None = None, options: Any = None, **recipe: Any):
    """Plan the merge of a group."""
    from resmerge_stream.planning.plan import plan_merge

    return plan_merge(recipe_of(group, **recipe), options, out=out)


def merge(group: Group, out: Path, *, options: Any = None, **recipe: Any) -> Merged:
    """Plan and run the merge of a group."""
    from resmerge_stream.run.engine import run_merge

    plan = plan_group(group, out=out, options=options, **recipe)
    try:
        events = list(run_merge(plan, out=out))
    finally:
        plan.close()
    return Merged(out, read_tensors(out), dict(events[-1].report), events)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Return the bytes of weights, index and config: what must not depend on how it was made."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name.startswith("model") or path.name == "config.json"
    }


def run_python(code: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter that can import the library."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


def child_environment() -> dict[str, str]:
    """Return the environment of a child process that imports the library from this tree."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _base_values(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=random, dtype=torch.float64)
    return 1 + 0.05 * values if "norm" in name else 0.05 * values


def _direction(shape: torch.Size, random: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.randn(shape, generator=random, dtype=torch.float64)
    left = torch.randn(shape[0], 1, generator=random, dtype=torch.float64)
    return left @ torch.randn(1, shape[1], generator=random, dtype=torch.float64)


def _task_vector(
    shape: torch.Size, shared: Tensor, sparse: float, random: torch.Generator
) -> Tensor:
    """Return a shared direction, an own one and noise, as RL leaves them; some of it zero."""
    own = _direction(shape, random)
    noise = torch.randn(shape, generator=random, dtype=torch.float64)
    kept = torch.rand(shape, generator=random, dtype=torch.float64) >= sparse
    return 2e-3 * (shared + 0.7 * own + noise) * kept
