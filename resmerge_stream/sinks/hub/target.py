"""What stands where a merge is to be published, and whether this account may publish it there.

Everything is asked before a tensor moves; nothing is changed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    get_session,
    hf_raise_for_status,
)
from huggingface_hub.utils._runtime import is_xet_available

from ...errors import Findings, Notice, Remedy, ResMergeError, StoppedError
from ...hub.account import rights_missing, seconds_left, whoami
from ...hub.client import client, patiently, status_of
from ...hub.repo import HubRepo, listed, sha256_of
from ...sources import REPO_ID
from ...units import format_size
from ..folder import REPORT
from ..provenance import Known, changed
from ..publication import Publication
from .afterwards import collection_problem, discussion_problem
from .staging import Staged, branch_name, is_branch_name, read_staged

# What every merge writes beside weights and side files.
CARD_FILES = (
    "README.md", REPORT, "resmerge/provenance.intoto.json", "resmerge/recipe.yml",
    "resmerge/gates.png",
)  # fmt: skip
# Beside them where mergekit could run the recipe.
MERGEKIT_CONFIG = "mergekit_config.yml"
# Of the account's own pull requests on the target.
_MOST_PULL_REQUESTS = 50
# What the Hub gives an account for private repositories (docs, 2026-08).
_PRIVATE_BYTES = {False: 100_000_000_000, True: 1_000_000_000_000}


@dataclass(slots=True)
class HubTarget:
    """A target as it was found.

    Attributes:
        repo: the repository, which may not exist.
        publication: what was asked for.
        info: its main branch, or None where the repository does not exist.
        account: the Hub's answer to who the caller is.
        finished: whether main, or an open pull request, holds the finished result of this very
            plan.
        pull_request: its number, where that is one.
        report: that result's report.
        staged: what an earlier run of this plan left.
        found: why it cannot be used, and what is to be known first.
    """

    repo: HubRepo
    publication: Publication
    info: ModelInfo | None = None
    account: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    pull_request: int | None = None
    report: dict[str, Any] = field(default_factory=dict)
    staged: Staged | None = None
    found: Findings = field(default_factory=Findings)

    @property
    def is_private(self) -> bool:
        """Whether nobody but the owners sees the repository now, or it does not exist."""
        return self.info is None or bool(self.info.private)

    @property
    def ends_public(self) -> bool:
        """Whether everybody will see it when the merge is published."""
        public = self.publication.public
        return not self.is_private if public is None else public

    @property
    def page(self) -> str:
        """Where people see the finished result."""
        if self.pull_request is not None:
            return f"{self.repo.page}/discussions/{self.pull_request}"
        commit = self.info.sha if self.info is not None else None
        return f"{self.repo.page}/commit/{commit or 'main'}"

    @property
    def bytes_staged(self) -> int:
        """Bytes of shards that need not be made again."""
        entries = self.staged.entries if self.staged is not None else {}
        return sum(int(entry["size"]) for entry in entries.values())


def staging_repo(target: HubTarget, plan_hash: str) -> HubRepo:
    """Return where shards are staged: in the target, or beside it when the target is public.

    A branch of a public repository would show everybody a half-made model. For a pull request it is
    a private repository of the account's own, which may not be allowed to write to the target.
    """
    if target.publication.create_pr:
        mine = pull_request_sibling(str(target.account.get("name")), target.repo.id, plan_hash)
        return HubRepo(target.repo.api, mine)
    if target.is_private:
        return target.repo
    return HubRepo(target.repo.api, sibling_id(target.repo.id, plan_hash))


def sibling_id(repo_id: str, plan_hash: str) -> str:
    """Return the name of the private repository beside a public target."""
    namespace, name = repo_id.split("/")
    return f"{namespace}/{name[:60]}-{branch_name(plan_hash)}"


def pull_request_sibling(account: str, repo_id: str, plan_hash: str) -> str:
    """Return the name of the account's private repository for a pull request on a target."""
    return sibling_id(f"{account}/{repo_id.replace('/', '-')}", plan_hash)


def look_at_target(publication: Publication, plan_hash: str, token: str | bool | None) -> HubTarget:
    """Ask the Hub about a target; what speaks against it is collected, not raised.

    Raises:
        StoppedError: the network or the Hub kept failing.
    """
    api = client(token)
    target = HubTarget(HubRepo(api, publication.repo_id), publication)
    try:
        target.account = whoami(api)
        writes_to = target.repo.id
        if publication.create_pr:
            writes_to = f"{target.account.get('name')}/staging"
        for text in rights_missing(target.account, writes_to):
            target.found.problem(text)
        if target.found.problems:
            return target
        target.info = target.repo.info()
        if publication.create_pr:
            _check_pull_requests(target, plan_hash)
        elif target.info is not None:
            _check_content(target, plan_hash)
        problems = []
        if publication.collection:
            problems.append(collection_problem(api, target.account, publication.collection))
        if publication.discuss and target.info is not None:
            problems.append(discussion_problem(target.repo))
        target.found.problems += filter(None, problems)
        if target.found.problems:
            return target
        if not target.finished or publication.update:  # then it may be an update that was stopped
            target.staged = read_staged(staging_repo(target, plan_hash), plan_hash)
    except StoppedError:
        raise  # the network, not the target
    except ResMergeError as exc:
        target.found.problems += exc.notices
    return target


