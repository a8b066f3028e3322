"""What a Job is given: files, command and labels; how it ended, by its log.

No network, and no token: a Job gets that as a secret, beside its command.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import PlanRefusedError, RecipeError, listed
from ..hub.flavors import Flavor
from ..planning.planned import Plan
from ..planning.request import Request
from ..sinks.publication import Publication
from .wheel import WHEEL_NAME, build_wheel

# Where the Job finds its files.
MOUNT = "/resmerge"
# Reports how it ended, whoever ends the log; "$@" keeps every argument as it is.
_WRAPPER = '"$@"{then}; code=$?; echo "resmerge-stream job: exit code $code"; exit $code'
_EXIT = re.compile(r"resmerge-stream job: exit code (\d+)")
# How lines begin that no installer writes.
_OURS = ("resmerge-stream: ", "merging: ", "merged into ")
_NOT_IN_LABELS = re.compile(r"[^A-Za-z0-9_-]+")


def sources_of(asked: Request) -> list[str]:
    """Return what a merge reads, as it is named."""
    names = [ref.id for ref in asked.recipe.named]
    return [*names, *([asked.options.tokenizer_from] if asked.options.tokenizer_from else [])]


def refuse_folders(names: Iterable[str]) -> None:
    """Refuse models on this machine: a Job cannot see them.

    Raises:
        PlanRefusedError: one is a folder here.
    """
    folders = [name for name in names if os.path.isdir(os.path.expanduser(name))]
    if folders:
        raise PlanRefusedError(
            f"a Job runs on the Hub and cannot see folders of this machine: {listed(folders)}. "
            "Push them to the Hub first and name the repositories, or run it here, not as a Job."
        )


@dataclass(slots=True)
class JobFiles:
    """What a Job is given as files.

    Attributes:
        contents: path in the repository → content; a path names the content, so it never changes.
    """

    contents: dict[str, bytes] = field(default_factory=dict)

    def put(self, room: str, name: str, data: bytes) -> str:
        """Take a file, and return where the Job sees it."""
        path = f"{room}/{digest(data)}/{name}"
        self.contents[path] = data
        return f"{MOUNT}/{path}"


def merge_words(asked: Request, files: JobFiles) -> list[str]:
    """Return the command of the same merge, and put its recipe among the files."""
    recipe = files.put("recipes", "recipe.yml", asked.recipe.to_yaml().encode())
    publish = _publication(asked).words()
    # A stop costs a Job its machine: it waits longer before it gives up.
    patience = [] if asked.options.patience is not None else ["--patience", "1h"]
    return ["merge", recipe, *publish, *asked.options.words(), *patience]


def job_command(
    commands: Sequence[Sequence[str]], files: JobFiles, flavor: Flavor, needs: Iterable[str] = ()
) -> list[str]:
    """Return what a Job runs: the package installed by uv, and its commands until one fails.

    torch comes without CUDA where there is no GPU: a tenth of the download.

    Args:
        commands: of this package.
        files: get the package.
        flavor: the machine.
        needs: what is installed beside the package.
    """
    start = [
        *("uv", "tool", "run", "--python", "3.12"),
        *("--torch-backend", "auto" if flavor.gpu_gb else "cpu"),
        *(word for need in needs for word in ("--with", need)),
        *("--from", files.put("wheels", WHEEL_NAME, build_wheel()), "resmerge-stream"),
    ]
    first, *others = ([*start, *words] for words in commands)
    then = "".join(f" && {shlex.join(words)}" for words in others)
    return ["sh", "-c", _WRAPPER.replace("{then}", then), "sh", *first]


def job_labels(plan: Plan) -> dict[str, str]:
    """Return what tells this merge's Jobs from others: the plan and the target."""
    target = _publication(plan.request).repo_id
    return {**labels_of("resmerge", target), "resmerge-plan": plan.plan_hash}


def labels_of(name: str, target: str) -> dict[str, str]:
    """Return the labels of whatever a Job does for a repository."""
    return {
        "name": f"{name}-{_NOT_IN_LABELS.sub('-', target.partition('/')[2])}"[:100],
        "resmerge-target": digest(target.encode()),
    }


@dataclass(slots=True)
class JobLog:
    """What a Job's log has told of its end.

    Attributes:
        lines: how many there were.
        exit_code: of the command, or of its installation; None as long as it is not known.
        began: whether the command itself said something.
        traceback: whether a bug showed itself.
    """

    lines: int = 0
    exit_code: int | None = None
    began: bool = False
    traceback: bool = False

    def read(self, line: str) -> None:
        """Take a line of the log."""
        self.lines += 1
        if match := _EXIT.fullmatch(line.strip()):
            self.exit_code = int(match[1])
        elif line.startswith(_OURS):
            self.began = True
        elif line.startswith("Traceback (most recent call last)"):
            self.traceback = True

    def ending(self, stage: str, message: str | None) -> tuple[int, str]:
        """Return the exit code that a Job's end calls for, and what to say of it.

        Args:
            stage: the Hub's word for the Job's state.
            message: the Hub's reason, where it gives one.
        """
        again = "The same command starts it again; what is published is kept."
        why = f" ({' '.join(message.split())[:200]})" if message else ""
        if stage == "COMPLETED":
            return 0, "the Job is done."
        if stage in ("CANCELED", "DELETED"):
            return 3, f"the Job was cancelled{why}. {again}"
        if self.exit_code == 2 and self.began:
            return 2, "it was refused in the Job; its log above says why."
        if self.exit_code == 1 and self.traceback:
            return 1, "it failed in the Job: a bug. Its log above has the traceback."
        if self.exit_code == 137:
            return 3, (
                f"the Job was killed, most likely for its memory{why}. Give a larger --flavor, or "
                f"merge with a smaller --memory-budget. {again}"
            )
        if self.exit_code is not None and not self.began:
            return (
                3,
                f"the Job ended before it began; its log above says why{why}. {again}",
            )
        if self.exit_code is None:
            return 3, (
                f"the Job was stopped{why}: its time was up, or its machine failed. {again} "
                "--timeout gives it more time."
            )
        return 3, f"it stopped in the Job; its log above says why{why}. {again}"


def _publication(asked: Request) -> Publication:
    if asked.publication is None:
        raise RecipeError("a Job publishes its result: give --push-to NAMESPACE/NAME.")
    return asked.publication


def digest(data: bytes) -> str:
    """Return what names a content among a Job's files and labels."""
    return hashlib.sha256(data).hexdigest()[:16]
