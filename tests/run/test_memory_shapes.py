"""The plan's memory for every method and shape: seen from outside, a merge takes no more, and its
report says what it took."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resmerge_stream.cli.main import main
from resmerge_stream.methods import find_methods
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.run.merging import Decided, Merged, Merger
from tests.support.checkpoints import child_environment, write_json
from tests.support.trainers import save_by_ranks

SHAPES = (
    (2, 4_000_000), (4_000_000, 2), (8_000_000,), (1, 6_000_000), (12, 700, 900), (1800, 1800),
    (8_000_000, 1), (3, 5, 7, 60_000), (32, 200_000), (100_000, 64),
)  # fmt: skip
# RESMERGE_EVERY_SHAPE=1: a shape of each kind for every method, and large ones: an hour.
EVERY = "RESMERGE_EVERY_SHAPE" in os.environ
# Elements of a tensor whose shape is drawn.
MOST = 8_000_000 if EVERY else 1_500_000
# What the C library keeps beyond what is in use, of what is planned.
SLACK = 1.05
# What a report says at least, of what is seen. Both look at a memory that rises and falls, each at
# its own moments: what is short may be seen by one of them alone, however idle the machine.
SAID = 0.8


def drawn(kind: str, draw: random.Random) -> tuple[int, ...]:
    """Draw a shape of a kind: of half of the most elements to all of them."""
    count, few = draw.randint(MOST // 2, MOST), draw.randint(2, 40)
    if kind == "stack":
        matrices, rows = draw.randint(3, 60), draw.randint(50, 1200)
        return matrices, rows, count // (matrices * rows)
    side = draw.randint(600, 1400)
    return {
        "wide": (few, count // few),
        "tall": (count // few, few),
        "square": (side, count // side),
        "tiny rows": (count // (few % 3 + 1), few % 3 + 1),
        "one row": (1, count),
    }[kind]


BUDGETS = ("default", "least")
KINDS = ("wide", "tall", "square", "stack", "tiny rows", "one row")


def write(folder: Path, shape: tuple[int, ...], count: int) -> list[Path]:
    """Write a base and experts of one large tensor and a norm."""
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=draw).mul_(0.02).bfloat16()
    folders = [folder / name for name in ("base", *(f"expert{n}" for n in range(count)))]
    for place in folders:
        change = torch.randn(shape, generator=draw).mul_(0.0 if place.name == "base" else 0.002)
        place.mkdir(parents=True)
        held = {"model.layers.0.mlp.up_proj.weight": change.add_(base).bfloat16(),
                "model.norm.weight": torch.ones(8).bfloat16()}  # fmt: skip
        save_file(held, place / "model.safetensors", {"format": "pt"})
        write_json(place / "config.json", {"model_type": "qwen2"})
    return folders


# A machine with more cores than this one may have.
MANY_CORES = (
    "import sys; from resmerge_stream import device; device.usable_cores = lambda: 16; "
    "from resmerge_stream.cli.main import main; sys.exit(main())"
)


def peak_of(
    arguments: list[str], said: Path, start: Sequence[str] = ("-m", "resmerge_stream")
) -> tuple[int, list[dict]]:
    """Run a command as a process; return its largest anonymous memory and its events."""
    peak = 0
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *start, *arguments, "--json"],
            env=child_environment(), stdout=file, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)
            peak = max(peak, 1024 * sum(map(int, found)))
            time.sleep(0.01)
    return peak, [json.loads(line) for line in said.read_text().splitlines()]


def check(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    shape: tuple[int, ...],
    budgets: Sequence[str] = BUDGETS,
) -> list[tuple[int, int]]:
    """Merge with the default and the least budget, and compare with what was planned.

    Returns:
        of each: the peak, as seen from outside, and as the report says.
    """
    kind = find_methods()[method]
    count = min(kind.models[1] or 2, 2)
    base, *experts = map(str, write(tmp_path / "group", shape, count))
    named = [word for expert in experts for word in ("--expert", expert)]
    merge = ["--base", base, *named, "--method", method]
    main(["plan", *merge, "--memory-budget", "1MB", "--json"])
    refused = json.loads(capsys.readouterr().out.splitlines()[-1])
    least = re.search(r"--memory-budget (\d+MB)", "".join(refused["problems"]))
    assert least, refused["problems"]

    found = []
    for name in budgets:
        budget = ["--memory-budget", least[1]] if name == "least" else []
        out = str(tmp_path / f"out-{name}")
        peak, events = peak_of(["merge", *merge, *budget, "--out", out], tmp_path / "said")
        planned = events[0]["plan"]["peak_memory_bytes"]

        assert events[-1]["event"] == "finished"
        said = events[-1]["report"]["summary"]["peak_private_bytes"]
        assert peak <= SLACK * planned, (method, shape, budget, peak, planned)
        found.append((peak, said))
    return found


def test_a_stack_merged_by_rows_takes_what_is_planned(tmp_path, capsys):
    """A row of a stack is a whole matrix; with the least budget nothing hides it."""
    check(tmp_path, capsys, "sce", (12, 700, 900))


def test_what_is_looked_at_before_a_merge_counts(tmp_path, capsys):
    """One long row, of which some is compared with the base's: in the plan, and in the report."""
    for peak, said in check(tmp_path, capsys, "task_arithmetic", (1, 6_500_000)):
        assert said >= SAID * peak


