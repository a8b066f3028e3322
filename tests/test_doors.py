"""Through whichever door a merge is asked for, one method is the default, and is named as such."""

import inspect
import json
from pathlib import Path

import pytest
import yaml

from resmerge_stream.cli.arguments import add_recipe
from resmerge_stream.cli.main import _Parser, main
from resmerge_stream.experts.group import PREFIX, built_in_recipe, builtin_group, on_this_machine
from resmerge_stream.jobs.merge import merge_words
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.planned import refused_plan
from resmerge_stream.planning.recipe_file import parse_recipe
from resmerge_stream.planning.request import Request
from resmerge_stream.recipe import DEFAULT_METHOD, ModelRef, Recipe, override
from resmerge_stream.sinks.publication import Publication
from space.asked import web_request
from space.endpoints import Endpoints
from space.examples import examples
from space.page.forms import document_of, form_of
from space.settings import read_settings
from space.view.jobs import title_of
from space.view.plan import plan_html

GROUP = builtin_group()
BASE, EXPERT = str(GROUP["base"]), str(GROUP["rl-add"])
BARE = {"base_model": "built-in/base", "models": ["built-in/rl-add"]}
FORM = {"base": "org/base", "count": 1, "expert0": "org/math"}


def command_line() -> str:
    """A command without a recipe."""
    return override(None, base=BASE, experts=[EXPERT]).method


def help_text() -> str:
    """What ``--help`` says."""
    parser = _Parser()
    add_recipe(parser)
    return parser.format_help().split("(default: ")[1].split(")")[0].split()[0]


def bare_recipe() -> str:
    """A recipe file that names none."""
    return parse_recipe(yaml.safe_dump(BARE)).method


def endpoint() -> str:
    """A recipe that a program sends, also over MCP."""
    return web_request({"recipe": BARE}, read_settings()).recipe.method


def endpoint_docs() -> str:
    """What endpoints and MCP tools say of it."""
    text = inspect.getdoc(Endpoints.plan) or ""
    return text.split("merge_method (default ")[1].split(")")[0]


def job() -> str:
    """What a Job on the Hub is sent."""
    asked = Request(
        recipe=override(None, base="org/base", experts=["org/math"]),
        publication=Publication(repo_id="me/merged"),
    )
    files: dict[str, bytes] = {}
    merge_words(asked, files)
    return str(yaml.safe_load(next(iter(files.values())))["merge_method"])


DOORS = {
    "command line": command_line,
    "its help": help_text,
    "bare recipe": bare_recipe,
    "Python": lambda: Recipe(ModelRef(BASE), (ModelRef(EXPERT),)).method,
    "demo": lambda: built_in_recipe().method,
    "page": lambda: document_of(FORM)["recipe"]["merge_method"],
    "examples": lambda: examples()[1].method,
    "endpoint and MCP": endpoint,
    "their description": endpoint_docs,
    "Job": job,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_one_default(door):
    """Who names no method gets the same one everywhere."""
    assert DOORS[door]() == DEFAULT_METHOD


@pytest.mark.parametrize(
    ("options", "merge_method", "who"),
    [([], None, "default"), ([], "ties", "recipe"), (["--method", "mean"], "ties", "option"),
     ([], DEFAULT_METHOD, "recipe")],
)  # fmt: skip
def test_a_plan_begins_with_its_method_and_who_chose_it(
    options, merge_method, who, tmp_path, capsys
):
    """Terminal and JSON say first which method it is, and whether anybody named it."""
    named = {} if merge_method is None else {"merge_method": merge_method}
    document = {**named, "base_model": BASE, "models": [EXPERT, str(GROUP["rl-sort"])]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    method = options[1] if options else merge_method or DEFAULT_METHOD

    for extra in ([], ["--json"]):
        assert main(["plan", str(tmp_path / "recipe.yml"), *options, *extra]) == 0

    first, *_, last = capsys.readouterr().out.splitlines()
    words = {"default": "the default; name another with --method", "recipe": "by the recipe",
             "option": "by --method"}  # fmt: skip
    assert first == f"method: {method}, {words[who]}"
    plan = json.loads(last)
    assert list(plan)[:2] == ["method", "chosen_by"]
    assert (plan["method"], plan["chosen_by"]) == (method, who)
    assert plan_html(plan, push_to="").index("Method: ") < plan_html(plan, push_to="").index("can")


def test_what_is_no_recipe_has_no_method():
    """Nothing is said of a method where nothing could be read."""
    plan = refused_plan()

    assert (plan["method"], plan["chosen_by"]) == (None, None)
    assert "Method: " not in plan_html(plan, push_to="")


def test_who_chose_and_notes_survive_as_data():
    """A request that travels as JSON still says who named the method, and what has no effect."""
    recipe = parse_recipe(yaml.safe_dump({**BARE, "models": ["built-in/rl-add", "built-in/base"]}))
    noted = override(recipe, experts=["built-in/rl-sort", "built-in/base"])
    assert noted.notes

    again = Request.from_dict(json.loads(json.dumps(Request(recipe=noted).to_dict()))).recipe

    assert (again.chosen_by, again.notes) == ("default", noted.notes)


def test_notes_of_a_pasted_recipe_reach_the_plan():
    """What of a recipe has no effect is still said when the page's form asks for it."""
    layers = {"merge_method": "passthrough", "base_model": "org/base", "models": ["org/base"]}
    noted = parse_recipe(yaml.safe_dump({**layers, "merge_method": "karcher",
                                         "models": ["org/a", "org/b"]}))  # fmt: skip
    assert noted.notes

    asked = Request.from_dict(document_of(form_of(noted))).recipe

    assert set(noted.notes) <= set(asked.notes)


def test_the_built_in_names_stand_for_folders_and_nothing_else_changes():
    """Everything of a recipe but its places is the same on this machine."""
    recipe = parse_recipe(yaml.safe_dump({
        **BARE, "models": [{"model": "built-in/rl-add", "parameters": {"density": 0.3}}],
        "merge_method": "ties", "chat_template": "chatml",
        "tokenizer": {"source": "built-in/base"},
    }))  # fmt: skip

    here = on_this_machine(recipe)

    assert PREFIX not in here.to_yaml()
    assert Path(here.experts[0].id).is_dir()
    assert here.experts[0].parameters == {"density": 0.3}
    assert (here.chat_template, here.chosen_by) == ("chatml", "recipe")


@pytest.mark.parametrize("wrong", [{"chosen_by": "me"}, {"notes": "text"}, {"notes": [1]}])
def test_wrong_words_about_a_recipe_are_refused(wrong):
    """A stranger's request says who chose in one of three words, and notes as texts."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        web_request({"recipe": BARE, **wrong}, read_settings())


def test_a_jobs_title_names_the_default():
    """A job whose recipe names no method is called by the default's title."""
    assert "Head regression" in title_of({"recipe": {**BARE, "models": ["a/b"]}})


def test_a_parameter_of_another_method_names_the_methods_that_have_it():
    """Who sets a parameter of a method that is no longer the default is told whose it is."""
    recipe = override(None, base=BASE, experts=[EXPERT], parameters={"rho": "0.5"})

    (problem,) = plan_merge(recipe).problems

    assert "Methods that have it: resmerge." in problem
