"""Check a repository on the Hub against its report, without downloading it."""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import VerificationError, listed
from ..planning.recipe_file import parse_recipe
from ..recipe import ModelRef, Recipe
from ..report.schema import parse_report
from ..report.statement import STATEMENT
from ..sinks.folder import REPORT
from ..sources import REPO_ID, Checkpoint, open_checkpoint
from .verify import (
    RECIPE,
    Check,
    check_finite,
    check_layout,
    check_sample,
    check_statement,
    verify_folder,
)


def verify_merge(
    merged: str | Path,
    *,
    recipe: Recipe | None = None,
    sample: int = 3,
    seed: int | None = None,
    token: str | None = None,
) -> Iterator[Check]:
    """Check a merged folder, or a repository on the Hub; see `verify_folder`, `verify_repo`.

    A name that exists as a folder is a folder.
    """
    is_folder = Path(os.path.expanduser(merged)).is_dir()
    if is_folder or not REPO_ID.fullmatch(str(merged).partition("@")[0]):
        return verify_folder(merged, recipe=recipe, sample=sample, seed=seed or 0)
    return verify_repo(str(merged), recipe=recipe, sample=sample, seed=seed, token=token)


def verify_repo(
    name: str,
    *,
    recipe: Recipe | None = None,
    sample: int = 3,
    seed: int | None = None,
    token: str | None = None,
) -> Iterator[Check]:
    """Check a repository against its report without downloading it: headers, hashes, a sample.

    Args:
        name: ``namespace/name``, perhaps with ``@revision``.
        recipe: names the sources; the repository's own recipe when None.
        sample: how many tensors to read again by range, and to merge again where possible.
        seed: of the sample; drawn anew when None.
        token: the caller's; None stands for HF_TOKEN or the login.

    Raises:
        VerificationError: there is no report to check against.
        CheckpointError: the weights cannot be read at all.
        StoppedError: the network or the Hub kept failing.
    """
    from ..hub.client import client
    from ..hub.repo import HubRepo
    from ..hub.repo import listed as files_of

    ref = ModelRef.parse(name)
    merged = open_checkpoint(ref, token=token)
    repo = HubRepo(client(token), ref.id)
    info = repo.info(merged.revision or "main")
    if info is None or repo.read_json(REPORT, info) is None:
        raise VerificationError(
            f"{name} has no {REPORT}, so there is nothing to verify against. Give the repository "
            "of a merge."
        )
    report = parse_report(repo.read(REPORT, info), where=f"{name}/{REPORT}")
    seed = random.randrange(1 << 30) if seed is None else seed
    names = random.Random(seed).sample(sorted(merged.tensors), min(sample, len(merged.tensors)))
    yield check_layout(merged, report)
    yield _check_hub_files(merged, report)
    yield check_finite(merged, report, names)
    found = recipe or parse_recipe(repo.read(RECIPE, info), where=f"{name}/{RECIPE}")
    yield check_sample(merged, report, found, sample, seed, token)
    if STATEMENT in files_of(info):
        yield check_statement(repo.read(STATEMENT, info), report)


def _check_hub_files(merged: Checkpoint, report: Mapping[str, Any]) -> Check:
    """Compare what the Hub says of the weight files with the report."""
    there = {file.name: file for file in merged.files}
    problems = []
    for file in report["files"]:
        found = there.get(str(file["name"]))
        if found is None:
            problems.append(f"{file['name']} is missing")
        elif found.size != file["size"]:
            problems.append(f"{found.name} has {found.size} bytes, not {file['size']}")
        elif found.sha256 != file["sha256"]:
            problems.append(f"{found.name} has another sha256 than the report")
    if extra := sorted(set(there) - {str(file["name"]) for file in report["files"]}):
        problems.append(f"not in the report: {listed(extra)}")
    return Check("files", tuple(problems), f"{len(there)} weight files: sizes and hashes")
