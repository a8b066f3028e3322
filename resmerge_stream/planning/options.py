"""How to run a merge: each option declared once, for the command line, the page and records."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..device import DEVICE
from ..errors import RecipeError, shown
from ..units import duration, parse_size
from .parts import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What is said of an option, beside its default.

    Attributes:
        name: of the attribute in `Options`.
        key: the user's word: ``max_shard_size`` in data and forms, ``--max-shard-size`` as a flag.
        default: when it is left out.
        changes: ``values`` of tensors (a report says it), ``files`` alone, or ``nothing`` that is
            written: such an option belongs to a machine and is not part of a request.
        parse: makes the value from what a user gave, text or plain data.
        help: a few words for ``--help``.
        metavar: what stands for the value there.
        choices: the words that it may be; none: anything that can be parsed.
        least: the smallest number that it may be.
        label: what its field on the page is called; that of a machine has none.
        info: a few words below that.
        placeholder: what stands in the field while it is empty.
    """

    name: str
    key: str
    default: Any
    changes: Literal["values", "files", "nothing"]
    parse: Callable[[str, object], Any]
    help: str
    metavar: str
    choices: tuple[str, ...]
    least: int | None
    label: str
    info: str
    placeholder: str

    @property
    def flag(self) -> str:
        """The command line's name."""
        return f"--{self.key.replace('_', '-')}"


def option(
    default: Any,
    *,
    changes: Literal["values", "files", "nothing"],
    parse: Callable[[str, object], Any],
    help: str,
    metavar: str,
    key: str = "",
    choices: tuple[str, ...] = (),
    least: int | None = None,
    label: str = "",
    info: str = "",
    placeholder: str = "",
) -> Any:
    """Return a field of `Options`; the arguments are those of `Declared`."""
    said = {
        "changes": changes, "parse": parse, "help": help, "metavar": metavar, "key": key,
        "choices": choices, "least": least, "label": label, "info": info,
        "placeholder": placeholder,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=said)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{key} must be text, not {shown(value)}.", field=key)
    return value.strip()


def _whole(key: str, value: object) -> int:
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise RecipeError(f"{key} must be a whole number, not {shown(value)}.", field=key)


def _size(key: str, value: object) -> int:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RecipeError(f"{key} must be a size such as 5GB, not {shown(value)}.", field=key)
    return parse_size(value, name=key.replace("_", "-"))


