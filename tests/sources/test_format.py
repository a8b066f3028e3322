"""Headers, indexes and configs: every rule of the format, and the safetensors library as judge."""

import json
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from resmerge_stream.errors import CheckpointError, CheckpointFormatError
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sinks.layout import plan_shards
from resmerge_stream.sources import format as format_rules
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.format import (
    collect_tensors,
    header_length,
    parse_header,
    parse_index,
    parse_json,
    parse_object,
)
from resmerge_stream.specs import DTYPES, TensorSpec

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def parse(document, size=None, data=32):
    """Parse a header given as JSON-able data or as bytes."""
    header = document if isinstance(document, bytes) else json.dumps(document).encode()
    size = 8 + len(header) + data if size is None else size
    return parse_header(header, size, file="f", where="w")


def held(file, document):
    """Return the tensors of a file with such a header."""
    header = json.dumps(document).encode()
    return parse_header(header, 8 + len(header) + 32, file=file, where=file)


def test_a_header_gives_names_dtypes_shapes_and_absolute_offsets():
    """Tensors come in the order of their bytes, with offsets from the start of the file."""
    header = json.dumps({"b": B, "__metadata__": {"format": "pt"}, "a": A}).encode()

    tensors = parse(header)

    start = 8 + len(header)
    assert list(tensors) == ["a", "b"]
    assert tensors["a"].spec == TensorSpec("a", "F32", (2, 3))
    assert tensors["b"].byte_range() == (start + 24, start + 32)
    assert tensors["a"].byte_range(slice(1, 2)) == (start + 12, start + 24)


def test_scalars_and_empty_tensors_are_tensors():
    """A shape of () is one element, a zero among the sizes is none."""
    tensors = parse(
        {
            "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
            "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        },
        data=4,
    )

    assert tensors["scalar"].spec.numel == 1
    assert tensors["empty"].spec.nbytes == 0


@pytest.mark.parametrize(
    ("prefix", "size", "reason"),
    [
        (b"", 0, "at least 8"),
        (b"\x02\0\0", 3, "at least 8"),
        (struct.pack("<Q", 2**63), 100, "at most"),
        (struct.pack("<Q", 100_000_001), 200_000_000, "at most"),
        (struct.pack("<Q", 93), 100, "in a file of 100"),
        (b"version ", 130, "git lfs pull"),
    ],
)
def test_an_impossible_header_length_is_refused(prefix, size, reason):
    """A file shorter than its header says, or an absurd length, is refused before it is read."""
    with pytest.raises(CheckpointFormatError, match=reason):
        header_length(prefix, size, where="w")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"a": A, "b": B | {"data_offsets": [23, 31]}}, "overlaps"),
        ({"a": A, "b": B | {"data_offsets": [25, 33]}}, "hole"),
        ({"a": A | {"data_offsets": [1, 25]}}, "hole"),
        ({"a": A}, "cut short"),
        ({"a": A, "b": B, "c": B | {"data_offsets": [32, 40]}}, "cut short"),
        ({"a": A | {"data_offsets": [0, 23]}}, "needs 24 bytes"),
        ({"a": A | {"data_offsets": [24, 0]}}, "needs 24 bytes"),
        ({"a": A | {"dtype": "F33"}}, "unknown dtype"),
        ({"a": A | {"dtype": "F4"}}, "unknown dtype"),
        ({"a": A | {"dtype": 7}}, "unknown dtype"),
        ({"a": A | {"dtype": None}}, "unknown dtype"),
        ({"a": A | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {"shape": [6], "data_offsets": [0, 24]}}, "unknown dtype"),
        ({"a": A | {"shape": [-2, -3]}}, "list of sizes"),
        ({"a": A | {"shape": [2.0, 3]}}, "list of sizes"),
        ({"a": A | {"shape": [True, 6]}}, "list of sizes"),
        ({"a": A | {"shape": ["2", 3]}}, "list of sizes"),
        ({"a": A | {"shape": 6}}, "list of sizes"),
        ({"a": A | {"shape": None}}, "list of sizes"),
        ({"a": A | {"shape": [2**64, 3]}}, "list of sizes"),
        ({"a": A | {"shape": [2**40, 2**40]}}, "larger than any file"),
        ({"a": A | {"shape": [2**62, 0, 2**62]}}, "needs 0 bytes"),
        ({"a": A | {"data_offsets": [0, 24, 48]}}, "two positions"),
        ({"a": A | {"data_offsets": [0]}}, "two positions"),
        ({"a": A | {"data_offsets": [False, 24]}}, "two positions"),
        ({"a": A | {"data_offsets": [0, 24.0]}}, "two positions"),
        ({"a": A | {"data_offsets": {"0": 24}}}, "two positions"),
        ({"a": A | {"data_offsets": [-24, 0]}}, "two positions"),
        ({"a": 5}, "not by an object"),
        ({"a": [A]}, "not by an object"),
        ({"__metadata__": {"x": 1}, "a": A, "b": B}, "text to text"),
        ({"__metadata__": [], "a": A, "b": B}, "text to text"),
        ([A], "does not start"),
        (b"", "does not start"),
        (b" {}", "does not start"),
        (b"{", "not valid"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": -Infinity}', "not JSON"),
        (b'{"\\ud800": {}}', "not valid"),
        (b'{"\xff": {}}', "not valid"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "stands twice"),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not valid"),
        (b'{"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "not valid"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid"),
        (b"{} {}", "not valid"),
    ],
)  # fmt: skip
def test_a_header_that_breaks_a_rule_is_refused_in_one_line(document, reason):
    """Each rule of the format has its own refusal, which names the file and stays one line."""
    with pytest.raises(CheckpointFormatError, match=reason) as caught:
        parse(document)

    message = str(caught.value)
    assert message.startswith("w ")
    assert "\n" not in message
    assert len(message) < 1000


