"""Following a job on the page: attach, watch, cancel, continue, result; and finding old ones."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from resmerge_stream.errors import ResMergeError
from resmerge_stream.experts.group import built_in_folders
from resmerge_stream.sinks.hub.leftovers import Unfinished, unfinished_merges

from ..asked import web_request
from ..explore import Opened
from ..identity import Visitor, secret_key
from ..jobs.records import ACTIVE, CONTINUABLE, DONE, FAILED, Job
from ..remedies import said
from ..service import Service
from ..view import jobs as view
from ..view import report as view_report
from ..view.words import notice
from .fields import MODELS
from .news import News

Form = Mapping[str, Any]
Changes = dict[str, Any]
Token = gr.OAuthToken | None
# Jobs whose models are suggested again.
_RECENT = 5
# For how long what was found on the Hub is believed.
_FOUND_S = 300.0


class Following:
    """The part of the page that shows a job.

    Args:
        service: behind the page.
        news: what a running job shows.
    """

    def __init__(self, service: Service, news: News) -> None:
        self._service, self._news = service, news
        self._found: dict[str, tuple[float, list[Unfinished]]] = {}

    def attach(self, job_id: str, visitor: Visitor, secret: str, *, asked: bool) -> Changes:
        """Show a job from now on; where there is none, only say so if it was asked for."""
        try:
            job = self._service.job(job_id, visitor)
        except ResMergeError as exc:
            text = notice(said(exc), "warn") if asked else ""
            return {
                "job": "", "state": "", "status": text,
                "watching": gr.update(active=False),
                "follow": gr.update(visible=asked), "done": gr.update(visible=False),
                "form": gr.update(open=True),
                **_buttons(None, may_change=False),
            }  # fmt: skip
        return {
            "job": job.id,
            "state": job.state,
            "follow": gr.update(visible=True),
            "form": gr.update(open=False),
            "link": view.link_html(job.id),
            "watching": gr.update(active=job.state in ACTIVE),
            **self._shown(job, visitor, secret),
        }

    def refresh(self, form: Form, token: Token) -> Changes:
        """Show everything of a job again, when its state changed.

        The browser says which job that is: a server that was started anew remembers no page.
        """
        visitor = self._visitor(token)
        try:
            job = self._service.job(str(form.get("job") or ""), visitor)
        except ResMergeError:
            return {"watching": gr.update(active=False)}
        return {
            **self._shown(job, visitor, secret_of(form)),
            "state": job.state,
            "watching": gr.update(active=job.state in ACTIVE),
        }

    def dismiss(self, form: Form) -> Changes:
        """Put a job away: the page is for a new merge; the job stays under My jobs."""
        remembered = {**dict(form.get("remembered") or {}), "job": ""}
        return {
            "job": "", "state": "", "watching": gr.update(active=False),
            "follow": gr.update(visible=False), "remembered": remembered, "name": "",
            "form": gr.update(open=True),
        }  # fmt: skip

    def cancel(self, form: Form, token: Token) -> Changes:
        """Stop the job that is shown."""
        return self._change(form, token, lambda job, _: self._service.jobs.cancel(job))

    def resume(self, form: Form, token: Token) -> Changes:
        """Continue the job that is shown."""
        return self._change(form, token, self._service.resume)

    def discard(self, form: Form, token: Token) -> Changes:
        """Remove what a stopped job left on the Hub, and say what."""
        from resmerge_stream.sinks.hub.leftovers import discard_staging

        def remove(job: Job, visitor: Visitor) -> None:
            target = job.asked.get("push_to")
            removed = (
                discard_staging(target, visitor.token, create_pr=bool(job.asked.get("create_pr")))
                if target and visitor.token
                else []
            )
            self._service.jobs.give_up(job, removed)

        return self._change(form, token, remove)

    def look_for_unfinished(self, form: Form, token: Token) -> Changes:
        """Offer a visitor's unfinished merges: from the records, and from the Hub."""
        return self.waiting(self._visitor(token), secret_of(form))

    def waiting(self, visitor: Visitor, secret: str) -> Changes:
        """Return what shows the jobs of an account, or of a browser, and unfinished merges."""
        jobs = self._service.jobs.of(visitor.name, secret_key(secret))
        reports = [
            (view.short_title(job), job.id)
            for job in jobs
            if job.state == DONE and not job.asked.get("methods")
        ]
        last = reports[0][1] if reports else ""
        published = self._service.search.own(visitor, merges=True, last=last)
        reports += [(name, name) for name in published]
        choices = [
            (f"{view.title_of(job.asked)} · {100 * job.progress:.0f} % done", f"job:{job.id}")
            for job in jobs
            if job.state in CONTINUABLE
        ]
        known = {job.asked.get("push_to") for job in jobs}
        choices += [
            (f"{view.title_of(found.asked)} · {found.shards} file(s) staged", f"hub:{number}")
            for number, found in enumerate(self._on_hub(visitor))
            if found.asked.get("push_to") not in known
        ]
        first = choices[0][1] if choices else None
        return {
            "unfinished": gr.update(visible=bool(choices)),
            "chosen": gr.update(choices=choices, value=first),
            "mine": view.jobs_html(jobs, signed_in=bool(visitor.name)),
            "report_a": gr.update(choices=reports),
            "report_b": gr.update(choices=reports),
            **dict.fromkeys(MODELS, gr.update(choices=self.suggestions(visitor, secret))),
        }

    def suggestions(self, visitor: Visitor, secret: str) -> list[str]:
        """Return the models that a visitor may mean: merged lately, their own, built-in ones."""
        jobs = self._service.jobs.of(visitor.name, secret_key(secret))
        recipes = [job.asked.get("recipe") or {} for job in jobs[:_RECENT]]
        lately = [
            model["model"] if isinstance(model, dict) else model
            for recipe in recipes
            for model in [recipe.get("base_model"), *(recipe.get("models") or ())]
        ]
        named = [str(name) for name in lately if name]
        return list(
            dict.fromkeys([*named, *self._service.search.own(visitor), *built_in_folders()])
        )

    def go_on(self, form: Form, token: Token) -> Changes:
        """Continue the unfinished merge that was chosen from the list."""
        visitor, secret = self._visitor(token), secret_of(form)
        kind, _, name = str(form.get("chosen") or "").partition(":")
        try:
            if kind == "job":
                job = self._service.job(name, visitor, key=secret_key(secret), change=True)
                self._service.resume(job, visitor)
            else:
                found = self._on_hub(visitor)
                if not name.isdigit() or int(name) >= len(found):
                    return {"go_on_note": notice("Choose a merge from the list.", "plain")}
                asked = web_request(found[int(name)].asked, self._service.settings)
                job = self._service.submit(asked, visitor)
        except ResMergeError as exc:
            return {"go_on_note": notice(said(exc))}
        remembered = {**dict(form.get("remembered") or {}), "job": job.id}
        shown = self.attach(job.id, visitor, secret, asked=True)
        return {
            **shown,
            **self.waiting(visitor, secret),
            "remembered": remembered,
            "go_on_note": "",
        }

    def explored(self, opened: Sequence[Opened]) -> str:
        """Return one report's figures, or two reports beside each other."""
        if len(opened) == 2:
            return view_report.compared_html(*opened)
        return view_report.opened_html(opened[0])

    def _change(self, form: Form, token: Token, act: Any) -> Changes:
        visitor, secret = self._visitor(token), secret_of(form)
        try:
            job = self._service.job(
                str(form.get("job") or ""), visitor, key=secret_key(secret), change=True
            )
            act(job, visitor)
        except ResMergeError as exc:
            return {"act_note": notice(said(exc), "warn")}
        shown = self.attach(job.id, visitor, secret, asked=True)
        return {**shown, "act_note": ""}

    def _shown(self, job: Job, visitor: Visitor, secret: str) -> Changes:
        changes: Changes = {
            "status": self._news.status(job),
            "log": "\n".join(job.log),
            "gates": self._news.picture(job)[1] if job.state != DONE else "",
            "done": gr.update(visible=job.state == DONE),
            **_buttons(job, may_change=job.may_change(visitor.name, secret_key(secret))),
        }
        return {**changes, **self._result(job, visitor)} if job.state == DONE else changes

    def _result(self, job: Job, visitor: Visitor) -> Changes:
        if job.asked.get("methods"):
            return {"result": view.result_html(job), "files": "", "figures": ""}
        changes: Changes = {"result": view.result_html(job), "files": ""}
        if self._service.jobs.report_path(job).exists():
            try:
                opened = self._service.report(job.id, visitor)
            except ResMergeError as exc:
                return {**changes, "figures": notice(said(exc))}
            changes["figures"] = view_report.decided_html(opened)
            changes["files"] = view.files_html(self._service.downloads.of(job))
        return changes

    def _on_hub(self, visitor: Visitor) -> list[Unfinished]:
        if not visitor.token:
            return []
        now = time.monotonic()
        known = self._found.get(visitor.name)
        if known is not None and now - known[0] < _FOUND_S:
            return known[1]
        try:
            found = unfinished_merges(visitor.token)
        except ResMergeError:
            found = []  # the page must open without it
        self._found[visitor.name] = (now, found)
        return found

    def _visitor(self, token: Token) -> Visitor:
        return self._service.visitors.who_or_nobody(token.token if token else None)


def secret_of(form: Form) -> str:
    """Return what tells this browser from others, see `secret_key`."""
    return str(dict(form.get("remembered") or {}).get("secret") or "")


def _buttons(job: Job | None, *, may_change: bool) -> Changes:
    state = job.state if job is not None and may_change else ""
    on_hub = job is not None and bool(job.asked.get("push_to"))
    stopped = state in CONTINUABLE or state == FAILED
    return {
        "cancel": gr.update(visible=state in ACTIVE),
        "resume": gr.update(visible=state in CONTINUABLE),
        "discard": gr.update(visible=stopped and on_hub),
    }
