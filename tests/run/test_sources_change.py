"""Sources that change, while they are merged or after: what was made of them is not believed."""

import json
import os
import shutil

import pytest

from resmerge_stream import run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.errors import CheckpointNotFoundError, SourceChangedError
from resmerge_stream.planning.plan import Options, plan_merge
from tests.support.checkpoints import (
    edit_tensors,
    file_bytes,
    make_group,
    plan_group,
    recipe_of,
    run_python,
)

pytestmark = pytest.mark.usefixtures("without_picture")
LAST = "model-00002-of-00002.safetensors"


def other_values(path):
    """Return a file of the same size and header, whose bfloat16 values differ in their last bit."""
    data = bytearray(path.read_bytes())
    for i in range(8 + int.from_bytes(data[:8], "little"), len(data) - 1, 2):
        data[i] ^= 1
    return bytes(data)


def renamed(path):
    """Put another file into its place."""
    new = path.with_name("new")
    new.write_bytes(other_values(path))
    os.replace(new, path)


def renamed_with_its_time(path):
    """Put another file into its place, with the time of the old one."""
    status = path.stat()
    renamed(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def written_in_place(path):
    """Write other values into the file, and set its time back."""
    status, data = path.stat(), other_values(path)
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def two_change_places(path):
    """Swap two tensors of one shape in header and data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    shapes = {}
    for name, info in header.items():
        if name != "__metadata__":
            shapes.setdefault(str(info["shape"]), []).append(name)
    a, b = next(names for names in shapes.values() if len(names) > 1)[:2]
    (i, j), (k, m) = header[a]["data_offsets"], header[b]["data_offsets"]
    body = bytearray(data[8 + length :])
    body[i:j], body[k:m] = body[k:m], body[i:j]
    header[a]["data_offsets"], header[b]["data_offsets"] = [k, m], [i, j]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + bytes(body))


def cut_short(path):
    """Truncate the file in place."""
    os.truncate(path, 1000)


def started(group, tmp_path):
    """Run a merge up to its first finished shard; return its events."""
    out = tmp_path / "out"
    events = run_merge(plan_group(group, out=out, method="mean"), out=out, work_dir=tmp_path / "w")
    next(event for event in events if event.name == "shard")
    return events


@pytest.mark.parametrize("file", [LAST, LAST.replace("00002-", "00001-", 1)])
@pytest.mark.parametrize(
    "change",
    [renamed, renamed_with_its_time, written_in_place, two_change_places, cut_short],
)
def test_a_source_that_changes_while_it_is_merged_ends_the_merge(change, file, tmp_path):
    """Whatever changes in a file, read already or not yet, nothing that was made of it is kept."""
    group = make_group(tmp_path / "group", experts=2, sharded=True)
    events = started(group, tmp_path)
    change(group.experts[0] / file)

    with pytest.raises(SourceChangedError, match=f"{file} (was written|has another size)"):
        list(events)

    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "w").rglob("journal"))


def test_a_source_that_is_gone_is_said_so_and_the_shards_stay(tmp_path):
    """A file that was removed may come back: the finished shards wait for it."""
    group = make_group(tmp_path / "group", experts=2, sharded=True)
    events = started(group, tmp_path)
    (group.experts[0] / LAST).rename(tmp_path / "away")

    with pytest.raises(CheckpointNotFoundError, match="is gone"):
        list(events)

    (tmp_path / "away").rename(group.experts[0] / LAST)
    out = tmp_path / "out"
    plan = plan_group(group, out=out, method="mean")
    again = list(run_merge(plan, out=out, work_dir=tmp_path / "w"))
    assert [event.resumed for event in again if event.name == "shard"] == [True, False]


def test_a_file_cut_short_while_its_pages_are_read_is_an_error():
    """A read of a page that is gone ends with an error in one message, not with a signal."""
    code = """
import os, sys, tempfile
from pathlib import Path
from resmerge_stream.errors import SourceChangedError
from resmerge_stream.filemaps import FileMap, Stamp
path = Path(tempfile.mkdtemp()) / "f"
path.write_bytes(bytes([7]) * 40960)
file = FileMap(path, "f", Stamp.of(path.stat()))
view = file.view(0, 40960)
assert view[0] == 7
os.truncate(path, 4096)
assert bytes(view[:4096]) == bytes([7]) * 4096
assert bytes(view[8192:]) == bytes(32768)
import numpy as np, torch
assert int(torch.frombuffer(view, dtype=torch.uint8)[5000:].sum()) == 0
try:
    file.check()
except SourceChangedError as exc:
    print(exc)
"""

    done = run_python(code)

    assert done.returncode == 0, done.stderr
    assert "f has another size" in done.stdout


def test_a_bus_error_of_others_still_ends_the_process():
    """Only maps of sources are looked after: any other read of nothing is a signal, as ever."""
    code = """
import mmap, os, tempfile
from pathlib import Path
from resmerge_stream.filemaps import FileMap, Stamp
path = Path(tempfile.mkdtemp()) / "f"
path.write_bytes(bytes(40960))
FileMap(path, "f", Stamp.of(path.stat())).view(0, 1)
other = mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ)
os.truncate(path, 0)
other[20000]
"""

    assert run_python(code).returncode == -7


def changed_expert(group):
    """Train the first expert on, and save it under its name."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(group.experts[0], lambda tensors: tensors[name].add_(0.01))


