"""What *From code* shows works as it stands: Python, curl, MCP and the command line."""

import html
import json
import re
import subprocess
import sys

import pytest
import yaml

from resmerge_stream.cli.main import _parser, main
from resmerge_stream.cli.options import request_of
from space.examples import examples
from space.page.texts import from_code
from tests.support.hub_runs import ROOT
from tests.support.space_runs import Town

FILES = {"recipe": examples()[0].recipe, "push_to": "", "options": {}}
OFFERED = {
    "recipe": {"merge_method": "ties", "base_model": "o/b", "models": [{"model": "o/a"}]},
    "push_to": "org/model", "options": {"seed": 7}, "public": None, "create_pr": True,
}  # fmt: skip


def shown(url: str, asked: dict, *, key: bool = False) -> dict[str, str]:
    """The blocks of code by their titles."""
    page = from_code(url, asked, key=key)
    found = re.findall(r"<h2>(.*?)</h2>.*?<pre[^>]*><code>(.*?)</code>", page, re.DOTALL)
    return {title: html.unescape(text) for title, text in found}


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    """Run something to its end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_the_python_merges(town: Town) -> None:
    """Copied and run, with a token in the place that is left for it, it ends with a done job."""
    code = shown(town.space.url, FILES)["Python"].replace("hf_…", town.alice)

    done = ran(sys.executable, "-c", code)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].lower().startswith("done")


def test_the_curl_plans(town: Town) -> None:
    """Copied into a shell, it prints the plan."""
    done = ran("bash", "-c", shown(town.space.url, FILES)["curl"])

    assert '"refused": false' in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("key", [False, True])
def test_the_configuration_of_mcp_is_one(key: bool) -> None:
    """It is JSON with the server's address, and its key where this one asks for one."""
    server = json.loads(shown("http://x", FILES, key=key)["MCP"])["mcpServers"]["resmerge"]

    assert server["url"] == "http://x/gradio_api/mcp/"
    assert ("x-resmerge-key" in server["headers"]) is key


def test_the_command_of_the_example_is_one(tmp_path, monkeypatch, capsys) -> None:
    """Copied into a shell without a network, it merges the built-in models, by their names."""
    text = shown("http://x", FILES)["Terminal"]
    recipe, _, command = text.partition("\nEND\n")
    (tmp_path / "recipe.yml").write_text(recipe.partition("\n")[2])
    monkeypatch.chdir(tmp_path)

    assert command == "resmerge-stream merge recipe.yml --out merged"
    assert main(["plan", *command.split()[2:]]) == 0
    assert "ready to merge" in capsys.readouterr().out


def test_the_command_asks_for_the_same(tmp_path, monkeypatch) -> None:
    """The recipe's file and the command line mean what the form says, publishing included."""
    text = shown("http://x", OFFERED)["Terminal"]
    recipe, _, command = text.partition("\nEND\n")
    (tmp_path / "recipe.yml").write_text(recipe.partition("\n")[2])
    monkeypatch.chdir(tmp_path)

    words = command.split()
    asked = request_of(_parser().parse_args(words[1:]))

    assert yaml.safe_load((tmp_path / "recipe.yml").read_text()) == OFFERED["recipe"]
    assert words[0] == "resmerge-stream"
    assert asked.options.seed == 7
    assert asked.publication is not None
    assert asked.publication.words() == ["--push-to", "org/model", "--create-pr"]
    assert "create_pr=True" in shown("http://x", OFFERED)["Python"]


@pytest.mark.slow
def test_the_examples_of_the_documentation_work(town: Town) -> None:
    """docs/space.md: the client's, curl's and MCP's, as they stand but for the address."""
    text = (ROOT / "docs" / "space.md").read_text().replace("http://127.0.0.1:7860", town.space.url)
    python, agent = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (configuration,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (curl,) = [each for each in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "curl" in each]

    merged = ran(sys.executable, "-c", python)
    planned = ran("bash", "-c", curl)
    asked = ran(sys.executable, "-c", agent)

    assert "done" in merged.stdout, merged.stderr
    assert '"refused": false' in planned.stdout, planned.stderr
    assert "'refused': False" in asked.stdout, asked.stderr
    server = json.loads(configuration)["mcpServers"]["resmerge"]
    assert server["url"] in agent
