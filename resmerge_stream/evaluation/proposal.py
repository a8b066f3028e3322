"""An evaluation of a published merge, as a pull request on its repository."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResultEntry,
    ModelInfo,
    eval_result_entries_to_yaml,
)

from ..errors import CheckpointNotFoundError, RecipeError, shown
from ..hub.client import client, patiently
from ..hub.repo import HubRepo, listed
from .card import CARD_FILES, with_evaluation

_RESULTS = ".eval_results/resmerge-stream.yaml"


def propose(
    repo_id: str,
    document: Mapping[str, Any],
    datasets: Mapping[str, str],
    *,
    name: str,
    token: str | bool | None = None,
) -> str:
    """Open a pull request that puts an evaluation into a merge's card, and return its address.

    One that says the same and is still open is not opened again.

    Args:
        repo_id: of the merge, ``namespace/name``.
        document: from `evaluation`.
        datasets: by task the id of the dataset on the Hub that it asks from, where there is one:
            those results go into ``.eval_results/`` as well, where the Hub reads them.
        name: of the merge in the evaluation.
        token: as for the Hub's client.

    Raises:
        CheckpointNotFoundError: there is no such repository.
        RecipeError: it has no card and report of a merge.
        StoppedError: the network or the Hub kept failing.
    """
    repo, info = merge_at(repo_id, token)
    stored = {file: repo.read(file, info) for file in CARD_FILES}
    files = with_evaluation(stored, name, document, title=repo_id.rpartition("/")[2])
    entries = [
        EvalResultEntry(datasets[task], task, round(share["accuracy"], 4))
        for task, share in document["models"][name].items()
        if task in datasets
    ]
    if entries:
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        files[_RESULTS] = text.encode()
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]
    title = f"Evaluation by ResMerge Stream ({digest})"
    opened = patiently(
        lambda: list(
            repo.api.get_repo_discussions(
                repo.id, discussion_type="pull_request", discussion_status="open"
            )
        ),
        what=f"list the pull requests of {repo.id}",
    )
    for one in opened:
        if one.title == title:
            return one.url
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    made = patiently(
        lambda: repo.api.create_commit(repo.id, operations, commit_message=title, create_pr=True),
        what=f"open a pull request on {repo.id}",
    )
    return str(made.pr_url)


def merge_at(repo_id: str, token: str | bool | None = None) -> tuple[HubRepo, ModelInfo]:
    """Return a merge's repository, and what stands at its main.

    Raises:
        CheckpointNotFoundError: there is no such repository.
        RecipeError: it has no card and report of a merge.
        StoppedError: the network or the Hub kept failing.
    """
    repo = HubRepo(client(token), repo_id)
    info = repo.info()
    if info is None:
        raise CheckpointNotFoundError(f"there is no model {shown(repo_id)} on the Hub.")
    if not set(CARD_FILES) <= set(listed(info)):
        raise RecipeError(f"{repo_id} has no {' and '.join(CARD_FILES)} of a merge.")
    return repo, info
