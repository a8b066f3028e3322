"""What a visitor may ask for, and what is refused before anything is requested."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from resmerge_stream.errors import PublishError, RecipeError, StoppedError
from resmerge_stream.experts.group import built_in_folders
from resmerge_stream.methods import build_method, find_methods, parameter_fields
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import recipe_from_dict
from resmerge_stream.planning.resolve import Resolver
from resmerge_stream.run.engine import run_merge
from space import identity
from space.asked import needs_account, web_recipe, web_request
from space.examples import examples, is_built_in, web_names
from space.explore import pinned_recipe
from space.identity import Visitor, Visitors
from space.jobs.planning import Allowance
from space.page.fields import names
from space.page.forms import document_of, field_name, form_of
from space.settings import Settings, read_settings
from tests.support.checkpoints import make_group


@pytest.fixture
def settings(tmp_path):
    """Settings of a Space in an empty folder."""
    return Settings(folder=tmp_path, max_experts=3)


@pytest.mark.parametrize(
    "name",
    ["/etc", "~/models", "../base", "./org/base", "org", "org/a/b", "resmerge_stream/methods",
     "loopback_hub", "https://x.y/z", "built-in/../base", "built-in/nothing", "a b/c", ""],
)  # fmt: skip
def test_no_path_is_accepted(name, settings):
    """A model is a repository id or a built-in one; folders are refused, even with such names."""
    with pytest.raises(RecipeError):
        web_recipe({"base_model": name, "models": ["org/expert"]}, settings)
    with pytest.raises(RecipeError):
        web_recipe({"base_model": "org/base", "models": [{"model": name}]}, settings)
    with pytest.raises(RecipeError):
        web_request(
            {"recipe": {"base_model": "o/b", "models": ["o/e"]},
             "options": {"tokenizer_from": name or "/"}},
            settings,
        )  # fmt: skip


@pytest.mark.parametrize(
    "document",
    [
        None, [], "a: [", "x" * 40_000, {"base_model": "o/b", "models": ["o/e"] * 4},
        {"base_model": "o/b", "models": ["o/e"], "slices": [{}]}, 
        {"base_model": "o/b@..", "models": 1},
        {"base_model": "o/b", "models": [{"model": "o/e", "parameters": {"weight": "x"}}]},
        {"base_model": {1: 2}, "models": ["o/e"]}, {"base_model": "o/b", "models": [object()]},
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(document, settings):
    """Malformed, too large, too many experts, unknown keys: refused with a message."""
    with pytest.raises(RecipeError):
        web_recipe(document, settings)


@pytest.mark.parametrize(
    "extra",
    [{"push_to": "nowhere"}, {"push_to": "a/../b"}, {"push_to": 7}, {"public": "yes"},
     {"update": 1}, {"options": {"seed": -1}}, {"options": {"seed": True}}, {"options": ["x"]},
     {"options": {"max_shard_size": "lots"}}, {"options": {"out": "/tmp"}},
     {"options": {"rounding": "up"}}],
)  # fmt: skip
def test_wrong_options_are_refused(extra, settings):
    """Targets, visibility and options are checked like the recipe."""
    with pytest.raises(RecipeError):
        web_request({"recipe": {"base_model": "o/b", "models": ["o/e"]}, **extra}, settings)


def test_what_was_asked_survives_its_record(settings):
    """What a record keeps asks for the same again."""
    document = {
        "recipe": {"base_model": "o/b@v1", "models": ["o/e"], "parameters": {"rank": 2}},
        "options": {"seed": 5, "max_shard_size": "2GB", "rounding": "stochastic"},
        "push_to": "me/m", "public": True, "update": True,
    }  # fmt: skip

    asked = web_request(document, settings)

    assert web_request(asked.to_dict(), settings) == asked
    assert asked.options.max_shard_bytes == 2_000_000_000
    assert asked.publication is not None
    assert asked.publication.update


def test_only_the_built_in_group_needs_no_account(settings):
    """A merge of built-in models into files is free; a repository on either side is not."""
    first = examples()[0]
    free = {"recipe": {"base_model": first.base, "models": list(first.experts)[:3]}}

    assert not needs_account(web_request(free, settings))
    assert needs_account(web_request({**free, "push_to": "me/m"}, settings))
    mixed = {"recipe": {"base_model": first.base, "models": ["org/e"]}}
    assert needs_account(web_request(mixed, settings))


def test_the_web_never_sees_where_built_in_models_lie():
    """Texts for the web have the built-in names in place of folders."""
    text = " and ".join(built_in_folders().values())

    assert web_names(text) == " and ".join(built_in_folders())


def test_every_example_is_one_that_the_web_accepts(tmp_path):
    """The examples pass the checks, and those of built-in models need nothing."""
    settings = Settings(folder=tmp_path)
    recipes = [
        web_recipe({"base_model": e.base, "models": list(e.experts)}, settings) for e in examples()
    ]

    assert [is_built_in(recipe) for recipe in recipes] == [True, False, False, True]


def test_a_form_shows_the_recipe_that_it_was_filled_from(tmp_path):
    """A recipe that fills the form is asked for by the form, parameters and weights included."""
    recipe = web_recipe(
        {"base_model": "o/b@v1", "merge_method": "task_arithmetic", "dtype": "float32",
         "models": [{"model": "o/a", "parameters": {"weight": 0.5}}, "o/c@abc"]},
        Settings(folder=tmp_path),
    )  # fmt: skip

    document = document_of({**form_of(recipe), "name": "m", "namespace": "me"})

    assert web_recipe(document["recipe"], Settings(folder=tmp_path)).to_dict() == recipe.to_dict()
    assert document["push_to"] == "me/m"


BEYOND_THE_FIELDS = {
    "gradients and filters": """
        {merge_method: resmerge, base_model: o/b, models: [o/a, o/c],
         parameters: {rho: [{filter: mlp, value: [0.1, 0.3]}, {value: 0.2}], rank: [1, 4]}}""",
    "a model's own": """
        {merge_method: ties, base_model: o/b, parameters: {lambda: 0.3, normalize: false}, models: [
         {model: o/a, parameters: {weight: 0.5, density: 0.4}},
         {model: o/c, parameters: {weight: [0.2, 1], density: [0.1, 0.9]}}]}""",
    "a model twice": """
        {merge_method: ties, base_model: o/b, models: [
         {model: o/a, parameters: {density: 0.4}}, {model: o/a, parameters: {density: 0.6}}]}""",
    "no weight": """
        {merge_method: task_arithmetic, base_model: o/b, models: [
         {model: o/a, parameters: {weight: 0}}, o/c]}""",
    "a weight of all": """
        {merge_method: task_arithmetic, base_model: o/b, parameters: {weight: 0.3}, models: [
         {model: o/a, parameters: {weight: 1.0}}, o/c]}""",
    "the base among the models": """
        {merge_method: linear, base_model: o/b, models: [
         {model: o/b, parameters: {weight: 0.5}}, {model: o/c, parameters: {weight: 2}}]}""",
    "no base": "{merge_method: passthrough, models: [{model: o/a, parameters: {scale: 0.4}}]}",
    "tokens": """
        {merge_method: ties, base_model: o/b, models: [o/a], chat_template: auto,
         tokenizer: {source: union, tokens: {<x>: {source: o/a, force: true}}}}""",
    "a preset": "{merge_method: 'ties:paper', base_model: o/b, models: [o/a]}",
    "old names": """
        {merge_method: task_arithmetic, base_model: o/b, models: [o/a],
         parameters: {scale: 0.5, reduce: mean}}""",
}


@pytest.mark.parametrize("text", BEYOND_THE_FIELDS.values(), ids=BEYOND_THE_FIELDS)
def test_what_no_field_shows_is_kept(text, tmp_path):
    """A recipe that fills the form is merged as it was written, whatever it says."""
    recipe = web_recipe(text, Settings(folder=tmp_path))

    form = {**form_of(recipe), "name": "m", "namespace": "me"}
    again = web_recipe(document_of(form)["recipe"], Settings(folder=tmp_path))

    tensors = ["model.embed_tokens.weight", *(f"layers.{i}.mlp.up.weight" for i in range(3))]
    assert Resolver(again).each(tensors) == Resolver(recipe).each(tensors)
    assert again.models == recipe.models
    assert (again.tokenizer, again.chat_template, again.base_listed) == (
        recipe.tokenizer, recipe.chat_template, recipe.base_listed,
    )  # fmt: skip


def test_what_belongs_to_another_method_goes_with_it(tmp_path):
    """After another method is chosen its own fields count; the tokens stay as they were."""
    text = """
        {merge_method: ties, base_model: o/b, tokenizer_source: union,
         parameters: {density: [0, 1]}, models: [{model: o/a, parameters: {weight: [0.2, 1]}}]}"""
    form = form_of(web_recipe(text, Settings(folder=tmp_path)))

    recipe = document_of({**form, "method": "mean"})["recipe"]

    assert recipe == {
        "merge_method": "mean", "base_model": "o/b", "models": [{"model": "o/a"}],
        "tokenizer": {"source": "union"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        '{"merge_method": "ties", "models": 1}',
        '{"merge_method": "ties", "models": [{"model": "o/a", "parameters": 1}], "parameters": []}',
    ],
)
def test_what_is_kept_may_be_anything(text):
    """A field that somebody wrote by hand adds nothing, and fails nothing."""
    form = {"base": "o/b", "expert0": "o/a", "count": 1, "method": "ties", "beyond": text}

    assert document_of(form)["recipe"]["models"] == [{"model": "o/a"}]


@pytest.mark.parametrize("method", find_methods())
def test_what_the_form_sends_of_a_method_is_what_a_recipe_says(method, tmp_path):
    """Every control has the recipe's word for its parameter, and its default is the method's."""
    kind = find_methods()[method]
    controls = {
        field_name(method, key): field.default for key, field in parameter_fields(kind).items()
    }
    form = {"base": "o/b", "expert0": "o/a", "count": 1, "method": method, **controls}

    recipe = web_recipe(document_of(form)["recipe"], Settings(folder=tmp_path))

    assert set(controls) <= set(names())
    assert build_method(method, recipe.parameters) == kind()


def test_settings_come_from_the_environment():
    """A number that is none is refused by the variable's name."""
    assert read_settings({"RESMERGE_SPACE_RUNNING": "2"}).running == 2
    with pytest.raises(RecipeError, match="RESMERGE_SPACE_RUNNING"):
        read_settings({"RESMERGE_SPACE_RUNNING": "0"})