def _duration(key: str, value: object) -> int:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RecipeError(f"{key} must be a time such as 15m, not {shown(value)}.", field=key)
    return duration(str(value), name=key, least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run a merge; the recipe says what to merge.

    Attributes:
        rounding: ``nearest`` or ``stochastic``.
        seed: of stochastic rounding and of methods that draw random numbers.
        max_shard_bytes: None mirrors the base's shards, cut at 5 GB.
        missing: what to do with a tensor that only some experts have: ``base`` merges it among
            those that have it, beside the base's; ``refuse`` makes it a problem.
        unrelated: what to do with an expert whose matrices have nothing in common with the base's:
            ``refuse`` ends the merge before anything is written; ``merge`` takes it.
        output: ``model`` writes whole weights, ``adapter`` a LoRA adapter of the base.
        adapter_rank: the rank of an adapter's modules at most, 1 or more; None keeps all of the
            update, where that is of low rank.
        tokenizer_from: where tokenizer files come from instead of the base.
        device: as ``--device``; not part of what makes a run the same run.
        memory_budget: bytes of private memory on this machine, likewise; processes of one run
            share it. None keeps to what the largest matrix calls for, and to 80 % of what is free.
        check_sources: ``hub`` compares files of the Hub that are read whole and in order with the
            sha256 that it names; ``full`` also hashes the files of folders, whatever their size, so
            that their content tells whether they changed; ``none`` does neither.
        patience: seconds for which a merge rides out failures of the Hub; None: 15 minutes.
        part: which of the shards this run makes, of several runs that cannot reach each other;
            None for all, and for what launched processes share.
        max_header_bytes: of indexes and headers that are read of one repository, where those who
            name it are not trusted; None leaves it at the format's limit for each file. Nobody
            asks for it, so it is not declared as an option.
        max_experts: that a recipe's patterns may stand for, likewise; None leaves it at
            `planning.checkpoints.MOST_CHECKPOINTS`.
    """

    rounding: str = option(
        "nearest", changes="values", parse=_text, choices=("nearest", "stochastic"),
        metavar="HOW", help="how to round: nearest (default) or stochastic",
        label="Rounding", info="stochastic loses no small update on average",
    )  # fmt: skip
    seed: int = option(
        0, changes="values", parse=_whole,
        metavar="N", help="seed for all random numbers (default: 0)",
        label="Seed", info="of random numbers",
    )  # fmt: skip
    max_shard_bytes: int | None = option(
        None, key="max_shard_size", changes="files", parse=_size, least=1, metavar="SIZE",
        help="largest output file, such as 5GB (default: as in the base, at most 5GB)",
        label="File size, at most", info="such as 5GB or 800MB",
        placeholder="as the base's files, cut at 5GB",
    )  # fmt: skip
    missing: str = option(
        "base", changes="values", parse=_text, choices=("base", "refuse"), metavar="HOW",
        help="if only some experts have a tensor: base (default) merges theirs, refuse stops",
        label="Tensors that some lack", info="base: merged among the experts that have them",
    )  # fmt: skip
    unrelated: str = option(
        "refuse", changes="values", parse=_text, choices=("refuse", "merge"), metavar="HOW",
        help="if an expert was not trained from the base: refuse (default), or merge",
        label="Experts of another base",
        info="their matrices have nothing in common with the base's",
    )  # fmt: skip
    output: str = option(
        "model", key="as", changes="values", parse=_text, choices=("model", "adapter"),
        metavar="KIND",
        help="what to write: model (default), or adapter, a LoRA adapter of the base",
        label="Output", info="adapter: a LoRA adapter of the base, a few megabytes",
    )  # fmt: skip
    adapter_rank: int | None = option(
        None, changes="values", parse=_whole, least=1, metavar="K",
        help="highest rank of the adapter (default: the rank that keeps everything)",
        label="Adapter's rank, at most",
        info="whole experts need one; empty: as high as it takes to keep all",
    )  # fmt: skip
    tokenizer_from: str | None = option(
        None, changes="files", parse=_text,
        metavar="ID", help="take the tokenizer files from this model",
        label="Tokenizer from", info="owner/name", placeholder="the base",
    )  # fmt: skip
    device: str = option(
        "auto", changes="nothing", parse=_text, metavar="DEVICE",
        help="where to compute: auto (default), cpu, cuda or cuda:N",
    )  # fmt: skip
    memory_budget: int | None = option(
        None, changes="nothing", parse=_size, metavar="SIZE",
        help="memory for all processes on this machine, such as 4GB (default: 80%% of free memory)",
    )  # fmt: skip
    check_sources: str = option(
        "hub", changes="nothing", parse=_text, choices=("hub", "full", "none"), metavar="WHICH",
        help="files to check by SHA-256: hub (default), those of the Hub; full, also hash folders; "
        "none",
    )  # fmt: skip
    patience: int | None = option(
        None, changes="nothing", parse=_duration, metavar="TIME",
        help="how long the Hub may fail before the merge stops (default: 15m)",
    )  # fmt: skip
    part: Part | None = option(  # noqa: RUF009  # of plain data, as the others
        None, changes="nothing", parse=Part.parsed, metavar="I/N",
        help="merge only part I (from 0) of N: runs that need no network between them; auto: as "
        "SLURM or, with auto/N, Kubernetes says",
    )  # fmt: skip
    max_header_bytes: int | None = None
    max_experts: int | None = None

    def __post_init__(self) -> None:
        for known in declared():
            value = getattr(self, known.name)
            if known.choices and value not in known.choices:
                *first, last = known.choices
                raise RecipeError(
                    f"{known.key} must be {', '.join(first)} or {last}, not {shown(value)}.",
                    field=known.key,
                )
            if known.least is not None and value is not None and value < known.least:
                raise RecipeError(
                    f"{known.key} must be {known.least} or more, not {value}.", field=known.key
                )
        if not DEVICE.fullmatch(self.device):
            raise RecipeError(
                f"the device must be auto, cpu, cuda, cuda:N or mps, not {shown(self.device)}.",
                field="device",
            )

    @classmethod
    def parsed(cls, given: Mapping[str, object]) -> Self:
        """Return the options that a user gave, by key; None leaves the default.

        Raises:
            RecipeError: a value is wrong.
        """
        return cls(
            **{
                known.name: known.parse(known.key, given[known.key])
                for known in declared()
                if given.get(known.key) is not None
            }
        )

    @classmethod
    def from_dict(cls, document: object) -> Self:
        """Return the options in plain data, as `to_dict` writes them.

        Raises:
            RecipeError: a key is none of an option that changes the output, or a value is wrong.
        """
        if not isinstance(document, Mapping):
            raise RecipeError(f"options must be a mapping, not {shown(document)}.")
        keys = [known.key for known in declared() if known.changes != "nothing"]
        unknown = [key for key in document if key not in keys]
        if unknown:
            raise RecipeError(f"unknown option {shown(unknown[0])}; there are: {', '.join(keys)}.")
        for known in declared():
            if known.default is not None and document.get(known.key, known.default) is None:
                raise RecipeError(f"{known.key} must have a value.", field=known.key)
        return cls.parsed(document)

    def to_dict(self, *changes: str) -> dict[str, Any]:
        """Return as plain data, by key, the options that change what is written.

        Args:
            changes: only those that change this; see `Declared`.
        """
        wanted = changes or ("values", "files")
        return {
            known.key: getattr(self, known.name) for known in declared() if known.changes in wanted
        }

    def words(self, *changes: str) -> list[str]:
        """Return the command line's words for them, without those at their defaults.

        Args:
            changes: only those that change this; see `Declared`. All where none is given.
        """
        words: list[str] = []
        for known in declared():
            value = getattr(self, known.name)
            if value != known.default and (not changes or known.changes in changes):
                words += [known.flag, str(value)]
        return words


@functools.cache
def declared() -> tuple[Declared, ...]:
    """Return what is declared of every option that a user has, in the order of `Options`."""
    return tuple(
        Declared(
            name=field.name,
            default=field.default,
            **{**field.metadata, "key": field.metadata["key"] or field.name},
        )
        for field in dataclasses.fields(Options)
        if field.metadata
    )
