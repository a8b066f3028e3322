"""A LoRA adapter as an expert: a checkpoint in the base's layout whose changes are factors.

It has every tensor that the base has. What it leaves alone is unchanged; of the others an
`EditRows` says what is stored. Nothing of the adapter's size is ever made whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..specs import TensorSpec
from .adapter_config import LoraSettings, parse_settings
from .adapter_layout import Edit, layout_of
from .ahead import Ahead, Followed
from .checkpoint import Checkpoint, SourceFile, StoredTensor
from .fetch import Span


@dataclass(frozen=True, slots=True)
class EditRows:
    """What an adapter stores about some rows of a tensor of the base.

    Attributes:
        edit: what it means; None where the adapter leaves the tensor alone.
        specs: the adapter's tensors that were read, by key.
        whole: their bytes, by key.
        stored: bytes of these rows alone, where the adapter has other values of the tensor.
        is_first: whether the whole tensors were read for these rows, and not for others before.
    """

    edit: Edit | None = None
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    whole: Mapping[str, memoryview] = field(default_factory=dict)
    stored: memoryview | None = None
    is_first: bool = True

    def __len__(self) -> int:
        whole = sum(map(len, self.whole.values())) if self.is_first else 0
        return whole + len(self.stored or b"")


class AdapterCheckpoint:
    """An adapter on a base. See `resmerge_stream.sources.Checkpoint` for the attributes.

    Args:
        own: the adapter's own tensors and config, opened.
        base: the checkpoint in whose layout they are seen.

    Raises:
        UnsupportedCheckpointError: the adapter is of a kind that cannot be merged, or does not
            fit the base.
        CheckpointFormatError: its config breaks the format.
    """

    def __init__(self, own: Checkpoint, base: Checkpoint) -> None:
        self.own, self._base = own, base
        self.id, self.revision, self.folder = own.id, own.revision, own.folder
        self.subfolder = own.subfolder
        self.files: tuple[SourceFile, ...] = own.files
        self.identity, self.license = own.identity, own.license
        self.gated, self.is_private, self.is_remote = own.gated, own.is_private, own.is_remote
        self.tensors: Mapping[str, StoredTensor] = base.tensors
        self.config: dict[str, Any] = base.config
        self.small_files: tuple[str, ...] = ()
        self.settings: LoraSettings = parse_settings(own.config, where=own.id)
        self.edits: Mapping[str, Edit] = layout_of(
            self.own_specs, base, self.settings, where=own.id
        )
        self._read: dict[str, dict[str, memoryview]] = {}

    @property
    def own_specs(self) -> dict[str, TensorSpec]:
        """The adapter's own tensors by key."""
        return {key: stored.spec for key, stored in self.own.tensors.items()}

    @property
    def ahead(self) -> Ahead | None:
        """What reads ahead for the adapter's file."""
        return self.own.ahead if isinstance(self.own, Followed) else None

    @ahead.setter
    def ahead(self, ahead: Ahead | None) -> None:
        if isinstance(self.own, Followed):
            self.own.ahead = ahead

    def rank_of(self, name: str) -> int | None:
        """Return the rank of a tensor's update at most; None where it is not given by factors."""
        edit = self.edits.get(name)
        if edit is None:
            return 0
        return edit.rank(self.own_specs) if edit.is_low_rank else None

    def read_edit(self, name: str, start_row: int = 0, stop_row: int | None = None) -> EditRows:
        """Return what is stored about some rows of a tensor.

        Factors are read once for all rows of a tensor, and let go with the last of them.

        Raises:
            StoppedError: the bytes cannot be had right now.
        """
        edit = self.edits.get(name)
        if edit is None:
            return EditRows()
        is_first = name not in self._read
        if is_first:
            self._read[name] = {key: self.own.read(key) for key in edit.keys}
        whole = self._read[name]
        stored = None
        if edit.stored is not None:
            stored = self.own.read(edit.stored, start_row, stop_row)
        keys = [*edit.keys, *([edit.stored] if edit.stored is not None else [])]
        specs = {key: self.own.tensors[key].spec for key in keys}
        return EditRows(edit, specs, whole, stored, is_first)

    def forget(self) -> None:
        """Let all factors go; those that are wanted again are read again."""
        self._read.clear()

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None) -> memoryview:
        """Return the base's bytes: what the adapter adds to them, `read_edit` says."""
        return self._base.read(name, start_row, stop_row)

    def read_cost(self, name: str, start_row: int = 0, stop_row: int | None = None) -> int:
        """Return how many stored bytes `read_edit` takes; factors count to the first rows."""
        return sum(end - begin for _, begin, end in self._ranges(name, start_row, stop_row))

    def spans(self, name: str, start_row: int = 0, stop_row: int | None = None) -> Iterator[Span]:
        """Yield what has to be fetched for some rows of a tensor."""
        if not isinstance(self.own, Followed):
            return
        for key, start, stop in self._readings(name, start_row, stop_row):
            yield from self.own.spans(key, start, stop)

    def release(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Let mapped rows go that only these rows of the tensor need."""
        edit = self.edits.get(name)
        if edit is not None and edit.stored is not None:
            self.own.release(edit.stored, start_row, stop_row)

    def done_with(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Say that these rows were read for the last time in this run."""
        edit = self.edits.get(name)
        if edit is None:
            return
        if edit.stored is not None:
            self.own.done_with(edit.stored, start_row, stop_row)
        rows, _ = edit.spec.matrix_shape
        if stop_row in (None, rows) and self._read.pop(name, None) is not None:
            for key in edit.keys:
                self.own.done_with(key)

    def read_small(self, name: str) -> bytes:
        """Return the content of a file of the adapter."""
        return self.own.read_small(name)

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content, where that is known for free."""
        return self.own.small_oid(name)

    def close(self) -> None:
        """Release the adapter's files and connections."""
        self._read.clear()
        self.own.close()

    def _readings(
        self, name: str, start_row: int, stop_row: int | None
    ) -> Iterator[tuple[str, int, int | None]]:
        edit = self.edits.get(name)
        if edit is None:
            return
        if edit.stored is not None:
            yield edit.stored, start_row, stop_row
        if start_row == 0:
            yield from ((key, 0, None) for key in edit.keys)

    def _ranges(
        self, name: str, start_row: int, stop_row: int | None
    ) -> Iterator[tuple[str, int, int]]:
        for key, start, stop in self._readings(name, start_row, stop_row):
            yield key, *self.own.tensors[key].byte_range(start, stop)


def is_bare_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is an adapter that has no base yet."""
    return not isinstance(checkpoint, AdapterCheckpoint) and "peft_type" in checkpoint.config


def rank_of(expert: Checkpoint, name: str) -> int | None:
    """Return the rank of an expert's update of a tensor at most; None where it is no product."""
    return expert.rank_of(name) if isinstance(expert, AdapterCheckpoint) else None


def base_mismatch(adapter: AdapterCheckpoint, base: Checkpoint) -> str | None:
    """Return a warning where an adapter says that it was trained on another base."""
    said = adapter.settings.base
    if not said or _short(said) == _short(base.id):
        return None
    full = _full_twin(said)
    if full is not None:
        if _short(full) == _short(base.id):
            return None
        return (
            f"{adapter.id} was trained on {said}, a quantised copy of {full}: give {full} as the "
            f"base rather than {base.id}, unless they are the same."
        )
    return (
        f"{adapter.id} says that it was trained on {said}, not on {base.id}. Its shapes fit; "
        "whether its weights do, only a test can tell."
    )


def _short(name: str) -> str:
    """Return what two names of one model have in common: the last part, without its case."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _full_twin(name: str) -> str | None:
    """Return the model that a name of a 4-bit copy was made of."""
    for end in ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit"):
        if name.lower().endswith(end):
            return name[: -len(end)]
    return None
