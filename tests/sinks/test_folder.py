"""A folder as target: temporary names, journal, publication, and what is never touched."""

import json
import os
import shutil

import pytest

from resmerge_stream.cli.main import main
from resmerge_stream.errors import OutputExistsError, PlanRefusedError, StoppedError
from resmerge_stream.sinks import FolderSink, target_state
from resmerge_stream.sinks.folder import LOCK, MARKER, REPORT, discard
from resmerge_stream.sinks.layout import plan_shards
from resmerge_stream.sinks.safetensors_file import SafetensorsFile
from resmerge_stream.specs import TensorSpec
from tests.support.checkpoints import file_bytes, make_group, merge, plan_group, run_python

pytestmark = pytest.mark.usefixtures("without_picture")

SPECS = [TensorSpec(name, "U8", (8,)) for name in ("a", "b")]
SHARDS = plan_shards([[SPECS[0]], [SPECS[1]]], 1000)
IDENTITY = {"base": {"size": 1}}


def sink_at(tmp_path, *, plan_hash="p", identity=None):
    """Open a sink on the folder ``out``."""
    return FolderSink(tmp_path / "out", plan_hash, tmp_path / "work", identity or IDENTITY).open()


def write(sink, shard, data=b"12345678"):
    """Write and keep one shard of eight bytes."""
    writer = sink.open_shard(shard)
    writer.write(memoryview(data))
    entry = {"size": shard.nbytes, "sha256": writer.finish(), "tensors": []}
    sink.keep(shard, entry)
    return entry


def names(folder):
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_shards_have_temporary_names_until_all_is_there(tmp_path):
    """Before publication there is no file with a final name, afterwards no other."""
    sink = sink_at(tmp_path)
    for shard in SHARDS:
        write(sink, shard)
    before = names(tmp_path / "out")

    sink.publish({"config.json": b"{}", "resmerge/report.json": b"{}"})
    sink.close()

    assert before == [MARKER, LOCK, *(f"{shard.name}.part" for shard in SHARDS)]
    assert names(tmp_path / "out") == ["config.json", *(s.name for s in SHARDS), "resmerge"]
    assert (tmp_path / "out" / SHARDS[0].name).read_bytes() == SHARDS[0].header + b"12345678"


def test_finished_shards_are_found_again(tmp_path):
    """A second sink of the same plan knows what the first one kept, and nothing else."""
    sink = sink_at(tmp_path)
    entry = write(sink, SHARDS[0])
    (tmp_path / "out" / f"{SHARDS[1].name}.part").write_bytes(SHARDS[1].header)
    sink.close()

    again = sink_at(tmp_path)

    assert dict(again.finished_shards()) == {SHARDS[0].name: {"shard": SHARDS[0].name, **entry}}
    again.close()


@pytest.mark.parametrize("damage", ["gone", "shorter", "a bit", "journal cut", "journal gone"])
def test_a_damaged_shard_is_made_again(damage, tmp_path):
    """A shard counts as finished only with its whole file and its whole row of the journal."""
    sink = sink_at(tmp_path)
    write(sink, SHARDS[0])
    sink.close()
    part = tmp_path / "out" / f"{SHARDS[0].name}.part"
    journal = tmp_path / "work" / "journal" / f"{SHARDS[0].name}.json"
    if damage == "gone":
        part.unlink()
    elif damage == "shorter":
        os.truncate(part, 20)
    elif damage == "a bit":
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    elif damage == "journal cut":
        os.truncate(journal, journal.stat().st_size - 5)
    else:
        journal.unlink()

    again = sink_at(tmp_path)

    assert not again.finished_shards()
    again.close()


def test_a_journal_cut_by_a_crash_can_be_continued(tmp_path):
    """After a torn row, shards that are kept later are found by the next run."""
    sink = sink_at(tmp_path)
    write(sink, SHARDS[0])
    sink.close()
    journal = tmp_path / "work" / "journal" / f"{SHARDS[0].name}.json"
    os.truncate(journal, journal.stat().st_size - 5)
    second = sink_at(tmp_path)
    write(second, SHARDS[0])
    write(second, SHARDS[1])
    second.close()

    third = sink_at(tmp_path)

    assert set(third.finished_shards()) == {shard.name for shard in SHARDS}
    third.close()


def test_changed_sources_are_refused(tmp_path):
    """A run continues only with the sources that it was started with."""
    sink_at(tmp_path).close()

    with pytest.raises(PlanRefusedError, match="sources changed"):
        sink_at(tmp_path, identity={"base": {"size": 2}})


