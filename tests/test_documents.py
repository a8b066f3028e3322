"""JSON and YAML of strangers: whatever it is, the answer is its content or one line of why not."""

import json

import pytest

from resmerge_stream.documents import MAX_DEPTH, MAX_NODES, load_json, load_yaml

DEEP = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
JSON = {
    "no text": b"\xff\xfe",
    "nothing": b"",
    "no JSON": "<html>",
    "cut": '{"a": [1, 2',
    "one level too many": DEEP,
    "as deep as it goes": "[" * 200_000,
    "a number of 5,000 digits": "9" * 5_000,
    "a number of 400 digits, in a list": f'{{"a": [{"9" * 400}]}}',
    "half a character": '{"a": "\\ud83d"}',
    "half a character as a key": '{"\\uDC00": 1}',
    "too many bytes": " " * 2_000_001,
}
YAML = {
    "no text": b"\xff\xfe",
    "no YAML": "a: [1",
    "one level too many": DEEP,
    "as deep as it goes": "- " * 3_000,
    "a number of 5,000 digits": f"a: {'9' * 5_000}",
    "a number of base 16": f"a: 0x{'f' * 6_000}",
    "a number of base 16 as a key": f"0x{'f' * 6_000}: 1",
    "a key of 5,000 digits": f"{'9' * 5_000}: 1",
    "no date": "a: 2024-99-99",
    "a list as a key": "? [a]\n: b",
    "a key twice": "a: 1\na: 2",
    "a tag": "a: !!python/object/apply:os.getcwd []",
    "an alias in itself": "&a [*a]",
    "a control character": "a: \x00",
    "too many bytes": "#" * 2_000_001,
}


@pytest.mark.parametrize("data", JSON.values(), ids=JSON)
def test_json_out_of_bounds_is_one_line(data):
    """What is no JSON, or more than anybody means, is a ValueError of one short line."""
    with pytest.raises(ValueError, match=r".") as told:
        load_json(data, max_bytes=2_000_000)

    assert len(str(told.value)) < 300
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("data", YAML.values(), ids=YAML)
def test_yaml_out_of_bounds_is_one_line(data):
    """What is no YAML, or more than anybody means, is a ValueError of one short line."""
    with pytest.raises(ValueError, match=r".") as told:
        load_yaml(data, max_bytes=2_000_000)

    assert len(str(told.value)) < 300
    assert "\n" not in str(told.value)


def test_within_the_bounds_everything_is_read():
    """The deepest document, the longest number, any text and NaN come back as they are."""
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    whole = {"a": 10**299, "b": [1.5, None, True, "\U0001f600"], "c": {}}

    assert json.dumps(load_json(deep)) == deep
    assert load_json(json.dumps(whole)) == whole
    assert load_json('{"a": NaN, "a": 2}') == {"a": 2}
    assert load_yaml("a: &x [1, 2.5]\nb: *x\n3: yes", max_bytes=100) == {
        "a": [1, 2.5], "b": [1, 2.5], 3: True
    }  # fmt: skip


def test_a_tag_is_nothing_where_it_is_allowed():
    """A task of the harness names functions by tags; they are not called."""
    assert load_yaml("a: !function os.getcwd\nb: 1", max_bytes=100, has_tags=True) == {
        "a": None, "b": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="could not determine"):
        load_yaml("a: !!python/name:os.getcwd ''", max_bytes=100, has_tags=True)


def test_aliases_are_counted_before_they_are_written_out():
    """A kilobyte that stands for 10^20 values is refused, and none of them is made."""
    rows = ["a0: &a0 [1, 1]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 66)]

    with pytest.raises(ValueError, match=f"more than {MAX_NODES} values"):
        load_yaml("\n".join(rows), max_bytes=10_000)