def check_current(target: HubTarget, plan_hash: str, now: Sequence[Known]) -> None:
    """Refuse a finished result of sources that have changed, or have it made anew.

    Args:
        target: finished; it is not any more where it is to be replaced.
        plan_hash: of the plan.
        now: its sources.

    Raises:
        StoppedError: the network or the Hub kept failing.
    """
    others = changed(target.report, now)
    if not others:
        return
    if target.publication.update or target.publication.create_pr:
        target.finished, target.report, target.pull_request = False, {}, None
        if target.staged is None:
            target.staged = read_staged(staging_repo(target, plan_hash), plan_hash)
    else:
        target.found.problem(
            f"{target.repo.id} holds the result of {'; of '.join(others)}.", Remedy.REPLACE
        )


def _check_pull_requests(target: HubTarget, plan_hash: str) -> None:
    repo, info = target.repo, target.info
    if info is None:
        target.found.problem(
            f"there is no {repo.id} that you may see, so nothing to open a pull request on. Check "
            "the name.",
            Remedy.SIGN_IN_TO_SEE,
            kind="no-repository",
        )
    elif (problem := discussion_problem(repo)) is not None:
        target.found.problems.append(problem)
    elif (report := _finished_report(repo, info, plan_hash)) is not None:
        target.finished, target.report = True, report
    else:
        number, report = pull_request_of(target, plan_hash)
        if report is not None:
            target.finished, target.report, target.pull_request = True, report, number


def pull_request_of(
    target: HubTarget, plan_hash: str, identity: object = None
) -> tuple[int | None, dict[str, Any] | None]:
    """Return the account's open pull request that holds a plan's result, and its report; or none.

    Args:
        target: where it was opened.
        plan_hash: of the plan.
        identity: what the report says of the sources; None for any.

    Raises:
        ResMergeError: the network or the Hub kept failing.
    """
    repo, author = target.repo, str(target.account.get("name"))
    for number in repo.pull_requests(author, limit=_MOST_PULL_REQUESTS):
        info = repo.info(f"refs/pr/{number}")
        report = _finished_report(repo, info, plan_hash) if info is not None else None
        if report is not None and identity in (None, report.get("identity")):
            return number, report
    return None, None


def _check_content(target: HubTarget, plan_hash: str) -> None:
    info, repo, publication = target.info, target.repo, target.publication
    if info is None:
        return
    try:
        patiently(
            lambda: repo.api.auth_check(repo.id, write=True),
            what=f"get the right to write {repo.id}",
        )
    except ResMergeError as exc:
        if exc.__cause__ is None or status_of(exc.__cause__) != 403:
            raise
        target.found.problem(
            f"you may not write to {repo.id}",
            Remedy.ANOTHER_REPO,
            Remedy.PULL_REQUEST,
            Remedy.SIGN_IN_AGAIN,
        )
        return
    files = listed(info)
    report = _finished_report(repo, info, plan_hash)
    if report is not None:
        target.finished, target.report = True, report
        return
    others = [
        name for name in repo.branches() if is_branch_name(name) and name != branch_name(plan_hash)
    ]
    if others:
        target.found.problem(
            f"{repo.id} holds the unfinished shards of another merge (branch {others[0]}).",
            Remedy.FINISH_OTHER,
            Remedy.DISCARD_STAGING,
            Remedy.ANOTHER_REPO,
        )
    elif files and not publication.update:
        target.found.problem(
            f"{repo.id} exists and holds {len(files)} file(s) that this merge did not make; "
            "nothing is overwritten.",
            Remedy.ANOTHER_REPO,
            Remedy.REPLACE,
            Remedy.PULL_REQUEST,
        )


def finished_at(repo: HubRepo, plan_hash: str, report: Mapping[str, Any]) -> str | None:
    """Return main's commit where it holds the finished result of a plan, else None.

    Args:
        repo: the target.
        plan_hash: of the plan.
        report: of the result; that of the same merge of other sources is not meant.
    """
    info = repo.info()
    there = None if info is None else _finished_report(repo, info, plan_hash)
    if info is None or there is None or there.get("identity") != report.get("identity"):
        return None
    return info.sha


