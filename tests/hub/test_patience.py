"""Faults of the Hub that pass are waited out, aloud and politely; those that stay end in words."""

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session

from loopback_hub import LoopbackHub, Trickle
from loopback_hub.faults import rate_limited
from resmerge_stream.errors import CheckpointNotFoundError, StoppedError
from resmerge_stream.hub import ranges
from resmerge_stream.hub.client import client, explain, patiently
from resmerge_stream.hub.patience import PATIENCE, Patience
from resmerge_stream.hub.ranges import RemoteFile
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint

DATA = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with one file behind signed links."""
    with LoopbackHub(tmp_path_factory.mktemp("patience")) as hub:
        hub.add_user("alice", "hf_alice_alice")
        hub.add_repo("alice/model", {"model.safetensors": DATA})
        yield hub


@pytest.fixture
def api(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """The client, for the loopback Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    hub.log.clear()
    yield client("hf_alice_alice")
    hub.faults.clear()


def remote_file(api: HfApi) -> RemoteFile:
    """The Hub's file, with no link yet."""
    url = f"{api.endpoint}/alice/model/resolve/main/model.safetensors"
    return RemoteFile("alice/model/model.safetensors", url, api._build_hf_headers(), len(DATA))


def read_by_threads(file: RemoteFile, threads: int = 8) -> bytes:
    """Read a file in as many parts at once."""
    data, step = bytearray(len(DATA)), len(DATA) // threads
    failed: list[BaseException] = []

    def read(begin: int) -> None:
        try:
            file.read_into(begin, memoryview(data)[begin : begin + step])
        except BaseException as exc:
            failed.append(exc)

    workers = [threading.Thread(target=read, args=(begin,)) for begin in range(0, len(data), step)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
    return bytes(data)


@pytest.mark.slow
def test_an_outage_shorter_than_the_patience_is_ridden_out(hub: LoopbackHub, api: HfApi) -> None:
    """Every connection is reset until the read says that it waits; then it has its bytes."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        hub.faults.clear()

    hub.faults.add("reset")
    PATIENCE.tell = tell
    try:
        with PATIENCE.of(300.0):
            data = remote_file(api).read(0, len(DATA))
    finally:
        PATIENCE.tell = None

    assert data == DATA
    assert len(told) == 1
    assert "alice/model" in told[0]
    assert "giving up in" in told[0]


def test_an_outage_longer_than_the_patience_stops(hub: LoopbackHub, api: HfApi) -> None:
    """When the patience is over the read stops, resumable, and names the file."""
    hub.faults.add("reset")
    began = time.monotonic()

    with PATIENCE.of(1.0), pytest.raises(StoppedError, match="alice/model"):
        remote_file(api).read(0, 1000)

    assert time.monotonic() - began < 120


def test_a_burst_of_refused_links_is_met_with_few_requests(hub: LoopbackHub, api: HfApi) -> None:
    """The storage answers 403 for two seconds to eight threads: one fresh link, then waits."""
    file = remote_file(api)
    file.read(0, 10)
    hub.log.clear()
    burst = hub.faults.add("expired", port="cdn", seconds=2.0)

    data = read_by_threads(file)

    assert data == DATA
    refused = [entry.time for entry in hub.log.find(port="cdn", status=403)]
    assert burst.hits == len(refused)
    in_flight = 8  # asked with the old link before its end was known
    assert len(refused) <= in_flight + 4, refused
    # In any second after those, never more than a few.
    later = sorted(refused)[in_flight:]
    assert all(sum(0 <= other - one < 1 for other in later) <= 3 for one in later)


def test_one_fresh_link_serves_all_threads(hub: LoopbackHub, api: HfApi) -> None:
    """When a link expires under eight threads, one of them asks for the next one."""
    file = remote_file(api)
    file.read(0, 10)
    hub.expire_urls()
    hub.log.clear()

    assert read_by_threads(file) == DATA
    assert len(hub.log.find(port="api", path="/resolve/")) == 1


def test_a_body_that_trickles_is_asked_for_anew(
    hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection at 1 kB/s is given up, and the next one goes on where it was."""
    monkeypatch.setattr(ranges, "SPEED_WINDOW_S", 0.5)
    trickle = hub.faults.add(Trickle(rate=1000), port="cdn", times=2)
    began = time.monotonic()

    data = remote_file(api).read(0, len(DATA))

    assert data == DATA
    assert time.monotonic() - began < 120
    assert trickle.hits == 2
    ranges_asked = [entry.range for entry in hub.log.find(port="cdn")]
    assert len(ranges_asked) == len(set(ranges_asked))


def test_a_page_for_people_is_no_answer(hub: LoopbackHub, api: HfApi) -> None:
    """An HTML page where the Hub answers in JSON is asked again; for ever, it is named."""
    hub.faults.add("html", path="/api/models/", times=1)
    assert patiently(lambda: api.model_info("alice/model"), what="look").id == "alice/model"

    hub.faults.add("html", path="/api/models/")
    with PATIENCE.of(0), pytest.raises(StoppedError, match="no JSON"):
        patiently(lambda: api.model_info("alice/model"), what="look")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR])
