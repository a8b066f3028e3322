"""Mutated headers, indexes, configs and recipes against the real commands (R3 of the targets).

Run from the repository: `python -m benchmarks.fuzz`. The inputs of a small expert group are changed
one at a time (flipped bits, cut or swapped files, keys that are gone, twice or renamed, absurd
numbers, wrong types, deep nesting, lone surrogates, control characters, names with `..`, YAML
bombs) and planned in one process; some of those that were refused are run again as whole commands.
A case is described by its kind and number alone, so `--kind header --only 1234` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from resmerge_stream.cli.main import main as run_command

KINDS = ("header", "index", "config", "recipe")
SECONDS = 1.0
MEMORY_BYTES = 200_000_000
MESSAGE_CHARACTERS = 2000
RECIPE = """\
merge_method: resmerge
base_model: base
models:
  - model: expert0
  - model: whole/expert1
parameters: {variant: paper, rank: 1, rho: 0.2}
dtype: bfloat16
"""
# What safetensors accepts and this tool refuses, as resmerge_stream/sources/format.py says.
STRICTER = ("stands twice", "unknown dtype")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Case:
    """One changed file of the group.

    Attributes:
        kind: one of `KINDS`.
        number: with the kind, the seed.
        change: what was done to the file, in words.
        path: the file, relative to the specimen's home.
        data: its bytes now.
    """

    kind: str
    number: int
    change: str
    path: Path
    data: bytes

    def __str__(self) -> str:
        return f"{self.kind} {self.number} ({self.change} in {self.path})"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did: exit code, or a traceback; what it printed; how long it took."""

    code: int | None
    text: str
    crash: str = ""
    seconds: float = 0.0


class Specimen:
    """A base, two experts (one in shards, one whole) and a recipe, each file changed in turn.

    Args:
        folder: made by `write_specimen`; nothing but `home / "out"` may change in it.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.home = _home(folder)
        shards = sorted(self.home.glob("base/*.safetensors"))
        shards += sorted(self.home.glob("expert0/*.safetensors"))
        models = [self.home / name for name in ("base", "expert0", "whole/expert1")]
        self.files = {
            "header": [*shards, self.home / "whole/expert1/model.safetensors"],
            "index": [folder / "model.safetensors.index.json" for folder in models[:2]],
            "config": [folder / "config.json" for folder in models],
            "recipe": [self.home / "recipe.yml"],
        }
        self._original = {path: path.read_bytes() for part in self.files.values() for path in part}

    def case(self, kind: str, number: int) -> Case:
        """Return a case; the same one for the same kind and number."""
        chance = random.Random(f"{kind} {number}")
        path = chance.choice(self.files[kind])
        data, changes = self._original[path], []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            data, change = self._change(kind, data, chance)
            changes.append(change)
        return Case(kind, number, ", ".join(changes), path.relative_to(self.home), data)

    @contextlib.contextmanager
    def changed(self, case: Case) -> Iterator[None]:
        """Put a case's file in place, and the original back afterwards."""
        path = self.home / case.path
        path.write_bytes(case.data)
        try:
            yield
        finally:
            path.write_bytes(self._original[path])

    def listing(self) -> dict[str, bytes | None]:
        """Return every file (with its bytes) and folder below the root, but for the output."""
        out = self.home / "out"
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.root.rglob("*"))
            if path != out and out not in path.parents
        }

    def _change(self, kind: str, data: bytes, chance: Random) -> tuple[bytes, str]:
        others = [other for other in self._original.values() if other != data]
        if chance.random() < 0.4:
            return _change_bytes(data, others, chance)
        try:
            change = {"header": _change_header, "recipe": _change_recipe}.get(kind, _change_json)
            return change(data, chance)
        except (ValueError, RecursionError, IndexError):
            # An earlier change left no document to look into.
            return _change_bytes(data, others, chance)


def write_specimen(folder: Path) -> None:
    """Write the group that is mutated; a few levels down, so that `..` stays inside the folder."""
    from benchmarks.synthetic import Shape, write_group

    home = _home(folder)
    shape = Shape(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=24,
    )
    write_group(home, shape, experts=1, max_shard_bytes=3000)
    write_group(home / "whole", shape, experts=2)
    (home / "recipe.yml").write_text(RECIPE)


