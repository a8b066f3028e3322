"""The named endpoints, for programs: the same service, also as MCP tools."""

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from resmerge_stream.errors import ResMergeError, shown
from resmerge_stream.methods import describe_methods

from .asked import web_request
from .identity import Visitor, caller, space_url
from .jobs.records import Job
from .remedies import said
from .service import Service

_ID = "x" * 43
# What the descriptions of the endpoints show; the recipe is one that everybody may plan and merge.
EXAMPLES: dict[str, Any] = {
    "recipe": {
        "merge_method": "head_regression",
        "base_model": "built-in/base",
        "models": ["built-in/rl-add", "built-in/rl-sort"],
    },
    "push_to": "your-name/merged",
    "private": True,
    "update": False,
    "create_pr": False,
    "collection": "your-name/merges-0123456789abcdef",
    "discuss": False,
    "questions": '{"prompt": "sort:cab>", "answer": "abc"}',
    "job": _ID,
    "job_or_repo": "your-name/merged",
    "tasks": "gsm8k",
    "limit": 500,
    "pay_up_to": 0,
}


@contextmanager
def _told() -> Iterator[None]:
    """Hand our errors to the caller with their message; anything else stays a server error."""
    try:
        yield
    except ResMergeError as exc:
        raise gr.Error(said(exc), print_exception=False) from exc


_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("a text", (str,)),
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an endpoint that says which argument is of another kind than it has; recipes do."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            words, kinds = _KINDS.get(signature.parameters[name].annotation, ("", ()))
            # To Python, true is a number.
            is_one = isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))
            if kinds and not is_one:
                text = f"{name} must be {words}, not {shown(value)}."
                raise gr.Error(text, print_exception=False)
        return function(*args, **kwargs)

    return call


def add_endpoints(app: gr.Blocks, service: Service) -> None:
    """Add the endpoints to an app; each parameter is described as its function describes it.

    Args:
        app: being built.
        service: behind them.
    """
    for function in map(_checked, Endpoints(service).all()):
        added = gr.api(  # type: ignore[attr-defined]
            function, api_name=function.__name__, concurrency_limit=16
        )
        _, said_of, _ = gr.utils.get_function_description(function)
        parameters: list[Any] = list(app.fns[added["id"]].inputs)
        for component, name in zip(parameters, said_of, strict=False):
            component._api_info["additional_description"] = said_of[name]
            component.label = name
            component.example_payload = functools.partial(EXAMPLES.get, name)


