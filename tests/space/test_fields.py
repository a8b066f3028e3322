"""The form is made from what is declared of options and parameters: nothing is listed again."""

import json

import pytest

from resmerge_stream.methods import find_methods, parameter_fields
from resmerge_stream.planning.options import declared
from space.page.forms import field_name
from tests.support.checkpoints import run_python

# In a process of its own: gradio leaves an event loop open.
SHOW = """
import json, gradio
from space.page import fields
parts = {}
with gradio.Blocks():
    fields.choose(parts)
shown = {
    name: [part.label, part.info, [value for _, value in getattr(part, "choices", ())], part.value]
    for name, part in parts.items() if name in fields.names() and name != "beyond"
}
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def shown():
    """Of each control that the form sends: its name, what is said of it, its choices, its value."""
    done = run_python(SHOW)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("known", [one for one in declared() if one.changes != "nothing"])
def test_every_option_has_a_field_as_it_is_declared(known, shown):
    """Name, words, choices and default come from the declaration; the form sends it by its key."""
    assert all((known.label, known.info))
    assert shown[known.key] == [known.label, known.info, list(known.choices), known.default]


def test_what_belongs_to_a_machine_is_not_on_the_page(shown):
    """Nobody who visits says how much memory a merge takes."""
    of_machine = [known for known in declared() if known.changes == "nothing"]

    assert of_machine
    assert not [known.key for known in of_machine if known.label or known.key in shown]


@pytest.mark.parametrize("method", find_methods().values(), ids=lambda method: method.name)
def test_every_parameter_has_a_control_as_it_is_declared(method, shown):
    """A method's parameters need no line on the page."""
    for key, field in parameter_fields(method).items():
        meta = field.metadata
        said = [key, meta["label"], list(meta["choices"]), field.default]

        assert shown[field_name(method.name, key)] == said
