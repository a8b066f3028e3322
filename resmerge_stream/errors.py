"""What goes wrong, as data: a text, what kind it is, what to do about it. One tree of errors.

    ResMergeError                      exit 2 unless said otherwise
    ├── RecipeError                    (ValueError)         the recipe or an option is wrong
    ├── CheckpointError
    │   ├── CheckpointNotFoundError    (FileNotFoundError)  nothing there, or not a model
    │   ├── CheckpointFormatError      (ValueError)         the bytes break the format's rules
    │   ├── UnsupportedCheckpointError (ValueError)         readable, but not something to merge
    │   │   └── PickledWeightsError                         weights that can run code
    │   ├── NonFiniteError             (ArithmeticError)    NaN or infinity among the weights
    │   └── SourceChangedError         (ValueError)         a file changed while it was read
    ├── PlanRefusedError               (ValueError)         the plan has problems; it lists them
    ├── NotEnoughMemoryError           (MemoryError)        the budget cannot hold a matrix
    ├── OutputExistsError              (FileExistsError)    the target is not this run's
    ├── PublishError                   (PermissionError)    no account that may publish there
    ├── JobRefusedError                (PermissionError)    the Hub runs no Job for this account
    ├── VerificationError              (ValueError)         a folder differs from its report
    └── StoppedError                   exit 3               stopped, but can be continued

How to raise one. The text says what is wrong and what was expected; it stands where the error is
raised, and holds for a terminal and for a web page, so it names no option of the command line:

    raise RecipeError(f"seed must be a whole number, not {shown(value)}.")

Where the user has to do something with the tool, that is a `Remedy`, which the command line and the
page put in words of their own. Several are alternatives, best first. Keywords are the error's
arguments; a remedy's words may name them:

    raise OutputExistsError(f"{name} is a file.", Remedy.ANOTHER_FOLDER)
    raise NotEnoughMemoryError("…", Remedy.MORE_MEMORY, needed="800MB")

Problems and warnings of a plan are made of the same parts, as a `Notice`, which is a string in the
terminal's words and can be worded otherwise; `found` collects them while planning:

    found.problem(f"{name} is a file.", Remedy.ANOTHER_FOLDER)
    found.warning(f"{expert.id} has another tokenizer.", Remedy.TOKENIZER_FROM)

``kind="slug"`` tells an error from others of its class, for programs. Between processes errors
travel as `to_dict`, never as a text to be parsed. Errors of other libraries are translated where
they enter, with ``raise … from exc``. What the system says of a file is translated where something
better can be said of it, and otherwise by `system_errors`, which the doors (the command line, the
page's service, worker processes) stand in. Anything else outside this tree is a bug.
"""

import errno
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self


class Remedy(Enum):
    """What a user can do with the tool about an error; the value is what a terminal says.

    In braces: arguments of the error. Advice that has nothing to do with the tool's options (give
    complete checkpoints, free some disk) belongs to the error's text.
    """

    SIGN_IN = "log in with 'hf auth login', or set HF_TOKEN to a token that may write"
    SIGN_IN_AGAIN = "log in again with 'hf auth login', or set HF_TOKEN"
    SIGN_IN_TO_SEE = "log in with 'hf auth login', or set HF_TOKEN to a token that may see it"
    CHECK_FOLDER = "check the path if you meant a folder"
    CONTINUE = "run the same command again to continue"
    FINISH_OTHER = "run that command again to finish it"
    DISCARD_STAGING = "remove it with --discard-staging"
    GIVE_MODELS = "give a recipe file, or --base ID and at least one --expert ID"
    SAY_WHERE = "say where it lies now: --base ID for the base, --expert ID for each of the experts"
    GIVE_TARGET = "give --out DIR or --push-to NAMESPACE/NAME"
    ANOTHER_FOLDER = "choose another --out"
    ANOTHER_REPO = "choose another --push-to"
    ONLY_PUBLISH = "leave --out away to publish it"
    REPLACE = "give --update to replace the model there"
    PULL_REQUEST = "give --create-pr to open a pull request there"
    NAME_PRIVATE = "give --public to name them"
    MATCH_TOKENS = "give --tokenizer-source base, or union to keep every model's tokens"
    TOKENS_OF = "give --tokenizer-source {model}, alone"
    TOKENIZER_FROM = "take the tokenizer from a model of your choice with --tokenizer-from"
    KEEP_BASE = "give --tokenizer-from {model} to keep the base's"
    CHAT_TEMPLATE = "give --chat-template auto for the one that most models have"
    GENERATION_CONFIG = "take a model's with --generation-config"
    GENERATION_OF = "give --generation-config {model}"
    SMALLER_SHARDS = "give a smaller --max-shard-size"
    ANOTHER_WORK_DIR = "choose another --work-dir"
    ANOTHER_CACHE = "set HF_HOME to a folder that can be written to"
    NO_DISK = "give --max-disk 0 to send shards without any file"
    MORE_DISK = "allow at least one shard on the disk (--max-disk 5GB)"
    MORE_MEMORY = "give --memory-budget {needed} or more on a machine that has it"
    ASK_AS_JOB = "give --job to ask it on a machine of the Hub"
    ASK_ON_CPU = "give --device cpu, or another GPU"
    TRAINED_EXPERTS = "give experts that were trained from this base"
    FEWER_PROCESSES = "start fewer processes"
    AS_ADAPTER = "give --as adapter"
    AS_MODEL = "leave --as adapter away to write the whole model"
    ADAPTER_RANK = "give --adapter-rank K for the best adapter of rank K"
    RUN_PARTS = (
        "run the parts that make them again, or give the same command without --finish to merge "
        "them here"
    )
    MERGE_UNRELATED = "give --unrelated merge to merge it all the same"
    MISSING_BASE = "leave --missing at base"
    WIDER_DTYPE = "give --dtype bfloat16 or float32"
    ON_CPU = "use --device cpu, or auto"

    @property
    def slug(self) -> str:
        """The name for programs, such as ``sign-in``."""
        return self.name.lower().replace("_", "-")