@pytest.mark.parametrize("budget", [[], ["--memory-budget", "340MB"]], ids=["default", "small"])
def test_many_cores_take_what_is_planned(tmp_path, budget):
    """Each thread that helps has row blocks of its own: planned, or there are fewer threads."""
    base, *experts = map(str, write(tmp_path / "group", (3600, 3600), 2))
    named = [word for expert in experts for word in ("--expert", expert)]
    merge = ["merge", "--base", base, *named, "--method", "ties", "--set", "density=0.2", *budget]

    peak, events = peak_of(
        [*merge, "--out", str(tmp_path / "out")], tmp_path / "said", ("-c", MANY_CORES)
    )

    threads = events[-1]["report"]["environment"]["threads"]
    assert threads == 16 if not budget else 2 < threads < 16
    assert peak <= SLACK * events[0]["plan"]["peak_memory_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(find_methods().keys() - {"passthrough"}))
def test_every_method_takes_what_is_planned(method, tmp_path, capsys):
    """A shape and a budget that the method's name draws, or a shape of each kind and both."""
    draw = random.Random(method)
    kinds = KINDS if EVERY else [draw.choice(KINDS)]

    for kind in kinds:
        budgets = BUDGETS if EVERY else [draw.choice(BUDGETS)]
        check(tmp_path / kind, capsys, method, drawn(kind, draw), budgets)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_takes_what_is_planned(shape, tmp_path, capsys):
    """Long rows, long columns, vectors and four dimensions, by methods that merge by rows."""
    method = random.Random(str(shape)).choice(("mean", "ties", "sce"))
    check(tmp_path, capsys, method, shape)


@pytest.mark.parametrize("method", ["mean", "ties", "head_regression"])
def test_a_merge_in_fp8_takes_what_is_planned(tmp_path, method):
    """A matrix waits whole for its scales, and a band of it for its blocks."""
    base, expert = map(str, write(tmp_path / "group", (2600, 2100), 1))
    merge = ["--base", base, "--expert", expert, "--method", method, "--dtype", "fp8"]

    peak, events = peak_of(["merge", *merge, "--out", str(tmp_path / "out")], tmp_path / "said")

    assert events[-1]["event"] == "finished"
    assert peak <= SLACK * events[0]["plan"]["peak_memory_bytes"]


def test_parts_that_are_joined_take_what_is_planned(tmp_path):
    """Rows and columns of two processes, put together when they are read: counted as made."""
    base, expert = map(str, write(tmp_path / "group", (1800, 1800), 1))
    save_by_ranks(Path(expert) / "model.safetensors", tmp_path / "saved")

    for cut in ("rows", "columns"):
        merge = ["--base", base, "--expert", str(tmp_path / "saved" / f"dcp-{cut}")]
        out = str(tmp_path / f"out-{cut}")
        peak, events = peak_of(["merge", *merge, "--method", "mean", "--out", out], tmp_path / "s")

        assert events[-1]["event"] == "finished"
        assert peak <= SLACK * events[0]["plan"]["peak_memory_bytes"], cut


def test_what_waits_to_be_written_counts_with_all_that_it_holds(tmp_path):
    """A large tensor that waits to be merged holds its memory; a merged one holds its bytes."""
    base, *experts = write(tmp_path, (200_000, 64), 2)
    recipe = Recipe(
        ModelRef(str(base)), tuple(ModelRef(str(one)) for one in experts), "della",
        parameters={"density": 0.5},
    )  # fmt: skip
    with closing(plan_merge(recipe)) as plan:
        merger = Merger(plan, torch.device("cpu"))
        held = {}
        for found in merger.each(list(plan.tensors.values()), merger.prepare):
            piece, prepared = found
            held[type(prepared)] = prepared.held_bytes, piece.tensor
            if isinstance(prepared, Decided):
                prepared.vectors.close()

    nbytes, large = held[Decided]
    assert nbytes == large.working_bytes > 10_000_000
    nbytes, small = held[Merged]
    assert nbytes == small.spec.nbytes
