"""The picture in the card."""

import copy
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps

from resmerge_stream.methods import find_methods, method_class
from resmerge_stream.report.card import render_card
from resmerge_stream.report.panels import CENTRED, VIRIDIS, gates_png, numbers_of
from resmerge_stream.report.sheet import painted
from resmerge_stream.report.values import module_label, value_of
from tests.report.test_card import merge, write_group


@pytest.fixture(scope="module")
def real_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report of a ResMerge merge of two experts."""
    return merge(write_group(tmp_path_factory.mktemp("plots") / "group"))[1]


@pytest.fixture
def report(real_report: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that a test may change."""
    return copy.deepcopy(real_report)


def size_of(png: bytes) -> tuple[int, int]:
    """Return width and height from a PNG's header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def spread(report: dict[str, Any], *, layers: int, experts: int = 1) -> dict[str, Any]:
    """Return a report whose first layer is repeated, its FFN as so many experts."""
    rows = []
    for row in report["tensors"]:
        if ".layers.0." not in row["name"]:
            continue
        for layer in range(layers):
            name = row["name"].replace(".0.", f".{layer}.", 1)
            names = [name]
            if "mlp." in name:
                names = [name.replace("mlp.", f"mlp.experts.{e}.") for e in range(experts)]
            rows += [{**row, "name": each} for each in names]
    return {**report, "tensors": rows}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(find_methods()) - {"passthrough"}))
def test_every_method_has_a_picture(tmp_path: Path, method: str) -> None:
    """The report of any method that merges gives a PNG at most 1600 pixels wide."""
    base, *experts = write_group(tmp_path / "group")
    _, report = merge([base, *experts[: method_class(method).models[1]]], method)

    width, height = size_of(gates_png(report))

    assert width <= 1600
    assert height > 300


def test_card_holds_the_picture_of_its_report(tmp_path: Path) -> None:
    """The picture depends on the report alone: drawn again, it has the same bytes."""
    plan, report = merge(write_group(tmp_path / "group"))

    assert render_card(plan, report)["resmerge/gates.png"] == gates_png(report)


def test_null_values_stay_blank(report: dict[str, Any]) -> None:
    """A row may have null for every key but its name."""
    for row in report["tensors"][::2]:
        row.update({key: None for key in row if key != "name"})

    assert size_of(gates_png(report))[0] <= 1600


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (126, 1), (4, 32)])
def test_size_does_not_grow_with_layers_or_experts(
    report: dict[str, Any], layers: int, experts: int
) -> None:
    """One layer or 126, dense or 32 experts a layer: the picture keeps its size."""
    reference = size_of(gates_png(spread(report, layers=2)))

    assert size_of(gates_png(spread(report, layers=layers, experts=experts))) == reference


def test_unchanged_model_has_a_picture(report: dict[str, Any]) -> None:
    """A report in which no expert changed any tensor is drawn, with nothing in it."""
    kept = ("name", "role", "shape", "dtype", "warnings")
    for row in report["tensors"]:
        row.update({key: None for key in row if key not in kept}, rule="copy")

    assert size_of(gates_png(report))[1] < 200


def test_empty_report_has_a_picture() -> None:
    """A report without tensors or sources does not fail."""
    assert size_of(gates_png({"tensors": []}))[0] <= 1600


def test_odd_names_are_drawn_as_text(report: dict[str, Any]) -> None:
    """Neither TeX, foreign scripts nor length in a name or role breaks the picture."""
    for row, odd in zip(
        report["tensors"], ["$\\frac{", "模型", "x" * 300, "$$", "_^"], strict=False
    ):
        row["name"], row["role"] = f"model.layers.0.{odd}.weight", odd
    report["method"]["name"] = "$\\alpha"

    assert size_of(gates_png(report))[0] <= 1600


def test_value_of_a_stack_is_the_median_of_its_slices() -> None:
    """A stack without a number of its own takes its slices'; nulls among them do not count."""
    row = {
        "name": "x",
        "slices": [
            {"head_energy": [0.1, 0.3], "alpha_R": None, "c_R": 0.6, "c_R_floor": 0.5},
            {"head_energy": [0.5, 0.7], "alpha_R": 0.8, "c_R": 0.8, "c_R_floor": 0.5},
        ],
    }

    assert value_of(row, "head_energy") == pytest.approx(0.4)
    assert value_of(row, "alpha_R") == 0.8
    assert value_of(row, "above_floor") == pytest.approx(0.2)
    assert value_of(row, "S_H") is None


