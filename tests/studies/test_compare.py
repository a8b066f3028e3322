"""Several methods in one pass: the same bytes as alone, each tensor read once, one SVD for all."""

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.synthetic import Shape, Updates, write_group
from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.errors import PlanRefusedError, RecipeError
from resmerge_stream.maths import task_vectors
from resmerge_stream.planning.plan import Options
from resmerge_stream.recipe import ModelRef, parse_method
from resmerge_stream.run import pipeline
from resmerge_stream.run.merging import Merger
from resmerge_stream.sources.checkpoint import Checkpoint
from resmerge_stream.sources.store import ALL
from resmerge_stream.studies.compare import run_comparison
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support.checkpoints import read_tensors

SMALL = Shape(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
METHODS = (
    "resmerge",
    "ties:paper",
    "tsv_m",
    "star",
    "svc:inner=ties",
    "ram_plus",
    "dare_ties:paper",
    "mean",
)


@pytest.fixture
def recipe(tmp_path):
    """Three bfloat16 experts in two files each."""
    folder = tmp_path / "group"
    write_group(folder, SMALL, updates=Updates(unchanged=0.3), max_shard_bytes=40_000)
    experts = tuple(ModelRef(str(folder / f"expert{i}")) for i in range(3))
    return Recipe(ModelRef(str(folder / "base")), experts)


def compared(recipe, methods, out, work, **options):
    """Run a comparison to its end and return its events."""
    comparison = plan_comparison(recipe, methods, out=out, **options)
    return list(run_comparison(comparison, work_dir=work))


@pytest.mark.slow
def test_every_method_gives_the_bytes_of_its_own_merge(recipe, tmp_path):
    """A folder of a comparison is what `merge` would have written."""
    compared(recipe, METHODS, tmp_path / "out", tmp_path / "work")

    for text in METHODS:
        name, given = parse_method(text)
        alone = Recipe(recipe.base, recipe.experts, name, given)
        folder = tmp_path / "alone" / name
        list(run_merge(plan_merge(alone, out=folder), out=folder, work_dir=tmp_path / "work"))
        label = text.replace(":", "-")
        for file in sorted(folder.glob("*.safetensors*")):
            assert file.read_bytes() == (tmp_path / "out" / label / file.name).read_bytes(), text


def test_what_no_method_merges_is_carried_into_every_folder(recipe, tmp_path):
    """A tensor that the base alone has is the same in every method's model."""
    own = torch.arange(12.0).reshape(3, 4)
    base = Path(recipe.base.id)
    for file in base.glob("model*"):
        file.unlink()
    others = read_tensors(Path(recipe.experts[0].id))
    save_file(others | {"vision.proj.weight": own}, base / "model.safetensors")

    compared(recipe, ("mean", "ram"), tmp_path / "out", tmp_path / "work")

    for label in ("mean", "ram"):
        merged = read_tensors(tmp_path / "out" / label)
        assert torch.equal(merged["vision.proj.weight"], own), label


def test_each_tensor_is_read_once(recipe, tmp_path, monkeypatch):
    """However many methods there are, every byte range of a source is asked for once."""
    asked = Counter()
    read = Checkpoint.read

    def counting(self, name, rows=ALL):
        asked[self.id, name, rows.start or 0] += 1
        return read(self, name, rows)

    monkeypatch.setattr(Checkpoint, "read", counting)

    compared(recipe, ["resmerge", "ties:density=0.2", "tsv_m", "ram"], tmp_path / "o", tmp_path)

    # Beside what is looked at of each model before anything is written.
    assert sum(asked.values()) - len(asked) <= 6 * len(recipe.models)
    assert set(asked.values()) <= {1, 2}


def test_row_blocks_are_merged_side_by_side(recipe, tmp_path, monkeypatch):
    """While one row block of a tensor is merged, another thread merges the next one."""
    monkeypatch.setattr(task_vectors, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 2)
    merge_rows, together = Merger.merge_rows, threading.Event()
    active, lock = [], threading.Lock()

    def watched(self, decided, rows, delta, base):
        with lock:
            active.append(rows)
            if len(active) > 1:
                together.set()
        if rows.start == 0 and rows.stop < decided.vectors.shape[0]:
            together.wait(10)
        try:
            return merge_rows(self, decided, rows, delta, base)
        finally:
            with lock:
                active.remove(rows)

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "merge_rows", watched)
        compared(recipe, ["mean"], tmp_path / "out", tmp_path / "work")

    assert together.is_set()