def test_plans_without_an_account_are_counted():
    """Beyond the allowance of a minute there is nothing."""
    allowance = Allowance(2)

    assert [allowance.take() for _ in range(3)] == [True, True, False]


ACCOUNTS = {"t-alice": Visitor("alice", "t-alice"), "owner": Visitor("owner", "owner")}


def ask(token):
    """Stand in for the Hub, which cannot be asked in this process; others tests ask a real one."""
    if token not in ACCOUNTS:
        raise PublishError("no such token")
    return ACCOUNTS[token]


def test_a_public_spaces_secret_is_nobodys(monkeypatch):
    """Without a token of their own a visitor of a Space is nobody, whatever HF_TOKEN holds."""
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv("HF_TOKEN", "owner")
    visitors = Visitors(ask)
    monkeypatch.setattr(visitors, "_is_private_space", lambda token: False)

    visitor = visitors.who(None)

    assert (visitor.name, visitor.token, visitor.token_or_nobody) == ("", None, False)
    assert visitors.who("t-alice").name == "alice"


def test_a_private_spaces_secret_only_reads(monkeypatch):
    """In a private Space the owner's token reads, and makes nobody an account."""
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv("HF_TOKEN", "owner")
    visitors = Visitors(ask)
    monkeypatch.setattr(visitors, "_is_private_space", lambda token: True)

    visitor = visitors.who(None)

    assert (visitor.name, visitor.token, visitor.token_or_nobody) == ("", None, "owner")


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [("GRADIO_SERVER_NAME", "127.0.0.1", "owner"), ("GRADIO_SERVER_NAME", "0.0.0.0", ""),
     ("GRADIO_SHARE", "True", "")],
)  # fmt: skip
def test_a_machines_login_is_for_whoever_sits_there(monkeypatch, variable, value, name):
    """On one's own machine one is signed in; not where others can reach the server."""
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setenv("HF_TOKEN", "owner")
    monkeypatch.setenv(variable, value)

    assert Visitors(ask).who(None).name == name


