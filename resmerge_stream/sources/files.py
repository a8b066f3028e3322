"""Which of a model's files are its weights, and which go along."""

from ..errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    PickledWeightsError,
    UnsupportedCheckpointError,
)
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .adapter_config import WEIGHTS as ADAPTER_WEIGHTS
from .adapter_config import check_adapter_files, is_adapter

WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")


MAX_SMALL_BYTES = 200_000_000


def config_file(names: list[str]) -> str:
    """Return the name of the config that tells what a model with these files is."""
    return ADAPTER_CONFIG if is_adapter(names) else "config.json"


def choose_weights(shown: str, names: list[str]) -> list[str] | None:
    """Return the weight files among a model's file names, or None where its index names them.

    Args:
        shown: what to call the model in errors.
        names: its files.

    Raises:
        CheckpointNotFoundError: there are no weights.
        CheckpointFormatError: it is not known which files make the model.
        UnsupportedCheckpointError: the weights are pickled or GGUF.
    """
    if is_adapter(names):
        check_adapter_files(shown, names)
        return [ADAPTER_WEIGHTS]
    _refuse_other_formats(shown, names)
    if WEIGHTS in names:
        return [WEIGHTS]
    return None if INDEX in names else _single_weight_file(shown, names)


def _refuse_other_formats(shown: str, names: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise PickledWeightsError(
            f"{shown!r} has its weights in {pickled[0]!r}, a pickle, which can run code when "
            "it is read. Convert it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) "
            "writes safetensors."
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        raise UnsupportedCheckpointError(
            f"{shown!r} holds {gguf[0]!r}: GGUF files are quantised for inference. "
            "Give the original safetensors model."
        )


def _single_weight_file(shown: str, names: list[str]) -> list[str]:
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found
    if not found:
        raise CheckpointNotFoundError(
            f"{shown!r} has no *.safetensors file. Give a folder with model.safetensors, "
            f"or with shards and {INDEX}."
        )
    raise CheckpointFormatError(
        f"{shown!r} has {len(found)} safetensors files but neither {WEIGHTS} nor {INDEX}, "
        "so it is not known which of them make the model."
    )
