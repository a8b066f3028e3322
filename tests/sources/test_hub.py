"""Reading from the Hub: pinned, ranged, strict, patient; over real HTTP with the real client."""

import json
import re
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from loopback_hub import Cut, Hook, Reset
from loopback_hub.faults import rate_limited
from resmerge_stream.hub.client import explain
from resmerge_stream.recipe import DEFAULT_METHOD
from tests.support.checkpoints import make_group, read_tensors
from tests.support.hub_runs import MODELS, Bench

pytestmark = pytest.mark.usefixtures("clean_hub")


def merged(bench: Bench, folder: Path, *arguments: str) -> dict[str, bytes]:
    """Merge from the Hub into a folder and return its weights, index, config and tokenizer."""
    done = bench.merge("--out", str(folder), *arguments)

    assert done.code == 0, done.err
    return {name: (folder / name).read_bytes() for name in bench.expected()}


def test_a_hub_merge_gives_the_bytes_of_a_folder_merge(bench: Bench, tmp_path: Path) -> None:
    """Weights, index, config and tokenizer do not depend on where the sources are."""
    assert merged(bench, tmp_path / "out") == bench.expected()


def test_folders_and_repositories_mix(bench: Bench, tmp_path: Path) -> None:
    """A name that exists as a folder is a folder; any other is a repository."""
    sources = [*bench.sources()[:4], *bench.folders()[4:]]

    done = bench.run("merge", *sources, "--out", str(tmp_path / "out"), "--json")

    assert done.code == 0, done.err
    for name, data in bench.expected().items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_a_plan_reads_only_headers(bench: Bench) -> None:
    """A plan asks for the first bytes of a weight file, never for all of it."""
    done = bench.run("plan", *bench.sources(), "--json")

    assert done.code == 0, done.err
    ranges = [entry.range for entry in bench.hub.log.find(path="/file/", method="GET")]
    assert ranges
    assert all(re.fullmatch(r"bytes=0-\d{1,5}", asked or "") for asked in ranges)


def test_everything_after_the_first_look_uses_the_commit(bench: Bench) -> None:
    """After the revision was resolved, no request names a branch."""
    bench.run("plan", *bench.sources(), "--json")

    paths = [entry.path for entry in bench.hub.log.find(path="/resolve/")]
    assert paths
    assert all(re.search(r"/resolve/[0-9a-f]{40}/", path) for path in paths)


def test_requests_ask_for_plain_bytes_and_links_are_used_again(
    bench: Bench, tmp_path: Path
) -> None:
    """Ranged reads forbid compression, and a file's signed link is asked for once."""
    merged(bench, tmp_path / "out")

    reads = bench.hub.log.find(path="/file/", method="GET")
    assert {entry.headers["accept-encoding"] for entry in reads} == {"identity"}
    resolved = [e.path for e in bench.hub.log.find(path=r"/resolve/.*safetensors", status=302)]
    assert len(resolved) == len(set(resolved))


def test_a_server_that_ignores_ranges_is_never_read(bench: Bench) -> None:
    """A 200 with the whole file is dropped before its body, and the run stops with exit 3."""
    bench.hub.faults.add("ignore-range", path="/file/")

    done = bench.run("plan", *bench.sources(), "--json")

    assert done.code == 3
    assert "instead of the range" in done.err


@pytest.mark.parametrize(
    "fault",
    [
        "503",
        "cut",
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in ("wrong-range", "416", "expired", "reset")
        ),
    ],
)
def test_a_fault_that_passes_is_survived(bench: Bench, tmp_path: Path, fault: str) -> None:
    """Wrong ranges, errors, expired links, short bodies and resets are tried again."""
    rule = bench.hub.faults.add(fault, path="/file/", port="cdn", times=3, skip=2)

    assert merged(bench, tmp_path / "out") == bench.expected()
    assert rule.hits == 3


def test_a_short_body_goes_on_where_it_broke(bench: Bench, tmp_path: Path) -> None:
    """After a cut, the next request starts in the middle and not from the beginning."""
    bench.hub.faults.add(Cut(fraction=0.5), path="/file/", skip=16, times=1)

    merged(bench, tmp_path / "out")

    cut = next(e for e in bench.hub.log.find(path="/file/") if "cut" in e.faults)
    first, last = map(int, (cut.range or "").removeprefix("bytes=").split("-"))
    later = [e.range for e in bench.hub.log.find(path=re.escape(cut.path.split("?")[0]))]
    starts = [int((r or "").removeprefix("bytes=").split("-")[0]) for r in later if r]
    assert any(first < start <= last for start in starts)


