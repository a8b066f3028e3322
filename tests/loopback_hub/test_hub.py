"""The loopback Hub, driven by the real huggingface_hub, by Xet and by LFS."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub import hf_hub_url as url_of
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status, http_backoff

from loopback_hub import Cut, Hook, LoopbackHub, Reset, Sparse, limits
from loopback_hub.exchange import Protocol

ROOT = Path(__file__).parents[2]
MODES = pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
LARGE = bytes(range(256)) * 4096  # 1 MiB
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="clients are told apart by /proc")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running Hub with the users alice and bob."""
    with LoopbackHub(tmp_path / "hub") as running:
        running.add_user("alice", "hf_alice")
        running.add_user("bob", "hf_bob")
        yield running


@pytest.fixture
def alice(hub: LoopbackHub) -> HfApi:
    """The Hub as alice sees it."""
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


@pytest.fixture
def bob(hub: LoopbackHub) -> HfApi:
    """The Hub as bob sees it."""
    return HfApi(endpoint=hub.endpoint, token="hf_bob")


@pytest.fixture
def stranger(hub: LoopbackHub) -> HfApi:
    """The Hub as it looks without a token."""
    return HfApi(endpoint=hub.endpoint, token=False)


def get(hub: LoopbackHub, path: str, **headers: str) -> httpx2.Response:
    """One plain GET as alice, with redirects and without retries."""
    headers = {"authorization": "Bearer hf_alice", **headers}
    return httpx2.get(hub.endpoint + path, headers=headers, follow_redirects=True)


def start_client(
    hub: LoopbackHub, script: str, folder: Path, *args: str, xet: bool
) -> "subprocess.Popen[str]":
    """Start a script as alice in its own process, as huggingface_hub reads its mode at import."""
    prelude = "import sys, os\nfrom huggingface_hub import *\napi = HfApi()\n"
    env = {**os.environ, **hub.env("hf_alice", xet=xet, home=folder / "home")}
    return subprocess.Popen(
        [sys.executable, "-c", prelude + script, *args],
        env=env,
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def run_client(hub: LoopbackHub, script: str, folder: Path, *args: str, xet: bool) -> str:
    """Run a client to its end and return what it printed."""
    client = start_client(hub, script, folder, *args, xet=xet)
    printed, _ = client.communicate()
    assert client.returncode == 0
    return printed


# Accounts and access


def test_a_token_tells_who_asks(hub: LoopbackHub, alice: HfApi) -> None:
    """whoami gives the token's user and their organisations."""
    hub.add_org("lab", {"alice": "write"})

    me = alice.whoami()

    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("alice", ["lab"])


def test_an_unknown_token_is_refused(hub: LoopbackHub) -> None:
    """A token that was never given out, or was revoked, is invalid."""
    hub.revoke_token("hf_bob")

    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token="hf_bob").whoami()


