"""What is unusual about a tensor, as the card and the page tell it."""

import re

import pytest

from resmerge_stream.report.unusual import by_reason, unusual
from tests.support.checkpoints import ROOT


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"branch": "consensus", "kept_cosine": 0.9}, []),
        ({"branch": "zero head"}, ["fallback: zero head"]),
        ({"branch": "zero head", "warnings": ["the head is zero"]}, ["the head is zero"]),
        (
            {"slices": [{"branch": "consensus"}, {"branch": "zero head"}]},
            ["fallback: zero head in some slices"],
        ),
        ({"slices": [{"branch": "zero head"}] * 2}, ["fallback: zero head"]),
        ({"rule": "copy"}, ["no expert changed it"]),
        ({"rule": "sum"}, ["sum instead of mean"]),
        ({"kept_cosine": 0.4}, ["mostly lost in the cast (kept cosine below 0.5)"]),
        ({"warnings": 7, "branch": [], "slices": [3], "kept_cosine": "x"}, []),
    ],
)
def test_what_a_reader_should_know_is_said_once(row, said):
    """Each way out of the ordinary has its words; whatever else a stranger wrote has none."""
    assert unusual({"rule": "mean", **row}, planned="mean") == said


def test_the_most_frequent_reason_comes_first():
    """Tensors are grouped by what is said of them."""
    found = by_reason([("a", ["x"]), ("b", ["y", "x"]), ("c", [])])

    assert found == [("x", ["a", "b"]), ("y", ["b"])]


@pytest.mark.parametrize("word", ["How far the heads agree", "mostly lost", "base + mean of"])
def test_the_words_of_a_report_stand_once(word):
    """Card, picture, page and terminal take titles, columns and remarks from the same place."""
    sources = [*(ROOT / "resmerge_stream").rglob("*.py"), *(ROOT / "space").rglob("*.py")]
    quoted = re.compile(rf'"[^"\n]*{re.escape(word)}[^"\n]*"')

    homes = {path.name for path in sources if quoted.search(path.read_text())}

    assert homes <= {"words.py", "unusual.py"}