def test_a_folder_of_another_merge_is_refused(tmp_path):
    """An unfinished output of another plan is neither continued nor removed."""
    sink = sink_at(tmp_path)
    write(sink, SHARDS[0])
    sink.close()
    before = names(tmp_path / "out")

    with pytest.raises(OutputExistsError, match="another merge"):
        FolderSink(tmp_path / "out", "other", tmp_path / "work2", IDENTITY).open()

    assert names(tmp_path / "out") == before


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    """Whatever someone else put into a folder stays as it is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"precious")

    with pytest.raises(OutputExistsError, match="nothing there is overwritten"):
        sink_at(tmp_path)

    assert names(out) == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == b"precious"


def test_two_runs_at_once_are_told_apart(tmp_path):
    """The second run of a merge stops at once, and the first one goes on."""
    first = sink_at(tmp_path)

    with pytest.raises(StoppedError, match="another process"):
        sink_at(tmp_path)

    write(first, SHARDS[0])
    first.close()
    sink_at(tmp_path).close()


def test_the_state_of_a_target_is_told_without_changing_it(tmp_path):
    """Nothing, an empty folder, this run's rest and this run's result are told apart."""
    out = tmp_path / "out"
    assert target_state(out, "p") == target_state(tmp_path / "none", "p")
    sink = sink_at(tmp_path)
    write(sink, SHARDS[0])

    unfinished = target_state(out, "p")
    files = [{"name": SHARDS[0].name, "size": SHARDS[0].nbytes}]
    sink.publish({REPORT: json.dumps({"plan_hash": "p", "files": files}).encode()})
    sink.close()
    finished, other = target_state(out, "p"), target_state(out, "q")
    (out / SHARDS[0].name).unlink()
    robbed = target_state(out, "p")

    assert (unfinished.problem, unfinished.finished) == (None, False)
    assert unfinished.bytes_there == SHARDS[0].nbytes
    assert finished.finished
    assert "not made by this merge" in other.problem
    assert not robbed.finished
    assert "not each file that it names" in robbed.problem


@pytest.mark.parametrize(
    "report",
    ["", "{", "[]", "[" * 100_000, '{"plan_hash": 3}', '{"plan_hash": "p"}',
     '{"plan_hash": "p", "files": 1}', '{"plan_hash": "p", "files": [1]}',
     '{"plan_hash": "p", "files": [{"name": 3}]}', '{"plan_hash": "p", "files": [{"name": ".."}]}'],
)  # fmt: skip
def test_a_malformed_report_is_not_a_finished_merge(report, tmp_path):
    """Whatever stands in a folder's `report.json`, the folder is refused in one message."""
    (tmp_path / "out" / REPORT).parent.mkdir(parents=True)
    (tmp_path / "out" / REPORT).write_text(report)

    with pytest.raises(OutputExistsError, match="nothing there is overwritten"):
        sink_at(tmp_path)

    assert names(tmp_path / "out") == ["resmerge"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merge in a folder, and the command that made it but for the folder."""
    root = tmp_path_factory.mktemp("merged")
    group = make_group(root / "group")
    words = [word for path in group.experts for word in ("--expert", str(path))]
    arguments = ["merge", "--base", str(group.base), *words, "--work-dir", str(root / "work")]
    assert main([*arguments, "--out", str(root / "out")]) == 0
    return root / "out", arguments


@pytest.fixture
def finished(merged, tmp_path, capsys):
    """A copy of it in ``out``; returns the command."""
    shutil.copytree(merged[0], tmp_path / "out")
    capsys.readouterr()
    return merged[1]


@pytest.mark.parametrize("change", [
    lambda report: report.pop("tensors"),
    lambda report: report.update(summary=3),
    lambda report: report["files"].append("x"),
], ids=["no tensors", "no summary", "no file"])  # fmt: skip
def test_a_finished_folder_with_a_malformed_report_is_refused_in_words(
    change, finished, tmp_path, capsys
):
    """The same command again says what is wrong with the report: one message, exit 2."""
    path = tmp_path / "out" / REPORT
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))

    assert main([*finished, "--out", str(tmp_path / "out")]) == 2

    said = capsys.readouterr().err
    assert "report" in said
    assert len(said.strip().splitlines()) <= 3


@pytest.mark.parametrize("change", [
    lambda report: report["summary"].clear(),
    lambda report: [row.pop("role") for row in report["tensors"]],
    lambda report: [row.update(alpha="x", role=[1]) for row in report["tensors"]],
], ids=["empty summary", "no role", "odd values"])  # fmt: skip
def test_a_finished_folder_is_told_of_whatever_else_its_report_says(
    change, finished, tmp_path, capsys
):
    """A report is read back as a stranger's: what it lacks is not shown, and nothing breaks."""
    path = tmp_path / "out" / REPORT
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))

    assert main([*finished, "--out", str(tmp_path / "out")]) == 0

    assert "already holds the finished result" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["out", "work/shards"])