def _home(folder: Path) -> Path:
    return folder / "a" / "b" / "home"


# Changes of bytes, for every kind of file.

_TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"-", b"0", b"1e999", b"NaN", b"null", b"true",
    b"\x00", b"\x1b[2J", b"\x7f", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80",
    b"\r", b"\n", b"\t", b"\\ud800", b"\\u0000", b"/*", b"#", b"&a", b"*a", b"!!int ", b"<<: ",
)  # fmt: skip
_FOREIGN = (
    b"PK\x03\x04", b"\x80\x02}q\x00.", b"GGUF\x03\x00\x00\x00", b"\x89PNG\r\n\x1a\n", b"#!/bin/sh",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", b"<html></html>", b"{}",
    b"[]", b"null", b"\xff\xff\xff\xff\xff\xff\xff\xff{}", b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
)  # fmt: skip


def _change_bytes(data: bytes, others: Sequence[bytes], chance: Random) -> tuple[bytes, str]:
    text = bytearray(data)
    at = chance.randrange(len(text) + 1)
    near = chance.randrange(min(len(text), 400) + 1)  # lengths and headers stand in front
    kind = chance.randrange(9)
    if kind == 0 and text:
        for spot in (chance.randrange(len(text)), min(near, len(text) - 1)):
            text[spot] ^= 1 << chance.randrange(8)
        return bytes(text), "bits flipped"
    if kind == 1:
        return bytes(text[:at]), "cut short"
    if kind == 2:
        return b"", "emptied"
    if kind == 3:
        return chance.choice(others), "another file's content"
    if kind == 4:
        return chance.choice(_FOREIGN) + bytes(text[: chance.choice((0, at))]), "foreign content"
    if kind == 5:
        text[near : near + chance.randrange(1, 9)] = b""
        return bytes(text), "bytes removed"
    if kind == 6:
        text[near:near] = text[at : at + 200]
        return bytes(text), "bytes repeated"
    if kind == 7:
        return bytes(text) + chance.choice((b"\x00", b"x" * 100, b"\n", b" ")), "bytes appended"
    text[near:near] = chance.choice(_TOKENS)
    return bytes(text), "token inserted"


# Changes of JSON documents. Objects are lists of [key, value], so that a key can stand twice.


class _Object(list[list[Any]]):
    pass


@dataclass(frozen=True, slots=True)
class _Raw:
    text: str


_NAMES = (
    "../../escaped.safetensors", "/etc/passwd", "..", "", ".", "a/b", "a\\b", "C:\\x", "x" * 300,
    "name\nwith\nlines", "\x1b[31mred", "\x00", "nul\x00byte", "\ud800", "\udcff", "\u202eknil",
    "é😀", " ", "__metadata__", "weight_map", "lm_head.weight", "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight", "model.safetensors", "quantization_config",
    "auto_map",
    "tie_word_embeddings", "a.weight_scale", "~nobody/x", "$HOME", "%n%s", "{0}", "y" * 20_000,
)  # fmt: skip
_VALUES = (
    0, 1, -1, 2, 3, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, 1e308, True, False,
    None, [], _Object(), [0], [0, 0], [1, -1], [2**62, 2**62], [None], ["a"], [[0]], ["x"] * 500,
    *_NAMES, "F32", "F64", "I64", "F8_E4M3", "F4", "gptq", _Object([["a", 1]]),
    _Object([["a", "b"]]), _Raw("NaN"), _Raw("Infinity"), _Raw("1e999"), _Raw("-0"), _Raw("01"),
    _Raw("1" + "0" * 5000), _Raw("0x10"), _Raw("[" * 900 + "]" * 900), _Raw("[" * 90_000),
    _Raw('{"a":' * 900 + "1" + "}" * 900), _Raw("[" * 5000 + "]" * 5000), _Raw("'a'"), _Raw(""),
    _Raw("{} {}"), _Raw("[" + "0," * 50_000 + "0]"),
)  # fmt: skip