class Notice(str):
    """An error, a problem or a warning of a plan: a string in the terminal's words, and its parts.

    Args:
        text: what is wrong, in words that hold everywhere.
        remedies: what the user can do with the tool, best first.
        kind: a slug for programs; it stays when the text changes.
        arguments: what the text speaks of, as plain data.

    Attributes:
        text, remedies, kind, arguments: as given.
    """

    text: str
    remedies: tuple[Remedy, ...]
    kind: str
    arguments: dict[str, Any]

    def __new__(cls, text: str, *remedies: Remedy, kind: str = "", **arguments: Any) -> Self:
        """Put the parts into the terminal's words."""
        if isinstance(text, Notice):
            made: Notice = text
            text, remedies, kind = made.text, made.remedies + remedies, kind or made.kind
            arguments = made.arguments | arguments
        self = super().__new__(cls, _worded(text, [r.value for r in remedies], arguments))
        self.text, self.remedies = text, remedies
        self.kind, self.arguments = kind, arguments
        return self

    def worded(self, words: Mapping[Remedy, str]) -> str:
        """Return the text with its remedies in other words than the terminal's.

        Args:
            words: of each remedy; those without any are left out.
        """
        return _worded(self.text, [words.get(r, "") for r in self.remedies], self.arguments)

    def prefixed(self, part: str) -> "Notice":
        """Return the same, said of a part: a process, a method."""
        text = f"{part}: {self.text}"
        return Notice(text, *self.remedies, kind=self.kind, **self.arguments)

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as plain data."""
        return {
            "kind": self.kind,
            "text": self.text,
            "remedies": [remedy.slug for remedy in self.remedies],
            "arguments": self.arguments,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the notice that `to_dict` wrote."""
        by_slug = {remedy.slug: remedy for remedy in Remedy}
        remedies = [by_slug[slug] for slug in stored["remedies"]]
        return cls(stored["text"], *remedies, kind=stored["kind"], **stored["arguments"])


def _worded(text: str, words: Sequence[str], arguments: Mapping[str, Any]) -> str:
    ways = ", or ".join(way.format_map(arguments) for way in words if way)
    if not ways:
        return text
    end = "" if text.endswith((".", "!", "?")) else "."
    return f"{text}{end} {ways[0].upper()}{ways[1:]}."


@dataclass(slots=True)
class Findings:
    """What the checks found: problems refuse the merge, warnings do not."""

    problems: list[Notice] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)

    def problem(self, text: str, *remedies: Remedy, kind: str = "", **arguments: Any) -> None:
        """Note what refuses the merge; see `Notice`."""
        self.problems.append(Notice(text, *remedies, kind=kind, **arguments))

    def warning(self, text: str, *remedies: Remedy, kind: str = "", **arguments: Any) -> None:
        """Note what a user should know before merging; see `Notice`."""
        self.warnings.append(Notice(text, *remedies, kind=kind, **arguments))


