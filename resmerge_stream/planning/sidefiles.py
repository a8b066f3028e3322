"""The small files of an output: config with the output dtype; tokenizer and the like, copied."""

import json
import re
from typing import Any

from ..sources.checkpoint import Checkpoint
from ..specs import DTYPES, OUTPUT_DTYPES

_TOKENIZER = re.compile(
    r"^(tokenizer.*\.(json|model|txt)|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece.*\.model|chat_template\.(jinja|json))$"
)
_MODEL = re.compile(
    r"^(generation_config\.json|preprocessor_config\.json|processor_config\.json|"
    r"image_processor.*\.json|video_preprocessor_config\.json|feature_extractor.*\.json)$"
)


def side_files(base: Checkpoint, tokenizer: Checkpoint) -> dict[str, bytes]:
    """Return the files to copy byte for byte, by name.

    Args:
        base: gives generation config, processor files, and the code that its config needs.
        tokenizer: gives tokenizer files and chat template; usually the base again.
    """
    files = {name: base.read_small(name) for name in base.small_files if _MODEL.fullmatch(name)}
    if base.config.get("auto_map"):
        files |= {name: base.read_small(name) for name in base.small_files if name.endswith(".py")}
    files |= {
        name: tokenizer.read_small(name)
        for name in tokenizer.small_files
        if _TOKENIZER.fullmatch(name)
    }
    return files


def output_config(base: Checkpoint, dtype: str | None) -> bytes:
    """Return ``config.json``: the base's, with the output dtype.

    Args:
        base: the base checkpoint.
        dtype: ``bfloat16`` and so on, or None for what most of the base's weights have.
    """
    name = dtype or main_dtype(base)
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if isinstance(section.get(key), str):
                section[key] = name
    if "torch_dtype" not in config and "dtype" not in config:
        config["dtype"] = name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def main_dtype(base: Checkpoint) -> str:
    """Return the torch name of the dtype that holds most bytes of the base."""
    totals: dict[str, int] = {}
    for tensor in base.tensors.values():
        if tensor.spec.dtype in OUTPUT_DTYPES.values():
            totals[tensor.spec.dtype] = totals.get(tensor.spec.dtype, 0) + tensor.spec.nbytes
    return DTYPES[max(totals, key=lambda key: totals[key])].torch_name if totals else "float32"
