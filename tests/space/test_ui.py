"""The page as gradio has it: names, what is public, what a session keeps."""

import json

import pytest

from tests.support.checkpoints import run_python

# In a process of its own: gradio leaves event loops open, which would fail a later test.
PAGE = """
import json, sys
from pathlib import Path
import gradio as gr
from space.page.news import News
from space.service import Service
from space.settings import Settings
from space.page.ui import build_page

service = Service.of(Settings(folder=Path(sys.argv[1])))
page = build_page(service, News(service))
kinds = (gr.Textbox, gr.Dropdown, gr.Number, gr.Checkbox, gr.Radio, gr.Slider, gr.File)
blocks = page.blocks.values()
info = page.get_api_info()
print(json.dumps({
    "labels": [block.label for block in blocks if isinstance(block, kinds)],
    "buttons": [block.value for block in blocks if isinstance(block, gr.Button)],
    "named": {name: end.get("description") for name, end in info["named_endpoints"].items()},
    "unnamed": list(info["unnamed_endpoints"]),
    "states": [block.label for block in blocks if isinstance(block, gr.State)],
}))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What is on the page, as plain data."""
    done = run_python(PAGE, str(tmp_path_factory.mktemp("page")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_has_a_name_for_every_control(page):
    """Each field has a label, and each button a text."""
    assert len(page["labels"]) > 60
    assert all(page["labels"])
    assert all(page["buttons"])


def test_only_the_endpoints_are_public(page):
    """The page's own events are private; programs have the named ones, described."""
    assert set(page["named"]) == {
        "/methods", "/plan", "/merge", "/status", "/cancel", "/resume", "/jobs", "/files",
        "/report", "/evaluate",
    }  # fmt: skip
    assert all(page["named"].values())
    assert not page["unnamed"]


def test_a_session_has_nothing_that_the_browser_has_not(page):
    """Gradio forgets sessions when there are many, so none has a state of its own."""
    assert not page["states"]
