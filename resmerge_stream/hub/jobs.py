"""Jobs on the Hub: its machines, the files a Job is given, starting, finding and following one.

The token travels as the Job's secret, in the body of one request, and nowhere else.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, Volume, get_token
from huggingface_hub import JobInfo as JobInfo
from huggingface_hub.hf_api import HfApi

from ..errors import JobRefusedError, PublishError, ResMergeError
from .account import whoami
from .client import (
    FAILURES,
    client,
    explain,
    is_transient,
    patiently,
    plain,
    status_of,
    wait_seconds,
)
from .flavors import FLAVORS, Flavor, flavor_from_text

T = TypeVar("T")
# The image of huggingface_hub's own uv Jobs: Debian, Python 3.12, uv.
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
# A small private repository that the first submit makes: wheels and recipes of Jobs.
FILES_REPO = "resmerge-stream-jobs"
SECRET = "HF_TOKEN"
_ALIVE = ("RUNNING", "SCHEDULING")
_ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
_POLL_SECONDS = 2.0
_TRIES = 6
_HUB = "https://huggingface.co"


class HubJobs:
    """The Jobs of one namespace, which pays for them.

    Args:
        token: the caller's; None stands for HF_TOKEN or the Hub's login.
        namespace: whose Jobs; None stands for the token's owner.

    Raises:
        PublishError: there is no token, or the Hub does not accept it.
    """

    def __init__(self, token: str | bool | None = None, namespace: str | None = None) -> None:
        self.api: HfApi = client(token)
        self.namespace = namespace or str(whoami(self.api)["name"])

    def page(self, job_id: str) -> str:
        """Return a Job's address for people."""
        return f"{self.api.endpoint}/jobs/{self.namespace}/{job_id}"

    def flavors(self) -> tuple[Flavor, ...]:
        """Return the machines that the Hub lists now, or the table where it does not answer."""
        try:
            listed = patiently(self.api.list_jobs_hardware, what="list the machines", tries=2)
            found = [
                flavor_from_text(
                    item.name,
                    cpu=item.cpu,
                    ram=item.ram,
                    disk=item.ephemeral_storage,
                    gpu=item.accelerator.vram if item.accelerator else "",
                    usd=item.unit_cost_usd,
                    unit=item.unit_label,
                    gpus=str(item.accelerator.quantity) if item.accelerator else "1",
                )
                for item in listed
            ]
        except (ResMergeError, AttributeError, KeyError, TypeError):  # no answer, or another form
            return FLAVORS
        return tuple(flavor for flavor in found if flavor is not None) or FLAVORS

    def upload(self, contents: Mapping[str, bytes], *, mount: str) -> Volume:
        """Put a Job's files where it can mount them, and return the mount, pinned to a commit.

        Args:
            contents: path → content; what is there already is not sent again.
            mount: where the Job is to see them.

        Raises:
            PublishError: the repository can be seen by everybody.
            StoppedError: the network or the Hub kept failing.
        """
        repo_id = f"{self.namespace}/{FILES_REPO}"
        patiently(
            lambda: self.api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True),
            what=f"create {repo_id} for the Job's files",
        )
        info = patiently(lambda: self.api.dataset_info(repo_id), what=f"look at {repo_id}")
        if not info.private:
            raise PublishError(
                f"{repo_id} is public, and a recipe may name private models. Make it private "
                f"({self.api.endpoint}/datasets/{repo_id}/settings), then try again."
            )
        there = {file.rfilename for file in info.siblings or ()}
        commit, missing = str(info.sha), sorted(set(contents) - there)
        if missing:
            done = patiently(
                lambda: self.api.create_commit(
                    repo_id,
                    [CommitOperationAdd(path, contents[path]) for path in missing],
                    commit_message="Files of a Job of ResMerge Stream",
                    repo_type="dataset",
                ),
                what=f"send the Job's files to {repo_id}",
            )
            commit = str(done.oid)
        return Volume(
            type="dataset", source=repo_id, mount_path=mount, revision=commit, read_only=True
        )

    def find(self, labels: Mapping[str, str]) -> str | None:
        """Return the id of the newest Job with these labels that runs or waits, or None.

        Raises:
            JobRefusedError: the token may not see Jobs.
            StoppedError: the network or the Hub kept failing.
        """
        newest = max(self.alive(labels), key=lambda job: str(job.created_at), default=None)
        return newest.id if newest is not None else None

    def alive(self, labels: Mapping[str, str]) -> list[JobInfo]:
        """Return the Jobs with these labels that run or wait.

        Raises:
            JobRefusedError: the token may not see Jobs.
            StoppedError: the network or the Hub kept failing.
        """
        jobs = self._ask(
            lambda: list(
                self.api.list_jobs(
                    status=list(_ALIVE), labels=dict(labels), namespace=self.namespace
                )
            ),
            what=f"list the Jobs of {self.namespace}",
        )
        wanted = set(labels.items())
        return [
            job
            for job in jobs
            if job.status.stage in _ALIVE and wanted <= set((job.labels or {}).items())
        ]

    def cancel(self, job_ids: Iterable[str]) -> list[str]:
        """Cancel Jobs, and return those that may still run, as it could not be done."""
        left = []
        for job_id in job_ids:
            try:
                self._ask(
                    lambda job_id=job_id: self.api.cancel_job(  # type: ignore[misc]
                        job_id=job_id, namespace=self.namespace
                    ),
                    what=f"cancel the Job {self.namespace}/{job_id}",
                )
            except ResMergeError:
                left.append(job_id)
        return left

    def start(
        self,
        command: Sequence[str],
        *,
        labels: Mapping[str, str],
        flavor: str,
        timeout: int,
        volume: Volume,
        attempts: int = 1,
        network: tuple[str, str] | None = None,
    ) -> str:
        """Start a Job and return its id.

        An answer that was lost is looked for before the Job is asked for again: it costs money.

        Args:
            command: what to run.
            labels: tell the Job from others.
            flavor: its machine.
            timeout: seconds after which it is ended.
            volume: its files.
            attempts: how often the Hub starts it in all, where it fails.
            network: the group in which Jobs reach each other, and the alias of this one.

        Raises:
            JobRefusedError: no credit, no right to run Jobs, or not such a Job.
            StoppedError: the network or the Hub kept failing.
        """
        token = self.api.token if isinstance(self.api.token, str) else get_token()
        environment = {"PYTHONUNBUFFERED": "1"}
        if self.api.endpoint.rstrip("/") != _HUB:
            environment["HF_ENDPOINT"] = self.api.endpoint
        for number in range(1, _TRIES + 1):
            try:
                job = self.api.run_job(
                    image=IMAGE,
                    command=list(command),
                    env=environment,
                    secrets={SECRET: token},
                    flavor=flavor,
                    timeout=timeout,
                    labels=dict(labels),
                    volumes=[volume],
                    attempts=attempts if attempts > 1 else None,
                    network_group=network[0] if network else None,
                    network_aliases=[network[1]] if network else None,
                    namespace=self.namespace,
                )
            except FAILURES as exc:
                if refused := self._refused(exc):
                    raise refused from exc
                if number == _TRIES or not is_transient(exc):
                    raise explain(exc, f"start a Job for {self.namespace}") from exc
                time.sleep(wait_seconds(number, exc))
            else:
                return job.id
            if found := self.find(labels):
                return found
        raise AssertionError("unreachable")

    def log(self, job_id: str) -> Iterator[str]:
        """Yield a Job's log from its beginning, line by line, until the Job has ended.

        Raises:
            JobRefusedError: there is no such Job, or the token may not see it.
            StoppedError: the network or the Hub kept failing; the Job goes on.
        """
        while self.inspect(job_id).status.stage == "SCHEDULING":
            time.sleep(_POLL_SECONDS)
        yield from self._lines(job_id, follow=True)

    def rest(self, job_id: str, seen: int) -> Iterator[str]:
        """Yield the lines of an ended Job's log after the first `seen` ones.

        The library's stream ends without them when the Job ended while it was out of touch.

        Raises:
            JobRefusedError, StoppedError: as for `log`.
        """
        yield from itertools.islice(self._lines(job_id, follow=False), seen, None)

    def _lines(self, job_id: str, *, follow: bool) -> Iterator[str]:
        try:
            yield from self.api.fetch_job_logs(
                job_id=job_id, namespace=self.namespace, follow=follow
            )
        except FAILURES as exc:
            failure = explain(exc, f"read the log of the Job {self.namespace}/{job_id}")
            raise self._refused(exc) or failure from exc

    def ending(self, job_id: str) -> JobInfo:
        """Return what the Hub says of a Job, once it has ended.

        The Hub may say that a little after the end of the log.
        """
        while (job := self.inspect(job_id)).status.stage not in _ENDED:
            time.sleep(_POLL_SECONDS)
        return job

    def inspect(self, job_id: str) -> JobInfo:
        """Return what the Hub says of a Job now.

        Raises:
            JobRefusedError: there is no such Job, or the token may not see it.
            StoppedError: the network or the Hub kept failing.
        """
        return self._ask(
            lambda: self.api.inspect_job(job_id=job_id, namespace=self.namespace),
            what=f"look at the Job {self.namespace}/{job_id}",
        )

    def _ask(self, call: Callable[[], T], *, what: str) -> T:
        try:
            return patiently(call, what=what)
        except ResMergeError as exc:
            if refused := self._refused(exc):
                raise refused from exc
            raise

    def _refused(self, exc: BaseException) -> JobRefusedError | None:
        """Return a refusal in clear words; None where the failure is another."""
        status, cause = status_of(exc), exc.__cause__ or exc
        said = getattr(exc, "server_message", None) or getattr(cause, "server_message", None) or ""
        said = plain(" ".join(str(said).split()))[:300]
        reason = f" The Hub says: {said}" if said else ""
        if status == 402:
            return JobRefusedError(
                f"{self.namespace!r} has no credit for Jobs: add some at {_HUB}/settings/billing, "
                f"or merge with 'merge' on a machine of your own.{reason}"
            )
        if status in (401, 403):
            return JobRefusedError(
                f"the token may not run or see Jobs of {self.namespace!r}. Make one with the "
                f"permission to start and manage Jobs ({_HUB}/settings/tokens).{reason}"
            )
        if status == 404:
            return JobRefusedError(f"{self.namespace!r} has no such Job.{reason}")
        if status in (400, 413, 422):
            return JobRefusedError(f"the Hub does not take this Job.{reason}")
        return None
