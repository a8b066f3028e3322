"""What each button does: a form's values in, the fields to change out. Plain functions."""

import secrets
from collections.abc import Mapping
from typing import Any

import gradio as gr

from resmerge_stream.errors import PublishError, ResMergeError
from resmerge_stream.methods import build_method, find_methods

from ..asked import web_recipe, web_request
from ..examples import examples, is_built_in
from ..identity import Visitor, on_space, secret_key
from ..remedies import said
from ..service import Service
from ..view import jobs as view
from ..view.plan import plan_html
from ..view.words import notice
from .following import Following
from .forms import ROWS, document_of, form_of, without_row
from .news import News

Form = Mapping[str, Any]
Changes = dict[str, Any]
Token = gr.OAuthToken | None
_NOT_TYPING = frozenset(
    {"Enter", "Tab", "Shift", "Escape", "ArrowUp", "ArrowDown", "Control", "Alt", "Meta"}
)


class Handlers:
    """The page's events. Each takes the values that it needs by name, and returns what changes.

    Args:
        service: behind the page.
        news: what a running job shows.
    """

    def __init__(self, service: Service, news: News) -> None:
        self._service = service
        self.following = Following(service, news)

    def load(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Show who somebody is, and attach to the job in the address or the one remembered."""
        remembered = dict(form.get("remembered") or {})
        remembered.setdefault("secret", secrets.token_urlsafe(32))
        visitor = self._visitor(token)
        asked = str(dict(request.query_params).get("job") or "") if request else ""
        job_id = asked or str(remembered.get("job") or "")
        changes = self.following.attach(job_id, visitor, remembered["secret"], asked=bool(asked))
        if changes.get("job"):
            remembered["job"] = changes["job"]
        choices = [visitor.name, *visitor.orgs] if visitor.name else []
        return {
            **changes,
            "remembered": remembered,
            "who": view.who_html(visitor.name, on_space()),
            "namespace": gr.update(
                choices=choices, value=visitor.name or None, visible=bool(choices)
            ),
        }

    def example(self, form: Form, number: int) -> Changes:
        """Fill the form from a ready example."""
        found = examples()[number]
        recipe = web_recipe(
            {"base_model": found.base, "models": list(found.experts)}, self._service.settings
        )
        return {**self._filled(form_of(recipe)), "name": found.name, "as_files": number == 0}

    def paste(self, form: Form) -> Changes:
        """Fill the form from a pasted recipe."""
        try:
            recipe = web_recipe(str(form.get("yaml") or ""), self._service.settings)
            build_method(recipe.method, recipe.parameters)
        except ResMergeError as exc:
            return {"pasted": notice(said(exc))}
        if len(recipe.experts) > ROWS:
            text = f"The form has room for {ROWS} experts; use the endpoints for more."
            return {"pasted": notice(text)}
        text = "The form shows this recipe now. Plan it below."
        return {
            **self._filled(form_of(recipe)),
            "as_files": is_built_in(recipe),
            "pasted": notice(text, "good"),
        }

    def add_row(self, form: Form) -> Changes:
        """Show one more row for an expert."""
        count = min(int(form["count"]) + 1, ROWS)
        return {"count": count, **_visible_rows(count)}

    def remove_row(self, form: Form, number: int) -> Changes:
        """Take one expert out of the form."""
        rows = without_row(form, number)
        return {**rows, **_visible_rows(rows["count"])}

    def suggest(
        self, form: Form, typed: gr.KeyUpData, request: gr.Request, token: Token
    ) -> Changes:
        """Offer ids of the Hub for what is being typed, once the keys rest."""
        if typed.key in _NOT_TYPING:
            return {}  # new choices would open the list again that was just left
        if not self._service.search.is_last(str(request.session_hash)):
            return {}
        text = str(typed.input_value or "")
        found = self._service.search.ids(text, self._visitor(token))
        built_in = [name for name in self._built_in() if text.lower() in name]
        return {"suggested": gr.update(choices=[*found, *built_in][:10])}

    def choose_method(self, form: Form) -> Changes:
        """Show the chosen method's own controls and what it is."""
        return self._method_shown(str(form["method"]))

    def plan(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Plan what the form asks for."""
        visitor = self._visitor(token)
        document = document_of({"namespace": visitor.name, **_given(form)})
        plan = self._service.plan(document, visitor)
        push_to = str(document["push_to"])
        ready = not plan["refused"]
        hindrance = self._hindrance(document, visitor) if ready else ""
        return {
            "planned": document if ready else None,
            "plan_html": plan_html(plan, push_to=push_to, hindrance=hindrance),
            "merge": gr.update(interactive=ready and not hindrance),
            "merge_note": "",
        }

    def merge(self, form: Form, token: Token) -> Changes:
        """Queue the merge that was planned."""
        visitor = self._visitor(token)
        document = document_of({"namespace": visitor.name, **_given(form)})
        if document != form.get("planned"):
            text = "The form was changed since it was planned. Plan again, then merge."
            return {"merge_note": notice(text, "warn"), "merge": gr.update(interactive=False)}
        remembered = dict(form.get("remembered") or {})
        remembered.setdefault("secret", secrets.token_urlsafe(32))
        try:
            asked = web_request(document, self._service.settings)
            job = self._service.submit(asked, visitor, key=secret_key(remembered["secret"]))
        except ResMergeError as exc:
            return {"merge_note": notice(said(exc))}
        remembered["job"] = job.id
        shown = self.following.attach(job.id, visitor, remembered["secret"], asked=True)
        return {**shown, "remembered": remembered, "merge_note": ""}

    def explore(self, form: Form, token: Token) -> Changes:
        """Open the report of one repository, or set two beside each other."""
        visitor = self._visitor(token)
        names = [str(form.get(key) or "").strip() for key in ("report_a", "report_b")]
        names = [name for name in names if name]
        if not names:
            return {"explored": notice("Write the repository of a merge.", "plain")}
        try:
            opened = [self._service.report(name, visitor) for name in names]
        except ResMergeError as exc:
            return {"explored": notice(said(exc))}
        return {"explored": self.following.explored(opened)}

    def _visitor(self, token: Token) -> Visitor:
        return self._service.visitors.who_or_nobody(token.token if token else None)

    def _built_in(self) -> list[str]:
        first = examples()[0]
        return [first.base, *first.experts]

    def _hindrance(self, document: Form, visitor: Visitor) -> str:
        """Return why Merge would not start what can be planned, and what to do; or nothing."""
        try:
            self._service.check(web_request(document, self._service.settings), visitor)
        except PublishError as exc:
            at_home = "" if on_space() else " Log in with “hf auth login”, and start this again."
            return said(exc) + at_home
        except ResMergeError as exc:
            return said(exc)
        return ""

    def _filled(self, fields: Changes) -> Changes:
        changes: Changes = {**fields, **_visible_rows(fields["count"])}
        for number in range(ROWS):
            key = f"expert{number}"
            changes[key] = gr.update(value=fields[key] or None)
        changes["base"] = gr.update(value=fields["base"])
        return {**changes, **self._method_shown(str(fields["method"])), "planned": None}

    def _method_shown(self, name: str) -> Changes:
        methods = find_methods()
        changes: Changes = {
            f"controls.{method}": gr.update(visible=method == name) for method in methods
        }
        chosen = methods.get(name)
        weighted = chosen is not None and chosen.weighted
        changes |= {f"weight{i}": gr.update(visible=weighted) for i in range(ROWS)}
        changes["about_method"] = view.method_html(chosen) if chosen else ""
        return changes


def _visible_rows(count: int) -> Changes:
    return {f"row{number}": gr.update(visible=number < count) for number in range(ROWS)}


def _given(form: Form) -> Changes:
    return {key: value for key, value in form.items() if key != "namespace" or value}
