"""What each button does: a form's values in, the fields to change out. Plain functions."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

import gradio as gr

from resmerge_stream.errors import PublishError, RecipeError, ResMergeError
from resmerge_stream.methods import find_methods
from resmerge_stream.planning.resolve import Resolver
from resmerge_stream.recipe import DEFAULT_METHOD, ModelRef

from ..asked import check_id, web_recipe, web_request
from ..examples import examples
from ..identity import Visitor, caller, has_login, on_space, secret_key, space_url
from ..remedies import said
from ..service import Service
from ..view import jobs as view
from ..view.plan import advice_html, no_advice_html, plan_html
from ..view.words import notice
from .fields import INFO, MODELS, SHORT, names, short_list
from .following import Following, secret_of
from .forms import ADAPTER, BEYOND, ROWS, document_of, form_of, in_words
from .news import News
from .texts import from_code

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
        """Show who somebody is, the form as it was left, and the job in the address or the last."""
        remembered = dict(form.get("remembered") or {})
        remembered.setdefault("secret", secrets.token_urlsafe(32))
        visitor = self._visitor(token)
        query = dict(request.query_params) if request else {}
        asked = str(query.get("job") or "")
        job_id = asked or str(remembered.get("job") or "")
        changes = self.following.attach(job_id, visitor, remembered["secret"], asked=bool(asked))
        if changes.get("job"):
            remembered["job"] = changes["job"]
        if query.get("recipe"):
            changes |= self.paste({"yaml": query["recipe"]}, request, token)
        elif form.get("kept"):
            changes |= self._restored(dict(form["kept"]))
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
        recipe = web_recipe(found.recipe, self._service.settings)
        return {**self._filled(form_of(recipe)), "name": found.name}

    def try_example(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Merge the built-in example at once, into files, and show its job."""
        found = examples()[0]
        filled = self.example(form, 0)
        return {**filled, **self._submit({"recipe": found.recipe}, form, request, token)}

    def paste(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Fill the form from a recipe, or from a model that was merged, by whatever tool."""
        text = str(form.get("yaml") or "")
        try:
            if "/" in text and len(text.split()) == 1 and "{" not in text:
                recipe = self._service.recipe(text, self._visitor(token), caller(request))
            else:
                recipe = web_recipe(text, self._service.settings)
            Resolver(recipe).at()
        except ResMergeError as exc:
            return {"pasted": notice(said(exc))}
        if len(recipe.experts) > ROWS:
            text = f"The form has room for {ROWS} experts; use the endpoints for more."
            return {"pasted": notice(text)}
        fields = form_of(recipe)
        text = "Form filled in."
        if hidden := in_words(fields[BEYOND]):
            text += f" What has no field applies as written: {', '.join(hidden)}."
        return {**self._filled(fields), "pasted": notice(text, "good")}

    def add_row(self, form: Form) -> Changes:
        """Show one more row for an expert."""
        count = min(int(form["count"]) + 1, ROWS)
        return {
            "count": count,
            **self._method_shown(str(form["method"]), count),
            f"expert{count - 1}": gr.update(visible=True),
        }

    def suggest(
        self, form: Form, typed: gr.KeyUpData, request: gr.Request, token: Token
    ) -> Changes:
        """Offer ids of the Hub for what is being typed, once the keys rest."""
        if typed.key in _NOT_TYPING:
            return {}  # new choices would open the list again that was just left
        if not self._service.search.is_last(str(request.session_hash)):
            return {}
        text = str(typed.input_value or "")
        visitor = self._visitor(token)
        near = self.following.suggestions(visitor, secret_of(form))
        mine = [name for name in near if text.strip().lower() in name.lower()]
        found = dict.fromkeys([*mine, *self._service.search.ids(text, visitor)])
        return {"suggested": gr.update(choices=list(found)[:10])}

    def choose_method(self, form: Form) -> Changes:
        """Show the chosen method's own controls and what it is."""
        return self._method_shown(str(form["method"]), int(form["count"]))

    def choose_short(self, form: Form) -> Changes:
        """Take a method of the short list; that it changed shows the rest."""
        return {"method": str(form["short"])}

    def choose_output(self, form: Form) -> Changes:
        """Show the rank where the result is an adapter."""
        return {"adapter_rank": gr.update(visible=form["as"] == ADAPTER)}

    def plan(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Plan what the form asks for; what is no model is said at its field."""
        visitor = self._visitor(token)
        document = document_of({"namespace": visitor.name, **_given(form)})
        if not document["recipe"]["models"]:
            text = "Fill in a base and at least one expert, or try the example."
            return {"planned": "", "plan_html": notice(text, "warn"), **_said_at_fields(form)}
        address = caller(request)
        plan = self._service.plan(document, visitor, address)
        push_to = str(document["push_to"])
        ready = not plan["refused"]
        hindrance = self._hindrance(document, visitor, address) if ready else ""
        return {
            "planned": _planned(document) if ready else "",
            "plan_html": plan_html(
                plan,
                push_to=push_to,
                create_pr=bool(document.get("create_pr")),
                hindrance=hindrance,
                recipe=document["recipe"],
            ),
            "merge": gr.update(interactive=ready and not hindrance),
            "merge_note": "",
            **_said_at_fields(form),
        }

    def advise(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Say which methods suit the models that were planned, and offer these first."""
        usual = {"short": gr.update(choices=short_list(SHORT)), "advice": ""}
        if not form.get("planned"):
            return usual
        visitor = self._visitor(token)
        document = document_of({"namespace": visitor.name, **_given(form)})
        try:
            advice = self._service.advice({**document, "push_to": ""}, visitor, caller(request))
        except ResMergeError:
            return usual
        found = {
            one["method"]: f"{-one['points']:.1f} points behind the best of such groups"
            for one in advice.get("candidates") or ()
            if one["method"] in find_methods()
        }
        if not found:
            return {**usual, "advice": no_advice_html()}
        return {
            "advice": advice_html(advice),
            "short": gr.update(choices=short_list(found), value=str(form.get("method"))),
        }

    def merge(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Queue the merge that was planned."""
        visitor = self._visitor(token)
        document = document_of({"namespace": visitor.name, **_given(form)})
        if _planned(document) != form.get("planned"):
            text = "The form was changed since it was planned. Plan again, then merge."
            return {"merge_note": notice(text, "warn"), "merge": gr.update(interactive=False)}
        return self._submit(document, form, request, token)

    def compare(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Queue merges by several methods that are asked the same."""
        document = document_of(_given(form))
        if not document["recipe"]["models"]:
            text = "Fill in a base and at least one expert, or take an example."
            return {"merge_note": notice(text, "warn")}
        document = {**document, "push_to": "", "methods": list(form.get("methods") or ())}
        return self._submit(document, form, request, token)

    def from_code(self, form: Form, request: gr.Request) -> Changes:
        """Show how to ask for what is in the form from code."""
        document = document_of(_given(form))
        if not document["recipe"]["models"]:
            document = {**document, "recipe": examples()[0].recipe, "push_to": ""}
        return {"code": from_code(space_url(request), document, key=has_login())}

    def _submit(self, document: Form, form: Form, request: gr.Request, token: Token) -> Changes:
        visitor = self._visitor(token)
        remembered = dict(form.get("remembered") or {})
        remembered.setdefault("secret", secrets.token_urlsafe(32))
        try:
            asked = web_request(document, self._service.settings)
            how = {
                "key": secret_key(remembered["secret"]),
                "address": caller(request),
                "questions": str(document.get("questions") or ""),
            }
            if "methods" in document:
                job = self._service.compare(asked, document["methods"], visitor, **how)
            else:
                job = self._service.submit(asked, visitor, **how)
        except ResMergeError as exc:
            return {"merge_note": notice(said(exc))}
        remembered["job"] = job.id
        shown = self.following.attach(job.id, visitor, remembered["secret"], asked=True)
        return {**shown, "remembered": remembered, "merge_note": ""}

    def explore(self, form: Form, request: gr.Request, token: Token) -> Changes:
        """Open the report of one repository, or set two beside each other."""
        visitor = self._visitor(token)
        names = [str(form.get(key) or "").strip() for key in ("report_a", "report_b")]
        names = [name for name in names if name]
        if not names:
            return {"explored": notice("Write the repository of a merge.", "plain")}
        try:
            address = caller(request)
            opened = [self._service.report(name, visitor, address) for name in names]
        except ResMergeError as exc:
            return {"explored": notice(said(exc))}
        return {"explored": self.following.explored(opened)}

    def _visitor(self, token: Token) -> Visitor:
        return self._service.visitors.who_or_nobody(token.token if token else None)

    def _hindrance(self, document: Form, visitor: Visitor, address: str) -> str:
        """Return why Merge would not start what can be planned, and what to do; or nothing."""
        try:
            asked = web_request(document, self._service.settings)
            questions = str(document.get("questions") or "")
            self._service.check(asked, visitor, address, questions)
        except PublishError as exc:
            at_home = "" if on_space() else " Log in with “hf auth login”, and start this again."
            return said(exc) + at_home
        except ResMergeError as exc:
            return said(exc)
        return ""

    def _filled(self, fields: Changes) -> Changes:
        count = int(fields["count"])
        changes = {**fields, **self._method_shown(str(fields["method"]), count), "planned": ""}
        changes["base"] = gr.update(value=fields["base"] or None)
        beyond = str(fields.get(BEYOND) or "")
        changes[BEYOND] = gr.update(value=beyond, visible=bool(beyond))
        for number in range(ROWS):
            changes[f"expert{number}"] = gr.update(
                value=fields[f"expert{number}"] or None, visible=number < count
            )
            changes[f"weight{number}"]["value"] = fields.get(f"weight{number}", 1.0)
        return changes

    def _restored(self, kept: Changes) -> Changes:
        """Return what fills the form from what the browser kept; whatever else it says is left."""
        plain = {
            name: value
            for name, value in kept.items()
            if name in names() and isinstance(value, str | int | float)
        }
        if plain.get("method", DEFAULT_METHOD) not in find_methods():
            del plain["method"]
        rows = [number for number in range(ROWS) if plain.get(f"expert{number}")]
        count = max(2, *(number + 1 for number in rows)) if rows else 2
        models = {f"expert{number}": plain.get(f"expert{number}") for number in range(ROWS)}
        fields = {"base": "", "method": DEFAULT_METHOD, **plain, **models, "count": count}
        return self._filled(fields)

    def _method_shown(self, name: str, count: int) -> Changes:
        methods = find_methods()
        changes: Changes = {
            f"controls.{method}": gr.update(visible=method == name) for method in methods
        }
        chosen = methods.get(name)
        weighted = chosen is not None and chosen.weighted
        for number in range(ROWS):
            changes[f"weight{number}"] = gr.update(visible=weighted and number < count)
        changes["about_method"] = view.method_html(chosen) if chosen else ""
        changes["short"] = gr.update(value=name)
        return changes


def _said_at_fields(form: Form) -> Changes:
    """Return what each field of a model says below its name: what is wrong there, or the usual."""
    changes: Changes = {}
    method = find_methods().get(str(form.get("method")))
    base = None
    for name in MODELS:
        info = INFO.get(name, "")
        try:
            if text := str(form.get(name) or "").strip():
                ref = ModelRef.parse(text)
                check_id(ref)
                if name == "base":
                    base = ref.place
                elif ref.place == base and (method is None or method.base != "input"):
                    info = "⚠ This is the base: it counts as no expert."
        except RecipeError as exc:
            info = f"⚠ {said(exc)}"
        changes[name] = gr.update(info=info)
    return changes


def _planned(document: Mapping[str, Any]) -> str:
    """Return what tells one plan's request from another's; the browser keeps it."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _given(form: Form) -> Changes:
    return {key: value for key, value in form.items() if key != "namespace" or value}
