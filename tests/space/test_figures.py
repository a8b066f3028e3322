"""Heatmaps, strips and tables of a report's tensors, as SVG and HTML."""

import re

from resmerge_stream.report import words
from resmerge_stream.report.panels import VIRIDIS
from space.rows import row_of
from space.view import figures


def test_tensors_are_folded_by_layer():
    """Each layer is closed until it is opened, and has its tensors with their gates."""
    html = figures.report_html(gates(layers=3))

    assert re.findall(r"<summary>(Layer \d), 2 tensors", html) == ["Layer 0", "Layer 1", "Layer 2"]
    assert "model.layers.2.up_proj.weight" in html.partition("<summary>Layer 2")[2]


def gates(layers=4, modules=("q_proj", "up_proj")):
    """Return rows with gates, as of a small model."""
    return [
        row_of(
            {
                "name": f"model.layers.{layer}.{m}.weight",
                "role": "ffn" if m == "up_proj" else "attention", "rule": "resmerge",
                "shape": [8, 8], "S_H": 0.1 * layer, "c_R": 0.6, "c_R_floor": 0.577,
                "alpha_R": 0.8, "head_energy": [0.1, 0.3], "kept_norm": 1.0, "kept_cosine": 0.9,
                "changed_fraction": 0.4, "update_norm": 1.0, "warnings": [],
            }
        )
        for layer in range(layers)
        for m in modules
    ]  # fmt: skip


def test_a_heatmap_tells_every_cell():
    """Each module and layer is a cell whose value a pointer reads, and the whole is described."""
    html = figures.heatmap(gates(), words.GATES[0], named=True)

    assert html.count("<title>") == 8
    assert "q_proj, layer 3: 0.3" in html
    assert 'role="img"' in html
    assert "median 0.15 over 8 cells" in html


def test_page_and_card_paint_in_the_same_colours():
    """A heatmap's least and most have the ends of the scale of the card's picture."""
    html = figures.heatmap(gates(), words.GATES[0], named=True)

    for number, colour in ((0, VIRIDIS[0]), (3, VIRIDIS[-1])):
        group = html.partition(f'<g fill="{colour}">')[2].partition("</g>")[0]
        assert f"q_proj, layer {number}: " in group


def test_the_running_picture_is_small():
    """What is sent again and again takes less than 20 kB for a 7B model's 28 layers."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    assert len(figures.live_html(gates(28, modules))) < 20_000


def test_unusual_tensors_are_named_by_reason():
    """Lost updates and warnings are listed, the most frequent first."""
    rows = [
        row_of({"name": f"t{i}", "rule": "mean", "shape": [2], "warnings": ["rank too low"]})
        for i in range(7)
    ]

    html = figures.unusual_html([*rows, row_of({"name": "x", "rule": "copy", "shape": [2]})])

    assert html.index("rank too low") < html.index("no expert changed it")
    assert "and 2 more" in html
