"""An errand for one of the Hub's machines: the cheapest that fits, how long, at what price."""

from types import MappingProxyType
from typing import Any

import pytest

from resmerge_stream.errors import RecipeError
from resmerge_stream.hub.flavors import Flavor
from resmerge_stream.jobs.errand import Errand, offer, start
from resmerge_stream.jobs.evaluation import JobEvaluation
from resmerge_stream.jobs.submission import JobFiles
from resmerge_stream.specs import TensorSpec

SMALL = Flavor("small", 2, 16, 50, 0, 0.06)
MIDDLE = Flavor("middle", 8, 30, 400, 24, 0.80)
LARGE = Flavor("large", 23, 256, 3000, 80, 4.50)
FLAVORS = (LARGE, SMALL, MIDDLE)
MODELS = ("org/base", "me/merged")


def errand(seconds: float = 600.0, *, needs_gpu: bool = True) -> Errand:
    """Return an errand that takes so long, perhaps on a GPU."""
    return Errand(
        what="evaluation",
        summary="evaluation: two models",
        told={},
        labels={"name": "evaluate-merged"},
        seconds_on=lambda flavor: seconds,
        lack_of=lambda flavor: "it has no GPU" if needs_gpu and not flavor.gpu_gb else "",
        commands=lambda files: [["evaluate", files.put("tasks", "a.jsonl", b"{}")]],
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
    taken = offer(errand(), FLAVORS)

    assert taken.estimate.flavor is MIDDLE
    assert offer(errand(needs_gpu=False), FLAVORS).estimate.flavor is SMALL
    assert taken.timeout_s >= 3 * 600
    assert taken.most == MIDDLE.price(taken.timeout_s) > taken.estimate.price


def test_a_timeout_of_ones_own_is_kept() -> None:
    """Whoever pays may say when the Job ends; the highest price follows from that."""
    taken = offer(errand(), FLAVORS, 120)

    assert (taken.timeout_s, taken.most) == (120, MIDDLE.price(120))


def test_an_errand_that_fits_nowhere_names_what_the_largest_lacks() -> None:
    """The refusal is about the machine that came nearest."""
    with pytest.raises(RecipeError, match="fits this evaluation: on small, it has no GPU"):
        offer(errand(), (SMALL,))


def test_what_is_started_is_what_was_offered() -> None:
    """Machine, end, labels, files and what is installed beside the package reach the Hub."""
    hub, taken = Hub(), offer(errand(), FLAVORS)

    job = start(hub, errand(), taken)  # type: ignore[arg-type]

    assert job == "job-1"
    command = " ".join(hub.started["command"])
    assert "--with lm_eval" in command
    assert "--torch-backend auto" in command
    assert (hub.started["flavor"], hub.started["timeout"]) == ("middle", taken.timeout_s)
    assert hub.started["labels"] == {"name": "evaluate-merged"}
    assert {path.partition("/")[0] for path in hub.uploaded} == {"tasks", "wheels"}
    assert b"{}" in hub.uploaded.values()


def test_vllm_is_installed_where_it_is_asked_for() -> None:
    """An evaluation by vLLM says so in its command, and what loads by itself is left to the Job."""
    known = MappingProxyType({model: [TensorSpec("w", "BF16", (8, 8))] for model in MODELS})

    by_vllm = JobEvaluation.of(MODELS, MODELS[1], ["sort"], limit=5, engine="vllm", known=known)
    left = JobEvaluation.of(MODELS, MODELS[1], ["sort"], limit=5, known=known)

    words = by_vllm.words(JobFiles())
    assert words[words.index("--engine") + 1] == "vllm"
    assert by_vllm.needs == ("vllm",)
    assert "--engine" not in left.words(JobFiles())
    assert left.needs == ()
    assert by_vllm.labels != left.labels
