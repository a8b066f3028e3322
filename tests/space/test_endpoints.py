"""The Space driven from code: gradio_client, plain HTTP and MCP, against the loopback Hub."""

import ast
import asyncio
import itertools
import json
from typing import Any

import httpx
import pytest
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from resmerge_stream.recipe import DEFAULT_METHOD
from tests.support.hub_runs import MODELS
from tests.support.space_runs import Town, client_of, ended, recipe, status, wait_for

ENDPOINTS = {"/methods", "/plan", "/merge", "/status", "/cancel", "/resume", "/jobs", "/files",
             "/report", "/evaluate"}  # fmt: skip
STATUS = {"state", "place", "progress", "bytes_read", "bytes_written", "shards_done", "shards",
          "seconds_left", "message", "url"}  # fmt: skip


def call(town: Town, name: str, body: dict[str, Any]) -> tuple[str, Any]:
    """One call by plain HTTP, as with curl: POST for an id, then the event with that id."""
    address = f"{town.space.url}/gradio_api/call"
    posted = httpx.post(f"{address}/v2/{name}", json=body, timeout=60.0)
    event = posted.raise_for_status().json()["event_id"]
    stream = httpx.get(f"{address}/{name}/{event}", timeout=120.0).text
    kind, data = [
        [line.partition(": ")[2] for line in block.splitlines()]
        for block in stream.strip().split("\n\n")
        if not block.startswith("event: heartbeat")
    ][-1][:2]
    return kind, json.loads(data)


def test_the_endpoints_are_these_and_documented(town: Town) -> None:
    """Each endpoint and each parameter has a description; all but recipe and ids have defaults."""
    info = httpx.get(f"{town.space.url}/gradio_api/info").json()["named_endpoints"]

    info = {name: info[name] for name in info if not name.startswith("/_")}  # of gradio's own
    assert set(info) == ENDPOINTS
    for name, endpoint in info.items():
        assert len(endpoint["description"]) > 20, name
        for parameter in endpoint["parameters"]:
            assert parameter["python_type"]["type"] != "Any", (name, parameter)
            assert len(parameter["python_type"]["description"]) > 5, (name, parameter)
            assert parameter["example_input"] != "...", (name, parameter)
            needed = parameter["parameter_name"] in ("recipe", "job", "job_or_repo")
            assert parameter["parameter_has_default"] is not needed, (name, parameter)


def test_methods_list_their_parameters(town: Town) -> None:
    """A program learns every method with the parameters that a recipe may set."""
    with client_of(town) as client:
        methods = client.predict(api_name="/methods")

    by_name = {method["name"]: method for method in methods}
    assert {"resmerge", "ties", "mean"} <= set(by_name)
    assert {"variant", "rank", "rho"} <= {
        field["name"] for field in by_name["resmerge"]["parameters"]
    }


def test_a_plan_says_what_will_happen(town: Town) -> None:
    """The plan of a program is the object that `plan --json` prints."""
    with client_of(town, town.alice) as client:
        plan = client.predict(recipe=recipe(), api_name="/plan")

    assert plan["refused"] is False
    assert plan["tensors"] > 0
    assert {source["id"] for source in plan["sources"]} == {f"alice/{name}" for name in MODELS}
    assert plan["peak_memory_bytes"] > 0


def test_a_stranger_does_not_learn_of_private_models(town: Town) -> None:
    """Without a token, and with another's, a private model is as if it did not exist."""
    answers = []
    for token in (None, town.bob):
        with client_of(town, token) as client:
            answers.append(client.predict(recipe=recipe(), api_name="/plan"))

    for plan in answers:
        assert plan["refused"] is True
        assert any("alice/expert0" in problem for problem in plan["problems"])


def test_merging_needs_a_token(town: Town) -> None:
    """Nobody publishes without saying who they are."""
    with client_of(town) as client, pytest.raises(AppError, match=r"(?i)sign in|token|logged in"):
        client.predict(recipe=recipe(), push_to="alice/x", private=True, api_name="/merge")