def _finished_report(repo: HubRepo, info: ModelInfo, plan_hash: str) -> dict[str, Any] | None:
    """Return the report of a plan's finished result; anybody may have written what is there."""
    report = repo.read_json(REPORT, info)
    if report is None or report.get("plan_hash") != plan_hash:
        return None
    told, files = report.get("files"), listed(info)
    if not isinstance(told, list) or not told:
        return None
    for file in told:
        name = file.get("name") if isinstance(file, dict) else None
        if not isinstance(name, str) or name not in files:
            return None
        if sha256_of(files[name]) != file.get("sha256"):
            return None
    return report if isinstance(report.get("summary"), dict) else None


def replaced_files(target: HubTarget, written: list[str]) -> tuple[list[str], list[str]]:
    """Return which files an update replaces, and which weight files it removes as stale.

    Args:
        target: as found.
        written: names of everything that the merge writes.
    """
    if target.info is None:
        return [], []
    there = listed(target.info)
    replaced = sorted(set(there) & set(written))
    stale = sorted(
        name
        for name in there
        if name not in written
        and "/" not in name
        and name.endswith((".safetensors", ".safetensors.index.json"))
    )
    return replaced, stale


def check_fit(
    target: HubTarget, write_bytes: int, largest: int, seconds: float, sharing: int = 1
) -> None:
    """Add what only a plan can tell: token's lifetime, storage, disk.

    Args:
        target: gets the problems and warnings.
        write_bytes: of all shards.
        largest: bytes of the largest shard.
        seconds: how long the merge may take.
        sharing: processes that share this machine's disk.
    """
    left = seconds_left(target.account)
    if left is not None and left < seconds:
        target.found.warning(
            f"the token expires in {left / 60:.0f} min and the merge may take "
            f"{seconds / 60:.0f} min. If it stops, it can be continued with a new login."
        )
    quota = _PRIVATE_BYTES[bool(target.account.get("isPro"))]
    if write_bytes > quota:
        target.found.warning(
            f"the output has {format_size(write_bytes)}; private storage of such an account is "
            f"about {format_size(quota)}."
        )
    max_disk = target.publication.max_disk
    if max_disk == 0 and not is_xet_available():
        target.found.problem(
            "shards can only be sent without a file through Xet, but hf_xet is not installed or is "
            "switched off (HF_HUB_DISABLE_XET). Install it.",
            Remedy.MORE_DISK,
        )
    elif max_disk == 0:
        creates_pr = target.publication.create_pr
        if target.info is not None and not has_xet(target.repo, create_pr=creates_pr):
            target.found.problems.append(no_xet(target.repo))
    elif max_disk is not None and max_disk < largest * sharing:
        each = "" if sharing == 1 else f" and each of {sharing} processes here writes one"
        target.found.problem(
            f"unsent shards may take {format_size(max_disk)} of disk, but the largest one has "
            f"{format_size(largest)}{each}.",
            Remedy.SMALLER_SHARDS,
            Remedy.NO_DISK,
        )


def has_xet(repo: HubRepo, *, create_pr: bool = False) -> bool:
    """Whether a repository's Hub takes uploads through Xet, for a pull request or a branch."""

    def ask() -> bool:
        url = f"{repo.api.endpoint}/api/models/{repo.id}/xet-write-token/main"
        url += "?create_pr=1" if create_pr else ""
        response = get_session().get(url, headers=repo.api._build_hf_headers(), timeout=60)
        if response.status_code == 404:
            return False
        hf_raise_for_status(response)
        return True

    return patiently(ask, what=f"ask for Xet storage in {repo.id}")


def no_xet(repo: HubRepo) -> Notice:
    """Return why nothing can be streamed into a repository."""
    return Notice(
        "shards can only be sent without a file to Xet storage, which the Hub of "
        f"{repo.id} does not offer.",
        Remedy.MORE_DISK,
    )


def card_problem(target: HubTarget, sources: Sequence[tuple[str, str | None]]) -> str:
    """Return what the Hub has against the metadata of the card to come, or an empty string.

    Args:
        target: whose Hub is asked.
        sources: id and licence of each.
    """
    from huggingface_hub import ModelCardData

    licences = {licence for _, licence in sources if licence}
    data = ModelCardData(
        base_model=[name for name, _ in sources if REPO_ID.fullmatch(name)],
        base_model_relation="merge",
        tags=["merge"],
        license=licences.pop() if len(licences) == 1 else "other",
    )
    api = target.repo.api

    def ask() -> str:
        response = get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json={"content": f"---\n{data.to_yaml()}\n---\n", "repoType": "model"},
            headers=api._build_hf_headers(),
            timeout=60,
        )
        if response.status_code != 400:
            hf_raise_for_status(response)
            return ""
        said = "; ".join(str(e.get("message"))[:200] for e in response.json().get("errors") or [])
        return f"the Hub refuses the model card's metadata: {said or 'no reason given'}."

    return patiently(ask, what="have the card's metadata checked")