def test_names_in_messages_are_bounded():
    """A tensor name of a megabyte does not fill the message."""
    with pytest.raises(CheckpointFormatError) as caught:
        parse({"n" * 1_000_000: 5})

    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "begin", [b"\n{", b"\xef\xbb\xbf{"], ids=["white space", "byte order mark"]
)
def test_a_header_begins_with_its_brace(begin):
    """Nothing stands before the opening brace."""
    with pytest.raises(CheckpointFormatError):
        parse(begin + b"}", data=0)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": [1]}, "weight_map"),
        ({"weight_map": {"a": 3}}, "not to a file name"),
        ({"weight_map": {"a": "../x.safetensors"}}, "beside the index"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "beside the index"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "beside the index"),
        ({"weight_map": {"a": "a\\b.safetensors"}}, "beside the index"),
        ({"weight_map": {"a": ".hidden.safetensors"}}, "beside the index"),
        ({"weight_map": {"a": "x.safetensors\n"}}, "beside the index"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "beside the index"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "beside the index"),
        ([], "not a JSON object"),
    ],
)
def test_an_index_points_only_at_files_beside_it(document, reason):
    """A weight map leads to no other folder and to no other kind of file."""
    with pytest.raises(CheckpointFormatError, match=reason):
        parse_index(json.dumps(document).encode(), where="w")


def test_an_index_that_repeats_a_name_is_refused():
    """A tensor stands once in a weight map."""
    data = b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'

    with pytest.raises(CheckpointFormatError, match="twice"):
        parse_index(data, where="w")


def test_a_tensor_that_no_shard_holds_is_refused():
    """An index may not name what is in none of its files."""
    shards = {"x.safetensors": parse({"a": A, "b": B})}

    with pytest.raises(CheckpointFormatError, match="does not hold it"):
        collect_tensors(shards, {"c": "x.safetensors"}, where="w")


def test_what_a_shard_holds_is_there_whatever_the_index_says():
    """Unlisted, misplaced and repeated tensors are read as transformers does, and each is said."""
    shards = {
        "model-1-of-3.safetensors": held("model-1-of-3.safetensors", {"a": A, "b": B}),
        "model-2-of-3.safetensors": held("model-2-of-3.safetensors", {"b": A, "c": B}),
    }
    weight_map = {"a": "model-2-of-3.safetensors", "b": "model-1-of-3.safetensors"}

    tensors, remarks = collect_tensors(
        shards, weight_map, where="w", beside=[*shards, "model-3-of-9.safetensors", "other"]
    )

    assert {name: one.file for name, one in tensors.items()} == {
        "a": "model-1-of-3.safetensors",
        "b": "model-2-of-3.safetensors",
        "c": "model-2-of-3.safetensors",
    }
    for told, name in zip(
        remarks, ("'c'", "'a'", "'b'", "'model-3-of-9.safetensors'"), strict=True
    ):
        assert name in told