def test_counting_passes_are_shared(recipe, tmp_path, monkeypatch):
    """TIES needs two passes and RAM+ one: together they read the sources twice, then merge."""
    asked = Counter()
    read = Checkpoint.read

    def counting(self, name, rows=ALL):
        asked[self.id, name, rows.start or 0] += 1
        return read(self, name, rows)

    monkeypatch.setattr(Checkpoint, "read", counting)

    compared(recipe, ["ties:paper", "ram_plus"], tmp_path / "out", tmp_path / "work")

    assert sum(asked.values()) - 3 * len(asked) <= 6 * len(recipe.models)
    assert set(asked.values()) <= {3, 4}


def test_each_decomposition_is_done_once(recipe, tmp_path, monkeypatch):
    """TSV-M, STAR and DC-Merge share the SVDs of a matrix."""
    import resmerge_stream.maths.factors as factors

    shapes = []
    thin_svd = factors.thin_svd
    monkeypatch.setattr(
        factors, "thin_svd", lambda matrix, keep=None: shapes.append(1) or thin_svd(matrix, keep)
    )

    compared(recipe, ["tsv_m", "star", "dc_merge"], tmp_path / "out", tmp_path / "work")

    assert len(shapes) == 3 * 7 * SMALL.num_hidden_layers


def test_the_table_sets_the_reports_side_by_side(recipe, tmp_path):
    """JSON, Markdown and a picture, with the methods in the order that was asked for."""
    *_, finished = compared(recipe, ["ties", "mean"], tmp_path / "out", tmp_path / "work")

    table = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["label"] for row in table["methods"]] == ["ties", "mean"]
    assert finished.report == table
    assert table["similarity"]["between_methods"][0][0] == pytest.approx(1.0)
    assert "| ties |" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "mean" / "resmerge" / "report.json").read_text())
    assert table["methods"][1]["kept_norm"] == report["summary"]["kept_norm"]


def test_report_only_writes_no_weights(recipe, tmp_path):
    """With --report-only there are reports, table and picture, and nothing to load."""
    compared(recipe, ["ties", "tsv_m"], tmp_path / "out", tmp_path / "work", report_only=True)

    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert names == [
        "comparison.json",
        "comparison.md",
        "comparison.png",
        "reports/ties.json",
        "reports/tsv_m.json",
    ]


def test_a_comparison_continues(recipe, tmp_path):
    """Stopped after its first shard, the same command continues and writes the same bytes."""
    methods = ["mean", "ties"]
    compared(recipe, methods, tmp_path / "whole", tmp_path / "work")
    comparison = plan_comparison(recipe, methods, out=tmp_path / "out")
    events = run_comparison(comparison, work_dir=tmp_path / "work")
    for event in events:
        if event.name == "shard":
            break
    events.close()

    again = compared(recipe, methods, tmp_path / "out", tmp_path / "work")

    assert any(event.name == "shard" and event.resumed for event in again)
    whole = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    assert again[-1].report["similarity"] == whole["similarity"]
    for file in sorted((tmp_path / "whole").glob("*/*.safetensors")):
        other = tmp_path / "out" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes()


def test_a_finished_comparison_is_not_run_again(recipe, tmp_path):
    """The same command on finished folders only makes the table again."""
    *_, first = compared(recipe, ["mean", "ties"], tmp_path / "out", tmp_path / "work")

    *_, again = compared(recipe, ["mean", "ties"], tmp_path / "out", tmp_path / "work")

    assert again.already_there
    assert again.report == first.report


def test_memory_is_stated_and_kept(recipe, tmp_path):
    """The plan says what all methods take together, and refuses what does not fit."""
    one = plan_comparison(recipe, ["tsv_m"], out=tmp_path / "a")
    two = plan_comparison(recipe, ["tsv_m", "iso_cts"], out=tmp_path / "b")
    assert two.peak_memory_bytes > one.peak_memory_bytes

    largest = max(tensor.working_bytes for tensor in one.first.tensors.values())
    tight = Options(memory_budget=one.peak_memory_bytes - one.first.working_bytes + largest)

    with pytest.raises(PlanRefusedError, match="memory"):
        plan_comparison(recipe, ["tsv_m", "iso_cts"], tight, out=tmp_path / "c")


@pytest.mark.parametrize(
    ("methods", "message"),
    [(["ties", "ties"], "twice"), ([], "no method"), (["ties:density=1:trim"], "PRESET")],
)
def test_wrong_lists_of_methods_are_refused(recipe, tmp_path, methods, message):
    """Nothing, the same twice, or a parameter without a value."""
    with pytest.raises(RecipeError, match=message):
        plan_comparison(recipe, methods, out=tmp_path / "out")


def test_one_wrong_method_refuses_the_comparison(recipe, tmp_path):
    """A method that cannot merge these experts is named before anything is read."""
    with pytest.raises(PlanRefusedError) as refused:
        plan_comparison(recipe, ["mean", "slerp"], out=tmp_path / "out")

    assert all(notice.startswith("slerp:") for notice in refused.value.notices)