def test_a_private_repository_is_hidden(
    hub: LoopbackHub, alice: HfApi, bob: HfApi, stranger: HfApi
) -> None:
    """Only members of its namespace learn that a private repository exists."""
    hub.add_org("lab", {"alice": "read"})
    hub.add_repo("lab/m", private=True)

    assert alice.model_info("lab/m").private
    for outsider, status in ((bob, 404), (stranger, 401)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            outsider.model_info("lab/m")
        assert caught.value.response.status_code == status


def test_a_gated_repository_shows_itself_but_not_its_files(
    hub: LoopbackHub, bob: HfApi, tmp_path: Path
) -> None:
    """A gated repository can be described by everyone and downloaded by those with a grant."""
    hub.add_repo("alice/m", {"config.json": "{}"}, gated="manual")

    assert bob.model_info("alice/m").gated == "manual"
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download("alice/m", "config.json", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError):
        bob.auth_check("alice/m")
    hub.grant("alice/m", "bob")
    assert bob.hf_hub_download("alice/m", "config.json", cache_dir=tmp_path)


@pytest.mark.parametrize("role", ["read", "contribute"])
def test_a_token_may_do_what_its_role_says(hub: LoopbackHub, role: str) -> None:
    """A read token writes nothing; a contribute token writes only to what it created."""
    hub.add_repo("alice/old")
    api = HfApi(endpoint=hub.endpoint, token=hub.add_token("alice", role))

    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_branch("alice/old", branch="b")
    if role == "read":
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("alice/new")
    else:
        api.create_repo("alice/new")
        api.create_branch("alice/new", branch="b")


# Repositories


def test_visibility_is_what_was_asked_for(hub: LoopbackHub, alice: HfApi) -> None:
    """A repository is created private on request, and can be made public later."""
    alice.create_repo("alice/m", private=True)
    assert hub.repo("alice/m").settings["private"]

    alice.update_repo_settings("alice/m", private=False)

    assert not hub.repo("alice/m").settings["private"]


def test_a_repository_is_created_once(alice: HfApi) -> None:
    """Creating what exists is a conflict, unless the caller allows for it; nothing is changed."""
    alice.create_repo("alice/m", private=True)

    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("alice/m")
    alice.create_repo("alice/m", private=False, exist_ok=True)
    assert alice.model_info("alice/m").private


def test_a_namespace_belongs_to_its_members(hub: LoopbackHub, alice: HfApi) -> None:
    """Nobody creates repositories under another name; members with write access do under theirs."""
    hub.add_org("lab", {"alice": "write"})

    alice.create_repo("lab/m")
    with pytest.raises(HfHubHTTPError, match="403"):
        alice.create_repo("bob/m")


def test_deleting_can_be_forbidden(hub: LoopbackHub, alice: HfApi) -> None:
    """A Hub deletes repositories, or refuses that altogether when told so."""
    alice.create_repo("alice/m")
    hub.settings.allow_delete = False
    with pytest.raises(HfHubHTTPError, match="403"):
        alice.delete_repo("alice/m")

    hub.settings.allow_delete = True
    alice.delete_repo("alice/m")

    assert not hub.has_repo("alice/m")


def test_search_finds_what_the_caller_may_see(
    hub: LoopbackHub, alice: HfApi, stranger: HfApi
) -> None:
    """Search matches words of the id and leaves out others' private repositories."""
    for name, private in (("qwen-base", False), ("qwen-secret", True), ("llama", False)):
        hub.add_repo(f"alice/{name}", private=private)

    assert [m.id for m in stranger.list_models(search="qwen")] == ["alice/qwen-base"]
    assert len(list(alice.list_models(search="qwen"))) == 2


def test_the_card_is_read_into_the_info(hub: LoopbackHub, alice: HfApi) -> None:
    """Licence, tags and the model's type come from the card and the config."""
    card = "---\nlicense: apache-2.0\ntags: [merge]\n---\n# M"
    hub.add_repo("alice/m", {"README.md": card, "config.json": '{"model_type": "qwen2"}'})

    info = alice.model_info("alice/m", files_metadata=True)

    assert info.card_data.license == "apache-2.0"
    assert info.tags == ["merge", "license:apache-2.0"]
    assert info.config == {"model_type": "qwen2"}
    assert {s.rfilename: s.size for s in info.siblings}["README.md"] == len(card)


def test_a_bad_card_stops_the_commit(hub: LoopbackHub, alice: HfApi) -> None:
    """Metadata that the Hub does not accept is refused before anything is committed."""
    before = hub.add_repo("alice/m")
    card = CommitOperationAdd("README.md", b"---\nbase_model_relation: marriage\n---\n")

    with pytest.raises(ValueError, match="base_model_relation"):
        alice.create_commit("alice/m", [card], commit_message="card")
    assert hub.repo("alice/m").at("main").id == before


# Revisions and commits


def test_a_pull_request_has_a_revision_with_slashes(
    hub: LoopbackHub, bob: HfApi, tmp_path: Path
) -> None:
    """A reader's pull request lands on refs/pr/1, which every endpoint takes as a revision."""
    hub.add_repo("alice/m")
    change = CommitOperationAdd("a.txt", b"a")

    made = bob.create_commit("alice/m", [change], commit_message="a", create_pr=True)

    assert made.pr_revision == "refs/pr/1"
    assert bob.model_info("alice/m", revision="refs/pr/1").sha == made.oid
    assert bob.list_repo_files("alice/m", revision="refs/pr/1") == [".gitattributes", "a.txt"]
    path = bob.hf_hub_download("alice/m", "a.txt", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"a"
    assert "a.txt" not in hub.files("alice/m")


def test_branches_and_tags_come_and_go(hub: LoopbackHub, alice: HfApi) -> None:
    """Branches and tags start at a revision, are listed, and can be deleted."""
    first = hub.add_repo("alice/m")
    hub.push("alice/m", {"a.txt": "a"})

    alice.create_branch("alice/m", branch="stage/1", revision=first)
    alice.create_tag("alice/m", tag="v1")

    refs = alice.list_repo_refs("alice/m")
    assert {ref.name: ref.target_commit for ref in refs.branches}["stage/1"] == first
    assert [ref.ref for ref in refs.tags] == ["refs/tags/v1"]
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_branch("alice/m", branch="stage/1")
    alice.delete_branch("alice/m", branch="stage/1")
    alice.delete_tag("alice/m", tag="v1")
    assert list(hub.repo("alice/m").refs()) == ["refs/heads/main"]


def test_history_lists_commits_until_it_is_squashed(hub: LoopbackHub, alice: HfApi) -> None:
    """Commits are listed newest first; squashing leaves one with the same files."""
    hub.add_repo("alice/m", {"a.txt": "a"})
    assert [c.title for c in alice.list_repo_commits("alice/m")] == ["Push", "initial commit"]

    alice.super_squash_history("alice/m")

    assert len(alice.list_repo_commits("alice/m")) == 1
    assert "a.txt" in hub.files("alice/m")


def test_a_stale_parent_is_refused(hub: LoopbackHub, alice: HfApi) -> None:
    """A commit that names a parent fails with 412 once the branch has moved."""
    parent = hub.add_repo("alice/m")
    hub.push("alice/m", {"theirs.txt": "theirs"})
    mine = CommitOperationAdd("mine.txt", b"mine")

    with pytest.raises(HfHubHTTPError, match="412"):
        alice.create_commit("alice/m", [mine], commit_message="mine", parent_commit=parent)
    assert set(hub.files("alice/m")) == {".gitattributes", "theirs.txt"}


def test_files_and_folders_are_deleted_in_a_commit(hub: LoopbackHub, alice: HfApi) -> None:
    """One commit may delete a file and a folder; deleting what is not there is an error."""
    hub.add_repo("alice/m", {"a.txt": "a", "d/b.txt": "b", "d/c.txt": "c"})

    gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("d/")]
    alice.create_commit("alice/m", gone, commit_message="less")

    assert set(hub.files("alice/m")) == {".gitattributes"}
    with pytest.raises(RemoteEntryNotFoundError):
        alice.delete_file("a.txt", "alice/m")


def test_a_commit_of_unknown_content_is_refused(hub: LoopbackHub, alice: HfApi) -> None:
    """An LFS pointer to what was never uploaded fails with 400."""
    hub.add_repo("alice/m")
    pointer = {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": pointer}]

    answer = httpx2.post(
        f"{hub.endpoint}/api/models/alice/m/commit/main",
        content="\n".join(json.dumps(line) for line in lines),
        headers={"authorization": "Bearer hf_alice"},
    )

    assert answer.status_code == 400
    assert "does not exist" in answer.json()["error"]


def test_the_tree_lists_folders_and_files(hub: LoopbackHub, alice: HfApi) -> None:
    """The tree shows one level or all of them, and large files with their SHA-256."""
    hub.add_repo("alice/m", {"w.safetensors": LARGE, "d/e/f.txt": "f"})

    top = {item.path for item in alice.list_repo_tree("alice/m")}
    below = {item.path for item in alice.list_repo_tree("alice/m", "d", recursive=True)}
    (large,) = alice.get_paths_info("alice/m", ["w.safetensors", "missing"])

    assert top == {".gitattributes", "d", "w.safetensors"}
    assert below == {"d/e", "d/e/f.txt"}
    assert large.lfs.sha256 == hub.files("alice/m")["w.safetensors"].sha256


def test_what_is_missing_has_its_own_error(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    """A missing revision and a missing file raise different errors."""
    hub.add_repo("alice/m")

    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/m", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        alice.hf_hub_download("alice/m", "nothing.txt", cache_dir=tmp_path)


# Downloads


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [("bytes=10-19", 10, 19), ("bytes=1048570-", 1048570, 1048575), ("bytes=-6", 1048570, 1048575)],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.txt"])
def test_a_range_is_answered_exactly(
    hub: LoopbackHub, name: str, wanted: str, first: int, last: int
) -> None:
    """A range gives 206 with exactly its bytes, from the storage and from the repository."""
    text = LARGE.replace(b"\0", b"0")
    hub.add_repo("alice/m", {name: text})

    answer = get(hub, f"/alice/m/resolve/main/{name}", range=wanted)

    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(text)}"
    assert answer.content == text[first : last + 1]


def test_a_range_outside_the_file_is_refused(hub: LoopbackHub) -> None:
    """A range that starts after the end gives 416 and the size."""
    hub.add_repo("alice/m", {"a.txt": "abc"})

    answer = get(hub, "/alice/m/resolve/main/a.txt", range="bytes=3-5")

    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */3")


def test_large_files_are_redirected_to_another_origin(hub: LoopbackHub, alice: HfApi) -> None:
    """The redirect carries the file's metadata, and the storage sees no credentials."""
    hub.add_repo("alice/m", {"w.safetensors": LARGE}, private=True)

    meta = alice.get_hf_file_metadata(
        url=url_of("alice/m", "w.safetensors", endpoint=hub.endpoint), token="hf_alice"
    )

    assert meta.commit_hash == hub.repo("alice/m").at("main").id
    assert (meta.size, meta.etag) == (len(LARGE), hub.files("alice/m")["w.safetensors"].sha256)
    assert meta.location.startswith(hub.cdn)
    assert httpx2.get(meta.location).content == LARGE


def test_a_signed_url_expires(hub: LoopbackHub, alice: HfApi) -> None:
    """An expired or altered URL gives 403; resolving again gives one that works."""
    hub.add_repo("alice/m", {"w.safetensors": LARGE})
    url = url_of("alice/m", "w.safetensors", endpoint=hub.endpoint)

    old = alice.get_hf_file_metadata(url=url).location
    hub.expire_urls()
    new = alice.get_hf_file_metadata(url=url).location

    assert httpx2.get(old).status_code == 403
    assert httpx2.get(new.replace("signature=", "signature=0")).status_code == 403
    assert httpx2.get(new).status_code == 200
    hub.settings.url_lifetime = -1
    assert get(hub, "/alice/m/resolve/main/w.safetensors").status_code == 403


def test_a_huge_file_takes_no_room(hub: LoopbackHub, alice: HfApi) -> None:
    """The header and the last bytes of a 100 GB stand-in are served without its bytes existing."""
    size = 100 * 10**9
    header = json.dumps({"w": {"dtype": "U8", "shape": [10], "data_offsets": [0, 10]}}).encode()
    head = len(header).to_bytes(8, "little") + header
    hub.add_repo("alice/m", {"model.safetensors": Sparse(head=head, size=size)})

    tensors = alice.get_safetensors_metadata("alice/m").files_metadata["model.safetensors"].tensors
    tail = get(hub, "/alice/m/resolve/main/model.safetensors", range=f"bytes={size - 4}-")

    assert tensors["w"].shape == [10]
    assert (tail.status_code, tail.content) == (206, bytes(4))


def test_a_folder_is_published_without_copying(hub: LoopbackHub, tmp_path: Path) -> None:
    """Seeded files are links to the originals, which stay as they are; not all need be read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(LARGE)
    before = (folder / "model.safetensors").stat()
    hub.add_repo("alice/m", folder)
    hub.add_repo("alice/fake", folder, fake_above=1000)

    real, fake = (hub.files(f"alice/{name}")["model.safetensors"] for name in ("m", "fake"))

    assert real.sha256 != fake.sha256
    assert len([path for path in tmp_path.rglob("*") if path.is_symlink()]) == 2
    assert (folder / "model.safetensors").stat().st_ctime_ns == before.st_ctime_ns
    assert hub.read("alice/fake", "model.safetensors") == LARGE


# Uploads, by Xet and by LFS


@MODES
def test_shards_are_staged_and_published(hub: LoopbackHub, tmp_path: Path, xet: bool) -> None:
    """Shards go to a branch; one commit copies them to main with small files and moves no bytes."""
    (tmp_path / "shard").write_bytes(LARGE)
    script = """
api.create_repo("alice/m", private=True)
api.create_branch("alice/m", branch="staging")
shard = CommitOperationAdd("w.safetensors", "shard")
api.preupload_lfs_files("alice/m", [shard], revision="staging")
api.create_commit("alice/m", [shard], commit_message="shard", revision="staging")
copy = CommitOperationCopy("w.safetensors", "w.safetensors", src_revision="staging")
card = CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\n")
api.create_commit("alice/m", [copy, card], commit_message="publish")
api.delete_branch("alice/m", branch="staging")
api.update_repo_settings("alice/m", private=False)
print(hf_hub_download("alice/m", "w.safetensors"))
"""
    downloaded = run_client(hub, script, tmp_path, xet=xet).strip()

    assert Path(downloaded).read_bytes() == hub.read("alice/m", "w.safetensors") == LARGE
    assert set(hub.files("alice/m")) == {".gitattributes", "README.md", "w.safetensors"}
    assert not hub.repo("alice/m").settings["private"]
    assert len(hub.log.find(method="PUT", path="/upload/")) == (0 if xet else 1)
    assert len(hub.log.find(path="xet-write-token")) == (1 if xet else 0)


def test_contents_are_copied_between_repositories(hub: LoopbackHub, tmp_path: Path) -> None:
    """A commit may copy a large file from another repository; the client copies Xet's alone."""
    (tmp_path / "shard").write_bytes(LARGE)
    script = """
for name in ("alice/from", "alice/to"):
    api.create_repo(name)
api.upload_file(path_or_fileobj="shard", path_in_repo="w.safetensors", repo_id="alice/from")
source = {"src_repo_id": "alice/from", "src_repo_type": "model"}
copy = CommitOperationCopy("w.safetensors", "v.safetensors", **source)
api.create_commit("alice/to", [copy], commit_message="copy")
"""
    run_client(hub, script, tmp_path, xet=True)

    assert hub.read("alice/to", "v.safetensors") == LARGE


@MODES
def test_a_folder_is_uploaded_and_a_snapshot_taken(
    hub: LoopbackHub, tmp_path: Path, xet: bool
) -> None:
    """upload_folder and snapshot_download give back the same files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.safetensors").write_bytes(LARGE)
    (folder / "config.json").write_text("{}")
    script = """
api.create_repo("alice/m")
api.upload_folder(repo_id="alice/m", folder_path="model")
print(snapshot_download("alice/m"))
"""
    snapshot = Path(run_client(hub, script, tmp_path, xet=xet).strip().splitlines()[-1])

    assert (snapshot / "w.safetensors").read_bytes() == LARGE
    assert (snapshot / "config.json").read_text() == "{}"


def test_big_files_go_up_in_parts(hub: LoopbackHub, tmp_path: Path) -> None:
    """Above a size, LFS files are uploaded in parts, each sent again when it fails."""
    hub.settings.multipart_over = hub.settings.part_bytes = 400_000
    failed = hub.faults.add("503", method="PUT", path="part=2", times=1)
    (tmp_path / "shard").write_bytes(LARGE)
    script = """
api.create_repo("alice/m")
api.upload_file(path_or_fileobj="shard", path_in_repo="w.safetensors", repo_id="alice/m")
"""
    run_client(hub, script, tmp_path, xet=False)

    assert hub.read("alice/m", "w.safetensors") == LARGE
    assert failed.hits == 1
    assert len(hub.log.find(method="PUT", status=200)) == 3


def test_a_damaged_upload_is_refused(hub: LoopbackHub, alice: HfApi) -> None:
    """Bytes that do not have the announced SHA-256 never become an object."""
    hub.add_repo("alice/m")
    batch = httpx2.post(
        f"{hub.endpoint}/alice/m.git/info/lfs/objects/batch",
        json={"objects": [{"oid": "0" * 64, "size": 3}]},
        headers={"authorization": "Bearer hf_alice"},
    )

    (wanted,) = batch.json()["objects"]
    answer = httpx2.put(wanted["actions"]["upload"]["href"], content=b"abc")

    assert answer.status_code == 400


@LINUX
def test_two_processes_upload_by_xet_at_once(hub: LoopbackHub, tmp_path: Path) -> None:
    """A process may upload while another one's upload is open; both end up in one repository."""
    hub.add_repo("alice/m")
    slow = """
import hf_xet
from huggingface_hub.utils._xet import get_xet_session
url = f"{api.endpoint}/api/models/alice/m/xet-write-token/main"
headers = api._build_hf_headers()
access = {"token_refresh_url": url, "token_refresh_headers": headers}
with get_xet_session().new_upload_commit(**access) as up:
    stream = up.start_upload_stream(name="slow", sha256=hf_xet.COMPUTE_SHA256)
    stream.write(b"slow" * 100_000)
    print("open", flush=True)
    sys.stdin.readline()
    sha256 = stream.finish().xet_info.sha256
print(sha256)
"""
    fast = """
api.upload_file(path_or_fileobj=b"fast" * 100_000, path_in_repo="fast.bin", repo_id="alice/m")
print(len(open(hf_hub_download("alice/m", "fast.bin"), "rb").read()))
"""
    client = start_client(hub, slow, tmp_path, xet=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "open\n"

    printed = run_client(hub, fast, tmp_path, xet=True)
    rest, _ = client.communicate("go on\n")

    assert int(printed) == len(hub.read("alice/m", "fast.bin"))
    pointer = {"path": "slow.bin", "algo": "sha256", "oid": rest.strip()}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": pointer}]
    answer = httpx2.post(
        f"{hub.endpoint}/api/models/alice/m/commit/main",
        content="\n".join(json.dumps(line) for line in lines),
        headers={"authorization": "Bearer hf_alice"},
    )
    assert answer.status_code == 200
    assert hub.read("alice/m", "slow.bin") == b"slow" * 100_000


def test_seeded_files_can_be_read_by_xet(hub: LoopbackHub, tmp_path: Path) -> None:
    """Files put into Xet storage from inside reach a client without the CDN."""
    hub.add_repo("alice/m", {"w.safetensors": LARGE}, xet=True)

    script = 'print(hf_hub_download("alice/m", "w.safetensors"))'
    downloaded = run_client(hub, script, tmp_path, xet=True).strip()

    assert Path(downloaded).read_bytes() == LARGE
    assert not hub.log.find(port="cdn")


@LINUX
def test_a_client_can_be_killed_at_a_chosen_request(hub: LoopbackHub, tmp_path: Path) -> None:
    """A hook strikes in the middle of a run; the Hub keeps what was committed until then."""
    hub.add_repo("alice/m")
    (tmp_path / "shard").write_bytes(LARGE)
    script = """
api.upload_file(path_or_fileobj=b"1", path_in_repo="1.txt", repo_id="alice/m")
api.upload_file(path_or_fileobj=b"2", path_in_repo="2.txt", repo_id="alice/m")
api.upload_file(path_or_fileobj=b"3", path_in_repo="3.txt", repo_id="alice/m")
"""
    client = start_client(hub, script, tmp_path, xet=False)
    kill = Hook(call=client.kill)
    hub.faults.add(kill, method="POST", path="/commit/", skip=1, times=1, after=True)

    client.communicate()

    assert client.returncode == -signal.SIGKILL
    assert set(hub.files("alice/m")) == {".gitattributes", "1.txt", "2.txt"}


def test_a_restart_keeps_everything(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    """A new Hub on the same folder knows the accounts, repositories and contents."""
    hub.add_repo("alice/m", {"w.safetensors": LARGE}, private=True)
    commit = hub.repo("alice/m").at("main").id
    hub.stop()

    with LoopbackHub(tmp_path / "hub") as again:
        api = HfApi(endpoint=again.endpoint, token="hf_alice")
        info = api.model_info("alice/m")
        served = get(again, "/alice/m/resolve/main/w.safetensors").content

    assert (info.sha, info.private, served) == (commit, True, LARGE)


def test_a_stopped_hub_comes_back_on_its_ports(hub: LoopbackHub, alice: HfApi) -> None:
    """While the Hub is down, requests fail; afterwards the same URL works."""
    endpoint = hub.endpoint
    hub.stop()
    with pytest.raises(httpx2.ConnectError):
        alice.whoami()

    hub.start()

    assert hub.endpoint == endpoint
    assert alice.whoami()["name"] == "alice"


# Faults and limits


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("429", 429),
        ("500", 500),
        ("502", 502),
        ("503", 503),
        ("416", 416),
        ("forbidden", 403),
        ("expired", 403),
        ("revoked", 401),
        ("quota", 403),
        ("stale", 412),
    ],
)
def test_a_fault_answers_in_the_hubs_place(hub: LoopbackHub, fault: str, status: int) -> None:
    """A fault with a status strikes once and leaves the next request alone."""
    hub.add_repo("alice/m", {"a.txt": "a"})
    rule = hub.faults.add(fault, path="/resolve/", times=1)

    statuses = [get(hub, "/alice/m/resolve/main/a.txt").status_code for _ in range(2)]

    assert (statuses, rule.hits) == ([status, 200], 1)
    assert [entry.faults for entry in hub.log] == [(fault,), ()]


def test_a_small_answer_is_sent_at_once(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer waits for the acknowledgement of the one before (TCP_NODELAY)."""
    options = []
    begin = Protocol.connection_made

    def noting(protocol: Protocol, transport: asyncio.Transport) -> None:
        connection = transport.get_extra_info("socket")
        options.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        begin(protocol, transport)

    monkeypatch.setattr(Protocol, "connection_made", noting)
    with httpx2.Client() as client:
        client.get(f"{hub.endpoint}/api/models", headers={"Authorization": "Bearer hf_alice"})

    assert options
    assert all(options)


def test_a_rate_limit_is_waited_for(hub: LoopbackHub) -> None:
    """The library reads the RateLimit header of a 429 and asks again."""
    hub.add_repo("alice/m", {"a.txt": "a"})
    hub.faults.add("429", path="/resolve/", times=1)

    answer = http_backoff("GET", f"{hub.endpoint}/alice/m/resolve/main/a.txt", base_wait_time=0)

    hf_raise_for_status(answer)
    assert [entry.status for entry in hub.log] == [429, 200]
    assert answer.content == b"a"


def test_a_range_can_be_ignored(hub: LoopbackHub) -> None:
    """With the fault, the storage answers a range with 200 and the whole file."""
    hub.add_repo("alice/m", {"w.bin": LARGE})
    hub.faults.add("ignore-range", port="cdn")

    answer = get(hub, "/alice/m/resolve/main/w.bin", range="bytes=0-9")

    assert (answer.status_code, len(answer.content)) == (200, len(LARGE))


def test_a_range_can_be_answered_wrongly(hub: LoopbackHub) -> None:
    """With the fault, the Content-Range is not what was asked for."""
    hub.add_repo("alice/m", {"w.bin": LARGE})
    hub.faults.add("wrong-range", port="cdn")

    answer = get(hub, "/alice/m/resolve/main/w.bin", range="bytes=0-9")

    assert answer.headers["content-range"] == f"bytes 1-10/{len(LARGE) + 1}"


def test_a_body_can_be_cut_short(hub: LoopbackHub) -> None:
    """With the fault, the connection closes before all promised bytes have come."""
    hub.add_repo("alice/m", {"w.bin": LARGE})
    hub.faults.add(Cut(fraction=0.25), port="cdn")

    with pytest.raises(httpx2.RemoteProtocolError, match="complete message body"):
        get(hub, "/alice/m/resolve/main/w.bin")
    (entry,) = hub.log.find(port="cdn")
    assert entry.sent == len(LARGE) // 4


def test_a_connection_can_be_reset(hub: LoopbackHub) -> None:
    """With the fault, a request ends without an answer."""
    hub.faults.add("reset")

    with pytest.raises(httpx2.NetworkError):
        get(hub, "/api/whoami-v2")
    assert [entry.status for entry in hub.log] == [None]


def test_an_upload_can_be_reset_in_the_middle(hub: LoopbackHub, tmp_path: Path) -> None:
    """The connection of a PUT breaks after some bytes; the library sends the file again."""
    hub.add_repo("alice/m")
    hub.faults.add(Reset(received=300_000), method="PUT", times=1)
    (tmp_path / "shard").write_bytes(LARGE)
    script = """
api.upload_file(path_or_fileobj="shard", path_in_repo="w.safetensors", repo_id="alice/m")
"""
    run_client(hub, script, tmp_path, xet=False)

    assert [entry.status for entry in hub.log.find(method="PUT")] == [None, 200]
    assert hub.read("alice/m", "w.safetensors") == LARGE


@pytest.mark.parametrize("fault", ["reset", "503"])
def test_an_answer_can_be_lost(hub: LoopbackHub, alice: HfApi, fault: str) -> None:
    """With `after`, the commit is made and the client is not told."""
    hub.add_repo("alice/m")
    hub.faults.add(fault, path="/commit/", times=1, after=True)
    change = CommitOperationAdd("a.txt", b"a")

    with pytest.raises((httpx2.NetworkError, HfHubHTTPError)):
        alice.create_commit("alice/m", [change], commit_message="a")
    assert hub.read("alice/m", "a.txt") == b"a"


def test_another_writer_can_come_first(hub: LoopbackHub, alice: HfApi) -> None:
    """A hook that pushes before the commit is handled makes its parent stale."""
    parent = hub.add_repo("alice/m")
    theirs = Hook(call=lambda: hub.push("alice/m", {"theirs.txt": "t"}))
    hub.faults.add(theirs, path="/commit/", times=1)
    mine = CommitOperationAdd("mine.txt", b"mine")

    with pytest.raises(HfHubHTTPError, match="412"):
        alice.create_commit("alice/m", [mine], commit_message="mine", parent_commit=parent)


def test_a_token_can_be_revoked_on_the_way(hub: LoopbackHub, alice: HfApi) -> None:
    """A hook that revokes the token fails the request that it strikes and all later ones."""
    hub.add_repo("alice/m")
    hub.faults.add(Hook(call=lambda: hub.revoke_token("hf_alice")), path="/preupload/", times=1)

    with pytest.raises(HfHubHTTPError, match="401"):
        alice.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="alice/m")


@MODES
def test_a_full_quota_stops_an_upload(hub: LoopbackHub, tmp_path: Path, xet: bool) -> None:
    """Private storage beyond the quota is refused, before or at the commit."""
    hub.add_repo("alice/m", {"old.bin": LARGE}, private=True)
    hub.set_quota("alice", len(LARGE))
    (tmp_path / "new").write_bytes(LARGE[::-1])
    script = """
try:
    api.upload_file(path_or_fileobj="new", path_in_repo="new.bin", repo_id="alice/m")
except Exception as error:
    print("403" in str(error) or "403" in str(error.__cause__))
"""
    assert run_client(hub, script, tmp_path, xet=xet).strip() == "True"
    assert "new.bin" not in hub.files("alice/m")


def test_chances_repeat_with_their_seed(hub: LoopbackHub) -> None:
    """The same seed strikes the same requests."""
    hub.add_repo("alice/m")
    hub.faults.add("503", chance=0.5)

    def statuses() -> list[int]:
        hub.faults.seed(7)
        return [get(hub, "/api/models/alice/m").status_code for _ in range(16)]

    first = statuses()
    assert set(first) == {200, 503}
    assert statuses() == first


def test_bytes_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's bytes wait for what it moved before in that direction, and for nobody else's."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(limits.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(limits.asyncio, "sleep", sleep)
    limit = limits.Limits(down=100.0, up=10.0)

    async def move() -> None:
        for direction, client in (("down", 1), ("down", 1), ("down", 2), ("up", 1)):
            await limit.spend(direction, client, 50)

    asyncio.run(move())

    assert waits == [0.5, 1.0, 0.5, 5.0]


def test_the_log_holds_no_secrets(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    """Entries name the user, the process and the bytes, but neither token nor signature."""
    hub.add_repo("alice/m", {"w.bin": LARGE})
    alice.hf_hub_download("alice/m", "w.bin", local_dir=tmp_path)

    head, body = hub.log.find(path="w.bin|/file/")

    assert (head.user, head.status, body.port, body.sent) == ("alice", 302, "cdn", len(LARGE))
    assert body.pid in (os.getpid(), None)
    assert "hf_alice" not in repr(list(hub.log))
    assert "signature=-" in body.path


# Jobs and Spaces


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_a_job_is_recorded_and_not_run(hub: LoopbackHub, alice: HfApi) -> None:
    """A Job's request can be read by the test; its answer does not repeat the secrets."""
    job = alice.run_uv_job(
        "resmerge-stream", script_args=["--help"], secrets={"HF_TOKEN": "hf_alice"}, flavor="cpu-xl"
    )

    ((path, payload),) = hub.recorded.payloads
    assert (path, payload["flavor"]) == ("POST /api/jobs/alice", "cpu-xl")
    assert payload["secrets"] == {"HF_TOKEN": "hf_alice"}
    assert "hf_alice" not in repr(job)
    alice.cancel_job(job_id=job.id)
    assert alice.inspect_job(job_id=job.id).status.stage == "CANCELED"


def test_a_space_is_duplicated_onto_hardware(hub: LoopbackHub, bob: HfApi) -> None:
    """Duplicating a Space copies its files and records the hardware that was asked for."""
    hub.add_repo("alice/space", {"app.py": "pass"}, kind="spaces")

    bob.duplicate_repo("alice/space", repo_type="space", private=True, space_hardware="a10g-small")
    bob.request_space_hardware("bob/space", "t4-small")

    copy = hub.repo("bob/space", "spaces")
    assert "app.py" in copy.at("main").files
    assert copy.settings["private"]
    flavors = [
        payload.get("hardware", payload.get("flavor")) for _, payload in hub.recorded.payloads
    ]
    assert flavors == ["a10g-small", "t4-small"]


# The command line


def test_the_command_line_serves_a_folder(tmp_path: Path) -> None:
    """`python -m loopback_hub` prints how to reach it, serves a folder, and stops cleanly."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    options = ["--port", "0", "--dir", str(tmp_path / "hub"), "--repo", f"demo/m={folder}"]
    command = [sys.executable, "-m", "loopback_hub", *options, "--fault", "503@0:/resolve/"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        exported = dict(word.split("=", 1) for word in server.stdout.readline().split()[1:])
        api = HfApi(endpoint=exported["HF_ENDPOINT"], token=exported["HF_TOKEN"])
        path = api.hf_hub_download("demo/m", "config.json", cache_dir=tmp_path / "cache")
        server.terminate()

    assert Path(path).read_text() == "{}"
    assert server.returncode == 0
