"""Buckets of the loopback Hub: what the real client makes of its answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import BucketFile, BucketFolder, HfApi
from huggingface_hub.errors import BucketNotFoundError

from loopback_hub import LoopbackHub
from loopback_hub.buckets import PAGE

FILES = {"run/a.txt": b"small", "run/sub/b.bin": bytes(range(256)) * 40, "run.json": b"{}",
         "empty": b""}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub with a private bucket."""
    with LoopbackHub(tmp_path / "hub") as running:
        running.add_user("alice", "t-alice")
        running.add_repo("alice/data", FILES, kind="buckets", private=True)
        yield running


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    """Alice's client."""
    return HfApi(endpoint=hub.endpoint, token="t-alice")


def listed(api: HfApi, **asked: object) -> dict[str, type]:
    """Return what a listing has, by path."""
    return {one.path: type(one) for one in api.list_bucket_tree("alice/data", **asked)}


def test_a_bucket_says_what_is_in_it(api: HfApi) -> None:
    """Number and size of the files; folders are listed where nobody asks for what is below."""
    info = api.bucket_info("alice/data")

    assert (info.id, info.private, info.total_files) == ("alice/data", True, 4)
    assert info.size == sum(map(len, FILES.values()))
    assert listed(api, recursive=True) == dict.fromkeys(FILES, BucketFile)
    assert listed(api) == {"run": BucketFolder, "run.json": BucketFile, "empty": BucketFile}


def test_a_prefix_is_any_beginning_of_a_path(api: HfApi) -> None:
    """As the client's source says of the Hub: `logs` lists `logs.json` too."""
    assert list(listed(api, prefix="run", recursive=True)) == [
        "run.json",
        "run/a.txt",
        "run/sub/b.bin",
    ]
    assert list(listed(api, prefix="run/", recursive=True)) == ["run/a.txt", "run/sub/b.bin"]


def test_a_long_listing_comes_page_by_page(hub: LoopbackHub, api: HfApi) -> None:
    """The client follows the links."""
    names = [f"many/{number:05d}" for number in range(2 * PAGE + 3)]
    hub.push("alice/data", dict.fromkeys(names, b""), kind="buckets")

    assert list(listed(api, prefix="many/", recursive=True)) == names


def test_a_hash_is_that_of_the_content(hub: LoopbackHub, api: HfApi) -> None:
    """Other bytes have another hash, the same ones under another path the same; gone is gone."""
    hub.push("alice/data", {"copy": FILES["run/a.txt"]}, kind="buckets")
    before = {one.path: one.xet_hash for one in api.get_bucket_paths_info("alice/data", FILES)}
    (copy,) = api.get_bucket_paths_info("alice/data", ["copy", "nothing"])
    hub.push("alice/data", {"run/a.txt": b"other"}, kind="buckets")
    hub.remove("alice/data", "empty", kind="buckets")
    after = {one.path: one.xet_hash for one in api.get_bucket_paths_info("alice/data", FILES)}

    assert before.keys() == set(FILES)
    assert copy.xet_hash == before["run/a.txt"] != after["run/a.txt"]
    assert after.keys() == set(FILES) - {"empty"}
    told = api.get_bucket_file_metadata("alice/data", "run/a.txt")
    assert (told.size, told.xet_file_data.file_hash) == (5, after["run/a.txt"])


def test_the_client_downloads_through_xet(api: HfApi, tmp_path: Path) -> None:
    """Hash, token and storage fit together: the bytes are those that were put there."""
    wanted = [(name, tmp_path / "got" / name) for name in FILES]

    api.download_bucket_files("alice/data", wanted)

    assert {name: path.read_bytes() for name, path in wanted} == FILES


def test_a_private_bucket_is_not_there_for_others(hub: LoopbackHub) -> None:
    """Nor is one that does not exist."""
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("bob"))

    for name in ("alice/data", "bob/nothing"):
        with pytest.raises(BucketNotFoundError):
            stranger.bucket_info(name)
