"""What pages and endpoints have in common: plans, jobs and reports, and whose they are."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from resmerge_stream.errors import PublishError, RecipeError, Remedy, ResMergeError, system_errors
from resmerge_stream.planning.planned import refused_plan
from resmerge_stream.planning.request import Request
from resmerge_stream.recipe import Recipe

from .asked import needs_account, web_recipe, web_request
from .asking import ask_as_job
from .examples import is_built_in
from .explore import STRANGERS_BYTES, Opened, opened, report_in
from .identity import Visitor, Visitors
from .jobs.downloads import Downloads
from .jobs.jobs import Jobs
from .jobs.planning import Planners
from .jobs.records import JOB_ID, Job
from .questions import check_comparison, check_questions
from .remedies import plan_said
from .search import Search
from .settings import Settings

NO_JOB = "there is no such job of yours."


@dataclass(slots=True)
class Service:
    """The Space behind its pages and endpoints.

    Attributes:
        settings: limits and the folder.
        jobs: all merges.
        visitors: looks up accounts.
        search: suggests ids.
        planners: make plans, and read what strangers wrote.
        downloads: the files of finished jobs.
    """

    settings: Settings
    jobs: Jobs
    visitors: Visitors
    search: Search
    planners: Planners
    downloads: Downloads = field(init=False)

    def __post_init__(self) -> None:
        self.downloads = Downloads(self.jobs)

    @classmethod
    def of(cls, settings: Settings) -> "Service":
        """Return the service of some settings; it reads the records of earlier jobs."""
        return cls(settings, Jobs(settings), Visitors(), Search(), Planners(settings))

    def close(self) -> None:
        """Stop the merges, and the processes that plan."""
        self.planners.close()
        self.jobs.close()

    def plan(
        self, document: Mapping[str, Any], visitor: Visitor, address: str = ""
    ) -> dict[str, Any]:
        """Return the plan of what a mapping asks for; a wrong recipe is a refused plan."""
        try:
            with system_errors():
                asked = web_request(document, self.settings)
                return self._as_here(self.planners.plan(asked, visitor, address))
        except ResMergeError as exc:
            refused = plan_said(refused_plan(*exc.notices))
            return {**refused, "hardware": [], "target_checked": False}

    def advice(
        self, document: Mapping[str, Any], visitor: Visitor, address: str = ""
    ) -> dict[str, Any]:
        """Return which methods to compare, as `Advice.to_dict`, for built-in models; else nothing.

        Others' weights are gigabytes, which a plan doesn't read.

        Raises:
            ResMergeError: as `plan_merge`.
        """
        asked = web_request(document, self.settings)
        if not is_built_in(asked.recipe):
            return {}
        return self.planners.advice(asked, visitor, address)

    def _as_here(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Return a plan with the time that finished merges here make likely."""
        seconds = self.jobs.expected_seconds(float(plan["seconds_estimate"]))
        if plan["refused"] or seconds is None:
            return plan
        hardware = list(plan["hardware"])
        hardware[:1] = [replace(fit, seconds=seconds) for fit in hardware[:1]]
        return {**plan, "seconds_estimate": round(seconds, 1), "hardware": hardware}

    def check(
        self, asked: Request, visitor: Visitor, address: str = "", questions: str = ""
    ) -> None:
        """Refuse what `submit` would not queue for this visitor now; the plan's verdict too.

        Args:
            asked: what to merge.
            visitor: who asks; only the built-in example goes without an account.
            address: where somebody without an account comes from.
            questions: that base, experts and merge are asked afterwards.

        Raises:
            PublishError: an account is needed.
            RecipeError: nowhere to publish, too many jobs, or a question is wrong.
        """
        check_questions(questions, asked)
        if needs_account(asked) and not visitor.name:
            raise PublishError(
                "only the built-in example is merged without an account.", Remedy.SIGN_IN
            )
        if needs_account(asked) and not asked.publication:
            raise RecipeError(
                "a merge of models on the Hub goes to the Hub. Only the built-in example can be "
                "downloaded as files.",
                Remedy.GIVE_TARGET,
            )
        self.jobs.check_caps(visitor.name, address)

    @system_errors()
    def compare(
        self,
        asked: Request,
        methods: Sequence[str],
        visitor: Visitor,
        *,
        key: str = "",
        address: str = "",
        questions: str = "",
    ) -> Job:
        """Queue a comparison: merges by several methods, asked the same; no model is kept.

        It is a job like a merge, in the same queue, with the same limits.

        Args:
            asked: the models, and how; where to publish counts for nothing.
            methods: by name, 2 to 4.
            visitor, key, address, questions: as for `submit`.

        Raises:
            PublishError: an account is needed.
            RecipeError: too many jobs, a question or a method is wrong, or there is none to ask.
        """
        asked = replace(asked, publication=None)
        check_comparison(methods, questions, asked, self.settings.prompts)
        if needs_account(asked) and not visitor.name:
            raise PublishError(
                "only methods on the built-in example are compared without an account.",
                Remedy.SIGN_IN,
            )
        return self._queue(asked, visitor, key, address, questions, list(methods))

    @system_errors()
    def submit(
        self,
        asked: Request,
        visitor: Visitor,
        *,
        key: str = "",
        address: str = "",
        questions: str = "",
    ) -> Job:
        """Queue a merge.

        Args:
            asked: what to merge.
            visitor: who asks.
            key: what tells the browser of somebody without an account, see `secret_key`.
            address: as for `check`.
            questions: that base, experts and merge are asked afterwards, as `parse_questions`
                takes them.

        Raises:
            ResMergeError: as `check`.
        """
        self.check(asked, visitor, address, questions)
        return self._queue(asked, visitor, key, address, questions, [])

    def _queue(
        self,
        asked: Request,
        visitor: Visitor,
        key: str,
        address: str,
        questions: str,
        methods: list[str],
    ) -> Job:
        owner = visitor.name
        return self.jobs.submit(
            asked,
            owner=owner,
            key="" if owner else key,
            token=visitor.token if owner else None,
            address=address,
            questions=questions.strip(),
            methods=methods,
        )

    @system_errors()
    def resume(self, job: Job, visitor: Visitor) -> None:
        """Queue a stopped job again, with the token of whoever owns it.

        Raises:
            RecipeError: it is not one that can go on.
        """
        self.jobs.resume(job, visitor.token if job.owner else None)

    def job(self, job_id: str, visitor: Visitor, *, key: str = "", change: bool = False) -> Job:
        """Return a job that a visitor may see, or change.

        `Job.may_see` and `Job.may_change` are the rule.

        Raises:
            RecipeError: there is none, or it is somebody else's; which of the two is not said.
        """
        found = self.jobs.get(job_id) if JOB_ID.fullmatch(job_id) else None
        if found is not None:
            name = visitor.name
            if found.may_change(name, key) if change else found.may_see(name):
                return found
        raise RecipeError(NO_JOB, Remedy.SIGN_IN_TO_SEE, kind="no-job")

    def status(self, job: Job) -> dict[str, Any]:
        """Return a job's state as the endpoint tells it."""
        left = job.seconds_left
        return {
            "state": job.state,
            "place": self.jobs.place(job),
            "progress": round(job.progress, 4),
            "bytes_read": job.bytes_read,
            "bytes_written": job.bytes_kept + job.bytes_written,
            "shards_done": job.shards_done,
            "shards": int(job.plan.get("shards") or 0),
            "seconds_left": None if left is None else round(left, 1),
            "message": job.message,
            "url": job.url.partition("/commit/")[0],
            "accuracies": job.accuracies,
        }

    def recipe(self, place: str, visitor: Visitor, address: str = "") -> Recipe:
        """Return the recipe of a merged model: its report's with the commits that were read, or,
        where another tool made it, the one in its files or its card.

        Args:
            place: of a repository: its id, or an address of it.
            visitor: whose token reads.
            address: as for `check`.

        Raises:
            ResMergeError: there is none, or it names what is no repository.
        """
        recipe = self.planners.recipe(place.strip(), visitor, address)
        return web_recipe(recipe, self.settings)

    @system_errors()
    def report(self, name: str, visitor: Visitor, address: str = "") -> Opened:
        """Return the report of a job that the visitor may see, or of a repository.

        Raises:
            ResMergeError: there is none, or it cannot be read.
        """
        name = name.strip()
        if "/" in name:
            return opened(self.planners.report(name, visitor, address), name=name)
        job = self.job(name, visitor)
        data = self.jobs.report(job)
        if data is None:
            raise RecipeError(f"this job is {job.state}; there is a report when it is done.")
        made = job.asked.get("push_to") or "files"
        asked_at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.created))
        name = f"{made} of {asked_at} UTC"
        if len(data) <= STRANGERS_BYTES:
            return opened(report_in(data, name=name, max_bytes=STRANGERS_BYTES), name=name)
        path = str(self.jobs.report_path(job))
        return opened(self.planners.report(path, visitor, address, name=name), name=name)

    @system_errors()
    def ask(
        self, name: str, visitor: Visitor, *, tasks: str, limit: int, pay_up_to: float = 0.0
    ) -> dict[str, Any]:
        """Offer a Job that asks a published merge what its models are asked, or start it.

        Args:
            name: of a job, or of a repository.
            visitor: who pays.
            tasks: names with commas between.
            limit: questions a task.
            pay_up_to: dollars; a Job that may cost more is offered and not started.

        Raises:
            ResMergeError: as `ask_as_job`; or it is no published merge.
        """
        repo_id = name.strip()
        if "/" not in repo_id:
            job = self.job(repo_id, visitor)
            repo_id = "" if job.asked.get("create_pr") else str(job.asked.get("push_to") or "")
            if not repo_id:
                raise RecipeError(
                    "a Job can only ask a model on its repository's main branch. Publish it first."
                )
        report = self.report(name, visitor).report
        return ask_as_job(report, repo_id, visitor, tasks=tasks, limit=limit, pay_up_to=pay_up_to)