def test_a_rate_limit_is_waited_out(bench: Bench) -> None:
    """A 429 with RateLimit headers is waited for as long as it says."""
    rule = bench.hub.faults.add(rate_limited(1), path="/resolve/", times=1)

    done = bench.run("plan", *bench.sources(), "--json")

    assert (done.code, rule.hits) == (0, 1)


@pytest.mark.slow
def test_a_lost_network_stops_with_exit_3(bench: Bench) -> None:
    """When every connection is reset the command gives up, and says that it can be repeated."""
    bench.hub.faults.add(Reset(), path="/file/")

    done = bench.run("plan", *bench.sources(), "--json")

    assert done.code == 3
    assert "same command again to continue" in done.err


def test_links_that_expire_in_the_middle_are_made_anew(bench: Bench, tmp_path: Path) -> None:
    """When all signed links expire while tensors are read, the Hub gives out new ones."""
    bench.hub.faults.add(Hook(call=bench.hub.expire_urls), path="/file/", skip=14, times=1)

    assert merged(bench, tmp_path / "out") == bench.expected()
    assert bench.hub.log.find(path="/file/", status=403)


def test_a_gated_model_says_which_page_to_visit(bench: Bench) -> None:
    """Without access, the message names the page where access is asked for; exit 2."""
    bench.hub.add_repo("bob/gated", bench.group / "base", gated="manual")

    done = bench.run("plan", "--base", "bob/gated", *bench.sources()[2:])

    assert done.code == 2
    assert f"{bench.hub.endpoint}/bob/gated" in done.out


def test_a_granted_gated_model_is_read(bench: Bench, tmp_path: Path) -> None:
    """With access, a gated model is read with the caller's token."""
    bench.hub.add_repo("bob/granted", bench.group / "base", gated="manual")
    bench.hub.grant("bob/granted", "alice")

    done = bench.run("plan", "--base", "bob/granted", *bench.sources()[2:], "--json")

    assert done.code == 0, done.err
    assert done.last["sources"][0]["gated"] is True


def test_another_users_private_model_does_not_exist(bench: Bench) -> None:
    """A private model that the token may not see is refused by name."""
    bench.hub.add_user("carol")
    bench.hub.add_repo("carol/secret", bench.group / "expert0", private=True)

    done = bench.run("plan", "--base", "alice/base", "--expert", "carol/secret")

    assert done.code == 2
    assert "carol/secret" in done.out


def test_a_revision_is_read_where_it_was(bench: Bench) -> None:
    """`ID@commit` reads that commit although main has moved."""
    old = bench.hub.repo("alice/expert0").at("main").id
    bench.hub.push("alice/expert0", {"note.txt": b"later"})

    done = bench.run("plan", "--base", "alice/base", "--expert", f"alice/expert0@{old}", "--json")

    assert done.last["sources"][1]["revision"] == old


def test_an_unknown_revision_is_refused(bench: Bench) -> None:
    """A branch that does not exist is a bad input."""
    done = bench.run("plan", "--base", "alice/base@nothing", "--expert", "alice/expert0")

    assert done.code == 2
    assert "no such revision" in done.out


@pytest.mark.slow
def test_a_whole_file_in_the_local_cache_is_not_fetched(bench: Bench, tmp_path: Path) -> None:
    """What `hf download` has put into the cache is read from there."""
    import subprocess
    import sys

    code = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1])"
    for name in MODELS:
        subprocess.run(
            [sys.executable, "-c", code, f"alice/{name}"], env=bench.env(home="cached"), check=True
        )
    bench.hub.log.clear()

    done = bench.fresh(["merge", *bench.sources(), "--out", str(tmp_path / "out")], home="cached")

    assert done.code == 0, done.err
    assert not bench.hub.log.find(path="/file/")
    for name, data in bench.expected().items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_memory_for_reading_ahead_is_planned(bench: Bench) -> None:
    """A plan of Hub sources counts what is on its way; one of folders does not."""
    hub = bench.run("plan", *bench.sources(), "--json").last
    folders = bench.run("plan", *bench.folders(), "--json").last

    assert hub["peak_memory_bytes"] > folders["peak_memory_bytes"]
    assert hub["plan_hash"] != folders["plan_hash"]


