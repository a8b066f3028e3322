"""Fixed texts of the page, and how a merge is asked for from code."""

import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

from resmerge_stream.planning.options import Options
from resmerge_stream.sinks.publication import Publication, words_of

from ..view.words import code, esc

_PAPER = "https://arxiv.org/abs/2606.02252"
SKIP = '<a class="rm-skip" href="#base">Skip to the form</a>'
TRY = "Merges four small built-in experts and tests the result. No account, under a minute."


def title() -> str:
    """Return the page's head: what it is, and where its docs, source and paper are."""
    links = {"Paper": _PAPER}
    if space := os.environ.get("SPACE_ID"):
        files = f"https://huggingface.co/spaces/{space}"
        links = {"Docs": f"{files}/blob/main/docs/space.md", "Source": f"{files}/tree/main"} | links
    shown = " · ".join(
        f'<a href="{esc(url)}" target="_blank" rel="noopener">{name}</a>'
        for name, url in links.items()
    )
    return (
        "<h1>ResMerge Stream</h1><p>Merge language models, or LoRA adapters, trained from "
        f"one base. From the Hub to the Hub, one tensor at a time. {shown}</p>"
    )


def heading(title: str, note: str = "") -> str:
    """Return the heading of a part of the page."""
    soft = f'<p class="rm-soft">{esc(note)}</p>' if note else ""
    return f'<div class="rm-step"><h2>{esc(title)}</h2>{soft}</div>'


def from_code(url: str, asked: Mapping[str, Any], *, key: bool) -> str:
    """Return how to ask a Space for a merge from Python, curl, MCP and the terminal.

    Args:
        url: of this Space.
        asked: the recipe and where to publish, as the form has them.
        key: whether this server asks for the key in its printed address.
    """
    recipe, push_to = asked["recipe"], asked["push_to"]
    body = json.dumps({"recipe": recipe}, indent=2)
    headers = '\n  -H "x-resmerge-key: $KEY" \\' if key else ""
    opened = ', headers={"x-resmerge-key": key}' if key else ', oauth_token="hf_…"'
    python = (
        "import time\nfrom gradio_client import Client\n\n"
        f'space = Client("{url}"{opened})\n'
        f"recipe = {_python(recipe)}\n"
        'plan = space.predict(recipe=recipe, api_name="/plan")\n'
        'print(plan["problems"], plan["read_bytes"])\n'
        f'job = space.predict(recipe=recipe, push_to="{push_to}"{_more(asked)}, '
        'api_name="/merge")["job"]\n'
        'while (now := space.predict(job=job, api_name="/status"))["state"] in (\n'
        '    "queued", "planning", "running"\n):\n'
        '    print(f"{now[\'progress\']:.0%}", now["message"])\n    time.sleep(5)\n'
        'print(now["state"], now["url"] or now["message"])'
    )
    curl = (
        f"EVENT=$(curl -s {url}/gradio_api/call/v2/plan \\{headers}\n"
        f"  -H 'Content-Type: application/json' -d {shlex.quote(body)} | cut -d'\"' -f4)\n"
        f"curl -sN {url}/gradio_api/call/plan/$EVENT{headers.rstrip(chr(92)).rstrip()}"
    )
    mcp = json.dumps(
        {
            "mcpServers": {
                "resmerge": {
                    "url": f"{url}/gradio_api/mcp/",
                    "headers": {"x-hf-token": "hf_…", **({"x-resmerge-key": "…"} if key else {})},
                }
            }
        },
        indent=2,
        ensure_ascii=False,
    )
    return (
        '<div class="rm"><p>The merge in the form, started from code. The same limits apply, and '
        "you can follow it here. The endpoints: <code>/methods</code>, "
        "<code>/plan</code>, <code>/merge</code>, <code>/status</code>, <code>/jobs</code>, "
        "<code>/cancel</code>, <code>/resume</code>, <code>/files</code>, "
        "<code>/report</code> and <code>/evaluate</code>.</p>"
        + _code("Python", python)
        + _code("curl", curl)
        + _code("MCP", mcp)
        + _code("Terminal", terminal(asked))
        + "</div>"
    )


def terminal(asked: Mapping[str, Any]) -> str:
    """Return the command that merges what is asked for, with the recipe as a file."""
    import yaml

    usual = Options().to_dict()
    recipe = yaml.safe_dump(dict(asked["recipe"]), sort_keys=False, allow_unicode=True)
    options = " ".join(
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key, value in asked["options"].items()
        if value != usual.get(key)
    )
    where = "--out merged"
    if asked["push_to"]:
        public = asked.get("public") or None  # a new one is private
        where = shlex.join(words_of({**asked, "repo_id": asked["push_to"], "public": public}))
    return (
        f"cat > recipe.yml <<'END'\n{recipe}END\n"
        f"resmerge-stream merge recipe.yml {' '.join(filter(None, [options, where]))}"
    )


def _more(asked: Mapping[str, Any]) -> str:
    """Return the arguments of the endpoint that say how to publish, beside where."""
    if not asked["push_to"]:
        return ""
    given: dict[str, Any] = {"private": False} if asked.get("public") else {}
    keys = (*Publication.defaults(), "questions")
    given |= {key: asked[key] for key in keys if asked.get(key)}
    return "".join(f", {key}={value!r}" for key, value in given.items())


def _code(title: str, text: str) -> str:
    return f"<h2>{esc(title)}</h2>{code(title, text)}"


def _python(recipe: Mapping[str, Any]) -> str:
    import pprint

    return pprint.pformat(dict(recipe), sort_dicts=False, width=88)