class ResMergeError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        text: what is wrong; or a notice that has its remedies already.
        remedies: what the user can do with the tool.
        kind: a slug for programs, when the class's own is too wide.
        arguments: what the text speaks of, as plain data.

    Attributes:
        exit_code: what the command returns.
        kind: the class's own slug.
        notices: what went wrong; one, save for a refused plan. ``str(error)`` is what a terminal
            says of them.
    """

    exit_code: ClassVar[int] = 2
    kind: ClassVar[str] = "error"
    notices: tuple[Notice, ...]

    def __init__(self, text: str, *remedies: Remedy, kind: str = "", **arguments: Any) -> None:
        notice = Notice(text, *remedies, kind=kind, **arguments)
        self.notices = (notice if notice.kind else Notice(notice, kind=type(self).kind),)
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join(self.notices)

    @classmethod
    def of(cls, notices: Iterable[str]) -> Self:
        """Return one error for several notices."""
        every = tuple(Notice(notice) for notice in notices)
        error = cls("\n".join(every))
        error.notices = every
        return error

    def to_dict(self) -> dict[str, Any]:
        """Return the error as plain data, to be raised again in another process."""
        # Subclasses that other rooms make for themselves travel as the class of the tree above.
        known = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        return {
            "error": known.__name__,
            "notices": [notice.to_dict() for notice in self.notices],
        }


def error_from_dict(stored: Mapping[str, Any]) -> ResMergeError:
    """Return the error that `ResMergeError.to_dict` wrote."""
    known = globals().get(str(stored["error"]))
    made: type[ResMergeError] = StoppedError
    if isinstance(known, type) and issubclass(known, ResMergeError):
        made = known
    return made.of(Notice.from_dict(notice) for notice in stored["notices"])


class RecipeError(ResMergeError, ValueError):
    """A recipe file, a command-line option or a method's parameter is wrong."""

    kind = "recipe"


class CheckpointError(ResMergeError):
    """A checkpoint cannot be used; the subclasses say why."""

    kind = "checkpoint"


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was named."""

    kind = "not-found"


class CheckpointFormatError(CheckpointError, ValueError):
    """A header, an index or a config breaks its format's rules."""

    kind = "format"


class UnsupportedCheckpointError(CheckpointError, ValueError):
    """A readable checkpoint of a kind that must not be merged (pickled, quantised, an adapter)."""

    kind = "unsupported"


class PickledWeightsError(UnsupportedCheckpointError):
    """The weights are pickles, which can run code when they are read."""

    kind = "pickled"


class NonFiniteError(CheckpointError, ArithmeticError):
    """A weight is NaN or infinite; the message names the tensor and the checkpoint."""

    kind = "non-finite"


class SourceChangedError(CheckpointError, ValueError):
    """A weight file is not the one any more whose header was read; nothing made of it is kept."""

    kind = "source-changed"


class PlanRefusedError(ResMergeError, ValueError):
    """The plan found problems, or nothing that differs; nothing was written."""

    kind = "refused"


class NotEnoughMemoryError(ResMergeError, MemoryError):
    """The memory budget is smaller than the least that this merge needs."""

    kind = "memory"


class OutputExistsError(ResMergeError, FileExistsError):
    """The target exists and was not made by this run."""

    kind = "output-exists"


class PublishError(ResMergeError, PermissionError):
    """There is no account that may publish there."""

    kind = "publish"


class JobRefusedError(ResMergeError, PermissionError):
    """The Hub runs no Job for this account, or not this one."""

    kind = "job-refused"


class VerificationError(ResMergeError, ValueError):
    """A merged folder differs from what its report says."""

    kind = "verification"


class StoppedError(ResMergeError):
    """The run stopped (disk, network, permission), and can be continued."""

    kind = "stopped"
    exit_code = 3


# A disk or a mount that fails; any other error of the system is about the path that was given.
_FAILING = frozenset(
    (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENFILE,
     errno.ENODEV, errno.ENOTCONN)
)  # fmt: skip


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the system says of a file, and nobody translated, as an error of this tree.

    Raises:
        StoppedError: the file system fails: it is full, read-only or gone.
        RecipeError: the path cannot be used: no permission, too long, links in a circle.
    """
    try:
        yield
    except ResMergeError:  # some are the system's kinds of error too
        raise
    except OSError as exc:
        # Without a name: of a file that is open already; a socket's errors are the hub room's.
        name = "a file" if exc.filename is None else shown(str(exc.filename))
        if exc.errno in _FAILING:
            text = f"cannot read or write {name}: {exc.strerror}. What is finished is kept."
            raise StoppedError(text, Remedy.CONTINUE) from exc
        if exc.filename is None:
            raise
        raise RecipeError(f"cannot use {name}: {exc.strerror}.") from exc


def listed(items: Iterable[object], *, limit: int = 5) -> str:
    """Return the first `limit` items, each bounded, then "and N more".

    Args:
        items: what to name; strings are shown in quotes.
        limit: how many to show.
    """
    every = list(items)
    text = ", ".join(shown(item) for item in every[:limit])
    return text if len(every) <= limit else f"{text} and {len(every) - limit} more"


def shown(value: object) -> str:
    """Return a value for a message: its repr, never long, never failing."""
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 2, 120, 120
    try:
        return shortener.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a {type(value).__name__} too long to show"
