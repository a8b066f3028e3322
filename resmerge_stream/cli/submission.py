"""A merge as a Job: its command, its labels, how it ended by its log.

No network, and no token: a Job gets that as a secret, beside its command.
"""

import hashlib
import os
import re
from dataclasses import dataclass

from ..errors import PlanRefusedError, RecipeError, listed
from ..hub.flavors import Flavor
from ..planning.planned import Plan
from ..planning.request import Request
from ..recipe import Recipe
from ..sinks.publication import Publication
from .wheel import WHEEL_NAME, build_wheel

# Where the Job finds the files that `job_files` names.
MOUNT = "/resmerge"
# Reports how the merge ended, whoever ends the log; "$@" keeps every argument as it is.
_WRAPPER = '"$@"; code=$?; echo "resmerge-stream job: exit code $code"; exit $code'
_EXIT = re.compile(r"resmerge-stream job: exit code (\d+)")
_NOT_IN_LABELS = re.compile(r"[^A-Za-z0-9_-]+")


def refuse_folders(asked: Request) -> None:
    """Refuse sources on this machine: a Job cannot see them.

    Raises:
        PlanRefusedError: a source is a folder here.
    """
    names = [ref.id for ref in asked.recipe.named]
    names += [asked.options.tokenizer_from] if asked.options.tokenizer_from else []
    folders = [name for name in names if os.path.isdir(os.path.expanduser(name))]
    if folders:
        raise PlanRefusedError(
            f"a Job runs on the Hub and cannot see folders of this machine: {listed(folders)}. "
            "Push them to the Hub first and name the repositories, or merge here with 'merge'."
        )


@dataclass(frozen=True, slots=True)
class JobFiles:
    """What a Job is given as files: this package, and the recipe.

    Attributes:
        contents: path in the repository → content; a path names the content, so it never changes.
        wheel, recipe: where the Job sees them.
    """

    contents: dict[str, bytes]
    wheel: str
    recipe: str


def job_files(recipe: Recipe) -> JobFiles:
    """Return the files of a Job."""
    wheel, text = build_wheel(), recipe.to_yaml().encode()
    wheel_path = f"wheels/{_digest(wheel)}/{WHEEL_NAME}"
    recipe_path = f"recipes/{_digest(text)}.yml"
    return JobFiles(
        {wheel_path: wheel, recipe_path: text},
        f"{MOUNT}/{wheel_path}",
        f"{MOUNT}/{recipe_path}",
    )


def job_command(asked: Request, files: JobFiles, flavor: Flavor) -> list[str]:
    """Return what a Job runs: the package installed by uv, and the same merge.

    torch comes without CUDA where there is no GPU: a tenth of the download.
    """
    publish = _publication(asked).words()
    # A stop costs a Job its machine: it waits longer before it gives up.
    patience = [] if asked.options.patience is not None else ["--patience", "1h"]
    options = [*asked.options.words(), *patience]
    merge = ["resmerge-stream", "merge", files.recipe, *publish, *options]
    return [
        *("sh", "-c", _WRAPPER, "sh"),
        *("uv", "tool", "run", "--python", "3.12"),
        *("--torch-backend", "auto" if flavor.gpu_gb else "cpu"),
        *("--from", files.wheel),
        *merge,
    ]


def job_labels(plan: Plan) -> dict[str, str]:
    """Return what tells this merge's Jobs from others: the plan and the target."""
    target = _publication(plan.request).repo_id
    return {
        "name": f"resmerge-{_NOT_IN_LABELS.sub('-', target.partition('/')[2])}"[:100],
        "resmerge-plan": plan.plan_hash,
        "resmerge-target": _digest(target.encode()),
    }


@dataclass(slots=True)
class JobLog:
    """What a Job's log has told of its end.

    Attributes:
        lines: how many there were.
        exit_code: of the merge, or of its installation; None as long as it is not known.
        began: whether the merge itself said something.
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
        elif line.startswith(("resmerge-stream: ", "merging: ", "merged into ")):
            self.began = True
        elif line.startswith("Traceback (most recent call last)"):
            self.traceback = True

    def ending(self, stage: str, message: str | None) -> tuple[int, str]:
        """Return the exit code that a Job's end calls for, and what to say of it.

        Args:
            stage: the Hub's word for the Job's state.
            message: the Hub's reason, where it gives one.
        """
        again = "Submit it again: it continues from the shards that are published."
        why = f" ({' '.join(message.split())[:200]})" if message else ""
        if stage == "COMPLETED":
            return 0, "the Job is done."
        if stage in ("CANCELED", "DELETED"):
            return 3, f"the Job was cancelled{why}. {again}"
        if self.exit_code == 2 and self.began:
            return 2, "the merge was refused in the Job; its log above says why."
        if self.exit_code == 1 and self.traceback:
            return 1, "the merge failed in the Job: a bug. Its log above has the traceback."
        if self.exit_code == 137:
            return 3, (
                f"the Job was killed, most likely for its memory{why}. Give a larger --flavor, or "
                f"a smaller --memory-budget. {again}"
            )
        if self.exit_code is not None and not self.began:
            return 3, f"the Job ended before the merge began; its log above says why{why}. {again}"
        if self.exit_code is None:
            return 3, (
                f"the Job was stopped{why}: its time was up, or its machine failed. {again} "
                "--timeout gives it more time."
            )
        return 3, f"the merge stopped in the Job; its log above says why{why}. {again}"


def _publication(asked: Request) -> Publication:
    if asked.publication is None:
        raise RecipeError("a Job publishes its result: give --push-to NAMESPACE/NAME.")
    return asked.publication


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
