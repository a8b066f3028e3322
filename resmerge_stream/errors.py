"""The error tree: everything that a user can cause or mend, and nothing else.

    ResMergeError                      exit 2 unless said otherwise
    ├── RecipeError                    (ValueError)         the recipe or an option is wrong
    ├── CheckpointError
    │   ├── CheckpointNotFoundError    (FileNotFoundError)  nothing there, or not a model
    │   ├── CheckpointFormatError      (ValueError)         the bytes break the format's rules
    │   ├── UnsupportedCheckpointError (ValueError)         readable, but not something to merge
    │   └── NonFiniteError             (ArithmeticError)    NaN or infinity among the weights
    ├── PlanRefusedError               (ValueError)         the plan has problems; it lists them
    ├── NotEnoughMemoryError           (MemoryError)        the budget cannot hold a matrix
    ├── OutputExistsError              (FileExistsError)    the target is not this run's
    ├── PublishError                   (PermissionError)    no account that may publish there
    ├── JobRefusedError            (PermissionError)    the Hub runs no Job for this account
    ├── VerificationError              (ValueError)         a folder differs from its report
    └── StoppedError                   exit 3               stopped, but the same command continues

A message says what is wrong, what was expected, and what to do. Errors of other libraries are
translated where they enter, with ``raise … from exc``. Anything outside this tree is a bug.
"""

import reprlib
from collections.abc import Iterable


class ResMergeError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is what the command returns."""

    exit_code = 2


class RecipeError(ResMergeError, ValueError):
    """A recipe file, a command-line option or a method's parameter is wrong."""


class CheckpointError(ResMergeError):
    """A checkpoint cannot be used; the subclasses say why."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was named."""


class CheckpointFormatError(CheckpointError, ValueError):
    """A header, an index or a config breaks its format's rules."""


class UnsupportedCheckpointError(CheckpointError, ValueError):
    """A readable checkpoint of a kind that must not be merged (pickled, quantised, an adapter)."""


class NonFiniteError(CheckpointError, ArithmeticError):
    """A weight is NaN or infinite; the message names the tensor and the checkpoint."""


class PlanRefusedError(ResMergeError, ValueError):
    """The plan found problems; nothing was read or written beyond headers."""


class NotEnoughMemoryError(ResMergeError, MemoryError):
    """The memory budget is smaller than the least that this merge needs."""


class OutputExistsError(ResMergeError, FileExistsError):
    """The target exists and was not made by this run."""


class PublishError(ResMergeError, PermissionError):
    """There is no account that may publish there."""


class JobRefusedError(ResMergeError, PermissionError):
    """The Hub runs no Job for this account, or not this one."""


class VerificationError(ResMergeError, ValueError):
    """A merged folder differs from what its report says."""


class StoppedError(ResMergeError):
    """The run stopped (disk, network, permission), and the same command continues it."""

    exit_code = 3


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
