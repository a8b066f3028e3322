"""What trainers, and llama.cpp, leave in the place of a model; and what makes a model of it.

A row of the table is a format, told by its files.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from typing import TypeVar

from ..errors import CheckpointFormatError, UnsupportedCheckpointError, listed
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .adapter_config import is_adapter
from .assembly import Source, whole
from .distributed import of_ranks, of_states, of_torch, of_universal
from .ggml import of_gguf
from .store import Store


@dataclass(frozen=True, slots=True)
class Leavings:
    """One format.

    Attributes:
        file: a file of it, by its path below the folder; group 1 is the folder that a converter
            takes.
        what: its name.
        way: what makes a model of it; ``{at}`` is that folder.
        weights: names in that folder of the files that are read; None where none can be.
        read: returns the tensors in them.
        unless: files beside which it is not the model, but a rounded copy of it.
        says: what a user should know who has it read.
    """

    file: re.Pattern[str]
    what: str
    way: str
    weights: re.Pattern[str] | None = None
    read: Callable[[Store, Mapping[str, int], str, str], dict[str, Source]] | None = None
    unless: re.Pattern[str] | None = None
    says: str = "which is read as it is"


_ZERO = (
    "Write it as safetensors with 'python {at}/zero_to_fp32.py {at} OUT --safe_serialization', "
    "put config.json and the tokenizer beside it, and give OUT"
)
_TABLE = (
    Leavings(
        re.compile(r"(.*?)model_world_size_\d+_rank_\d+\.pt$"),
        "shards of verl's FSDP workers",
        "Merge them with 'python -m verl.model_merger merge --backend fsdp --local_dir {at} "
        "--target_dir OUT', and give OUT",
        re.compile(r"model_world_size_\d+_rank_\d+\.pt"),
        of_ranks,
    ),
    Leavings(
        re.compile(r"(.*?)zero/[^/]+/fp32\.pt$"),
        "a universal checkpoint of DeepSpeed",
        _ZERO,
        re.compile(r"zero/[^/]+/fp32\.pt"),
        of_universal,
    ),
    Leavings(
        re.compile(r"(.*?)zero_to_fp32\.py$"),
        "16-bit weights of DeepSpeed's ZeRO",
        _ZERO,
        re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
        of_states,
    ),
    Leavings(
        re.compile(r"((?:.*?/)??)(?:global_step\d+/)?mp_rank_\d+_model_states\.pt$"),
        "a checkpoint of DeepSpeed's ZeRO",
        _ZERO,
        re.compile(r"(?:global_step\d+/)?mp_rank_\d+_model_states\.pt"),
        of_states,
    ),
    Leavings(
        re.compile(
            r"((?:.*?/)??)"
            r"(?:zero_to_fp32\.py|(?:global_step\d+/)?[\w.]*mp_rank_\d+_\w+_states\.pt)$"
        ),
        "a checkpoint of DeepSpeed's ZeRO",
        _ZERO,
    ),
    Leavings(
        re.compile(r"((?:.*/)?(?!optim)[^/]*/|)(?:\.metadata|__\d+_\d+\.distcp)$"),
        "a distributed checkpoint of torch (FSDP)",
        "Write it as safetensors with 'accelerate merge-weights {at} OUT', put config.json and the "
        "tokenizer beside it, and give OUT",
        re.compile(r"\.metadata|__\d+_\d+\.distcp"),
        of_torch,
    ),
    Leavings(
        re.compile(r"((?:.*/)?)(?!mmproj)[^/]+\.gguf$"),
        "a GGUF file",
        "Write it as safetensors with transformers and the package gguf, "
        "AutoModelForCausalLM.from_pretrained('{at}', gguf_file='…').save_pretrained('OUT'), and "
        "give OUT",
        re.compile(r"(?!mmproj)[^/]+\.gguf"),
        of_gguf,
        unless=re.compile(r".*\.(bin|pt|pth|ckpt|pkl)$"),
        says="which is read as it is; rounding may have changed it more than its training did "
        "(docs/models.md)",
    ),
)  # fmt: skip
_CONSOLIDATED = re.compile(r"consolidated[\w.\-]*\.safetensors$")
_MODEL = re.compile(r"(?:(.+)/)(?:config\.json|" + re.escape(ADAPTER_CONFIG) + r")$")
_WEIGHTS = re.compile(r"(?:(.+)/)[^/]+\.safetensors$")
_DIGITS = re.compile(r"(\d+)")
_Folder = TypeVar("_Folder", bound=PurePath)
# Where weights are in pickles: what lies beside them and holds none.
NO_WEIGHTS = re.compile(
    r"^(optimizer|scheduler|scaler|rng_state|training_args|extra_state|optim_)[\w.\-]*$"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of this machine or of a repository.

    Attributes:
        shown: as it is written in a recipe.
        below: gives the paths of all files below it.
        is_remote: whether it is on the Hub.
    """

    shown: str
    below: Callable[[], Iterable[str]]
    is_remote: bool = False

    def inside(self, path: str) -> str:
        """Return how a folder below it is written in a recipe."""
        is_top = self.is_remote and ":" not in self.shown
        return f"{self.shown}:{path}" if is_top else f"{self.shown}/{path}"


def models_below(paths: Iterable[str]) -> list[str]:
    """Return the folders below one that hold models with safetensors, the last checkpoint last.

    Args:
        paths: of files, below that folder.
    """
    every = list(paths)
    with_config = {m[1] for path in every if (m := _MODEL.match(path))}
    with_weights = {m[1] for path in every if (m := _WEIGHTS.match(path))}
    return sorted(with_config & with_weights, key=_by_number)


