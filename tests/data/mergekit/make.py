"""Makes the models here and has mergekit merge them; run it with a Python that has mergekit 0.1.5.

Writes ``base`` and ``expert0`` … (whole models, float32, 40 % of the weights unchanged) and
``expected.safetensors``: of each recipe in ``recipes`` mergekit's output, its tensors flattened and
joined in the order of their names.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LAYERS, HIDDEN, INNER, VOCAB = 3, 8, 16, 32
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the model's tensors."""
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (VOCAB, HIDDEN)}
    found["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
    found["model.norm.weight"] = (HIDDEN,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            found[f"{layer}.self_attn.{part}_proj.weight"] = (rows, HIDDEN)
            found[f"{layer}.self_attn.{part}_proj.bias"] = (rows,)
        found[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{layer}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        found[f"{layer}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        found[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    return dict(sorted(found.items()))


def main() -> None:
    """Write the models, then mergekit's outputs."""
    random = torch.Generator().manual_seed(20261126)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    base = {name: 0.5 * draw(shape) for name, shape in shapes().items()}
    models = {"base": base}
    for number in range(3):
        models[f"expert{number}"] = {
            name: w + 0.2 * draw(w.shape) * (torch.rand(w.shape, generator=random) > 0.4)
            for name, w in base.items()
        }
    for name, tensors in models.items():
        (HERE / name).mkdir(exist_ok=True)
        save_file(tensors, HERE / name / "model.safetensors", {"format": "pt"})
        (HERE / name / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    expected = {}
    for recipe in sorted((HERE / "recipes").glob("*.yml")):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "mergekit.scripts.run_yaml", f"recipes/{recipe.name}"]
            subprocess.run([*command, out, "--no-write-model-card"], cwd=HERE, check=True)
            merged = load_file(Path(out) / "model.safetensors")
        assert sorted(merged) == list(base), recipe.name
        expected[recipe.stem] = torch.cat([merged[name].flatten() for name in sorted(merged)])
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