def test_an_unknown_token_is_an_error_for_programs_and_nobody_on_the_page():
    """A program hears that its token is not accepted; the page opens all the same."""
    with pytest.raises(PublishError):
        Visitors(ask).who("wrong")
    assert Visitors(ask).who_or_nobody("wrong") == Visitor()


@pytest.mark.parametrize("token", ["x\n", "two words", "ü", "x" * 1001])
def test_what_can_be_no_token_is_refused_without_asking(token):
    """A text that no header can carry never reaches the Hub."""
    asked = []

    with pytest.raises(PublishError, match="not a token"):
        Visitors(asked.append).who(token)

    assert not asked


def test_the_hub_is_asked_once_for_a_token():
    """Eight requests with the same wrong token, side by side and later, are one question."""
    asked, answer = [], threading.Event()

    def slow(token):
        asked.append(token)
        answer.wait(10)
        raise PublishError("no such token")

    visitors = Visitors(slow)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(visitors.who, "wrong") for _ in range(8)]
        answer.set()
        errors = [each.exception() for each in found]

    assert all(isinstance(error, PublishError) for error in errors)
    with pytest.raises(PublishError):
        visitors.who("wrong")
    assert asked == ["wrong"]


def test_an_outage_is_not_remembered():
    """After the Hub could not be asked, the next request asks again."""
    answers = [StoppedError("the network fails"), Visitor(name="alice", token="t")]

    def ask_twice(token):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    visitors = Visitors(ask_twice)
    with pytest.raises(StoppedError):
        visitors.who("t")

    assert visitors.who("t").name == "alice"


