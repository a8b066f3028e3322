"""Bytes that change on their way from the Hub."""

import json
from pathlib import Path

import pytest

from loopback_hub import Flip
from resmerge_stream.recipe import DEFAULT_METHOD
from tests.support.hub_runs import Bench, Run

NAME = "model-00001-of-00003.safetensors"


pytestmark = pytest.mark.usefixtures("clean_hub")


def sha_path(bench: Bench, name: str = NAME) -> str:
    """What the storage calls a file of an expert."""
    entry = bench.hub.files("alice/expert1")[name]
    return str(entry.sha256)


def last_weight(bench: Bench) -> tuple[int, bytes]:
    """Where the last bfloat16 weight of that file is, and its bytes."""
    data = (bench.group / "expert1" / NAME).read_bytes()
    return len(data) - 2, data[-2:]


def weights(bench: Bench, out: Path) -> bool:
    """Whether a folder holds the weights of a calm merge."""
    expected = bench.expected()
    return all(
        (out / name).read_bytes() == data
        for name, data in expected.items()
        if name.endswith(".safetensors")
    )


def merged(bench: Bench, out: Path, *options: str) -> Run:
    """Merge from the Hub into a folder."""
    return bench.merge("--out", str(out), *options)


def test_a_flipped_bit_is_found_and_its_tensors_merged_again(bench: Bench, tmp_path: Path) -> None:
    """The file is hashed while it streams: other bytes than the Hub's sha256 are not kept."""
    position, _ = last_weight(bench)
    bench.hub.faults.add(Flip(position=position), path=sha_path(bench), times=1)

    done = merged(bench, tmp_path / "out")

    assert done.code == 0, done.err
    assert weights(bench, tmp_path / "out")


def test_without_the_check_the_flipped_bit_stays(bench: Bench, tmp_path: Path) -> None:
    """`--no-check-sources` turns it off: so the fault of the test above strikes."""
    position, _ = last_weight(bench)
    bench.hub.faults.add(Flip(position=position), path=sha_path(bench), times=2)

    done = merged(bench, tmp_path / "out", "--no-check-sources")

    assert done.code == 0, done.err
    assert not weights(bench, tmp_path / "out")


def test_a_comparison_finds_it_too(bench: Bench, tmp_path: Path) -> None:
    """A comparison reads by the same loop: other bytes are read again, and the result is right."""
    position, _ = last_weight(bench)
    bench.hub.faults.add(Flip(position=position), path=sha_path(bench), times=1)
    words = ("--methods", f"{DEFAULT_METHOD},mean", "--out", str(tmp_path / "out"))

    done = bench.run("compare", *bench.sources(), *words)

    assert done.code == 0, done.err
    assert weights(bench, tmp_path / "out" / DEFAULT_METHOD)


def test_a_file_that_always_comes_wrong_is_named(bench: Bench, tmp_path: Path) -> None:
    """Twice other bytes: exit 3 with the file's name, and nothing is published."""
    position, _ = last_weight(bench)
    bench.hub.faults.add(Flip(position=position), path=sha_path(bench))

    done = merged(bench, tmp_path / "out")

    assert done.code == 3, done.err
    assert f"alice/expert1/{NAME}" in done.err
    assert not (tmp_path / "out" / "config.json").exists()


def to_nan(weight: bytes) -> bytes:
    """The bits that make a bfloat16 weight NaN."""
    return bytes(ours ^ theirs for ours, theirs in zip(weight, b"\xc0\x7f", strict=True))


def test_a_weight_that_is_nan_only_on_the_way_is_read_again(bench: Bench, tmp_path: Path) -> None:
    """Two bytes in transit do not end a merge."""
    position, weight = last_weight(bench)
    bench.hub.faults.add(
        Flip(position=position, bits=to_nan(weight)), path=sha_path(bench), times=1
    )

    done = merged(bench, tmp_path / "out")

    assert done.code == 0, done.err
    assert weights(bench, tmp_path / "out")


def test_a_weight_that_stays_nan_stops_and_keeps_what_is_staged(bench: Bench) -> None:
    """Exit 2 with the tensor's name; the shards that were paid for stay on the branch."""
    name = "model-00003-of-00003.safetensors"
    data = (bench.group / "expert1" / name).read_bytes()
    bench.hub.faults.add(
        Flip(position=len(data) - 2, bits=to_nan(data[-2:])), path=sha_path(bench, name)
    )

    done = bench.merge("--push-to", "alice/nan")

    assert done.code == 2, done.err
    assert "NaN" in done.err
    assert any("resmerge-" in ref for ref in bench.hub.repo("alice/nan").refs())


@pytest.mark.parametrize("times", [1, None])
def test_a_small_file_is_compared_with_its_hash(
    bench: Bench, tmp_path: Path, times: int | None
) -> None:
    """A tokenizer that comes damaged is fetched again; twice damaged, it is named."""
    repo_id = f"alice/small-{times}"
    bench.hub.add_repo(repo_id, bench.group / "base")
    bench.hub.push(repo_id, {"tokenizer_config.json": json.dumps({"a": "b" * 60}).encode()})
    bench.hub.faults.add(Flip(position=10), method="GET", path="tokenizer_config.json", times=times)
    arguments = ["merge", "--base", repo_id, "--expert", "alice/expert0", "--json"]

    done = bench.run(*arguments, "--out", str(tmp_path / "out"))

    if times is None:
        assert done.code == 3, done.err
        assert "tokenizer_config.json" in done.err
    else:
        assert done.code == 0, done.err
        data = (tmp_path / "out" / "tokenizer_config.json").read_bytes()
        assert json.loads(data) == {"a": "b" * 60}
