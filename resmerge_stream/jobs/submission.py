"""What a Job is given: files, command and labels.

No network, and no token: a Job gets that as a secret, beside its command.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import PlanRefusedError, RecipeError, Remedy, listed
from ..hub.flavors import Flavor
from ..planning.planned import Plan
from ..planning.request import Request
from ..sinks.publication import Publication
from .wheel import WHEEL_NAME, build_wheel

# Where the Job finds its files.
MOUNT = "/resmerge"
# Reports how it ended, whoever ends the log; "$@" keeps every argument as it is.
_WRAPPER = '"$@"{then}; code=$?; echo "resmerge-stream job: exit code $code"; exit $code'
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


def _publication(asked: Request) -> Publication:
    if asked.publication is None:
        raise RecipeError("a Job publishes its result.", Remedy.GIVE_TARGET)
    return asked.publication


def digest(data: bytes) -> str:
    """Return what names a content among a Job's files and labels."""
    return hashlib.sha256(data).hexdigest()[:16]
