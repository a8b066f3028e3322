"""The page's handlers as plain functions, and the page that they are wired to."""

import functools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from loopback_hub import LoopbackHub
from resmerge_stream.errors import Remedy, StoppedError
from resmerge_stream.methods import find_methods, parameter_fields
from space import launch
from space.asked import web_request
from space.examples import examples
from space.explore import pinned_recipe
from space.jobs.records import ACTIVE, new_job
from space.page import fields, ui
from space.page.forms import document_of
from space.page.handlers import Handlers
from space.page.handlers import _said_at_fields as said_at_fields
from space.page.news import News
from space.settings import Settings
from tests.support.checkpoints import ROOT, run_python

PATIENCE_S = 180.0  # a busy machine is slow


def request(host="203.0.113.7", **query):
    """Return what gradio tells of a request."""
    client = SimpleNamespace(host=host)
    return SimpleNamespace(query_params=query, session_hash="page", headers={}, client=client)


NOBODY = request()
SETTINGS = Settings(folder=Path("unused"))
ALICE = gr.OAuthToken("t-alice", "openid", 0)
BOB = gr.OAuthToken("t-bob", "openid", 0)


@pytest.fixture
def handlers(service, monkeypatch):
    """The page's handlers; unfinished merges are not looked for on a Hub, which is not here."""
    made = Handlers(service, News(service))
    monkeypatch.setattr(made.following, "_on_hub", lambda visitor: [])
    monkeypatch.setattr(
        service.search,
        "own",
        lambda visitor, **wanted: [f"{visitor.name}/model"] if visitor.name else [],
    )
    return made


def value(change):
    """Return the value in a change, which may be an update."""
    return change.get("value") if isinstance(change, dict) else change


def form_after(changes, **more):
    """Return what the form sends after some changes."""
    form = dict.fromkeys([*fields.names(), "count"])
    for name, change in changes.items():
        if name in form:
            form[name] = value(change)
    return {**form, "rounding": "nearest", "visibility": "private", **more}


def test_the_built_in_way_from_choosing_to_files(service, handlers, monkeypatch):
    """Example, plan, merge, news until it is done, files, the form again from the report."""
    opened = handlers.load({"remembered": {}}, NOBODY, None)
    form = form_after(handlers.example({}, number=0))
    planned = handlers.plan(form, NOBODY, None)
    assert "This can be merged" in planned["plan_html"]
    assert planned["merge"]["interactive"]

    started = handlers.merge(
        {**form, "planned": planned["planned"], "remembered": opened["remembered"]},
        NOBODY,
        None,
    )

    assert started["follow"]["visible"]
    assert started["watching"]["active"]
    job, deadline = service.jobs.get(started["job"]), time.monotonic() + PATIENCE_S
    while News(service).since(job)["state"] != "done":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    seen = handlers.following.refresh(started, None)
    assert seen["watching"]["active"] is False
    assert "also as one archive" in seen["result"]
    assert "By layer and module" in seen["figures"]
    assert "model.safetensors</a>" in seen["files"]

    again = handlers.load({"remembered": started["remembered"]}, NOBODY, None)
    assert again["job"] == started["job"]
    assert "also as one archive" in again["result"]

    recipe = pinned_recipe(service.report(job.id, service.visitors.who(None)).report)
    monkeypatch.setattr(type(service.planners), "recipe", lambda *_: recipe)
    from_repository = form_after(handlers.paste({"yaml": "o/merged"}, None, None))
    assert document_of(from_repository)["recipe"]["models"] == document_of(form)["recipe"]["models"]


def test_what_changed_since_the_plan_is_planned_again(handlers):
    """Nothing is merged that was not planned as it is now."""
    form = form_after(handlers.example({}, number=0))
    planned = handlers.plan(form, NOBODY, None)["planned"]

    changes = handlers.merge(
        {**form, "seed": 7, "planned": planned, "remembered": {}}, NOBODY, None
    )

    assert "Plan again" in changes["merge_note"]
    assert "job" not in changes