def _change_json(data: bytes, chance: Random) -> tuple[bytes, str]:
    document = json.loads(data, object_pairs_hook=lambda pairs: _Object(map(list, pairs)))
    change = _change_document(document, chance)
    return _dumps(document).encode("utf-8", "surrogatepass"), change


def _change_header(data: bytes, chance: Random) -> tuple[bytes, str]:
    length = int.from_bytes(data[:8], "little")
    header, change = _change_json(data[8 : 8 + length], chance)
    if chance.random() < 0.8:
        header += b" " * (-len(header) % 8)
    said = len(header)
    if chance.random() < 0.05:
        said = chance.choice((0, 1, length, 2**40, 2**64 - 1))
    return said.to_bytes(8, "little") + header + data[8 + length :], change


def _change_document(document: Any, chance: Random) -> str:
    """Change one place of a document, and say how."""
    objects = [node for node in _nodes(document) if isinstance(node, _Object)]
    places = [(node, i) for node in _nodes(document) for i in range(len(node))]
    node, i = chance.choice(places)
    entry: Any = node[i]
    inside = chance.choice(objects)
    kind = chance.randrange(8)
    if kind <= 2:
        _set(node, i, copy.deepcopy(chance.choice(_VALUES)))
        return "value replaced"
    if kind == 3:
        del node[i]
        return "entry removed"
    if kind == 4:
        node.append(copy.deepcopy(entry))
        return "entry twice"
    if kind == 5:
        pairs = [pair for pair in inside if isinstance(pair[0], str)]
        if pairs:
            pair = chance.choice(pairs)
            pair[0] = chance.choice((*_NAMES, _misspelt(pair[0], chance)))
        return "key renamed"
    if kind == 6:
        inside.insert(
            chance.randrange(len(inside) + 1),
            [chance.choice(_NAMES), copy.deepcopy(chance.choice(_VALUES))],
        )
        return "entry added"
    numbers = [(n, j) for n, j in places if type(_get(n, j)) is int]
    if numbers:
        n, j = chance.choice(numbers)
        _set(n, j, _get(n, j) + chance.choice((-8, -2, -1, 1, 2, 8, 64)))
        return "number changed"
    other, k = chance.choice(places)
    mine, theirs = _get(node, i), _get(other, k)
    if not isinstance(mine, list) and not isinstance(theirs, list):
        _set(node, i, theirs)
        _set(other, k, mine)
    return "values swapped"


def _nodes(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, _Object):
        yield value
        for pair in value:
            yield from _nodes(pair[1])
    elif isinstance(value, list):
        yield value
        for item in value:
            yield from _nodes(item)


def _get(node: list[Any], i: int) -> Any:
    return node[i][1] if isinstance(node, _Object) else node[i]


def _set(node: list[Any], i: int, value: Any) -> None:
    if isinstance(node, _Object):
        node[i][1] = value
    else:
        node[i] = value


def _dumps(value: Any) -> str:
    if isinstance(value, _Raw):
        return value.text
    if isinstance(value, _Object):
        return "{" + ",".join(f"{json.dumps(key)}:{_dumps(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumps, value)) + "]"
    return json.dumps(value)


def _misspelt(word: str, chance: Random) -> str:
    at = chance.randrange(len(word) + 1)
    return word[:at] + chance.choice(("", "s", "_")) + word[at + 1 :]


# Changes of recipes, as YAML text.