def test_a_token_is_not_shown():
    """A visitor's representation, as logs may hold it, has no token in it."""
    assert "t-alice" not in repr(ACCOUNTS["t-alice"]).replace("alice'", "")
    assert identity.secret_key("s") != "s"


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "linear", "models": [{"model": "base", "parameters": {"weight": 0.5}},
                                              {"model": "expert0", "parameters": {"weight": 2.0}}]},
        {"merge_method": "ties",
         "parameters": {"density": [{"filter": "mlp", "value": [0.2, 0.9]}]},
         "models": ["expert0", {"model": "expert1", "parameters": {"density": 0.3}}]},
    ],
    ids=["a listed base", "settings"],
)  # fmt: skip
def test_a_merged_models_report_has_the_recipe_that_fills_the_form(recipe, tmp_path, monkeypatch):
    """What "namespace/name" of a merge of ours brings to the form is the merge as it was asked."""
    make_group(tmp_path, experts=2)
    monkeypatch.chdir(tmp_path)
    asked = recipe_from_dict({"base_model": "base", **recipe})
    *_, last = run_merge(plan_merge(asked, out="out"), out="out")

    again = recipe_from_dict(yaml.safe_load(pinned_recipe(dict(last.report))))

    tensors = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert [ref.id for ref in again.models] == [ref.id for ref in asked.models]
    assert Resolver(again).each(tensors) == Resolver(asked).each(tensors)
    assert again.base_listed == asked.base_listed


def test_a_pattern_stands_for_no_more_models_than_a_recipe_may_name(settings):
    """What is found behind it is counted where it is planned, with the Space's own limit."""
    recipe = {"merge_method": "average", "models": [{"model": "org/run@step_*"}]}

    request = web_request({"recipe": recipe}, settings)

    assert request.options.max_experts == 3