@pytest.mark.parametrize(
    ("token", "push_to", "busy", "says"),
    [
        (None, "o/m", 0, "Sign in"),
        (ALICE, "", 0, "Name the result"),
        (ALICE, "alice/m", 3, "have 3 jobs"),
        (ALICE, "alice/m", 2, ""),
    ],
    ids=["nobody", "no name", "too many jobs", "ready"],
)
def test_the_plans_verdict_is_what_merge_would_say(
    service, handlers, monkeypatch, token, push_to, busy, says
):
    """The headline is green and the button on only where pressing it starts the merge."""
    recipe = {"base_model": "o/b", "models": ["o/e"]}
    for _ in range(busy):
        job = new_job({"recipe": recipe, "push_to": "alice/x"}, "alice", "")
        service.jobs._jobs[job.id] = job
    ready = {"method": None, "refused": False, "problems": [], "warnings": [], "tensors": 0,
             "sources": [], "seconds_estimate": 9.0}  # fmt: skip
    monkeypatch.setattr(type(service), "plan", lambda self, document, visitor, address: ready)
    monkeypatch.setattr(service.jobs, "submit", lambda *asked, **known: job_of_nobody())
    namespace, _, name = push_to.partition("/")
    form = form_after({}, base="o/b", expert0="o/e", count=1, method="resmerge", name=name)
    form |= {"namespace": namespace}

    planned = handlers.plan(form, NOBODY, token)
    merged = handlers.merge(
        {**form, "planned": planned["planned"], "remembered": {}}, NOBODY, token
    )

    assert planned["merge"]["interactive"] is not bool(says)
    assert ("This can be merged</b>" in planned["plan_html"]) is not bool(says)
    assert says in planned["plan_html"]
    assert says in merged["merge_note"]
    assert bool(merged["merge_note"]) is bool(says)


def job_of_nobody():
    """Return a job that no queue knows."""
    return new_job({"recipe": {"base_model": "o/b", "models": ["o/e"]}}, "", "")


def test_gradio_gives_no_value_that_a_button_has_already():
    """A button of its own number calls its handler with that number, and what gradio injects."""
    called = functools.partial(lambda form, token, number: {}, number=2)

    assert list(ui._signature(called, 1).parameters) == ["value0", "token"]


def test_a_refused_plan_cannot_be_merged(handlers):
    """The problem is on the page, and the button stays off."""
    form = form_after({}, base="/etc", expert0="o/e", count=1, method="resmerge")

    changes = handlers.plan(form, NOBODY, None)

    assert "cannot be merged" in changes["plan_html"]
    assert not changes["merge"]["interactive"]
    assert changes["planned"] == ""


def test_every_wrong_model_is_named_at_its_field(handlers):
    """All are named at once, each where it was written; a page of the Hub is a model."""
    form = form_after(
        {}, base="/etc", expert0="https://huggingface.co/o/e", expert1="../x", count=2,
        method="resmerge",
    )  # fmt: skip

    changes = handlers.plan(form, NOBODY, None)

    assert "/etc" in changes["plan_html"]
    assert "../x" in changes["plan_html"]
    assert "/etc" in changes["base"]["info"]
    assert "../x" in changes["expert1"]["info"]
    assert "⚠" not in changes["expert0"]["info"]


def test_an_outage_while_planning_says_to_plan_again(handlers, service, monkeypatch):
    """There is no job yet that could be continued, and no token is spoken of to a guest."""

    def fail(*asked):
        raise StoppedError("the Hub does not answer.", Remedy.CONTINUE)

    monkeypatch.setattr(type(service.planners), "plan", fail)
    form = form_after({}, base="o/b", expert0="o/e", count=1, method="resmerge")

    html = handlers.plan(form, NOBODY, None)["plan_html"]

    assert "lan again" in html
    assert "Continue" not in html
    assert "token" not in html


@pytest.mark.parametrize(("method", "is_said"), [("resmerge", True), ("linear", False)])
def test_the_base_among_the_experts_is_said_where_it_takes_no_part(handlers, method, is_said):
    """It is not dropped in silence; a method that merges the base too has nothing to say."""
    form = form_after({}, base="o/b", expert0="o/a", expert1="o/b", count=2, method=method)

    assert ("counts as no expert" in said_at_fields(form)["expert1"]["info"]) is is_said
    assert "⚠" not in said_at_fields(form)["expert0"]["info"]