_YAML = (
    "&a [*a, *a]", "*nothing", "&a x", "!!int ''", "!!int x", "!!float ''", "!!float x",
    "!!bool maybe", "!!null x", "!!timestamp x", "!!timestamp 2001-99-99", "!!binary '%%'",
    "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 1", "!x y",
    "!!seq {}",
    "!!map []", "!<tag:yaml.org,2002:int> ''", "!!python/object/apply:os.system ['touch escaped']",
    "!!python/name:os.system", "2001-01-01", "2001-99-99", "2001-01-01 25:61:61",
    "0x" + "f" * 20_000, "0x", "0b", "0b2", "1" + "0" * 6000, "1:" * 4000 + "1", "-0x1",
    "1_0", "1e400", ".inf", "-.inf",
    ".nan", "~", "=", "<<", "yes", "on", "''", '"\\ud800"', '"\\0"', '"\\e[31m"', '"\\u202E"',
    "'~nobody/x'", "'~'", "/", "..", "../../escaped", "x" * 20_000, "a/" * 3000, "[" * 3000,
    "[" * 300 + "]" * 300, "{a: " * 300 + "1" + "}" * 300, "{? [a] : b}", "{? {a: b} : c}", "[]",
    "{}", "{<<: {rank: 2}}", "{rank: 1, rank: 2}", "{weight: 1}", "{weight: .nan}", "{weight: 1e9}",
    "{1: 2}", "{null: 2}", "{2001-01-01: 2}", "{true: 1}", "|\n    text", ">-\n    text", "%", "@x",
    "`x`", "base", "base@", "@main", "base@main", "base@a b", "expert0@../..", "[expert0, expert0]",
    "resmrge", "task_arithmetic", "mean", "{scale: 1}", "float32", "bf16", "int8", "{rank: 0x10}",
    "{rank: 1.5}", "{rank: 0x" + "f" * 5000 + "}", "{rank: '1'}", "{rank: [1]}", "{rank: true}",
    "{rho: .nan}", "{variant: [paper]}", "{variant: 1}", "{solver: dnse}", "{'\\x1b': 1}",
    '{"\\x1b[31m": 1}', '{"a\\nb": 1}', "- model: expert0", "[{model: expert0, weight: 1}]",
    "[{model: expert0, parameters: {weight: 2}}]", "[{model: {model: {model: expert0}}}]", "[[a]]",
    "[{}]", "[~]", "[1]", "[base]", "[expert0, base]", "[" + "expert0, " * 40 + "]",
)  # fmt: skip
_LINES = (
    "slices: []", "tokenizer_source: base", "out_dtype: float32", "name: x", "modules: {}",
    "chat_template: auto", "tokenizer: {source: base}", "merge_metod: mean", "base-model: x",
    "%YAML 9.9", "---", "...", "--- !!int ''", "\tx: 1", "? [a]\n: b", "? a", "- a", "x", ": x",
    "=: 1", "<<: {dtype: float32}", "<<: *a", "&a a: 1", "\x85: 1", "\u2028", "'a", '"a', "{", "[",
    "x: &x [&y [&z [a, a]]]\nl: [*x, *x, *y]", "dtype: float32", '"\\ud800": 1', '"\\x1b[31m": 1',
    "\ufeffx: 1", "1: 2", "null: 1", "~: 1", "true: 1", "2001-01-01: 1", "x" * 3000 + ": 1",
    "0x" + "f" * 9000 + ": 1",
)  # fmt: skip


def _change_recipe(data: bytes, chance: Random) -> tuple[bytes, str]:
    text = data.decode("utf-8")
    if chance.random() < 0.03:
        return text.encode("utf-16"), "UTF-16"
    if chance.random() < 0.01:
        return data + b"# " + b"x" * 40_000, "too large"
    if chance.random() < 0.25:
        import yaml

        document = _pairs(yaml.safe_load(RECIPE))
        change = _change_document(document, chance)
        return _dumps(document).encode("utf-8", "surrogatepass"), change
    lines = text.split("\n")
    at = chance.randrange(len(lines))
    if chance.random() < 0.7:
        key, colon, _ = lines[at].partition(": ")
        key, colon = (key, colon) if colon else (key.rstrip(":"), ": ")
        lines[at] = f"{key}{colon}{chance.choice(_YAML)}"
        return "\n".join(lines).encode("utf-8", "surrogatepass"), "YAML value"
    lines.insert(at, chance.choice(_LINES))
    return "\n".join(lines).encode("utf-8", "surrogatepass"), "YAML line"


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return _Object([key, _pairs(item)] for key, item in value.items())
    return [_pairs(item) for item in value] if isinstance(value, list) else value


# Running and judging.