def test_more_tensors_than_any_model_has_are_refused_before_they_are_read(monkeypatch, tmp_path):
    """A file, an index, and a folder whose shards hold too many together."""
    monkeypatch.setattr(format_rules, "MAX_TENSORS", 3)
    tensors = {f"t{n}": torch.zeros(1) for n in range(6)}
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    for number, names in enumerate((("t0", "t1"), ("t2", "t3")), start=1):
        save_file({n: tensors[n] for n in names}, tmp_path / f"model-{number}.safetensors")
    few = {"t0": "model-1.safetensors", "t2": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": few}))
    (tmp_path / "config.json").write_text("{}")

    with monkeypatch.context() as unread:
        unread.setattr(format_rules, "load_json", None)  # never called
        with pytest.raises(CheckpointFormatError, match="more than 3 tensors"):
            parse(save(tensors)[8:-24], data=24)
        with pytest.raises(CheckpointFormatError, match="more than 3 tensors"):
            parse_index(json.dumps(index).encode(), where="w")
    with pytest.raises(CheckpointFormatError, match="more than 3 tensors"):
        open_checkpoint(ModelRef(str(tmp_path)))


def test_configs_may_hold_what_transformers_reads():
    """NaN, infinities and negative zeros are numbers in a config, though not in a header."""
    config = parse_object(b'{"a": NaN, "b": -1, "c": Infinity, "a": 2}', where="w")

    assert config["b"] == -1
    with pytest.raises(CheckpointFormatError):
        parse_json(b'{"b": NaN}', where="w", what="header")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"{", b"\xff{}", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}",
     b'{"a": 0x1f}', b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"],
)  # fmt: skip
def test_a_config_is_a_json_object(data):
    """Anything else is refused, however deep."""
    with pytest.raises(CheckpointFormatError):
        parse_object(data, where="w")


TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"-", b"0", b"1", b"24", b"1e2", b"2.0", b"true",
    b"null", b"NaN", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\xff", b"\xc3\xa9", b" ",
    b"\n", b"\x00",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"F16"', b'"I64"', b'"F8_E4M3"', b'"BOOL"',
    b'"__metadata__"', b'"F4"', b'"C64"', b'"extra":1,', b"18446744073709551616",
    b"9223372036854775807", b"-0", b"01", b"[0,0]", b'{"a":"b"}',
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
)  # fmt: skip
NUMBERS = (b"0", b"1", b"2", b"3", b"4", b"8", b"12", b"24", b"32", b"64", b"4294967296", b"2.0")


def valid_file():
    """Return the bytes of a small valid file."""
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b.weight": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
    }
    return save(tensors, {"format": "pt"})


def mutate(data, chance):
    """Return the file with a few changes to its header, its length or its end."""
    length = int.from_bytes(data[:8], "little")
    header, rest = bytearray(data[8 : 8 + length]), bytearray(data[8 + length :])
    adjust = True
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(header) + 1)
        kind = chance.randrange(8)
        if kind == 0:
            header[at : at + chance.randrange(1, 4)] = b""
        elif kind == 1:
            header[at:at] = chance.choice(TOKENS)
        elif kind == 2:
            header[at : at + 1] = chance.choice(TOKENS)
        elif kind == 3:
            # Another number where a number stands: often a file that is still valid.
            digits = [i for i, byte in enumerate(header) if chr(byte).isdigit()]
            if digits:
                spot = chance.choice(digits)
                header[spot : spot + 1] = chance.choice(NUMBERS)
        elif kind == 4:
            names = [i for i, byte in enumerate(header) if chr(byte).isalpha()]
            if names:
                header[chance.choice(names)] = chance.choice(b"abcFIU_ \\\xc3")
        elif kind == 5:
            other = chance.randrange(len(header) + 1)
            header[at:at] = header[min(at, other) : max(at, other)][:60]
        elif kind == 6:
            rest = rest[: chance.randrange(len(rest) + 1)] if chance.random() < 0.5 else rest + b"x"
        else:
            adjust = chance.random() < 0.3
    prefix = len(header).to_bytes(8, "little") if adjust else data[:8]
    return prefix + bytes(header) + bytes(rest)