def test_a_job_in_the_address_is_attached_for_its_owner_only(service, handlers):
    """A link shows a job to its owner; to others it says that there is none."""
    job = new_job({"recipe": {}, "push_to": "alice/m"}, "alice", "")
    job.state = "resumable"
    service.jobs._jobs[job.id] = job
    asking = request(job=job.id)

    mine = handlers.load({"remembered": {}}, asking, ALICE)
    other = handlers.load({"remembered": {}}, asking, BOB)

    assert mine["job"] == job.id
    assert mine["resume"]["visible"]
    assert mine["namespace"]["choices"] == ["alice", "team"]
    assert other["job"] == ""
    assert "no such job" in other["status"]
    assert not other["cancel"]["visible"]


def test_another_browser_sees_an_anonymous_job_but_cannot_cancel_it(service, handlers):
    """Without an account, the secret of the browser that started a job is what changes it."""
    form = form_after(handlers.example({}, number=0))
    planned = handlers.plan(form, NOBODY, None)["planned"]
    mine = handlers.merge({**form, "planned": planned, "remembered": {}}, NOBODY, None)
    theirs = {"job": mine["job"], "remembered": {"secret": "another"}}

    asking = request(job=mine["job"])
    shown = handlers.load({"remembered": theirs["remembered"]}, asking, None)
    refused = handlers.following.cancel(theirs, None)

    assert not shown["cancel"]["visible"]
    assert "no such job" in refused["act_note"]
    assert service.jobs.get(mine["job"]).state in {*ACTIVE, "done"}
    handlers.following.cancel({**theirs, "remembered": mine["remembered"]}, None)


def test_unfinished_merges_are_offered_to_their_owner(service, handlers):
    """Who signs in finds what can go on, the first chosen; others find nothing."""
    job = new_job({"recipe": {"base_model": "o/b", "models": [1]}, "push_to": "a/m"}, "alice", "")
    job.state = "cancelled"
    service.jobs._jobs[job.id] = job

    mine = handlers.following.look_for_unfinished({}, ALICE)
    other = handlers.following.look_for_unfinished({}, BOB)

    assert mine["chosen"]["value"] == f"job:{job.id}"
    assert f"?job={job.id}" in mine["mine"]
    assert not other["unfinished"]["visible"]


def test_models_are_suggested_before_anything_is_typed(service, handlers):
    """Those merged lately come first, then the account's own, then the built-in ones."""
    asked = {"recipe": {"base_model": "o/b", "models": [{"model": "o/a"}, "o/c"]}}
    job = new_job(asked, "alice", "")
    service.jobs._jobs[job.id] = job

    mine = handlers.following.look_for_unfinished({}, ALICE)
    other = handlers.following.look_for_unfinished({}, None)

    for field in fields.MODELS:
        assert mine[field]["choices"][:5] == ["o/b", "o/a", "o/c", "alice/model", "built-in/base"]
        assert other[field]["choices"][0] == "built-in/base"


def test_reports_are_picked_by_name(service, handlers):
    """Finished jobs come first, then the account's published merges; of others there is nothing."""
    job = new_job({"recipe": {"base_model": "o/b", "models": ["o/a"]}, "push_to": "a/m"}, "bob", "")
    job.state = "done"
    service.jobs._jobs[job.id] = job

    seen = [handlers.following.look_for_unfinished({}, token) for token in (BOB, ALICE, None)]

    for field in ("report_a", "report_b"):
        picked = [[name for _, name in changes[field]["choices"]] for changes in seen]
        assert picked == [[job.id, "bob/model"], ["alice/model"], []]


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_number_is_its_default(handlers, empty):
    """Whoever clears a parameter, the seed, a weight or the rank can still plan and merge."""
    form = form_after({**handlers.example({}, 0), "dtype": {"value": "same as the base"}})
    numbers = [name for name in form if name.startswith(("weight", "resmerge.", "head_regress"))]
    form |= dict.fromkeys([*numbers, "seed", "adapter_rank", "max_shard_size"], empty)

    planned = handlers.plan(form, NOBODY, None)

    assert planned["merge"]["interactive"], planned["plan_html"]


def test_how_it_is_published_is_one_choice():
    """A pull request asks for nothing that it cannot have; the rest says what it replaces."""
    form = {"base": "o/b", "expert0": "o/a", "count": 1, "name": "me/m", "visibility": "public",
            "collection": " me/merges-1 ", "discuss": True}  # fmt: skip

    asked = {
        publish: document_of({**form, "publish": publish})
        for publish in ("a new repository", "an update", "a pull request")
    }

    found = {publish: web_request(each, SETTINGS).publication for publish, each in asked.items()}
    assert found["a new repository"].words() == [
        "--push-to", "me/m", "--public", "--collection", "me/merges-1", "--discuss"
    ]  # fmt: skip
    assert "--update" in found["an update"].words()
    assert found["a pull request"].words() == ["--push-to", "me/m", "--create-pr"]