@pytest.mark.parametrize("value", [None, True, "0.5", float("nan"), [1.0]])
def test_what_is_not_a_number_is_no_value(value: object) -> None:
    """Only finite numbers count; a report may come from a stranger."""
    assert value_of({"name": "x", "S_H": value}, "S_H") is None


def test_module_label_tells_a_bias_from_its_matrix() -> None:
    """A bias is a row of its own, so that medians do not mix it with the weights."""
    assert module_label("model.layers.0.self_attn.q_proj.weight") == "q_proj"
    assert module_label("model.layers.0.self_attn.q_proj.bias") == "q_proj bias"


def test_a_card_and_its_picture_import_no_matplotlib() -> None:
    """Planning pays for no picture, and a merge not for a library that takes longer to load."""
    code = (
        "import sys, resmerge_stream.report.card as c; assert 'PIL' not in sys.modules\n"
        "import resmerge_stream.report.panels as p; p.gates_png({'tensors': []})\n"
        "assert 'PIL' in sys.modules and 'matplotlib' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("scale", "name"), [(VIRIDIS, "viridis"), (CENTRED, "RdBu_r")])
def test_colours_are_matplotlibs(scale: tuple[str, ...], name: str) -> None:
    """Every number of a scale gets the colour that matplotlib gives it, to 6 of 255."""
    numbers = np.linspace(0, 1, 256)

    ours = painted(numbers, 0, 1, scale, "#dcdcdc").astype(int)

    theirs = np.rint(255 * colormaps[name](numbers)[:, :3]).astype(int)
    assert np.abs(ours - theirs).max() <= 6


def test_what_is_no_number_is_blank() -> None:
    """NaN and infinity get the colour of nothing; what lies outside the scale its ends."""
    found = painted(np.array([np.nan, np.inf, -5, 5]), 0, 1, ("#000000", "#0a0a0a"), "#dcdcdc")

    assert found[:, 0].tolist() == [0xDC, 0xDC, 0, 10]


@given(
    st.floats(-1e300, 1e300, allow_subnormal=False), st.floats(1e-300, 1e300, allow_subnormal=False)
)
def test_axes_have_round_numbers(low: float, length: float) -> None:
    """An axis has four to ten different numbers at equal steps, all of them inside it."""
    high = low + length
    found = numbers_of(low, high)
    if length < 1e-6 * abs(low):
        return  # hardly a range; the next test

    values = [value for value, _ in found]
    slack = 1e-6 * length
    assert 4 <= len(found) <= 10
    assert all(low - slack <= value <= high + slack for value in values)
    np.testing.assert_allclose(np.diff(values), values[1] - values[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 0.83, "0.0 0.2 0.4 0.6 0.8"),
        (0.945, 0.962, "0.9450 0.9475 0.9500 0.9525 0.9550 0.9575 0.9600"),
        (0.0, 1.35e-4, "0.0e+00 2.0e-05 4.0e-05 6.0e-05 8.0e-05 1.0e-04 1.2e-04"),
        (-1.0, 1.0, "-1.00 -0.75 -0.50 -0.25 0.00 0.25 0.50 0.75 1.00"),
        (0.0, 1.6e6, "0.0e+00 2.0e+05 4.0e+05 6.0e+05 8.0e+05 1.0e+06 1.2e+06 1.4e+06 1.6e+06"),
        (1e30, 1e30, ""),
        (0.0, math.inf, ""),
    ],
)
def test_numbers_are_written_as_short_as_they_are_told_apart(
    low: float, high: float, texts: str
) -> None:
    """As many digits as the step has; powers of ten for what is tiny or huge; none for no range."""
    assert " ".join(text for _, text in numbers_of(low, high)) == texts