class Endpoints:
    """The functions; their names are those of the endpoints and of the MCP tools.

    Args:
        service: behind them.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Callable[..., Any]]:
        """Return them, in the order in which a program would call them."""
        return [
            self.methods, self.plan, self.merge, self.status, self.cancel, self.resume, self.jobs,
            self.files, self.report, self.evaluate,
        ]  # fmt: skip

    def _visitor_of(self, oauth_token: gr.OAuthToken | None, x_hf_token: str | None) -> Visitor:
        return self._service.visitors.who(oauth_token.token if oauth_token else x_hf_token or None)

    def methods(self) -> list[dict]:  # type: ignore[type-arg]
        """List the merge methods with their parameters.

        Returns:
            One object a method: name, title, paper, url, summary, weighted, and its parameters.
        """
        return describe_methods()

    def plan(
        self,
        recipe: dict,  # type: ignore[type-arg]
        push_to: str = "",
        create_pr: bool = False,
        request: gr.Request = None,  # type: ignore[assignment]
        oauth_token: gr.OAuthToken | None = None,
        x_hf_token: gr.Header | None = None,
    ) -> dict:  # type: ignore[type-arg]
        """Preview a merge from file headers: its cost and every problem. Takes seconds.

        Args:
            recipe: in mergekit's vocabulary, such as {"base_model": "built-in/base", "models": ["built-in/rl-add", "built-in/rl-sort"]}, or with namespace/name of the Hub, @revision if you like; merge_method (default head_regression), parameters and dtype may be added. At most 16 experts and 32 kB.
            push_to: the repository to publish to, namespace/name, to have it checked too; empty for none.
            create_pr: whether that is to be a pull request on it.

        Returns:
            An object: refused, problems, warnings, bytes, memory, disk, time, tensors, sources.
        """  # noqa: E501 - gradio drops what follows the first line of a description
        with _told():
            visitor = self._visitor_of(oauth_token, x_hf_token)
            document = {"recipe": recipe, "push_to": push_to, "create_pr": create_pr}
            found = self._service.plan(document, visitor, caller(request))
            return {key: found[key] for key in found if key not in ("hardware", "target_checked")}

    def merge(
        self,
        recipe: dict,  # type: ignore[type-arg]
        push_to: str = "",
        private: bool = True,
        update: bool = False,
        create_pr: bool = False,
        collection: str = "",
        discuss: bool = False,
        questions: str = "",
        request: gr.Request = None,  # type: ignore[assignment]
        oauth_token: gr.OAuthToken | None = None,
        x_hf_token: gr.Header | None = None,
    ) -> dict:  # type: ignore[type-arg]
        """Start a merge that goes on by itself, and return its job. Publishing needs a token.

        Args:
            recipe: as for plan.
            push_to: the repository to publish to, namespace/name; empty for the built-in example's files.
            private: whether the repository stays private; false makes it public at the very end.
            update: whether to replace a model that stands there already.
            create_pr: whether to open a pull request on that repository instead; private is then ignored.
            collection: a collection of the account to add the model to, owner/title-id; empty for none.
            discuss: whether to open a discussion in the repository when the merge is done.
            questions: what base, experts and merge are asked afterwards if they are small, as JSONL: {"prompt": "2+2=", "answer": "4"} a line, "verify": "number" and "max_new_tokens" may be added; at most 50.

        Returns:
            {"job": id}, for status, cancel, resume, files and report.
        """  # noqa: E501
        with _told():
            visitor = self._visitor_of(oauth_token, x_hf_token)
            document = {
                "recipe": recipe,
                "push_to": push_to,
                "public": None if create_pr else not private,
                "update": update,
                "create_pr": create_pr,
                "collection": collection,
                "discuss": discuss,
            }
            asked = web_request(document, self._service.settings)
            address = caller(request)
            job = self._service.submit(asked, visitor, address=address, questions=questions)
            return {"job": job.id}

    def _found(
        self,
        job: str,
        oauth_token: gr.OAuthToken | None,
        x_hf_token: str | None,
        *,
        change: bool = False,
    ) -> tuple[Job, Visitor]:
        visitor = self._visitor_of(oauth_token, x_hf_token)
        return self._service.job(job, visitor, change=change), visitor

    def status(
        self, job: str, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None
    ) -> dict:  # type: ignore[type-arg]
        """Say how far a job is: queued, planning, running, cancelled, failed, resumable or done.

        Args:
            job: the id that merge returned, 43 characters. An account's job is told to that account alone.

        Returns:
            state, place (how many are before it), progress (0 to 1), bytes, shards, seconds_left (null if unknown), message, url, accuracies (by model and task what was asked after the merge: share of right answers, both ends of its 95 % interval, questions).
        """  # noqa: E501
        with _told():
            return self._service.status(self._found(job, oauth_token, x_hf_token)[0])

    def cancel(
        self, job: str, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None
    ) -> dict:  # type: ignore[type-arg]
        """Stop a job. Finished files are kept, so that resume goes on from there.

        Args:
            job: the id that merge returned.

        Returns:
            The job's status; its state is cancelled within seconds.
        """
        with _told():
            mine, _ = self._found(job, oauth_token, x_hf_token, change=True)
            self._service.jobs.cancel(mine)
            return self._service.status(mine)

    def resume(
        self, job: str, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None
    ) -> dict:  # type: ignore[type-arg]
        """Continue a job that was cancelled, or stopped by the network or a restart.

        Args:
            job: the id that merge returned; its state is cancelled or resumable.

        Returns:
            The job's status.
        """
        with _told():
            mine, visitor = self._found(job, oauth_token, x_hf_token, change=True)
            self._service.resume(mine, visitor)
            return self._service.status(mine)

    def jobs(self, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None) -> list[dict]:  # type: ignore[type-arg]
        """List the jobs of an account, the newest first; without a token there are none.

        Returns:
            One object a job: job, created, push_to, and its status.
        """
        with _told():
            name = self._visitor_of(oauth_token, x_hf_token).name
            return [
                {
                    "job": job.id,
                    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(job.created)),
                    "push_to": job.asked.get("push_to") or "",
                    **self._service.status(job),
                }
                for job in self._service.jobs.of(name)
            ]

    def files(
        self,
        job: str,
        request: gr.Request,
        oauth_token: gr.OAuthToken | None,
        x_hf_token: gr.Header | None,
    ) -> list[dict]:  # type: ignore[type-arg]
        """List the files of a finished job with the addresses to download them from.

        Args:
            job: the id that merge returned.

        Returns:
            One object a file: name, bytes (null for the archive of all), url.
            A published merge's weights are in its repository.
        """
        with _told():
            mine, _ = self._found(job, oauth_token, x_hf_token)
            at = space_url(request)
            return [
                {"name": file.name, "bytes": file.nbytes, "url": f"{at}{file.path}"}
                for file in self._service.downloads.of(mine)
            ]

    def report(
        self,
        job_or_repo: str,
        request: gr.Request,
        oauth_token: gr.OAuthToken | None,
        x_hf_token: gr.Header | None,
    ) -> dict:  # type: ignore[type-arg]
        """Return every gate of every tensor of a finished merge.

        Args:
            job_or_repo: a job's id, or the namespace/name of any repository that this tool made.

        Returns:
            The content of resmerge/report.json: recipe, sources, summary, files, tensors.
        """
        with _told():
            visitor = self._visitor_of(oauth_token, x_hf_token)
            return self._service.report(job_or_repo, visitor, caller(request)).report

    def evaluate(
        self,
        job_or_repo: str,
        tasks: str = "gsm8k",
        limit: int = 500,
        pay_up_to: float = 0.0,
        oauth_token: gr.OAuthToken | None = None,
        x_hf_token: gr.Header | None = None,
    ) -> dict:  # type: ignore[type-arg]
        """Ask a published merge and its models questions in a Job on the Hub, which you pay for.

        Args:
            job_or_repo: a job's id, or the namespace/name of a merge that you may write to.
            tasks: names of tasks of lm-evaluation-harness, with commas between, at most 10.
            limit: questions a task, 1 to 10,000.
            pay_up_to: in dollars. A Job that may cost more, so any for 0, is offered and not started.

        Returns:
            summary, flavor, usd_estimate, usd_at_most, seconds_estimate, timeout_seconds, url (of the Job; empty if none was started). Results are a pull request on the merge.
        """  # noqa: E501
        with _told():
            visitor = self._visitor_of(oauth_token, x_hf_token)
            return self._service.ask(
                job_or_repo, visitor, tasks=tasks, limit=limit, pay_up_to=pay_up_to
            )