def test_a_pasted_recipe_fills_the_form(handlers):
    """Models, method and parameters of a mergekit recipe are in the form afterwards."""
    text = """
    merge_method: ties
    base_model: o/b
    models: [{model: o/a, parameters: {weight: 0.5}}, {model: o/c@v1}]
    parameters: {density: 0.3}
    dtype: bfloat16
    """

    form = form_after(handlers.paste({"yaml": text}, None, None), name="m", namespace="me")

    recipe = document_of(form)["recipe"]
    assert recipe["merge_method"] == "ties"
    assert recipe["models"][1] == {"model": "o/c@v1"}
    assert recipe["parameters"]["density"] == 0.3


MERGEKITS = (
    "merge_method: ties\nbase_model: o/b\nmodels:\n"
    "  - model: o/a\n    parameters: {weight: 0.5}\n  - model: o/c\n"
)
# In a process of its own: the client reads once where the Hub is.
PASTE = """
import json, sys
from pathlib import Path
from space.page.handlers import Handlers
from space.page.news import News
from space.service import Service
from space.settings import Settings
from tests.space.test_handlers import form_after
from space.page.forms import document_of

service = Service.of(Settings(folder=Path(sys.argv[1]), prompts=0))
page = Handlers(service, News(service))
pasted = [page.paste({"yaml": place}, None, None) for place in sys.argv[2:]]
found = [document_of(form_after(changes))["recipe"] for changes in pasted]
service.close()
print(json.dumps({"recipes": found, "said": [changes["pasted"] for changes in pasted]}))
"""


def test_a_model_that_another_tool_merged_fills_the_form(monkeypatch, tmp_path):
    """Without a report of ours, the recipe in a repository's file or card is taken; where there is
    none, that is said."""
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.add_user("alice")
        for name, file, text in (
            ("file", "mergekit_config.yml", MERGEKITS),
            ("card", "README.md", f"# A merge\n\n```yaml\n{MERGEKITS}```\n"),
            ("none", "README.md", "# A model\n"),
        ):
            hub.add_repo(f"alice/{name}", {file: text.encode()})
        for key, setting in hub.env(xet=False, home=tmp_path / "home").items():
            monkeypatch.setenv(key, setting)
        places = ("alice/file", "https://huggingface.co/alice/card", "alice/none", "alice/nothing")
        done = run_python(PASTE, str(tmp_path / "space"), *places)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for recipe in found["recipes"][:2]:
        assert (recipe["merge_method"], recipe["base_model"]) == ("ties", "o/b")
        assert [model["model"] for model in recipe["models"]] == ["o/a", "o/c"]
    assert "holds no recipe" in found["said"][2]
    assert "no repository alice/nothing" in found["said"][3]


def test_what_the_form_cannot_show_is_said(handlers):
    """A paste names what goes over the fields; another recipe takes it away again."""
    text = """
    merge_method: ties
    base_model: o/b
    models: [{model: o/a, parameters: {density: 0.5}}]
    parameters: {lambda: [0.5, 1.0]}
    tokenizer_source: union
    """

    changes = handlers.paste({"yaml": text}, None, None)
    after = handlers.example({}, number=0)

    for words in ("lambda by layer or module", "density of o/a", "the tokenizer"):
        assert words in changes["pasted"]
    assert changes["beyond"]["visible"]
    assert (value(after["beyond"]), after["beyond"]["visible"]) == ("", False)


@pytest.mark.parametrize("text", ["", "a: [", "base_model: /etc\nmodels: [o/e]", "slices: []"])
def test_a_wrong_paste_says_what_is_wrong(handlers, text):
    """The form stays as it is, and the reason is told."""
    changes = handlers.paste({"yaml": text}, None, None)

    assert set(changes) == {"pasted"}
    assert "rm-bad" in changes["pasted"]


def test_a_row_for_one_more_expert(handlers):
    """The next row is shown, with its weight where the method has weights."""
    more = handlers.add_row({"count": 2, "method": "task_arithmetic"})

    assert [more["count"], more["expert2"]["visible"]] == [3, True]
    assert [more["weight2"]["visible"], more["weight3"]["visible"]] == [True, False]


