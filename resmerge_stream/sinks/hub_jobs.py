"""Jobs on the Hub: its machines, the files a Job is given, starting, finding and following one.

The token travels as the Job's secret, in the body of one request, and nowhere else.
"""

import time
from collections.abc import Iterator, Mapping

from huggingface_hub import CommitOperationAdd, JobInfo, Volume, get_token
from huggingface_hub.hf_api import HfApi

from ..errors import JobRefusedError, PublishError, ResMergeError
from ..flavors import FLAVORS, Flavor, flavor_from_text
from ..sources.hub_client import (
    FAILURES,
    TRIES,
    explain,
    is_transient,
    patiently,
    plain,
    status_of,
    wait_seconds,
)

# The image of huggingface_hub's own uv Jobs: Debian, Python 3.12, uv.
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
# A small private repository that the first submit makes: wheels and recipes of Jobs.
FILES_REPO = "resmerge-stream-jobs"
SECRET = "HF_TOKEN"
ENDED = frozenset({"COMPLETED", "CANCELED", "ERROR", "DELETED"})
_ALIVE = ("RUNNING", "SCHEDULING")
_POLL_SECONDS = 2.0
_HUB = "https://huggingface.co"


def live_flavors(api: HfApi) -> tuple[Flavor, ...]:
    """Return the machines that the Hub lists now, or the table where it does not answer."""
    try:
        listed = patiently(api.list_jobs_hardware, what="list the Hub's machines", tries=2)
        found = [
            flavor_from_text(
                item.name,
                cpu=item.cpu,
                ram=item.ram,
                disk=item.ephemeral_storage,
                gpu=item.accelerator.vram if item.accelerator else "",
                usd=item.unit_cost_usd,
                unit=item.unit_label,
            )
            for item in listed
        ]
    except (ResMergeError, KeyError, TypeError):  # no answer, or one of another form
        return FLAVORS
    return tuple(flavor for flavor in found if flavor is not None) or FLAVORS


def upload_files(
    api: HfApi, namespace: str, contents: Mapping[str, bytes], *, mount: str
) -> Volume:
    """Put a Job's files where it can mount them, and return the mount, pinned to a commit.

    Args:
        api: with the caller's token.
        namespace: whose repository it is, made where there is none.
        contents: path → content; what is there already is not sent again.
        mount: where the Job is to see them.

    Raises:
        PublishError: the repository can be seen by everybody.
        StoppedError: the network or the Hub kept failing.
    """
    repo_id = f"{namespace}/{FILES_REPO}"
    patiently(
        lambda: api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True),
        what=f"create {repo_id} for the Job's files",
    )
    info = patiently(lambda: api.dataset_info(repo_id), what=f"look at {repo_id}")
    if not info.private:
        raise PublishError(
            f"{repo_id} is public, and a recipe may name private models. Make it private "
            f"({api.endpoint}/datasets/{repo_id}/settings), then run this again."
        )
    there = {file.rfilename for file in info.siblings or ()}
    commit, missing = str(info.sha), sorted(set(contents) - there)
    if missing:
        done = patiently(
            lambda: api.create_commit(
                repo_id,
                [CommitOperationAdd(path, contents[path]) for path in missing],
                commit_message="Files of a Job of ResMerge Stream",
                repo_type="dataset",
            ),
            what=f"send the Job's files to {repo_id}",
        )
        commit = str(done.oid)
    return Volume(type="dataset", source=repo_id, mount_path=mount, revision=commit, read_only=True)


def find_job(api: HfApi, namespace: str, labels: Mapping[str, str]) -> JobInfo | None:
    """Return the newest Job with these labels that runs or waits, or None.

    Raises:
        JobRefusedError: the token may not see Jobs.
        StoppedError: the network or the Hub kept failing.
    """
    try:
        jobs = patiently(
            lambda: list(
                api.list_jobs(status=list(_ALIVE), labels=dict(labels), namespace=namespace)
            ),
            what=f"list the Jobs of {namespace}",
        )
    except ResMergeError as exc:
        raise _refused(exc, namespace) or exc from exc
    wanted = set(labels.items())
    alive = [
        job
        for job in jobs
        if job.status.stage in _ALIVE and wanted <= set((job.labels or {}).items())
    ]
    return max(alive, key=lambda job: str(job.created_at), default=None)