def run_in_process(*argv: str) -> Outcome:
    """Run a command in this process; what it prints must be text, as for a terminal."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    streams[1].reconfigure(errors="backslashreplace")
    code, crash, start = None, "", time.perf_counter()
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = run_command(argv)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except Exception as exc:
        # What was raised, cut, then where; the innermost frames only.
        raised = "".join(traceback.format_exception_only(exc)).strip()[:200]
        crash = raised + "\n" + "".join(traceback.format_tb(exc.__traceback__, limit=-3))
    seconds = time.perf_counter() - start
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return Outcome(code, "\n".join(texts), crash, seconds)


def wrong(case: Case, outcome: Outcome, home: Path) -> str | None:
    """Return what is wrong with an outcome, or None. The case's file must still be in place."""
    if outcome.crash:
        return f"an exception: {outcome.crash[:700]}"
    if outcome.code == 0:
        if case.kind == "header" and not library_accepts(home / case.path):
            return "accepted what safetensors refuses"
        return None
    # A name that was changed to namespace/name is looked for on the Hub, which is not there.
    if outcome.code == 3 and case.kind == "recipe" and "offline mode" in outcome.text:
        return None
    if outcome.code != 2:
        return f"exit code {outcome.code}: {outcome.text[-500:]}"
    message = message_of(outcome.text)
    if not message:
        return "refused without a message"
    if "Traceback" in outcome.text:
        return f"a traceback: {outcome.text[-1500:]}"
    if len(message) >= MESSAGE_CHARACTERS:
        return f"a message of {len(message)} characters: {message[:300]} …"
    if found := _CONTROL.search(message):
        return f"the control character {found.group()!r} in the message: {message[:300]!r}"
    if not _names_subject(case, message):
        return f"names neither the file nor a key: {message[:300]!r}"
    if (
        case.kind == "header"
        and str(case.path) in message
        and not any(reason in message for reason in STRICTER)
        and library_accepts(home / case.path)
    ):
        return f"refused what safetensors accepts: {message[:300]}"
    return None


def message_of(text: str) -> str:
    """Return why a command refused: its problems and its error, without plan and progress."""
    lines = text.splitlines()
    begins = ("warning: ", "tensors: ", "sources: ", "output: ", "memory: ", "time: ", "plan ")
    kept = [line for line in lines if not line.startswith(begins) and line != "refused"]
    return "\n".join(kept).strip()