@pytest.mark.parametrize("temporary", [False, True])
def test_an_empty_mark_of_a_full_disk_is_ones_own(temporary, place, tmp_path):
    """A disk that was full when a run began leaves an empty mark: the same command goes on."""
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / (f".{MARKER}.tmp" if temporary else MARKER)).touch()

    sink = FolderSink(tmp_path / place, "p", tmp_path / "work", IDENTITY).open()
    for shard in SHARDS:
        write(sink, shard)
    sink.publish({"config.json": b"{}"})
    sink.close()

    assert names(tmp_path / place) == ["config.json", *(shard.name for shard in SHARDS)]


def test_an_empty_mark_beside_other_files_is_not_ones_own(tmp_path):
    """In a folder that somebody uses, an empty mark proves nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).touch()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(OutputExistsError):
        sink_at(tmp_path)

    assert names(tmp_path / "out") == [MARKER, "notes.txt"]


def test_discarding_removes_a_runs_own_files_only(tmp_path):
    """The marker and the unfinished shards go, everything else stays."""
    sink = sink_at(tmp_path)
    write(sink, SHARDS[0])
    sink.close()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "other.part").write_text("mine")

    removed = discard(tmp_path / "out")

    assert removed == [MARKER, f"{SHARDS[0].name}.part"]
    assert names(tmp_path / "out") == ["notes.txt", "other.part"]


def test_discarding_needs_the_marker(tmp_path):
    """In a folder without a marker nothing is removed."""
    (tmp_path / "x.safetensors.part").write_text("mine")

    with pytest.raises(OutputExistsError):
        discard(tmp_path)

    assert names(tmp_path) == ["x.safetensors.part"]


def test_a_shard_with_too_few_bytes_is_a_bug_not_a_file(tmp_path):
    """A writer that did not get all planned bytes refuses to finish."""
    writer = SafetensorsFile(tmp_path / "x.part", SHARDS[0])
    writer.write(memoryview(b"123"))

    with pytest.raises(RuntimeError, match="wrote"):
        writer.finish()

    writer.abort()
    assert not (tmp_path / "x.part").exists()


def test_a_target_that_cannot_be_made_stops_the_run(tmp_path):
    """A folder below a file cannot be made; the run stops and says so."""
    (tmp_path / "file").write_text("x")

    with pytest.raises(StoppedError, match="cannot use"):
        FolderSink(tmp_path / "file" / "out", "p", tmp_path / "work", IDENTITY).open()


FULL_DISK = """
import resource, signal, sys
from resmerge_stream import StoppedError, plan_merge, run_merge
from resmerge_stream.recipe import ModelRef, Recipe
out, work, base, *experts = sys.argv[1:]
plan = plan_merge(Recipe(ModelRef(base), tuple(map(ModelRef, experts)), "resmerge"), out=out)
events = run_merge(plan, out=out, work_dir=work)
next(events)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    list(events)
except StoppedError as exc:
    print(exc)
    sys.exit(exc.exit_code)
"""


def test_a_write_that_fails_stops_the_run_and_a_rerun_finishes_it(tmp_path):
    """Where a file cannot grow, the run stops with exit 3, and later ends with the same bytes."""
    group = make_group(tmp_path / "group", hidden=48, experts=2, sharded=True)
    out, work = tmp_path / "out", tmp_path / "work"
    paths = [str(path) for path in (out, work, *group.folders)]
    whole = merge(group, tmp_path / "whole")

    stopped = run_python(FULL_DISK, *paths)

    assert stopped.returncode == 3, stopped.stderr
    assert str(out) in stopped.stdout
    assert names(out) == [MARKER, LOCK]
    from resmerge_stream import run_merge

    list(run_merge(plan_group(group, out=out), out=out, work_dir=work))
    assert file_bytes(out) == file_bytes(whole.out)
