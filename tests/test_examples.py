"""Which examples the property tests see."""

import sys
from types import ModuleType

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import ROOT


def examples():
    """Return what a derandomized test is given."""
    seen = []

    @settings(max_examples=200)
    @given(st.text(min_size=1) | st.integers())
    def draw(value):
        seen.append(value)

    draw()
    return seen


def test_examples_do_not_depend_on_what_is_imported(monkeypatch):
    """A module that is imported between two runs changes no example, whatever words are in it."""
    first = examples()
    for path in (ROOT / "benchmarks").glob("*.py"):
        module = ModuleType(f"imported_{path.stem}")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    assert examples() == first
