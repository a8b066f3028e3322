"""How to run a merge: each option declared once, for the command line, the page and records."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..device import DEVICE
from ..errors import RecipeError, shown
from ..units import duration, parse_size


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
    """

    name: str
    key: str
    default: Any
    changes: Literal["values", "files", "nothing"]
    parse: Callable[[str, object], Any]
    help: str
    metavar: str

    @property
    def flag(self) -> str:
        """The command line's name; of what is on by itself, the one that turns it off."""
        no = "no-" if self.default is True else ""
        return f"--{no}{self.key.replace('_', '-')}"


def option(
    default: Any,
    *,
    changes: Literal["values", "files", "nothing"],
    parse: Callable[[str, object], Any],
    help: str,
    metavar: str,
    key: str = "",
) -> Any:
    """Return a field of `Options`; the arguments are those of `Declared`."""
    said = {"changes": changes, "parse": parse, "help": help, "metavar": metavar, "key": key}
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


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{key} must be true or false, not {shown(value)}.", field=key)
    return value


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
        output: ``model`` writes whole weights, ``adapter`` a LoRA adapter of the base.
        adapter_rank: the rank of an adapter's modules at most, 1 or more; None keeps all of the
            update, where that is of low rank.
        tokenizer_from: where tokenizer files come from instead of the base.
        device: as ``--device``; not part of what makes a run the same run.
        memory_budget: bytes of private memory on this machine, likewise; processes of one run
            share it. None keeps to what the largest matrix calls for, and to 80 % of what is free.
        check_sources: whether files of the Hub that are read whole and in order are compared with
            the sha256 that it names.
        patience: seconds for which a merge rides out failures of the Hub; None: 15 minutes.
        max_header_bytes: of indexes and headers that are read of one repository, where those who
            name it are not trusted; None leaves it at the format's limit for each file. Nobody
            asks for it, so it is not declared as an option.
    """

    rounding: str = option(
        "nearest",
        changes="values",
        parse=_text,
        metavar="HOW",
        help="how to round: nearest (default) or stochastic",
    )
    seed: int = option(
        0,
        changes="values",
        parse=_whole,
        metavar="N",
        help="seed for all random numbers (default: 0)",
    )
    max_shard_bytes: int | None = option(
        None, key="max_shard_size", changes="files", parse=_size, metavar="SIZE",
        help="largest output file, such as 5GB (default: as in the base, at most 5GB)",
    )  # fmt: skip
    missing: str = option(
        "base", changes="values", parse=_text, metavar="HOW",
        help="if only some experts have a tensor: base (default) merges theirs, refuse stops",
    )  # fmt: skip
    output: str = option(
        "model", key="as", changes="values", parse=_text, metavar="KIND",
        help="what to write: model (default), or adapter, a LoRA adapter of the base",
    )  # fmt: skip
    adapter_rank: int | None = option(
        None, changes="values", parse=_whole, metavar="K",
        help="highest rank of the adapter (default: the rank that keeps everything)",
    )  # fmt: skip
    tokenizer_from: str | None = option(
        None,
        changes="files",
        parse=_text,
        metavar="ID",
        help="take the tokenizer files from this model",
    )
    device: str = option(
        "auto", changes="nothing", parse=_text, metavar="DEVICE",
        help="where to compute: auto (default), cpu, cuda or cuda:N",
    )  # fmt: skip
    memory_budget: int | None = option(
        None, changes="nothing", parse=_size, metavar="SIZE",
        help="memory for all processes on this machine, such as 4GB (default: 80%% of free memory)",
    )  # fmt: skip
    check_sources: bool = option(
        True, changes="nothing", parse=_flag, metavar="",
        help="do not compare source files with the Hub's SHA-256",
    )  # fmt: skip
    patience: int | None = option(
        None, changes="nothing", parse=_duration, metavar="TIME",
        help="how long the Hub may fail before the merge stops (default: 15m)",
    )  # fmt: skip
    max_header_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise RecipeError(
                f"rounding must be nearest or stochastic, not {self.rounding!r}.", field="rounding"
            )
        if self.missing not in ("base", "refuse"):
            raise RecipeError(
                f"missing must be base or refuse, not {self.missing!r}.", field="missing"
            )
        if self.output not in ("model", "adapter"):
            raise RecipeError(
                f"the output must be a model or an adapter, not {self.output!r}.", field="as"
            )
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise RecipeError(
                f"an adapter's rank must be 1 or more, not {self.adapter_rank}.",
                field="adapter_rank",
            )
        if not DEVICE.fullmatch(self.device):
            raise RecipeError(
                f"the device must be auto, cpu, cuda, cuda:N or mps, not {shown(self.device)}.",
                field="device",
            )
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise RecipeError(
                "a shard's size must be more than zero, such as 5GB.", field="max_shard_size"
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
                words += [known.flag] if isinstance(value, bool) else [known.flag, str(value)]
        return words


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
