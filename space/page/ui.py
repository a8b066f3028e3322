"""The page: what stands where, and which handler each button calls."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from resmerge_stream.methods import find_methods

from ..endpoints import add_endpoints
from ..examples import examples
from ..identity import on_space
from ..questions import MOST_METHODS
from ..service import Service
from . import fields
from .following import Following
from .handlers import Handlers
from .news import News
from .texts import SKIP, TRY, heading, title

CSS, _WATCH, _KEEP, _FILE = (
    Path(__file__).with_name(name) for name in ("style.css", "watch.js", "keep.js", "file.js")
)
TICK_S = 5.0
# Afterwards what changes was changed by a visitor; what a reload brought back is shown at once.
_READY = "(...values) => {{ {leave} window.resmergeReady = true; return (\n{keep})(...values); }}"
# Gradio's dropdown opens its list again after Tab has left it: it must not hear of that key.
_LEAVE = """window.addEventListener('keydown', (event) => {
  const list = event.target.closest?.('input[role="combobox"], input[role="listbox"]');
  if (event.key === 'Tab' && list) event.stopPropagation();
}, true);
window.addEventListener('click', async (event) => {
  const button = event.target.closest?.('.rm-copy');
  if (!button) return;
  await navigator.clipboard.writeText(button.parentElement.querySelector('code').textContent);
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
});"""
# Plan stands at the end of a long form, and its answer below it, out of a small window.
_SHOW_PLAN = """() => { setTimeout(() => {
  const plan = document.getElementById('plan');
  if (plan.getBoundingClientRect().bottom + 200 > window.innerHeight) plan.scrollIntoView();
}, 200); }"""
# What Merge says when it starts nothing stands above the form.
_SHOW_MERGE = """() => setTimeout(() => {
  const said = document.querySelector('#merge-note .rm-note');
  (said || document.getElementById('follow'))?.scrollIntoView();
}, 100)"""
_LOST = '<p id="lost" class="rm-lost" role="status"></p>'
# The browser decodes what it keeps, so this is in the page: it hides nothing, it only must not
# change from one start of the server to the next.
_NO_SECRET = "resmerge-stream"

Parts = dict[str, Any]


def build_page(service: Service, news: News) -> gr.Blocks:
    """Return the app: four tabs for people, endpoints for programs.

    Args:
        service: behind it.
        news: what a running job shows; its route is for the server that runs this.
    """
    handlers = Handlers(service, news)
    with gr.Blocks(
        title="ResMerge Stream", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as app:
        parts: Parts = {
            "remembered": gr.BrowserState({}, storage_key="resmerge-stream", secret=_NO_SECRET),
            "kept": gr.BrowserState({}, storage_key="resmerge-form", secret=_NO_SECRET),
            # No gr.State: the browser needs both, and a server started anew knows neither.
            "job": gr.Textbox("", label="Job", visible="hidden"),
            "state": gr.Textbox("", label="State of the job", visible="hidden"),
            "planned": gr.Textbox("", label="What was planned", visible="hidden"),
            "count": gr.Number(2, label="Experts shown", precision=0, visible="hidden"),
            "watching": gr.Timer(TICK_S, active=False),
        }
        _header(parts)
        with gr.Tab("Merge"):
            _now(parts)
            with gr.Row(elem_id="try"):
                parts["try"] = gr.Button(
                    "Try the example", variant="primary", scale=0, min_width=220
                )
                gr.HTML(f'<p class="rm-soft">{TRY}</p>', container=False, padding=False)
            parts["merge_note"] = gr.HTML(container=False, padding=False, elem_id="merge-note")
            with gr.Accordion("Merge your own", open=True, elem_id="form") as parts["form"]:
                fields.choose(parts)
                _plan_and_merge(parts)
        with gr.Tab("My jobs") as parts["my_jobs"]:
            parts["mine"] = gr.HTML(label="My jobs", container=False, padding=False)
            with gr.Row():
                parts["refresh"] = gr.Button("Refresh", size="sm", scale=0, min_width=160)
        with gr.Tab("Explore") as parts["explore"]:
            _explore(parts)
        with gr.Tab("From code") as parts["from_code"]:
            parts["code"] = gr.HTML(label="From code", container=False, padding=False)
        _wire(app, parts, handlers)
        add_endpoints(app, service)
    app.queue(max_size=400, default_concurrency_limit=16)
    page: gr.Blocks = app
    return page


def _header(parts: Parts) -> None:
    gr.HTML(SKIP, container=False, padding=False, elem_classes="rm-first")
    with gr.Row(equal_height=True, elem_id="head"):
        gr.HTML(title(), container=False, padding=False, elem_classes="rm-title", min_width=320)
        if on_space():
            with gr.Column(min_width=240, scale=0):
                gr.LoginButton(size="sm", logout_value="Sign out ({})")
                gr.DuplicateButton("Duplicate this Space", size="sm")
    parts["who"] = gr.HTML(label="Account", container=False, padding=False)


_ACTS: tuple[tuple[str, str, Literal["stop", "primary", "secondary"]], ...] = (
    ("cancel", "Cancel", "stop"),
    ("resume", "Continue", "primary"),
    ("discard", "Delete the partial result", "secondary"),
)


def _now(parts: Parts) -> None:
    """Add what concerns the visitor now: the job that runs or ended, and what can be continued."""
    with gr.Column(visible=False, elem_id="follow") as parts["follow"]:
        gr.HTML(heading("Your merge"), container=False, padding=False)
        gr.HTML(_LOST, container=False, padding=False)
        parts["status"] = gr.HTML(label="Progress", container=False, padding=False)
        with gr.Row():
            # As wide as "Try the example", not as the page: none is what a visitor came for.
            for name, label, variant in _ACTS:
                parts[name] = gr.Button(
                    label, variant=variant, visible=False, scale=0, min_width=220
                )
        parts["act_note"] = gr.HTML(container=False, padding=False)
        with gr.Column(visible=False) as parts["done"]:
            parts["result"] = gr.HTML(label="Result", container=False, padding=False)
            parts["files"] = gr.HTML(label="Files to download", container=False, padding=False)
            parts["figures"] = gr.HTML(label="What was decided", container=False, padding=False)
        parts["gates"] = gr.HTML(label="Tensors so far", container=False, padding=False)
        with gr.Accordion("Log", open=False):
            parts["log"] = gr.Textbox(
                label="Log, times in UTC", lines=12, max_lines=12, interactive=False
            )
        with gr.Row():
            parts["link"] = gr.HTML(container=False, padding=False)
            parts["dismiss"] = gr.Button("New merge", size="sm", scale=0, min_width=140)
    with gr.Group(visible=False) as parts["unfinished"]:
        parts["chosen"] = gr.Dropdown([], label="Your unfinished merges")
        parts["go_on"] = gr.Button("Continue this merge", variant="primary")
        parts["go_on_note"] = gr.HTML(container=False, padding=False)


def _plan_and_merge(parts: Parts) -> None:
    with gr.Row():
        parts["plan"] = gr.Button("Plan", variant="primary", elem_id="plan")
        parts["merge"] = gr.Button("Merge", variant="primary", interactive=False, elem_id="merge")
    gr.HTML(
        '<p class="rm-soft">Plan reads headers only, a few megabytes. Merge goes on when you close '
        "the page.</p>",
        container=False,
        padding=False,
    )
    parts["plan_html"] = gr.HTML(label="Plan", container=False, padding=False, elem_id="answer")
    parts["advice"] = gr.HTML(label="Advice", container=False, padding=False)
    parts["methods"] = gr.Dropdown(
        [(method.title, name) for name, method in find_methods().items()],
        value=list(fields.SHORT), label="Or compare methods, 2 to 4", multiselect=True,
        max_choices=MOST_METHODS,
        info="base, experts and each merge are asked the same questions; no model is kept",
    )  # fmt: skip
    parts["compare"] = gr.Button("Compare", elem_id="compare")


def _explore(parts: Parts) -> None:
    gr.HTML(
        '<p class="rm-soft">Every merge by this tool keeps a report: its scores, its settings, and '
        "what was decided for each tensor. Open one, or compare two.</p>",
        container=False,
        padding=False,
    )
    with gr.Row():
        for name, label in (("report_a", "Merged model"), ("report_b", "Compare with (optional)")):
            parts[name] = gr.Dropdown(
                [], value=None, label=label, allow_custom_value=True, filterable=True,
                info="one of your merges, or any owner/name", min_width=320,
            )  # fmt: skip
    parts["open"] = gr.Button("Open", variant="primary", elem_id="open-report")
    parts["explored"] = gr.HTML(label="Report", container=False, padding=False)


_JOB = [
    "job", "state", "watching", "follow", "status", "cancel", "resume", "discard",
    "act_note", "link", "gates", "log", "done", "result", "files", "figures", "form",
]  # fmt: skip
_UNFINISHED = ["unfinished", "chosen", "mine", "report_a", "report_b", *fields.MODELS]


def _wire(app: gr.Blocks, parts: Parts, handlers: Handlers) -> None:
    on = functools.partial(_on, parts)
    _wire_form(parts, handlers, on)
    _wire_merge(parts, handlers, on)
    _wire_job(parts, handlers.following, on)
    following, filled = handlers.following, fields.filled()
    loaded = [*_JOB, *filled, "remembered", "who", "pasted"]
    on(app.load, handlers.load, ["remembered", "kept"], loaded).then(
        None,
        [parts[name] for name in fields.names()],
        [parts["kept"], parts["chips"]],
        js=_READY.format(leave=_LEAVE, keep=_keep(parts)),
        api_visibility="private",
    )
    on(app.load, following.look_for_unfinished, ["remembered"], _UNFINISHED)
    for look in (parts["my_jobs"].select, parts["explore"].select, parts["refresh"].click):
        on(look, following.look_for_unfinished, ["remembered"], _UNFINISHED, busy="mine")
    form = [*fields.names(), "count"]
    on(parts["from_code"].select, handlers.from_code, form, ["code"])
    on(
        parts["open"].click,
        handlers.explore,
        ["report_a", "report_b"],
        ["explored"],
        busy="explored",
    )


def _wire_form(parts: Parts, handlers: Handlers, on: Callable[..., Any]) -> None:
    """Wire what fills the form, and what keeps it."""
    filled = fields.filled()
    gr.on(
        [parts[name].change for name in fields.names()],
        None,
        [parts[name] for name in fields.names()],
        [parts["kept"], parts["chips"]],
        js=_keep(parts),
        queue=False,
        api_visibility="private",
    )
    for number, _ in enumerate(examples()):
        choose = functools.partial(handlers.example, number=number)
        on(parts[f"example{number}"].click, choose, [], filled)
    on(parts["fill"].click, handlers.paste, ["yaml"], [*filled, "pasted"])
    parts["file"].click(None, None, parts["yaml"], js=_FILE.read_text(), api_visibility="private")
    on(parts["add"].click, handlers.add_row, ["count", "method"], filled)
    for name in fields.MODELS:
        renamed = {"suggested": parts[name], "remembered": parts["remembered"]}
        _on(
            renamed,
            parts[name].key_up,
            handlers.suggest,
            ["remembered"],
            ["suggested"],
            quick=True,
            mode="multiple",
        )
    on(parts["short"].input, handlers.choose_short, ["short"], ["method"], quick=True)
    on(parts["method"].change, handlers.choose_method, ["method", "count"], filled, quick=True)
    on(parts["as"].change, handlers.choose_output, ["as"], ["adapter_rank"], quick=True)


def _wire_merge(parts: Parts, handlers: Handlers, on: Callable[..., Any]) -> None:
    """Wire Plan, Merge and *Try the example*."""
    form, filled = [*fields.names(), "count"], fields.filled()
    planned = ["planned", "plan_html", "merge", "merge_note", *fields.MODELS]
    parts["plan"].click(None, js=_SHOW_PLAN, api_visibility="private")
    shown = on(parts["plan"].click, handlers.plan, form, planned, busy="plan_html").then(
        None, js=_SHOW_PLAN, api_visibility="private"
    )
    on(shown.then, handlers.advise, [*form, "planned"], ["advice", "short"])
    merge = [*form, "planned", "remembered"]
    started = [*_JOB, "remembered", "merge", "merge_note"]
    on(parts["merge"].click, handlers.merge, merge, started, busy="merge_note").then(
        None, js=_SHOW_MERGE
    )
    compared = [*form, "methods", "remembered"]
    on(parts["compare"].click, handlers.compare, compared, started, busy="merge_note").then(
        None, js=_SHOW_MERGE
    )
    tried = list(dict.fromkeys([*started, *filled]))
    on(parts["try"].click, handlers.try_example, ["remembered"], tried, busy="merge_note").then(
        None, js=_SHOW_MERGE
    )


def _wire_job(parts: Parts, following: Following, on: Callable[..., Any]) -> None:
    """Wire the job that is shown: its news and its buttons."""
    asked, told = ["job", "state", "log", "gates"], ["state", "status", "log", "gates"]
    parts["watching"].tick(
        None, [parts[name] for name in asked], [parts[name] for name in told], js=_WATCH.read_text()
    )
    on(parts["state"].change, following.refresh, ["job", "remembered"], _JOB, quick=True)
    for name, _, _ in _ACTS:
        on(parts[name].click, getattr(following, name), ["remembered", "job"], _JOB)
    on(parts["dismiss"].click, following.dismiss, ["remembered"], [*_JOB, "remembered", "name"])
    continued = [*_JOB, *_UNFINISHED, "remembered", "go_on_note"]
    on(parts["go_on"].click, following.go_on, ["chosen", "remembered"], continued)


def _keep(parts: Parts) -> str:
    """Return the script that keeps the form, with its fields and what each says at first."""
    advanced = set(fields.names()) - {"method", "namespace", "name", "base"}
    known = [
        {
            "name": name,
            "value": parts[name].value,
            "label": parts[name].label
            if name in advanced and not name.startswith(("expert", "weight"))
            else parts[name].label * name.startswith("weight"),
        }
        for name in fields.names()
    ]
    return _KEEP.read_text().replace("FIELDS", json.dumps(known))


def _on(
    parts: Parts,
    event: Callable[..., Any],
    handler: Callable[..., dict[str, Any]],
    inputs: list[str],
    outputs: list[str],
    *,
    quick: bool = False,
    busy: str = "",
    mode: Literal["once", "multiple", "always_last"] | None = None,
) -> Any:
    """Call a handler on an event with the named values; what it returns changes the named parts.

    Args:
        parts: the page's components by name.
        event: such as a button's ``click``.
        handler: takes the values by name, and what gradio injects; returns changes by name.
        inputs: the names of its values.
        outputs: the names of what it may change.
        quick: not through the queue, and without any sign of waiting.
        busy: which part shows that something is being done.
        mode: what happens to events while one is served; once, or the last when quick.

    Returns:
        What gradio returns of an event, for what follows it.
    """

    def run(*values: Any) -> Any:
        given, special = values[: len(inputs)], values[len(inputs) :]
        changes = handler(dict(zip(inputs, given, strict=True)), *special)
        if unknown := set(changes) - set(outputs):
            raise KeyError(f"{handler} changes what is not among its outputs: {unknown}")
        found = [changes.get(name, gr.skip()) for name in outputs]
        return found if len(found) > 1 else found[0]

    signature = _signature(handler, len(inputs))
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return event(
        run,
        [parts[name] for name in inputs],
        [parts[name] for name in outputs],
        api_visibility="private",
        queue=not quick,
        show_progress="full" if busy else "hidden",
        show_progress_on=parts[busy] if busy else None,
        trigger_mode=mode or ("always_last" if quick else "once"),
    )


def _signature(handler: Callable[..., Any], count: int) -> inspect.Signature:
    """Return a signature of so many plain values, then what gradio shall inject."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    plain = [inspect.Parameter(f"value{i}", kind, annotation=Any) for i in range(count)]
    _, *others = inspect.signature(handler).parameters.values()
    # What a partial has given already is keyword-only, and not for gradio to inject.
    injected = [parameter for parameter in others if parameter.kind is kind]
    special = [parameter.replace(kind=kind) for parameter in injected]
    return inspect.Signature([*plain, *special])