COMMANDS = {
    "merge": ["merge"],
    "adapter": ["merge", "--as", "adapter", "--adapter-rank", "2"],
    "compare": ["compare", "--methods", "mean,ties"],
    "extract": ["extract"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_of_sources_that_changed_is_not_taken_for_theirs(command, tmp_path, capsys):
    """The same command after an expert was saved anew: exit 2; `--update` makes it anew."""
    group, out = make_group(tmp_path / "group", experts=2), tmp_path / "out"
    models = ["--base", str(group.base), "--expert", str(group.experts[0])]
    models += ["--expert", str(group.experts[1])]
    if command == "extract":
        models = [str(group.experts[0]), "--base", str(group.base)]
    words = [*COMMANDS[command], *models, "--work-dir", str(tmp_path / "w"), "--out"]
    assert main([*words, str(out)]) == 0
    before = weights(out)
    assert main([*words, str(out)]) == 0
    changed_expert(group)
    capsys.readouterr()

    code = main([*words, str(out)])

    assert (code, weights(out)) == (2, before)
    assert "as it was before its files changed" in capsys.readouterr().err
    assert main([*words, str(out), "--update"]) == 0
    assert main([*words, str(tmp_path / "other")]) == 0
    assert weights(out) == weights(tmp_path / "other") != before


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_result_of_files_that_were_copied_and_changed_is_not_taken_for_theirs(
    file, tmp_path, capsys
):
    """Not weights alone: a base's other files come along, and are new in `--update`'s result."""
    group, out = make_group(tmp_path / "group", experts=2), tmp_path / "out"
    copied = group.base / file
    said = json.loads(copied.read_text()) if copied.exists() else {}
    copied.write_text(json.dumps({**said, "_note": "first"}))
    words = ["merge", "--base", str(group.base), "--out", str(out)]
    words += [word for one in group.experts for word in ("--expert", str(one))]
    words += ["--work-dir", str(tmp_path / "w")]
    assert main(words) == 0
    copied.write_text(json.dumps({**said, "_note": "second"}))
    capsys.readouterr()

    assert main(words) == 2
    capsys.readouterr()
    assert main([*words, "--update"]) == 0
    assert json.loads((out / file).read_text())["_note"] == "second"
    assert main(words) == 0


def weights(out):
    """Return the bytes of all weight files below a folder."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}


def test_an_update_leaves_no_file_of_the_result_before(tmp_path):
    """Another number of shards, and a file that somebody put there: only the merge's own go."""
    group, out = make_group(tmp_path / "group", experts=2, sharded=True), tmp_path / "out"
    run(group, out, tmp_path)
    (out / "notes.txt").write_text("mine")
    shutil.rmtree(group.base)
    make_group(tmp_path / "one", experts=2).base.rename(group.base)

    run(group, out, tmp_path, update=True)

    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"


def test_an_update_that_is_killed_is_finished_by_the_next(tmp_path):
    """Until the last moment the result before stands as it was; then the same command ends it."""
    group, out = make_group(tmp_path / "group", experts=2, sharded=True), tmp_path / "out"
    run(group, out, tmp_path)
    renamed(group.experts[0] / LAST)
    before = file_bytes(out)
    plan = plan_merge(recipe_of(group, method="mean"), out=out, update=True)
    events = run_merge(plan, out=out, work_dir=tmp_path / "w")
    next(event for event in events if event.name == "shard")
    events.close()
    assert {n: data for n, data in file_bytes(out).items() if not n.endswith(".part")} == before

    again = run(group, out, tmp_path, update=True)

    run(group, tmp_path / "other", tmp_path)
    assert [event.resumed for event in again if event.name == "shard"] == [True, False]
    assert file_bytes(out) == file_bytes(tmp_path / "other")


def run(group, out, tmp_path, *, update=False):
    """Merge by the mean, and return the events."""
    plan = plan_merge(recipe_of(group, method="mean"), out=out, update=update)
    return list(run_merge(plan, out=out, work_dir=tmp_path / "w"))


def test_a_small_model_is_known_by_its_content(tmp_path):
    """Other values under the old size, header and time are seen; a new time alone is no change."""
    group, out = make_group(tmp_path / "group", experts=2, sharded=True), tmp_path / "out"
    run(group, out, tmp_path)
    os.utime(group.experts[0] / LAST)
    touched = plan_merge(recipe_of(group, method="mean"), out=out)
    renamed_with_its_time(group.experts[0] / LAST)

    written = plan_merge(recipe_of(group, method="mean"), out=out)

    assert not touched.refused
    assert "as it was before" in written.problems[0]


def test_large_models_are_known_by_their_time_or_by_content_on_request(tmp_path, monkeypatch):
    """Beyond the size that is hashed for free, a new time is a change unless all is hashed."""
    monkeypatch.setattr("resmerge_stream.sources.local.HASHED_BYTES", 0)
    group = make_group(tmp_path / "group", experts=1)
    full = Options(check_sources="full")

    by_time, by_content = plan_group(group).identity, plan_group(group, options=full).identity

    assert "mtime_ns" in by_time["0"]["model.safetensors"]
    os.utime(group.base / "model.safetensors")
    assert plan_group(group).identity != by_time
    assert plan_group(group, options=full).identity == by_content


def test_the_report_says_the_sources_hashes(tmp_path):
    """Of a folder too, where hashing takes no time: what was merged can be told for ever."""
    import hashlib

    group = make_group(tmp_path / "group", experts=2)

    *_, finished = run(group, tmp_path / "out", tmp_path)

    told = [source["files"][0]["sha256"] for source in finished.report["sources"]]
    assert told == [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in group.folders
    ]
    assert len(finished.report["identity"]) == 3