def seen_by_the_library(path):
    """Return names with dtypes and shapes as safetensors sees them, or None when it refuses."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError:
        return None


def seen_here(folder):
    """Return the same as this library sees it, or the one line that refuses it."""
    try:
        source = open_checkpoint(ModelRef(str(folder)))
    except CheckpointError as exc:
        return str(exc)
    return {n: (t.spec.dtype, t.spec.shape) for n, t in source.tensors.items()}


def test_mutated_files_are_read_as_the_library_reads_them_or_refused(tmp_path):
    """Of many damaged files, none is accepted that safetensors refuses or reads otherwise.

    What safetensors accepts and this library does not breaks one of its three stricter rules.
    """
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    original = valid_file()
    chance = random.Random(20260601)
    accepted = 0
    for number in range(1600):
        data = mutate(original, chance)
        path.write_bytes(data)
        expected = seen_by_the_library(path)

        got = seen_here(tmp_path)

        if isinstance(got, str):
            assert "\n" not in got, (number, data)
            assert len(got) < 2000, (number, data)
            if expected is not None:
                strict = ("stands twice", "unknown dtype")
                assert any(reason in got for reason in strict), (number, got, data)
        else:
            assert got == expected, (number, data)
            accepted += 1
    assert 20 < accepted < 1500  # the mutations leave some files valid, and break others


CORNERS = (
    {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [0, 2**63 - 1], "data_offsets": [0, 0]},
    {"dtype": "F64", "shape": [2**61, 0], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "extra": [{}, None, 1.5]},
    {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]},
    {"dtype": "F32", "shape": [1] * 64, "data_offsets": [0, 4]},
    {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]},
    {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
    {"dtype": "f32", "shape": [1], "data_offsets": [0, 4]},
)


@pytest.mark.parametrize("entry", CORNERS)
def test_corner_cases_are_read_as_the_library_reads_them(entry, tmp_path):
    """Sizes near the limits of 64 bits are accepted or refused exactly as safetensors does it."""
    header = json.dumps({"a": entry}).encode()
    header += b" " * (-len(header) % 8)
    data = len(header).to_bytes(8, "little") + header + bytes(entry["data_offsets"][1])
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data)

    got = seen_here(tmp_path)

    expected = seen_by_the_library(tmp_path / "model.safetensors")
    assert (got if isinstance(got, dict) else None) == expected


ALL = tuple(getattr(torch, dtype.torch_name) for dtype in DTYPES.values())
names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12
).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def zeros(shape, dtype):
    """Return some bytes as a tensor of any dtype."""
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    return torch.arange(count, dtype=torch.uint8).remainder(2).view(dtype).view(shape)


def write_here(tensors, limit=10**12):
    """Return the bytes of the files that this library plans for a set of tensors."""
    spelled = {getattr(torch, d.torch_name): d.name for d in DTYPES.values()}
    specs = [TensorSpec(n, spelled[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    shards = plan_shards([specs], limit)
    return [
        shard.header
        + b"".join(tensors[s.name].reshape(-1).view(torch.uint8).numpy() for s in shard.tensors)
        for shard in shards
    ]


@given(
    drawn=st.dictionaries(names, st.tuples(shapes, st.sampled_from(ALL)), min_size=1, max_size=8)
)
def test_written_bytes_equal_those_of_save_file(drawn, tmp_path_factory):
    """A planned file is byte for byte what safetensors.torch.save_file writes."""
    tensors = {name: zeros(shape, dtype) for name, (shape, dtype) in drawn.items()}
    path = tmp_path_factory.mktemp("save") / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})

    (written,) = write_here(tensors)

    assert written == path.read_bytes()


def test_a_file_of_every_dtype_equals_that_of_save_file(tmp_path):
    """All dtypes of the table together, scalars and empty ones among them, come in its order."""
    tensors = {f"é{i}": zeros((2, 2), dtype) for i, dtype in enumerate(ALL)}
    tensors |= {f"scalar{i}": zeros((), dtype) for i, dtype in enumerate(ALL)}
    tensors |= {f'empty"\\\n\x7f😀{i}': zeros((0, 3), dtype) for i, dtype in enumerate(ALL)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})

    (written,) = write_here(tensors)

    assert written == (tmp_path / "x.safetensors").read_bytes()
