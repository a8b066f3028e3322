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
from .trainers import NO_WEIGHTS, Place, is_consolidated, leavings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *_PICKLED)
MAX_SMALL_BYTES = 200_000_000


def is_small(path: str) -> bool:
    """Return whether a file may go along with a model's weights: at its top, or one folder below.

    A folder below may hold weights of a part that is loaded by itself.
    """
    folder, _, name = path.rpartition("/")
    if "/" in folder or path.startswith(".") or name.startswith("."):
        return False
    return bool(folder) or not name.endswith(_WEIGHTS)


def config_file(names: list[str]) -> str:
    """Return the name of the config that tells what a model with these files is."""
    return ADAPTER_CONFIG if is_adapter(names) else "config.json"


def choose_weights(place: Place, names: list[str]) -> list[str] | None:
    """Return the weight files among a model's file names, or None where its index names them.

    Args:
        place: where they are.
        names: its files.

    Raises:
        CheckpointNotFoundError: there are no weights.
        CheckpointFormatError: it is not known which files make the model.
        UnsupportedCheckpointError: the weights are of a kind that is not read.
    """
    if is_adapter(names):
        check_adapter_files(place.shown, names)
        return [ADAPTER_WEIGHTS]
    if is_consolidated(names):
        raise UnsupportedCheckpointError(
            f"{place.shown!r} has its weights in Mistral's own format alone "
            "(consolidated*.safetensors), under names that transformers cannot load. Convert it "
            "with transformers' convert_mistral_weights_to_hf.py, or give a repository with "
            "model.safetensors."
        )
    found = [name for name in names if name.endswith(".safetensors")]
    if not found and leavings(place):
        raise no_model(place, "*.safetensors file")
    pickled = [n for n in names if n.endswith(_PICKLED) and not NO_WEIGHTS.match(n)]
    if pickled and not found:
        raise PickledWeightsError(
            f"{place.shown!r} has its weights in {pickled[0]!r}, a pickle, which can run code when "
            "it is read. Convert it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) "
            "writes safetensors."
        )
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX in names:
        return None
    if len(found) == 1:
        return found
    if not found:
        raise no_model(place, "*.safetensors file")
    raise CheckpointFormatError(
        f"{place.shown!r} has {len(found)} safetensors files but neither {WEIGHTS} nor {INDEX}, "
        "so it is not known which of them make the model."
    )


def no_model(place: Place, lacks: str) -> CheckpointNotFoundError:
    """Return the error for a folder that is no model, with what it is instead."""
    instead = leavings(place) or (
        f"Give the folder that transformers would load: with config.json, and {WEIGHTS} or shards "
        f"with {INDEX}"
    )
    return CheckpointNotFoundError(f"{place.shown!r} has no {lacks}. {instead}.")