def start_job(
    api: HfApi,
    namespace: str,
    *,
    command: list[str],
    labels: Mapping[str, str],
    flavor: str,
    timeout: int,
    volume: Volume,
) -> JobInfo:
    """Start a Job, once: an answer that was lost is looked for before it is asked again.

    Args:
        api: with the caller's token.
        namespace: who pays.
        command: what to run.
        labels: tell the Job from others.
        flavor: of its machine.
        timeout: seconds after which it is ended.
        volume: the Job's files.

    Raises:
        JobRefusedError: no credit, no right to run Jobs, or not such a Job.
        StoppedError: the network or the Hub kept failing.
    """
    token = api.token if isinstance(api.token, str) else get_token()
    environment = {"PYTHONUNBUFFERED": "1"}
    if api.endpoint.rstrip("/") != _HUB:
        environment["HF_ENDPOINT"] = api.endpoint
    for number in range(1, TRIES + 1):
        try:
            return api.run_job(
                image=IMAGE,
                command=command,
                env=environment,
                secrets={SECRET: token},
                flavor=flavor,
                timeout=timeout,
                labels=dict(labels),
                volumes=[volume],
                namespace=namespace,
            )
        except FAILURES as exc:
            failure = explain(exc, f"start a Job for {namespace}")
            if refused := _refused(exc, namespace):
                raise refused from exc
            if number == TRIES or not is_transient(exc):
                raise failure from exc
            time.sleep(wait_seconds(number, exc))
        if job := find_job(api, namespace, labels):
            return job
    raise AssertionError("unreachable")


def inspect_job(api: HfApi, namespace: str, job_id: str) -> JobInfo:
    """Return a Job as it is now.

    Raises:
        JobRefusedError: there is no such Job, or the token may not see it.
        StoppedError: the network or the Hub kept failing.
    """
    try:
        return patiently(
            lambda: api.inspect_job(job_id=job_id, namespace=namespace),
            what=f"look at the Job {namespace}/{job_id}",
        )
    except ResMergeError as exc:
        raise _refused(exc, namespace) or exc from exc


def follow_job(api: HfApi, job: JobInfo) -> Iterator[str]:
    """Yield a Job's log from its beginning, line by line, until the Job has ended.

    Raises:
        JobRefusedError: the token may not see it.
        StoppedError: the network or the Hub kept failing; the Job goes on.
    """
    namespace = job.owner.name
    while job.status.stage == "SCHEDULING":
        time.sleep(_POLL_SECONDS)
        job = inspect_job(api, namespace, job.id)
    try:
        yield from api.fetch_job_logs(job_id=job.id, namespace=namespace, follow=True)
    except FAILURES as exc:
        failure = explain(exc, f"read the log of the Job {namespace}/{job.id}")
        raise _refused(exc, namespace) or failure from exc


def ended_job(api: HfApi, job: JobInfo) -> JobInfo:
    """Return a Job when it has ended; the Hub may say so a little after its log has ended."""
    while True:
        job = inspect_job(api, job.owner.name, job.id)
        if job.status.stage in ENDED:
            return job
        time.sleep(_POLL_SECONDS)


def _refused(exc: BaseException, namespace: str) -> JobRefusedError | None:
    """Return a refusal in clear words; None where the failure is another."""
    status, cause = status_of(exc), exc.__cause__ or exc
    said = getattr(exc, "server_message", None) or getattr(cause, "server_message", None) or ""
    said = plain(" ".join(str(said).split()))[:300]
    reason = f" The Hub says: {said}" if said else ""
    if status == 402:
        return JobRefusedError(
            f"{namespace!r} has no credit for Jobs: add some at {_HUB}/settings/billing, or merge "
            f"with 'merge' on a machine of your own. Nothing was started.{reason}"
        )
    if status in (401, 403):
        return JobRefusedError(
            f"the token may not run or see Jobs of {namespace!r}. Make one with the permission to "
            f"start and manage Jobs ({_HUB}/settings/tokens).{reason}"
        )
    if status == 404:
        return JobRefusedError(f"{namespace!r} has no such Job.{reason}")
    if status in (400, 409, 413, 422):
        return JobRefusedError(f"the Hub does not take this Job.{reason}")
    return None
