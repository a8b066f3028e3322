"""The table of formats in docs/models.md: what it claims is what the tests show."""

import ast

import pytest

from tests.support.checkpoints import ROOT, Group, make_group, plan_group
from tests.zoo.formats import FORMATS, place_of, table


def test_the_page_has_the_table():
    """docs/models.md holds the table of tests/zoo/formats.py as it is."""
    assert table() in (ROOT / "docs" / "models.md").read_text("utf-8")


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_what_a_row_claims_is_tested(row):
    """Each yes names a test that is there; what is not read names its way out."""
    for place in filter(None, (row.read, row.carried, row.written)):
        path, name = place_of(place)
        tree = ast.parse(path.read_text("utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert bool(row.read) == bool(row.oracle)
    assert bool(row.refused) != bool(row.read)


@pytest.mark.parametrize("row", [row for row in FORMATS if row.files], ids=lambda row: row.name)
def test_what_is_not_read_is_refused_in_the_rows_words(row, tmp_path):
    """A folder of such files in an expert's place is one problem, which says what to do."""
    group = make_group(tmp_path / "group", experts=1)
    folder = tmp_path / "expert"
    for file in row.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")

    (problem,) = plan_group(Group(group.base, (folder,)), method="mean").problems

    assert row.refused in problem
    assert str(folder) in problem
