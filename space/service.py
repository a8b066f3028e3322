"""What pages and endpoints have in common: plans, jobs and reports, and whose they are."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from resmerge_stream.errors import (
    PublishError,
    RecipeError,
    Remedy,
    ResMergeError,
    VerificationError,
)
from resmerge_stream.planning.planned import refused_plan
from resmerge_stream.planning.recipe_places import recipe_on_the_hub
from resmerge_stream.planning.request import Request
from resmerge_stream.recipe import ModelRef, Recipe

from .asked import check_id, needs_account, web_recipe, web_request
from .asking import ask_as_job
from .explore import Opened, open_report, read_report
from .identity import Visitor, Visitors
from .jobs.downloads import pinned_recipe
from .jobs.jobs import Jobs
from .jobs.planning import Planners
from .jobs.records import JOB_ID, Job
from .questions import check_questions
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
        planners: make plans.
    """

    settings: Settings
    jobs: Jobs
    visitors: Visitors
    search: Search
    planners: Planners

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
            asked = web_request(document, self.settings)
            plan = self.planners.plan(asked, visitor, address)
            return self._as_here(plan)
        except ResMergeError as exc:
            refused = plan_said(refused_plan(*exc.notices))
            return {**refused, "hardware": [], "target_checked": False}

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
        owner = visitor.name
        return self.jobs.submit(
            asked,
            owner=owner,
            key="" if owner else key,
            token=visitor.token if owner else None,
            address=address,
            questions=questions.strip(),
        )

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

    def recipe(self, place: str, visitor: Visitor) -> Recipe:
        """Return the recipe of a merged model: its report's with the commits that were read, or,
        where another tool made it, the one in its files or its card.

        Args:
            place: of a repository: its id, or an address of it.
            visitor: whose token reads.

        Raises:
            ResMergeError: there is none, or it names what is no repository.
        """
        ref = ModelRef.parse(place.strip())
        check_id(ref)
        try:
            return web_recipe(pinned_recipe(self.report(str(ref), visitor).report), self.settings)
        except VerificationError:
            found = recipe_on_the_hub(ref, token=visitor.token_or_nobody)
            return web_recipe(found.to_dict(), self.settings)

    def report(self, name: str, visitor: Visitor) -> Opened:
        """Return the report of a job that the visitor may see, or of a repository.

        Raises:
            ResMergeError: there is none, or it cannot be read.
        """
        name = name.strip()
        if "/" in name:
            return open_report(read_report(name, visitor), name=name)
        job = self.job(name, visitor)
        data = self.jobs.report(job)
        if data is None:
            raise RecipeError(f"this job is {job.state}; there is a report when it is done.")
        made = job.asked.get("push_to") or "files"
        asked_at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.created))
        return open_report(data, name=f"{made} of {asked_at} UTC")

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
        opened = self.report(name, visitor)
        return ask_as_job(
            opened.report, repo_id, visitor, tasks=tasks, limit=limit, pay_up_to=pay_up_to
        )
