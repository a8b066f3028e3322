"""A LoRA adapter as an expert: a model in the base's layout whose changes are factors.

It has every tensor that the base has. What it leaves alone is unchanged; of the others an
`EditRows` says what is stored. Nothing of the adapter's size is ever made whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Self

from ..specs import TensorSpec
from .adapter_config import LoraSettings, parse_settings
from .adapter_layout import Edit, layout_of
from .assembly import Reading
from .checkpoint import Checkpoint
from .store import ALL

# Names of saved modules that are looked for; real configs have a handful.
_MAX_SAVED = 1_000


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter(Checkpoint):
    """An adapter on a base: the base's tensors, and what the adapter's own say of them.

    Attributes:
        settings: what its config says.
        edits: of the base's tensors that it changes, by name.
        notes: what a user should know of how it was read.
    """

    settings: LoraSettings
    edits: Mapping[str, Edit]
    notes: tuple[str, ...]
    _read: dict[str, dict[str, memoryview]] = field(default_factory=dict)

    @classmethod
    def of(cls, own: Checkpoint, base: Checkpoint) -> Self:
        """Return an adapter in a base's layout.

        Raises:
            UnsupportedCheckpointError: the adapter is of a kind that cannot be merged, or does not
                fit the base.
            CheckpointFormatError: its config breaks the format.
        """
        settings = parse_settings(own.config, where=own.id)
        layout = layout_of(own, base, settings)
        facts = {one.name: getattr(own, one.name) for one in fields(Checkpoint)}
        facts |= {"trees": base.trees, "config": base.config, "small_files": (), "seen": own}
        return cls(**facts, settings=settings, edits=layout.edits, notes=layout.notes)

    @cached_property
    def own_specs(self) -> dict[str, TensorSpec]:
        """The adapter's own tensors by key."""
        return {key: stored.spec for key, stored in self.opened.tensors.items()}

    def rank_of(self, name: str) -> int | None:
        """Return the rank of a tensor's update at most; None where it is not given by factors."""
        edit = self.edits.get(name)
        if edit is None:
            return 0
        return edit.rank(self.own_specs) if edit.is_low_rank else None

    @property
    def rank(self) -> int:
        """The highest rank of its modules."""
        return max((self.rank_of(name) or 0 for name in self.edits), default=0)

    def read_edit(self, name: str, rows: slice = ALL) -> EditRows:
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
            self._read[name] = {key: self.opened.read(key) for key in edit.keys}
        whole = self._read[name]
        stored = None
        if edit.stored is not None:
            stored = self.opened.read(edit.stored, rows)
        keys = [*edit.keys, *([edit.stored] if edit.stored is not None else [])]
        specs = {key: self.opened.tensors[key].spec for key in keys}
        return EditRows(edit, specs, whole, stored, is_first)

    def forget(self) -> None:
        """Let all factors go; those that are wanted again are read again."""
        self._read.clear()

    def readings(self, name: str, rows: slice = ALL) -> Iterator[Reading]:
        """Yield what of the adapter is read for some rows; factors count to the first rows."""
        edit = self.edits.get(name)
        if edit is None:
            return
        if edit.stored is not None:
            yield from self.opened.readings(edit.stored, rows)
        if rows.start in (None, 0):
            for key in edit.keys:
                yield from self.opened.readings(key)

    def made_bytes(self, name: str, rows: slice = ALL) -> int:
        """Return 0: an adapter is read as it is stored."""
        return 0

    def release(self, name: str, rows: slice = ALL) -> None:
        """Let mapped rows go that only these rows of the tensor need."""
        edit = self.edits.get(name)
        if edit is not None and edit.stored is not None:
            self.opened.release(edit.stored, rows)

    def done_with(self, name: str, rows: slice = ALL) -> None:
        """Say that these rows were read for the last time in this run."""
        edit = self.edits.get(name)
        if edit is None:
            return
        if edit.stored is not None:
            self.opened.done_with(edit.stored, rows)
        if (
            rows.stop in (None, edit.spec.matrix_shape[0])
            and self._read.pop(name, None) is not None
        ):
            for key in edit.keys:
                self.opened.done_with(key)

    def close(self) -> None:
        """Release the adapter's files and connections."""
        self._read.clear()
        super().close()


def is_bare_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is an adapter that has no base yet."""
    return not isinstance(checkpoint, Adapter) and "peft_type" in checkpoint.config


def base_mismatch(adapter: Adapter, base: Checkpoint) -> str | None:
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


def announced_absent(adapter: Adapter, base: Checkpoint) -> str | None:
    """Return a warning where an adapter's config names weights of its own that it does not hold."""
    said, keys = adapter.settings, [f".{key}" for key in adapter.opened.tensors]
    names = [f".{name}" for name in base.tensors]
    absent = [
        f"{module} (modules_to_save)"
        for module in [*dict.fromkeys(said.saved)][:_MAX_SAVED]
        if any(f".{module}." in name for name in names)
        and not any(f".{module}." in key for key in keys)
    ]
    if said.tokens and not any("trainable_tokens_delta" in key for key in keys):
        absent.append("trained tokens (trainable_token_indices)")
    if said.bias != "none" and not any(key.endswith(".bias") for key in keys):
        of = {edited.rpartition(".")[0] for edited in adapter.edits}
        biases = [name.rpartition(".")[0] for name in base.tensors if name.endswith(".bias")]
        if said.bias == "all" or of.intersection(biases):
            absent += ["biases (bias)"] if biases else []
    if not absent:
        return None
    return (
        f"the config of {adapter.id} says that it brings {', '.join(absent[:5])}, but it holds no "
        "such weights; the base's are kept. Save it again if they were trained."
    )


def are_twins(left: Adapter, right: Adapter) -> bool:
    """Return whether two adapters say the same, as far as a row of each tensor shows it."""
    if left.edits != right.edits or left.own_specs != right.own_specs:
        return False
    if left.is_remote or right.is_remote:
        ours, theirs = ([file.sha256 for file in one.files] for one in (left, right))
        return ours == theirs and None not in ours
    row = slice(0, 1)
    return all(
        left.opened.read(key, row) == right.opened.read(key, row) for key in left.opened.tensors
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
