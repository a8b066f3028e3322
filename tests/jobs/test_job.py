"""A Job for one of the Hub's machines: the cheapest that fits, at what price, how it ended."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from resmerge_stream.cli.job import ending
from resmerge_stream.errors import RecipeError
from resmerge_stream.hub.flavors import Flavor
from resmerge_stream.jobs.evaluation import evaluation_job
from resmerge_stream.jobs.job import HubJob, JobLog, put
from resmerge_stream.planning.machines import Fleet
from resmerge_stream.specs import TensorSpec

SMALL = Flavor("small", 2, 16, 50, 0, 0.06)
MIDDLE = Flavor("middle", 8, 30, 400, 24, 0.80)
LARGE = Flavor("large", 23, 256, 3000, 80, 4.50)
FLAVORS = (LARGE, SMALL, MIDDLE)
MODELS = ("org/base", "me/merged")


def job(seconds: float = 600.0, *, needs_gpu: bool = True) -> HubJob:
    """Return a Job that takes so long, perhaps on a GPU."""
    files: dict[str, bytes] = {}
    return HubJob(
        what="evaluation",
        summary="evaluation: two models",
        told={},
        labels={"name": "evaluate-merged"},
        seconds_on=lambda flavor, speed: seconds,
        lack_of=lambda flavor: "it has no GPU" if needs_gpu and not flavor.gpu_gb else "",
        commands=[["evaluate", put(files, "tasks", "a.jsonl", b"{}")]],
        files=files,
        needs=("lm_eval",),
    )


class Hub:
    """Stands for the Jobs of a namespace: writes down what it was asked to start."""

    def __init__(self) -> None:
        self.uploaded: dict[str, bytes] = {}
        self.started: dict[str, Any] = {}

    def upload(self, contents: dict[str, bytes], *, mount: str) -> str:
        """Take files."""
        self.uploaded = dict(contents)
        return f"volume at {mount}"

    def start(self, command: list[str], **how: Any) -> str:
        """Take a Job."""
        self.started = {"command": command, **how}
        return "job-1"


def test_the_cheapest_machine_that_fits_is_offered() -> None:
    """Cheaper ones that lack something are passed over; the price is by the started minute."""
    taken = job().on(FLAVORS)
    offer = taken.offer()

    assert (taken.machine.flavor, offer["flavor"]) == (MIDDLE, "middle")
    assert job(needs_gpu=False).on(FLAVORS).machine.flavor is SMALL
    assert offer["timeout_seconds"] == taken.timeout_s >= 3 * 600
    assert offer["usd_at_most"] == round(MIDDLE.price(taken.timeout_s), 4) > offer["usd_estimate"]


def test_a_timeout_of_ones_own_is_kept() -> None:
    """Whoever pays may say when the Job ends; the highest price follows from that."""
    offer = job().on(FLAVORS, 120).offer()

    assert (offer["timeout_seconds"], offer["usd_at_most"]) == (120, round(MIDDLE.price(120), 4))


def test_a_job_that_fits_nowhere_names_what_the_largest_lacks() -> None:
    """The refusal is about the machine that came nearest."""
    with pytest.raises(RecipeError, match="fits this evaluation: on small, it has no GPU"):
        job().on((SMALL,))


def test_what_is_started_is_what_was_offered() -> None:
    """Machine, end, labels, files and what is installed beside the package reach the Hub."""
    hub, taken = Hub(), job().on(FLAVORS)

    started = taken.start(hub)  # type: ignore[arg-type]

    assert started == "job-1"
    command = " ".join(hub.started["command"])
    assert "--with lm_eval" in command
    assert "--torch-backend auto" in command
    assert (hub.started["flavor"], hub.started["timeout"]) == ("middle", taken.timeout_s)
    assert hub.started["labels"] == {"name": "evaluate-merged"}
    assert {path.partition("/")[0] for path in hub.uploaded} == {"tasks", "wheels"}
    assert b"{}" in hub.uploaded.values()


def test_a_job_may_do_one_thing_after_another():
    """The second begins when the first is done; times add up, and a machine has to fit both."""
    hub = Hub()
    one, other = job(60, needs_gpu=False), replace(job(600), labels={"name": "b", "kind": "b"})

    both = one.then(other).on(FLAVORS)
    both.start(hub)  # type: ignore[arg-type]

    assert both.labels == {"name": "evaluate-merged", "kind": "b"}
    assert both.machine.flavor is MIDDLE
    assert both.machine.seconds - other.on(FLAVORS).machine.seconds == 60
    command = hub.started["command"]
    assert command[2].startswith('"$@" && uv tool run')
    assert command[2].count(" evaluate ") == 1 == command.count("evaluate")


def test_vllm_is_installed_where_it_is_asked_for() -> None:
    """An evaluation by vLLM says so in its command, and what loads by itself is left to the Job."""
    known = MappingProxyType({model: [TensorSpec("w", "BF16", (8, 8))] for model in MODELS})

    by_vllm = evaluation_job(MODELS, MODELS[1], ["sort"], limit=5, engine="vllm", known=known)
    left = evaluation_job(MODELS, MODELS[1], ["sort"], limit=5, known=known)

    (words,) = by_vllm.commands
    assert words[words.index("--engine") + 1] == "vllm"
    assert by_vllm.needs == ("vllm",)
    assert "--engine" not in left.commands[0]
    assert left.needs == ()
    assert by_vllm.labels != left.labels


@pytest.mark.parametrize(
    ("lines", "stage", "code"),
    [
        (["merging: 1 GB to write", "resmerge-stream job: exit code 0"], "COMPLETED", 0),
        (["resmerge-stream: no.", "resmerge-stream job: exit code 2"], "ERROR", 2),
        (
            ["warning: from uv", "error: no solution", "resmerge-stream job: exit code 2"],
            "ERROR",
            3,
        ),
        (["resmerge-stream: later.", "resmerge-stream job: exit code 3"], "ERROR", 3),
        (["Traceback (most recent call last):", "resmerge-stream job: exit code 1"], "ERROR", 1),
        (["merging: 1 GB to write", "resmerge-stream job: exit code 137"], "ERROR", 3),
        (["merging: 1 GB to write"], "ERROR", 3),
        ([], "ERROR", 3),
        (["merging: 1 GB to write"], "CANCELED", 3),
    ],
    ids=[
        "done",
        "refused",
        "not-installed",
        "stopped",
        "bug",
        "memory",
        "timeout",
        "silent",
        "cancelled",
    ],
)
def test_how_a_job_ended_is_told_by_its_log(lines: list[str], stage: str, code: int) -> None:
    """A refusal is exit 2, a bug exit 1; whatever another submit can mend is exit 3."""
    log = JobLog()
    for line in lines:
        log.read(line)

    found, text = ending(log, stage, None)

    assert found == code
    assert ("The same command" in text) == (code == 3)


def test_the_table_has_no_more_machines_than_have_a_part() -> None:
    """A machine without a shard would be paid for nothing, and asking for one is refused."""
    shared = replace(
        job(needs_gpu=False),
        fleet_on=lambda flavor, speed, count: Fleet(count, 600.0 / count, 1.0, "line"),
        most_machines=5,
    )

    assert [row.machines for row in shared.on(FLAVORS).choices()] == [1, 2, 4]
    with pytest.raises(RecipeError, match=r"6 machines: the merge has 5 file\(s\)"):
        shared.on(FLAVORS, machines=6)


def test_what_one_machine_does_is_not_offered_to_several() -> None:
    """A Job that cannot be shared is refused for several, and has no table."""
    alone = job(needs_gpu=False)

    assert alone.on(FLAVORS).choices() == []
    with pytest.raises(RecipeError, match="one machine does a whole evaluation"):
        alone.on(FLAVORS, machines=2)


def test_the_last_attempt_tells_how_a_job_ended() -> None:
    """What an attempt before it said of its end counts no more; there were two."""
    log = JobLog()
    for line in (
        "merging: 1 GB to write",
        "Traceback (most recent call last):",
        "resmerge-stream job: exit code 1",
        "Installed resmerge_stream",
        "merging: 1 GB to write",
        "resmerge-stream: later.",
        "resmerge-stream job: exit code 1",
    ):
        log.read(line)

    assert log.attempts == 2
    assert ending(log, "ERROR", None)[0] == 3


def test_a_merges_last_line_tells_what_it_took() -> None:
    """Seconds, bytes read and bytes written are read from the line that the console prints."""
    log = JobLog()
    log.read(
        "merged into http://127.0.0.1:1/me/a in 3 s, 1 GB read, 2 GB written, x: 12 tensors in "
        "1834.5 s, 61.2 GB read, 15.2 GB written, peak private memory 942 MB"
    )

    assert log.merged == (1834.5, 61_200_000_000, 15_200_000_000)