@pytest.mark.slow
def test_a_program_merges_and_publishes(town: Town) -> None:
    """merge, status until done, report: the repository and the report are there."""
    with client_of(town, town.alice) as client:
        started = client.predict(
            recipe=recipe(), push_to="alice/by-client", private=True, api_name="/merge"
        )
        last = ended(client, started["job"])
        by_job = client.predict(job_or_repo=started["job"], api_name="/report")
        by_repo = client.predict(job_or_repo="alice/by-client", api_name="/report")
        files = client.predict(job=started["job"], api_name="/files")
        jobs = client.predict(api_name="/jobs")
    with client_of(town, town.bob) as bob:
        others = bob.predict(api_name="/jobs")

    assert last["state"] == "done", last["message"]
    assert set(last) >= STATUS
    assert last["url"] == f"{town.hub.endpoint}/alice/by-client"
    assert (last["progress"], last["shards_done"]) == (1.0, last["shards"])
    assert town.hub.repo("alice/by-client").settings["private"] is True
    assert "model.safetensors.index.json" in town.hub.files("alice/by-client")
    assert by_job["summary"]["tensors"] == by_repo["summary"]["tensors"] > 0
    assert "report.json" in {file["name"] for file in files}
    assert all(len(httpx.get(file["url"]).content) == file["bytes"] for file in files)
    assert started["job"] in json.dumps(jobs)
    assert started["job"] not in json.dumps(others)


@pytest.mark.slow
def test_a_job_is_its_owners(town: Town) -> None:
    """Another user, and nobody in particular, can neither see nor cancel a job with its id."""
    with (
        town.held("alice/mine") as hold,
        client_of(town, town.alice) as alice,
        client_of(town, town.bob) as bob,
    ):
        job = alice.predict(recipe=recipe(), push_to="alice/mine", private=True, api_name="/merge")[
            "job"
        ]
        wait_for(lambda: hold.hits, "the merge to stand still")
        with client_of(town) as stranger:
            for other in (bob, stranger):
                for name in ("/status", "/cancel", "/resume", "/files"):
                    with pytest.raises(AppError, match=r"(?i)no such job|not found|no job"):
                        other.predict(job=job, api_name=name)
                with pytest.raises(AppError):
                    other.predict(job_or_repo=job, api_name="/report")
        still = status(alice, job)
        alice.predict(job=job, api_name="/cancel")
        last = ended(alice, job)

    assert still["state"] in ("queued", "planning", "running")
    assert last["state"] == "cancelled"
    assert "To go on, merge the same again" in last["message"]


@pytest.mark.slow
def test_plain_http_is_enough(town: Town) -> None:
    """curl's way: the token in the body, the job's id back, its end, a published repository."""
    kind, answer = call(
        town, "merge",
        {"recipe": recipe(), "push_to": "alice/by-http", "private": False,
         "oauth_token": town.alice},
    )  # fmt: skip
    assert kind == "complete", answer
    job = answer[0]["job"]

    def look() -> bool:
        state = call(town, "status", {"job": job, "oauth_token": town.alice})[1][0]["state"]
        assert state not in ("failed", "resumable", "cancelled")
        return bool(state == "done")

    wait_for(look, "the merge", patience_s=180.0)
    assert town.hub.repo("alice/by-http").settings["private"] is False


def test_a_bad_recipe_is_an_answer_and_not_a_crash(town: Town) -> None:
    """What is wrong with a recipe comes back in words."""
    kind, answer = call(town, "plan", {"recipe": {"merge_method": "resmerg"}, "oauth_token": None})

    text = json.dumps(answer)
    assert "Traceback" not in text
    assert "resmerg" in text or "base_model" in text, (kind, text)


@pytest.mark.parametrize("body", [{}, {"recipe": {}, "none_such": 1}], ids=["missing", "unknown"])
def test_a_wrong_parameter_is_a_400_that_says_which(town: Town, body: dict[str, Any]) -> None:
    """What a call lacks, or an endpoint does not have, is told by name; the server has no fault."""
    answer = httpx.post(f"{town.space.url}/gradio_api/call/v2/plan", json=body, timeout=60.0)

    assert answer.status_code == 400
    assert ("recipe" if not body else "none_such") in answer.text