def test_a_full_disk_is_not_the_networks_fault(number: int) -> None:
    """A failure of this machine says so, and where: of its disk, or of a cache that cannot be."""
    failed = OSError(number, os.strerror(number), "cache/blob")

    text = str(explain(failed, "read alice/model"))

    assert f"this machine fails, not the Hub: {os.strerror(number)} (cache/blob)" in text


@pytest.mark.parametrize("token", ["hf_mistyped_mistyped", "hf_mist\nyped"])
def test_a_mistyped_token_is_bad_input(hub: LoopbackHub, api: HfApi, token: str) -> None:
    """A token that the Hub does not accept before anything began is refused, not a stop."""
    with pytest.raises(CheckpointNotFoundError, match="token"):
        open_checkpoint(ModelRef("alice/model"), token=token)


@pytest.mark.parametrize("name", ["alice/x.git", "alice/x--y", "alice/x..y"])
def test_a_name_that_no_repository_has_is_bad_input(api: HfApi, name: str) -> None:
    """What the Hub takes for no repository id is refused before it is asked."""
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(ModelRef(name), token="hf_alice_alice")


def test_a_fault_of_the_network_says_nothing_of_folders(hub: LoopbackHub, api: HfApi) -> None:
    """Only a repository that does not exist may be a mistyped folder."""
    hub.faults.add("503", path="/api/models/")
    with PATIENCE.of(0), pytest.raises(StoppedError) as stopped:
        patiently(lambda: api.model_info("alice/model"), what="read", tries=1)
    assert "folder" not in str(stopped.value)
    hub.faults.clear()

    with pytest.raises(CheckpointNotFoundError, match="if you meant a folder"):
        open_checkpoint(ModelRef("alice/modle"), token="hf_alice_alice")


def test_the_clients_own_waits_are_told_in_our_words(
    hub: LoopbackHub, api: HfApi, caplog: pytest.LogCaptureFixture
) -> None:
    """What huggingface_hub logs about its retries is not shown; why and until when is."""
    seen: list[str | None] = []
    hub.faults.add(rate_limited(1), path="/api/whoami", times=1)
    watcher = threading.Timer(0.7, lambda: seen.append(PATIENCE.waiting()))
    watcher.start()

    with caplog.at_level(logging.WARNING):
        from huggingface_hub.utils import http_backoff

        http_backoff("GET", f"{api.endpoint}/api/whoami-v2", headers=api._build_hf_headers())

    watcher.join()
    assert not caplog.records
    assert seen[0] is not None
    assert "429" in seen[0]
    assert get_session() is not None


def test_a_patience_is_told_of_once_a_minute() -> None:
    """Waits that follow each other are one line, not one each; short ones are none."""
    told: list[str] = []
    patience = Patience(60.0)
    patience.tell = told.append
    for seconds in (0.01, 0.01):
        patience.wait(seconds, "short", None)
    for _ in range(3):
        patience.client_waits(3.0, "the Hub answers 503")

    assert len(told) == 1
    assert told[0].startswith("waiting: the Hub answers 503; next try in")
