"""The named endpoints, for programs: the same service, also as MCP tools."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from resmerge_stream.errors import ResMergeError
from resmerge_stream.methods import describe_methods

from .asked import web_request
from .identity import Visitor
from .jobs.records import Job
from .remedies import said
from .service import Service


@contextmanager
def _told() -> Iterator[None]:
    """Hand our errors to the caller with their message; anything else stays a server error."""
    try:
        yield
    except ResMergeError as exc:
        raise gr.Error(said(exc), print_exception=False) from exc


def endpoints(service: Service) -> list[Callable[..., Any]]:
    """Return the six functions; their names are those of the endpoints and of the MCP tools.

    Args:
        service: behind them.
    """

    def visitor_of(oauth_token: gr.OAuthToken | None, x_hf_token: str | None) -> Visitor:
        return service.visitors.who(oauth_token.token if oauth_token else x_hf_token or None)

    def methods() -> list[dict]:  # type: ignore[type-arg]
        """List the merge methods with their parameters.

        Returns:
            One object a method: name, title, paper, url, summary, weighted, and its parameters.
        """
        return describe_methods()

    def plan(
        recipe: dict,  # type: ignore[type-arg]
        oauth_token: gr.OAuthToken | None,
        x_hf_token: gr.Header | None,
    ) -> dict:  # type: ignore[type-arg]
        """Say what a merge would do and what speaks against it, from headers alone. Takes seconds.

        Args:
            recipe: in mergekit's vocabulary, such as {"base_model": "built-in/base", "models": [{"model": "built-in/rl-add"}, {"model": "built-in/rl-sort"}]}, or with namespace/name of the Hub; merge_method (default resmerge), parameters and dtype may be added.

        Returns:
            An object: refused, problems, warnings, bytes, memory, disk, time, tensors, sources.
        """  # noqa: E501 - gradio drops what follows the first line of a description
        with _told():
            visitor = visitor_of(oauth_token, x_hf_token)
            found = service.plan({"recipe": recipe}, visitor)
            return {key: found[key] for key in found if key not in ("hardware", "target_checked")}

    def merge(
        recipe: dict,  # type: ignore[type-arg]
        push_to: str,
        private: bool,
        oauth_token: gr.OAuthToken | None,
        x_hf_token: gr.Header | None,
    ) -> dict:  # type: ignore[type-arg]
        """Start a merge that goes on by itself, and return its job. Publishing needs a token.

        Args:
            recipe: as for plan.
            push_to: the repository to publish to, namespace/name; empty for the built-in example's files.
            private: whether the repository stays private; false makes it public at the very end.

        Returns:
            {"job": id}, for status, cancel and report.
        """  # noqa: E501
        with _told():
            visitor = visitor_of(oauth_token, x_hf_token)
            document = {"recipe": recipe, "push_to": push_to, "public": not private}
            asked = web_request(document, service.settings)
            return {"job": service.submit(asked, visitor).id}

    def found(
        job: str, oauth_token: gr.OAuthToken | None, x_hf_token: str | None, *, change: bool = False
    ) -> Job:
        return service.job(job, visitor_of(oauth_token, x_hf_token), change=change)

    def status(job: str, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None) -> dict:  # type: ignore[type-arg]
        """Say how far a job is: queued, planning, running, cancelled, failed, resumable or done.

        Args:
            job: the id that merge returned. An account's job is told to that account alone.

        Returns:
            state, progress (0 to 1), bytes, shards, seconds_left (null if unknown), message, url.
        """
        with _told():
            return service.status(found(job, oauth_token, x_hf_token))

    def cancel(job: str, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None) -> dict:  # type: ignore[type-arg]
        """Stop a job. Finished files are kept, so that merging the same again goes on from there.

        Args:
            job: the id that merge returned.

        Returns:
            The job's status; its state is cancelled within seconds.
        """
        with _told():
            mine = found(job, oauth_token, x_hf_token, change=True)
            service.jobs.cancel(mine)
            return service.status(mine)

    def report(
        job_or_repo: str, oauth_token: gr.OAuthToken | None, x_hf_token: gr.Header | None
    ) -> dict:  # type: ignore[type-arg]
        """Return every gate of every tensor of a finished merge.

        Args:
            job_or_repo: a job's id, or the namespace/name of any repository that this tool made.

        Returns:
            The content of resmerge/report.json: recipe, sources, summary, files, tensors.
        """
        with _told():
            return service.report(job_or_repo, visitor_of(oauth_token, x_hf_token)).report

    return [methods, plan, merge, status, cancel, report]
