"""Dtypes, tensor records and sizes in words."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.errors import RecipeError, listed
from resmerge_stream.specs import DTYPES, OUTPUT_DTYPES, TensorSpec
from resmerge_stream.units import format_duration, format_size, parse_size


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_torchs_of_the_same_size(name):
    """A dtype of the table is a torch dtype with as many bytes an element."""
    dtype = DTYPES[name]

    assert torch.empty((), dtype=getattr(torch, dtype.torch_name)).element_size() == dtype.nbytes


def test_only_real_floats_of_16_bits_and_more_are_merged():
    """Integers, booleans, complex numbers and 8-bit floats are never averaged."""
    merged = {name for name, dtype in DTYPES.items() if dtype.is_merged}

    assert merged == {"F16", "BF16", "F32", "F64"}
    assert set(OUTPUT_DTYPES.values()) <= merged


@pytest.mark.parametrize(
    ("shape", "numel", "nbytes", "matrix"),
    [
        ((), 1, 2, (1, 1)),
        ((5,), 5, 10, (5, 1)),
        ((3, 4), 12, 24, (3, 4)),
        ((2, 3, 4), 24, 48, (2, 12)),
        ((0, 4), 0, 0, (0, 4)),
        ((4, 0), 0, 0, (4, 0)),
    ],
)
def test_a_spec_counts_elements_bytes_rows_and_columns(shape, numel, nbytes, matrix):
    """The first axis is rows, the rest columns; a scalar is one of each."""
    spec = TensorSpec("x", "BF16", shape)

    assert (spec.numel, spec.nbytes, spec.matrix_shape) == (numel, nbytes, matrix)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("800 MB", 800_000_000),
        ("12GiB", 12 * 1024**3),
        ("1.5kb", 1500),
        ("2K", 2000),
        ("3T", 3 * 10**12),
        ("0", 0),
        ("1_000", 1000),
        ("7b", 7),
        (123, 123),
    ],
)
def test_sizes_are_read_in_the_hubs_units(text, nbytes):
    """GB is a power of 1000, GiB of 1024, and a bare number counts bytes."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "5XB", "nan", "inf", "5 GB 3", "1e30", "0x10", "5,5GB"]
)  # fmt: skip
def test_text_that_is_no_size_is_refused(text):
    """A size is a plain number and a unit; the error names the option and the text."""
    with pytest.raises(RecipeError, match="max-disk"):
        parse_size(text, name="max-disk")


def test_a_negative_number_is_no_size():
    """An integer below zero is refused like its text."""
    with pytest.raises(RecipeError):
        parse_size(-5)


@given(st.integers(0, 10**17))
def test_sizes_for_people_have_three_digits_and_a_unit(nbytes):
    """What is shown is within half a percent of the number, with a decimal unit."""
    shown = format_size(nbytes)

    number, unit = shown.split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(nbytes, rel=5.1e-3)
    assert len(shown) < 12


def test_long_lists_are_cut_in_messages():
    """Five names are shown, the others are counted."""
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(range(17)).endswith("and 12 more")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (1220, "20 min"), (7200, "2 h"),
     (15558, "4 h 19 min"), (86400, "1 day"), (166017, "1 day 22 h"), (172800, "2 days")],
)  # fmt: skip
def test_a_time_reads_as_people_say_it(seconds, words):
    """Seconds, minutes, hours, days: two units at most, and none that is zero."""
    assert format_duration(seconds) == words


@pytest.mark.parametrize("text", ["5", " 20 ", "999"])
def test_a_size_without_its_unit_is_asked_about(text):
    """A few bytes are never meant: the answer names gigabytes."""
    with pytest.raises(RecipeError, match=f"mean {text.strip()}GB"):
        parse_size(text)
