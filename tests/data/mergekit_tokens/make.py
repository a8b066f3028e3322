"""Makes models with different tokens and has mergekit merge them; run it where mergekit 0.1.5 is.

The base's tables are padded; ``expert0`` and ``expert1`` added tokens in another order, and
``expert2`` has two ordinary tokens in each other's place. ``expected.json`` says the tokens of
mergekit's output for each recipe; ``expected.safetensors`` holds its two tables and a matrix.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

HERE = Path(__file__).parent
HIDDEN, INNER = 8, 16
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 16,
    "eos_token_id": 17,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LETTERS = "abcdefghijkl"
PAIRS = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]


def write_tokenizer(folder: Path, *added: str, swapped: bool = False) -> int:
    """Write a tokenizer; return how many tokens it has."""
    words = [*LETTERS, *("".join(pair) for pair in PAIRS)]
    if swapped:
        words[3], words[7] = words[7], words[3]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, PAIRS))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # transformers would add the last of these itself.
    special = ("<s>", "</s>", "<|endoftext|>", *added)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ messages[0].content }}" + ("!" if added else ""),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tokenizer.get_vocab_size()


def main() -> None:
    """Write the models, then what mergekit makes of them."""
    random = torch.Generator().manual_seed(20261127)
    layer = "model.layers.0"
    shapes = {
        f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}.self_attn.q_proj.bias": (HIDDEN,),
        f"{layer}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{layer}.self_attn.k_proj.bias": (HIDDEN // 2,),
        f"{layer}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{layer}.self_attn.v_proj.bias": (HIDDEN // 2,),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
    }
    plans = {
        "base": ((), False, 24),
        "expert0": (("<pad>",), False, 20),
        "expert1": (("<tool>", "<pad>"), False, 32),
        "expert2": ((), True, 19),
    }
    for name, (added, swapped, rows) in plans.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        assert write_tokenizer(folder, *added, swapped=swapped) <= rows
        tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (rows, HIDDEN))
        tensors = {n: torch.randn(s, generator=random) for n, s in (shapes | tables).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = CONFIG | {"vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    os.chdir(HERE)
    kept = ("model.embed_tokens.weight", "lm_head.weight", f"{layer}.mlp.up_proj.weight")
    expected, said = {}, {}
    for recipe in sorted((HERE / "recipes").glob("*.yml")):
        with tempfile.TemporaryDirectory() as out:
            config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
            run_merge(config, out, MergeOptions(write_model_card=False, quiet=True))
            merged = load_file(Path(out) / "model.safetensors")
            said[recipe.stem] = {
                "tokens": AutoTokenizer.from_pretrained(out).get_vocab(),
                "template": AutoTokenizer.from_pretrained(out).chat_template,
                "vocab_size": json.loads((Path(out) / "config.json").read_text())["vocab_size"],
            }
        expected |= {f"{recipe.stem}/{name}": merged[name] for name in kept}
    save_file(expected, HERE / "expected.safetensors")
    (HERE / "expected.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
