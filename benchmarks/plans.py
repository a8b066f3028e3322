"""How long a plan takes, and what it says: ``python -m benchmarks.plans [names] [7b] [70b]``.

`names`: seconds, with names that agree and names that do not. `7b`, `70b`: what a merge with
Qwen2.5's shapes of that size will take. All from headers over holes: a plan reads nothing else of a
folder's weights.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resmerge_stream.planning.plan import Options, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.sinks.layout import plan_shards
from resmerge_stream.specs import TensorSpec

from .synthetic import QWEN25_05B, QWEN25_7B, QWEN25_72B, Shape, tensor_shapes

_TIMES = 5
_EXPERTS, _LAYERS, _HIDDEN, _MIDDLE = 256, 58, 128, 64
# A mixture of 45,000 tensors in the form that is published, and in the one that transformers runs.
_MIXTURE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": _HIDDEN, "num_hidden_layers": _LAYERS, "num_experts": _EXPERTS,
            "moe_intermediate_size": _MIDDLE, "tie_word_embeddings": False}  # fmt: skip
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
          "num_hidden_layers": 24, "tie_word_embeddings": True}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


def main() -> None:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("what", nargs="*", help="names, 7b, 70b; default: all")
    chosen = parser.parse_args().what or list(_MEASURED)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            _MEASURED[name](Path(folder) / name)


def _names(folder: Path) -> None:
    """Print how long plans take."""
    print("| base, 3 experts | tensors | first s | median s |\n|---|---:|---:|---:|")
    small = dict(tensor_shapes(QWEN25_05B))
    wrapped = {name.replace("model.", "model.language_model.", 1): s for name, s in small.items()}
    inside = {"model_type": "qwen2_vl", "text_config": _QWEN2}
    split, fused = _mixture(is_fused=False), _mixture(is_fused=True)
    for label, base, experts, configs in (
        ("Qwen2.5-0.5B, equal names", small, small, (_QWEN2, _QWEN2)),
        ("the same, experts inside a multimodal model", small, wrapped, (_QWEN2, inside)),
        ("a mixture, equal names", split, split, (_MIXTURE, _MIXTURE)),
        ("the same, experts fused", split, fused, (_MIXTURE, _MIXTURE)),
    ):
        models = folder / label.replace(" ", "-")
        for name, shapes in (("base", base), *((f"expert{i}", experts) for i in range(3))):
            _write_headers(models / name, shapes, configs[name != "base"])
        first, *others = [_plan_seconds(models) for _ in range(_TIMES)]
        print(f"| {label} | {len(base):,} | {first:.2f} | {statistics.median(others):.2f} |")
        shutil.rmtree(models)


def _mixture(*, is_fused: bool) -> Shapes:
    return dict(_mixture_tensors(is_fused=is_fused))


def _mixture_tensors(*, is_fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (512, _HIDDEN)
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (_HIDDEN,)
        for name in "qkvo":
            yield f"{at}.self_attn.{name}_proj.weight", (_HIDDEN, _HIDDEN)
        yield f"{at}.mlp.gate.weight", (_EXPERTS, _HIDDEN)
        if is_fused:
            yield f"{at}.mlp.experts.gate_up_proj", (_EXPERTS, 2 * _MIDDLE, _HIDDEN)
            yield f"{at}.mlp.experts.down_proj", (_EXPERTS, _HIDDEN, _MIDDLE)
            continue
        for expert in range(_EXPERTS):
            for name in ("gate", "up"):
                yield f"{at}.mlp.experts.{expert}.{name}_proj.weight", (_MIDDLE, _HIDDEN)
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", (_HIDDEN, _MIDDLE)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (512, _HIDDEN)


def _write_headers(folder: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    (shard,) = plan_shards([specs], 1 << 62)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(shard.header)
        file.truncate(len(shard.header) + sum(spec.nbytes for spec in specs))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _plan_seconds(models: Path) -> float:
    experts = tuple(ModelRef(str(models / f"expert{i}")) for i in range(3))
    started = time.perf_counter()
    plan = plan_merge(Recipe(ModelRef(str(models / "base")), experts))
    seconds = time.perf_counter() - started
    plan = plan.accepted()
    plan.close()
    return seconds


def _planned(folder: Path, shape: Shape) -> None:
    """Print what the plan of a merge of whole experts says, method by method."""
    shapes = dict(tensor_shapes(shape))
    config = _QWEN2 | {"hidden_size": shape.hidden_size, "tie_word_embeddings": False}
    config["num_hidden_layers"] = shape.num_hidden_layers
    for name in ("base", *(f"expert{i}" for i in range(3))):
        _write_headers(folder / name, shapes, config)
    models = (
        ModelRef(str(folder / "base")),
        tuple(ModelRef(str(folder / f"expert{i}")) for i in range(3)),
    )
    print("| method | read | written | files | private memory | at least | arithmetic |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in ("mean", "ties", "resmerge", "head_regression", "tsv_m", "swudi"):
        plan = plan_merge(Recipe(*models, method), Options(memory_budget=64 * 10**9))
        tight = plan_merge(Recipe(*models, method), Options(memory_budget=1))
        ample = plan_merge(Recipe(*models, method))
        peak = "-" if ample.problems else f"{ample.peak_memory_bytes / 1e6:,.0f} MB"
        print(
            f"| `{method}` | {plan.read_bytes / 1e9:.1f} GB | {plan.write_bytes / 1e9:.1f} GB "
            f"| {len(plan.shards)} | {peak} | {tight.problems[0].arguments['needed']} "
            f"| {plan.compute_seconds:,.0f} s |"
        )
        for one in (plan, tight, ample):
            one.close()


_MEASURED = {
    "names": _names,
    "7b": lambda folder: _planned(folder, QWEN25_7B),
    "70b": lambda folder: _planned(folder, QWEN25_72B),
}


if __name__ == "__main__":
    main()