def model_folders(paths: Iterable[str]) -> list[str]:
    """Return the folders that can be given as a model: with safetensors, or what a trainer left.

    Args:
        paths: of files, below a folder.
    """
    every = list(paths)
    left = left_by_trainer(Place("", lambda: every, is_remote=True))
    of_trainer = {
        str(folder)
        for at in (left.folders if left is not None and left.row.read is not None else ())
        for folder in (PurePosixPath(at), *PurePosixPath(at).parents)
    }
    return sorted({*models_below(every), *of_trainer} - {"."}, key=_by_number)


@dataclass(frozen=True, slots=True)
class Left:
    """What a trainer left in a folder.

    Attributes:
        row: the format.
        folders: those below it that hold such weights, the last step last; the folder itself is
            empty, and the others end in a slash.
        files: of the weights in the last of them, by their paths.
        place: what they are below.
    """

    row: Leavings
    folders: tuple[str, ...]
    files: tuple[str, ...]
    place: Place

    @property
    def at(self) -> str:
        """The folder that the weights are in."""
        return self.folders[-1]

    @property
    def way(self) -> str:
        """What else makes a model of it."""
        top = "." if self.place.is_remote else self.place.shown
        first = "Download it first. " if self.place.is_remote else ""
        return first + self.row.way.format(at=f"{top}/{self.at}".rstrip("/"))

    def trees(self, store: Store, sizes: Mapping[str, int]) -> dict[str, Source]:
        """Return the tensors in the last folder, in the order of the files and of their bytes.

        Args:
            store: where the files are.
            sizes: of the files, by their paths.

        Raises:
            UnsupportedCheckpointError: they cannot be read; says why, and what makes a model of it.
            StoppedError: the bytes cannot be had right now.
        """
        assert self.row.read is not None
        where = self.place.inside(self.at.rstrip("/")) if self.at else self.place.shown
        try:
            found = self.row.read(store, sizes, self.at, where)
            if not found:
                raise UnsupportedCheckpointError(f"{where} holds no tensors.")
        except (CheckpointFormatError, UnsupportedCheckpointError) as exc:
            raise UnsupportedCheckpointError(
                f"{self.place.shown!r} holds {self.row.what} that cannot be read here: {exc} "
                f"{self.way}."
            ) from exc

        def first_byte(name: str) -> tuple[str, int]:
            first = next(iter(found[name].readings(whole(found[name].shape))))
            return first.tensor.file, first.tensor.begin

        return {name: found[name] for name in sorted(found, key=first_byte)}


def config_folder(own: _Folder, is_file: Callable[[_Folder], bool]) -> _Folder:
    """Return where the config of a trainer's weights is: beside them, or one folder up.

    Args:
        own: the folder that the weights are in.
        is_file: tells whether there is such a file.
    """
    places = [own / "huggingface", own, own.parent]
    return next((one for one in places if is_file(one / "config.json")), own)


def readable(place: Place, names: Iterable[str]) -> Left | None:
    """Return what a trainer left where nothing else is a model, and it can be read; else None.

    Args:
        place: what it may be below.
        names: of the files right there.
    """
    every = list(names)
    if is_adapter(every) or any(name.endswith(".safetensors") for name in every):
        return None
    if models_below(place.below()):
        return None
    left = left_by_trainer(place)
    is_one = left is not None and left.row.read is not None and len(left.folders) == 1
    return left if is_one else None


def left_by_trainer(place: Place) -> Left | None:
    """Return what a trainer left in a folder, or in some below it; None for no trainer's."""
    every = sorted(place.below())
    for row in _TABLE:
        if row.unless is not None and any(map(row.unless.match, every)):
            continue
        found = {matched[1] for path in every if (matched := row.file.match(path))}
        files = {at: _weights_in(at, every, row.weights) for at in found}
        folders = [at for at in found if files[at]] if row.read is not None else [*found]
        if folders:
            folders.sort(key=_by_number)
            return Left(row, tuple(folders), tuple(files[folders[-1]]), place)
    return None


def _weights_in(at: str, paths: Iterable[str], weights: re.Pattern[str] | None) -> list[str]:
    return [
        path
        for path in paths
        if weights and path.startswith(at) and weights.fullmatch(path.removeprefix(at))
    ]


def leavings(place: Place) -> str | None:
    """Return in words what a trainer left in a folder, and what to do; None for no trainer's."""
    below = models_below(place.below())
    if below:
        return (
            f"There are models in its folders {listed(below)}; write one of them, such as "
            f"{place.inside(below[-1])}"
        )
    left = left_by_trainer(place)
    if left is None:
        return None
    if left.row.read is not None and len(left.folders) > 1:
        names = [at.rstrip("/") for at in left.folders]
        return (
            f"It holds {left.row.what} in its folders {listed(names)}; write one of them, such as "
            f"{place.inside(names[-1])}"
        )
    return f"It holds {left.row.what}. {left.way}"


def is_consolidated(names: Iterable[str]) -> bool:
    """Return whether a model is there in Mistral's own names alone."""
    weights = [name for name in names if name.endswith(".safetensors")]
    return bool(weights) and all(map(_CONSOLIDATED.match, weights))


def _by_number(path: str) -> list[tuple[int, str]]:
    """Order names with numbers by their numbers: checkpoint-500 before checkpoint-1000."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(path)]