def test_what_the_browser_kept_fills_the_form_and_nothing_else(handlers):
    """Fields come back as they were; what is no field, or no method, is left out."""
    kept = {"base": "o/b", "expert2": "o/c", "method": "none", "job": "x", "seed": [1]}

    changes = handlers.load({"remembered": {}, "kept": kept}, NOBODY, None)

    assert [value(changes["base"]), value(changes["expert2"]), changes["count"]] == [
        "o/b",
        "o/c",
        3,
    ]
    assert changes["controls.head_regression"]["visible"]
    assert "seed" not in changes
    assert changes["job"] == ""


def test_the_example_is_merged_with_one_click(service, handlers):
    """The form shows it, and its job is queued for whoever clicked, into files."""
    shown = handlers.try_example({"remembered": {"secret": "s"}}, NOBODY, None)
    job = service.jobs.get(shown["job"])

    assert shown["follow"]["visible"]
    assert value(shown["base"]) == "built-in/base"
    assert job.asked["push_to"] == ""
    assert [found.id for found in service.jobs.of("", job.key)] == [job.id]
    handlers.following.cancel({"job": job.id, "remembered": shown["remembered"]}, None)


def test_every_method_has_its_own_controls(handlers):
    """Choosing a method shows its controls alone, and a control is there for each of its fields."""
    methods = find_methods()

    for name in methods:
        changes = handlers.choose_method({"method": name, "count": 2})
        shown = [m for m in methods if changes[f"controls.{m}"]["visible"]]
        assert shown == [name]
    names = set(fields.names())
    assert {f"{n}.{key}" for n, m in methods.items() for key in parameter_fields(m)} <= names


def test_exploring_needs_a_repository_id(handlers):
    """A path or an unknown job is refused with a message, before anything is requested."""
    for name in ("/etc/passwd", "../x", "x" * 43):
        changes = handlers.explore({"report_a": name, "report_b": ""}, None, None)
        assert "rm-bad" in changes["explored"]


def test_readme_names_the_gradio_that_is_installed():
    """The Space is built with the version of gradio that the tests ran with."""
    import yaml

    front = yaml.safe_load((ROOT / "README.md").read_text().split("---")[1])
    required = (ROOT / "requirements.txt").read_text()

    assert front["sdk_version"] == gr.__version__
    assert f"gradio[oauth,mcp]=={gr.__version__}" in required
    assert (front["sdk"], front["app_file"], front["hf_oauth"]) == ("gradio", "app.py", True)
    assert front["hf_oauth_scopes"] == [
        "contribute-repos",
        "gated-repos",
        "write-discussions",
        "write-collections",
        "read-repos",
    ]


def test_nothing_is_open_that_a_space_does_not_need(service, monkeypatch):
    """No folder is served, no history kept in the browser, next to nothing can be uploaded."""
    seen = {}

    def note(page, **options):
        seen.update(options)
        return None, "http://127.0.0.1", None

    monkeypatch.setattr(launch, "Service", SimpleNamespace(of=lambda settings: service))
    page = SimpleNamespace(launch=lambda **options: note(page, **options))
    monkeypatch.setattr(launch, "build_page", lambda service, news: page)

    launch.launch(service.settings, block=False)

    assert seen["allowed_paths"] == []
    assert seen["run_history"] is False
    assert seen["strict_cors"] is True
    assert seen["max_file_size"] == "1kb"


def test_an_example_is_there_for_each_button():
    """There are four; those that are published have a name for the result."""
    assert [bool(example.name) for example in examples()] == [False, True, True, False]


def test_the_rank_is_asked_for_where_the_result_is_an_adapter(handlers):
    """The field is shown for an adapter alone, and one that is hidden asks for nothing."""
    form = {"base": "o/b", "expert0": "o/a", "count": 1, "adapter_rank": "8"}

    shown = [handlers.choose_output({"as": kind})["adapter_rank"] for kind in ("adapter", "model")]
    sent = [document_of({**form, "as": kind})["options"] for kind in ("adapter", "model")]

    assert [change["visible"] for change in shown] == [True, False]
    assert sent == [{"as": "adapter", "adapter_rank": "8"}, {"as": "model"}]
