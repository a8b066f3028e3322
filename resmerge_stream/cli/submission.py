"""A merge as a Job: its command, its labels, how it ended by its log; and the line that submits it.

No network, and no token: a Job gets that as a secret, beside its command.
"""

import hashlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanRefusedError, RecipeError, listed
from ..hub.flavors import Flavor
from ..planning.options import Options
from ..planning.planned import Plan
from ..recipe import Recipe
from ..sinks.publication import Publication
from ..units import dollars
from .wheel import WHEEL_NAME, build_wheel

# Where the Job finds the files that `job_files` names.
MOUNT = "/resmerge"
# Reports how the merge ended, whoever ends the log; "$@" keeps every argument as it is.
_WRAPPER = '"$@"; code=$?; echo "resmerge-stream job: exit code $code"; exit $code'
_EXIT = re.compile(r"resmerge-stream job: exit code (\d+)")
_NOT_IN_LABELS = re.compile(r"[^A-Za-z0-9_-]+")


def refuse_folders(recipe: Recipe, options: Options) -> None:
    """Refuse sources on this machine: a Job cannot see them.

    Raises:
        PlanRefusedError: a source is a folder here.
    """
    names = [ref.id for ref in recipe.models]
    names += [options.tokenizer_from] if options.tokenizer_from else []
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


def job_command(plan: Plan, files: JobFiles, flavor: Flavor) -> list[str]:
    """Return what a Job runs: the package installed by uv, and the same merge.

    torch comes without CUDA where there is no GPU: a tenth of the download.
    """
    publication = _publication(plan)
    merge = ["resmerge-stream", "merge", files.recipe, *_options(plan.options, publication)]
    return [
        *("sh", "-c", _WRAPPER, "sh"),
        *("uv", "tool", "run", "--python", "3.12"),
        *("--torch-backend", "auto" if flavor.gpu_gb else "cpu"),
        *("--from", files.wheel),
        *merge,
    ]


def job_labels(plan: Plan) -> dict[str, str]:
    """Return what tells this merge's Jobs from others: the plan and the target."""
    target = _publication(plan).repo_id
    return {
        "name": f"resmerge-{_NOT_IN_LABELS.sub('-', target.partition('/')[2])}"[:100],
        "resmerge-plan": plan.plan_hash,
        "resmerge-target": _digest(target.encode()),
    }


def submit_command(
    recipe: Recipe | str | Path,
    push_to: str,
    flavor: str | None = None,
    *,
    options: Options | None = None,
    public: bool = False,
    price: float | None = None,
) -> str:
    """Return the command line that submits a merge, ready to copy into a shell.

    Args:
        recipe: what to merge, or the name of a recipe file. A recipe with a weight for each model
            cannot be said in options: then the line names ``recipe.yml``, which is to be saved.
        push_to: the target, ``namespace/name``.
        flavor: the machine; None lets the command choose.
        options: how to merge.
        public: whether the model is to be public.
        price: estimated dollars, added as a comment.
    """
    words = ["resmerge-stream", "submit"]
    if not isinstance(recipe, Recipe):
        words.append(str(recipe))
    elif any(expert.weight is not None for expert in recipe.experts):
        words.append("recipe.yml")
    else:
        words += ["--base", str(recipe.base)] if recipe.base is not None else []
        for expert in recipe.experts:
            words += ["--expert", str(expert)]
        words += ["--method", recipe.method]
        for key, value in recipe.parameters.items():
            words += ["--set", f"{key}={value}"]
        words += ["--dtype", recipe.dtype] if recipe.dtype else []
    publication = Publication(repo_id=push_to, public=True if public else None)
    words += _options(options or Options(), publication)
    words += ["--flavor", flavor] if flavor else []
    return shlex.join(words) + (f"  # about {dollars(price)}" if price is not None else "")


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


def _publication(plan: Plan) -> Publication:
    if plan.publication is None:
        raise RecipeError("a Job publishes its result: give --push-to NAMESPACE/NAME.")
    return plan.publication


def _options(options: Options, publication: Publication) -> list[str]:
    """Return the command-line options that stand for these, without those at their defaults."""
    words = ["--push-to", publication.repo_id]
    if publication.public is not None:
        words.append("--public" if publication.public else "--private")
    words += ["--update"] if publication.update else []
    valued = {
        "--max-disk": publication.max_disk,
        "--rounding": options.rounding if options.rounding != "nearest" else None,
        "--seed": options.seed or None,
        "--max-shard-size": options.max_shard_bytes,
        "--tokenizer-from": options.tokenizer_from,
        "--device": options.device if options.device != "auto" else None,
        "--memory-budget": options.memory_budget,
    }
    for name, value in valued.items():
        words += [name, str(value)] if value is not None else []
    return words


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