KINDS = [None, 5, 0.5, True, "x", [], {}, [{"a": []}], {"b": None}]


def test_an_argument_of_another_kind_is_told_by_name(town: Town) -> None:
    """Whatever stands for an argument, an endpoint answers in words or does what it is asked."""
    info = httpx.get(f"{town.space.url}/gradio_api/info").json()["named_endpoints"]
    given: dict[str, Any] = {"recipe": recipe(), "job": "x" * 43, "job_or_repo": "alice/none"}
    wrong, named = [], []
    for endpoint in sorted(ENDPOINTS):
        names = [parameter["parameter_name"] for parameter in info[endpoint]["parameters"]]
        for name, value in itertools.product(names, KINDS):
            asked = {key: given[key] for key in names if key in given} | {name: value}
            kind, answer = call(town, endpoint.strip("/"), asked)
            if kind == "error":
                named += [name] if f"{name} must be" in str(answer) else []
                wrong += [] if answer.get("error") else [(endpoint, name, value)]

    assert not wrong
    assert {"push_to", "update", "job", "limit", "pay_up_to"} <= set(named)


async def tools_of(town: Town, token: str | None, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """The MCP tools, then the answers to some calls."""
    headers = {} if token is None else {"x-hf-token": token}
    address = f"{town.space.url}/gradio_api/mcp/"
    async with (
        httpx.AsyncClient(headers=headers, timeout=60.0, follow_redirects=True) as http,
        streamable_http_client(address, http_client=http) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        tools = await session.list_tools()
        answers: list[Any] = [tools.tools]
        by_end = {tool.name.removeprefix("space_"): tool.name for tool in tools.tools}
        for name, arguments in calls:
            answers.append(await session.call_tool(by_end[name], arguments))
        return answers


def said(answer: Any) -> Any:
    """What a tool answered; gradio writes it as Python does, not as JSON."""
    return ast.literal_eval(answer.content[0].text)


def test_the_same_functions_are_mcp_tools(town: Town) -> None:
    """An agent finds the endpoints as tools; its token travels in a header only."""
    bare = {key: value for key, value in recipe().items() if key != "merge_method"}
    tools, planned = asyncio.run(tools_of(town, town.alice, ("plan", {"recipe": bare})))

    # In a Space gradio puts the Space's name before each.
    names = {tool.name.removeprefix("space_") for tool in tools}
    assert {name[1:] for name in ENDPOINTS} <= names
    ours = [
        tool for tool in tools if tool.name.removeprefix("space_") in {n[1:] for n in ENDPOINTS}
    ]
    assert all(tool.description for tool in ours)
    assert not any("token" in json.dumps(tool.inputSchema.get("required", [])) for tool in ours)
    # gradio drops what follows the first line of a parameter's description.
    by_name = {tool.name: tool for tool in ours}
    assert f"merge_method (default {DEFAULT_METHOD})" in json.dumps(
        by_name["space_plan"].inputSchema
    )
    assert ",," not in json.dumps([tool.description for tool in ours])
    assert not planned.isError, planned
    assert said(planned)["refused"] is False
    assert (said(planned)["method"], said(planned)["chosen_by"]) == (DEFAULT_METHOD, "default")


@pytest.mark.slow
def test_an_agent_merges(town: Town) -> None:
    """Over MCP a merge starts, is followed and ends in a repository."""

    def ask(name: str, arguments: dict[str, Any]) -> Any:
        answer = asyncio.run(tools_of(town, town.alice, (name, arguments)))[1]
        assert not answer.isError, answer
        return said(answer)

    job = ask("merge", {"recipe": recipe(), "push_to": "alice/by-agent", "private": True})["job"]
    wait_for(lambda: ask("status", {"job": job})["state"] == "done", "the merge", pause_s=0.5)

    assert town.hub.has_repo("alice/by-agent")