def test_a_plan_on_folders_does_not_import_the_library(bench: Bench) -> None:
    """Local plans start without huggingface_hub."""
    import subprocess
    import sys

    code = (
        "import sys; from resmerge_stream.cli.main import main; main(sys.argv[1:]);"
        "sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *bench.folders(), "--json"],
        env=bench.env(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["refused"] is False


def test_several_methods_read_the_hub_once(bench: Bench, tmp_path: Path) -> None:
    """A comparison opens each model once, reads each weight once, and gives a merge's bytes."""
    done = bench.run(
        "compare", *bench.sources(), "--methods", f"mean,ties:density=0.2,{DEFAULT_METHOD}",
        "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip

    assert done.code == 0, done.err
    for name, data in bench.expected().items():
        assert (tmp_path / "out" / DEFAULT_METHOD / name).read_bytes() == data
    looks = [entry.path for entry in bench.hub.log.find(path="/api/models/", method="GET")]
    assert max(looks.count(path) for path in looks) == 1, looks
    asked = sum(entry.sent for entry in bench.hub.log.find(path="/file/", method="GET"))
    sizes = [path.stat().st_size for path in bench.group.rglob("*.safetensors")]
    # Rows that say whether anything differs, and whether the models are of one base.
    looked = 150_000 * len(MODELS)
    assert asked <= sum(sizes) + sum(min(size, 100_000) for size in sizes) + looked


def test_counting_and_analysing_read_ahead(bench: Bench, tmp_path: Path) -> None:
    """Passes over the whole model join neighbours to few requests, as a merge does."""
    for arguments, passes in (
        (("merge", *bench.sources(), "--method", "ties"), 3),
        (("analyse", *bench.sources()), 1),
    ):
        bench.hub.log.clear()
        done = bench.run(*arguments, "--out", str(tmp_path / arguments[0]), "--json")

        assert done.code == 0, done.err
        asked = bench.hub.log.find(path="/file/", method="GET")
        files = len(list(bench.group.rglob("*.safetensors")))
        assert len(asked) <= files * (passes + 1)


def test_digits_in_a_message_are_no_status() -> None:
    """A refusal whose message happens to hold 401, in a hash, is told by its own status."""
    request = httpx2.Request("POST", "https://hub.example/api/models/alice/x401y/commit/main")
    response = httpx2.Response(403, request=request)
    refused = HfHubHTTPError("403 Forbidden: a401b", response=response, server_message="full")

    assert "the Hub refuses it (full)" in str(explain(refused, "commit"))
    assert "Log in again" in str(explain(RuntimeError("status client error (401)"), "send"))


def test_what_a_shard_holds_is_read_whatever_the_index_says(bench: Bench, tmp_path: Path) -> None:
    """A repository whose index forgets a tensor gives the merge that a complete index gives."""
    lost = "model.layers.1.self_attn.q_proj.weight"
    group = make_group(tmp_path, experts=1, sharded=True)
    for folder in group.folders:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        index = json.loads(files["model.safetensors.index.json"])
        del index["weight_map"][lost]
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        bench.hub.add_repo(f"alice/forgetful-{folder.name}", files)

    out = tmp_path / "out"
    sources = ["--base", "alice/forgetful-base", "--expert", "alice/forgetful-expert0"]
    done = bench.run("merge", *sources, "--method", "task_arithmetic", "--out", str(out), "--json")

    assert done.code == 0, done.err
    assert torch.equal(read_tensors(out)[lost], read_tensors(group.experts[0])[lost])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_on_the_hub_is_named(bench: Bench, tmp_path: Path, name: str) -> None:
    """A pointer of git-lfs that was committed in the place of a file is refused as one."""
    (folder,) = make_group(tmp_path, experts=0).folders
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files[name] = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 15231233024\n"
    bench.hub.add_repo(f"alice/pointer-{name.partition('.')[0]}", files)

    done = bench.run(
        "plan", "--base", f"alice/pointer-{name.partition('.')[0]}", "--expert", "alice/expert0"
    )

    assert done.code == 2
    assert f"{name} is a git-lfs pointer" in done.out
