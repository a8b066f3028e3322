"""An opened report and two beside each other, as HTML: also when strangers wrote them."""

import re

import pytest

from space.explore import Opened
from space.rows import row_of
from space.view import report as view_report
from tests.space.test_figures import gates


def evaluation(**models):
    """Return a report's evaluation on one task, with its mean."""
    rows = {
        name: {"maths": {"accuracy": share, "low": share, "high": share, "n": 20}, "mean": {}}
        for name, share in models.items()
    }
    return {"evaluation": {"version": 1, "models": rows, "differences": []}}


def test_an_evaluation_that_was_made_is_drawn():
    """The base, the experts and the merge are bars, and the merge, the last, stands out."""
    report = {"summary": {}, **evaluation(base=0.25, expert=0.5, merge=0.75)}

    html = view_report.opened_html(Opened("x/y", report, []))

    assert re.findall(r"width:(\d+)%", html) == ["25", "50", "75"]
    assert "<li class=rm-own><span>merge</span>" in html


@pytest.mark.parametrize(
    "wrong",
    [
        {"evaluation": 5},
        {"evaluation": {"models": {"a": {"t": {"accuracy": 2, "low": 0, "high": 1, "n": 1}}}}},
        {"evaluation": {"models": {"a": {"t": {"accuracy": "<b>", "low": 0, "high": 1, "n": 1}}}}},
        {"evaluation": {"models": {"a": [], "b": {"mean": {}}}}},
    ],
)
def test_a_strangers_evaluation_is_no_bar(wrong):
    """What is no share of right answers is left out; nothing fails."""
    assert "rm-bars" not in view_report.opened_html(Opened("x/y", {"summary": {}, **wrong}, []))


STRANGER = {
    "name": "model.layers.0.<script>alert(1)</script>.weight", "role": ["x"], "rule": {"a": 1},
    "shape": [2, 2], "S_H": "9e9", "c_R": True, "c_R_floor": None, "alpha_R": 1e300,
    "head_energy": [None, "x", 0.5], "warnings": ["<img src=x onerror=alert(1)>", 7, None],
    "branch": {"b": 1}, "kept_cosine": 0.1, "slices": None,
}  # fmt: skip


def test_a_strangers_report_is_drawn_safely():
    """Whatever a report from the web holds, nothing of it becomes markup, and all is drawn."""
    rows = [row_of(STRANGER), row_of({"name": "a", "rule": "mean", "shape": []})]
    opened = Opened("x/<y>", {"summary": {"seconds": [], "bytes_read": "<b>"}, "sources": 5,
                              "method": "m"}, rows)  # fmt: skip

    html = view_report.opened_html(opened)
    html += view_report.compared_html(opened, opened)

    assert not re.search(r"<script|<img|onerror=[^&]*alert\(1\)>", html)
    assert "&lt;img src=x" in html
    assert "x/&lt;y&gt;" in html


def test_two_reports_are_set_side_by_side():
    """The comparison has both medians, their difference, and the tensors that differ most."""
    left = Opened("me/a", {"summary": {}}, gates())
    right = Opened("me/b", {"summary": {}}, [row_of({**STRANGER, "name": r.name}) for r in gates()])

    html = view_report.compared_html(left, Opened("me/c", {"summary": {}}, gates(4)))

    assert "me/a" in html
    assert "+0.000" in html
    assert "model.layers.0.q_proj.weight" in html
    assert view_report.compared_html(left, right)


def test_scores_come_first_and_what_was_decided_is_folded():
    """An opened report: bars, then what it is, then the gates behind a click; two likewise."""
    report = {"summary": {}, **evaluation(base=0.25, merge=0.75)}
    left, right = (Opened(name, report, gates(4)) for name in ("me/a", "me/b"))

    one, two = view_report.opened_html(left), view_report.compared_html(left, right)

    for html, folded in ((one, "Medians by family"), (two, "Two merges beside each other")):
        assert html.index("rm-bars") < html.rindex("<summary>What") < html.index(folded)
    assert one.index("rm-bars") < one.index("rm-tiles")
    assert two.index("rm-bars") < two.index("Settings, what differs first")
    assert "What the gates decided" in one