def library_accepts(path: Path) -> bool:
    """Return whether the safetensors library opens a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return bool(file.keys() is not None)
    except (SafetensorError, OSError, ValueError):
        return False


_RECIPE_WORDS = re.compile(
    r"recipe|model|expert|method|parameter|dtype|weight|rank|rho|variant|solver|base|other|\bkey\b"
)


def _names_subject(case: Case, message: str) -> bool:
    if case.kind == "recipe":
        return bool(_RECIPE_WORDS.search(message))
    return any(word in message for word in (str(case.path), str(case.path.parent), "the base"))


@dataclass(slots=True)
class Tally:
    """Counts of one kind.

    Attributes:
        refused: the numbers of cases that exit 2.
        offline: cases that stopped because the Hub is out of reach.
        failures: what went wrong, case by case.
        slowest: seconds and the case.
    """

    accepted: int = 0
    refused: list[int] = field(default_factory=list)
    offline: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "-")


def plan_all(
    specimen: Specimen,
    kind: str,
    numbers: Sequence[int],
    on_accepted: Callable[[Case], str | None] = lambda case: None,
) -> Tally:
    """Plan every case of a kind in this process, from the specimen's home as working directory.

    Args:
        specimen: whose files are changed.
        kind: one of `KINDS`.
        numbers: which cases.
        on_accepted: called with a case's file in place; returns what is wrong, or None.
    """
    tally = Tally()
    for number in numbers:
        case = specimen.case(kind, number)
        with specimen.changed(case):
            outcome = run_in_process("plan", "recipe.yml")
            problem = wrong(case, outcome, specimen.home)
            if problem is None and outcome.code == 0:
                tally.accepted += 1
                problem = on_accepted(case)
        if problem is not None:
            tally.failures.append(f"{case}: {problem}")
        elif outcome.code == 2:
            tally.refused.append(number)
        elif outcome.code == 3:
            tally.offline += 1
        tally.slowest = max(tally.slowest, (outcome.seconds, str(case)))
    return tally


def run_whole(specimen: Specimen, case: Case) -> tuple[Outcome, int, str | None]:
    """Run `merge` on a case as a whole command; return what it did, its peak memory, its faults."""
    command = [sys.executable, "-m", "resmerge_stream", "merge", "recipe.yml", "--out", "out"]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with specimen.changed(case), tempfile.TemporaryFile() as printed:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=specimen.home, env=environment, stdout=printed, stderr=printed
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        outcome = Outcome(
            process.returncode, printed.read().decode("utf-8", "replace"), "", seconds
        )
        problem = wrong(case, outcome, specimen.home)
    if problem is None and outcome.code != 2:
        problem = f"exit code {outcome.code}"
    return outcome, usage.ru_maxrss * 1024, problem


def main() -> int:
    """Run the cases, print counts, worst time and peak memory; 1 if anything was wrong."""
    arguments = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported, later
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: torch would hide how much memory the plans take.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write_specimen, Path(folder)).result()
        specimen = Specimen(Path(folder))
        with contextlib.chdir(specimen.home):
            before = specimen.listing()
            start = _peak_bytes()
            tallies = {}
            for kind in kinds:
                count = arguments.cases // len(kinds)
                numbers = range(count) if arguments.only is None else [arguments.only]
                tallies[kind] = plan_all(specimen, kind, numbers)
            grown = _peak_bytes() - start
            failures = _report(tallies, grown)
            failures += _report_commands(specimen, tallies, arguments.commands)
            if specimen.listing() != before:
                failures.append("a file outside the output folder changed")
    for failure in failures:
        print(f"WRONG {failure}")
    return 1 if failures else 0


def _peak_bytes() -> int:
    """Return the most memory that this process had; not that of the one that started it."""
    with contextlib.suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description="Plan mutated inputs: each refused in one message, or rightly accepted.",
    )
    parser.add_argument("--cases", type=int, default=20_000, help="in one process (20000)")
    parser.add_argument("--commands", type=int, default=200, help="as whole commands (200)")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only this case of each kind")
    return parser.parse_args()


def _report(tallies: dict[str, Tally], grown: int) -> list[str]:
    failures = []
    print(
        f"{'kind':8}{'cases':>8}{'refused':>9}{'accepted':>10}{'offline':>9}{'wrong':>7}{'worst':>9}"
    )
    for kind, tally in tallies.items():
        failures += tally.failures
        total = tally.accepted + len(tally.refused) + tally.offline + len(tally.failures)
        counts = f"{total:8}{len(tally.refused):9}{tally.accepted:10}{tally.offline:9}"
        counts += f"{len(tally.failures):7}"
        print(f"{kind:8}{counts}{tally.slowest[0]:7.3f} s  {tally.slowest[1]}")
        if tally.slowest[0] > SECONDS:
            print(f"{'':8}over the target of {SECONDS:g} s")
    print(f"peak memory: {grown / 1e6:.0f} MB above the start (target {MEMORY_BYTES / 1e6:.0f} MB)")
    if grown > MEMORY_BYTES:
        failures.append(f"{grown / 1e6:.0f} MB of memory")
    return failures


def _report_commands(specimen: Specimen, tallies: dict[str, Tally], count: int) -> list[str]:
    refused = [(kind, number) for kind, tally in tallies.items() for number in tally.refused]
    chosen = random.Random(0).sample(refused, min(count, len(refused)))
    codes: Counter[int | None] = Counter()
    failures, worst, peak = [], (0.0, "-"), 0
    for kind, number in chosen:
        case = specimen.case(kind, number)
        outcome, memory, problem = run_whole(specimen, case)
        codes[outcome.code] += 1
        worst, peak = max(worst, (outcome.seconds, str(case))), max(peak, memory)
        if problem is not None:
            failures.append(f"{case}, as a whole command: {problem}")
    print(
        f"{len(chosen)} whole commands: exit codes {dict(codes)}, worst {worst[0]:.2f} s "
        f"({worst[1]}), peak {peak / 1e6:.0f} MB"
    )
    return failures


if __name__ == "__main__":
    sys.exit(main())
