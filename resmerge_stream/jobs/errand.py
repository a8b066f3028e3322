"""What a Job is to do, the machine it is offered, and its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RecipeError
from ..hub.flavors import Flavor
from ..planning.machines import Estimate, ranked, timeout_for
from .submission import MOUNT, JobFiles, job_command

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs


@dataclass(frozen=True, slots=True)
class Errand:
    """What a Job is to do.

    Attributes:
        what: a word for it, such as ``merge``.
        summary: a line that says how much it is.
        told: of it in the event ``offered``.
        labels: that tell it from others.
        seconds_on: what it takes on a machine, once it has begun.
        lack_of: what a machine lacks for it, or an empty string.
        commands: of this package; they put their files among those given.
        needs: what is installed beside the package.
    """

    what: str
    summary: str
    told: Mapping[str, Any]
    labels: Mapping[str, str]
    seconds_on: Callable[[Flavor], float]
    lack_of: Callable[[Flavor], str]
    commands: Callable[[JobFiles], Sequence[Sequence[str]]]
    needs: Sequence[str] = field(default=())


class Offer(NamedTuple):
    """A machine for an errand, and after how many seconds the Hub ends the Job."""

    estimate: Estimate
    timeout_s: int

    @property
    def most(self) -> float:
        """What it costs at most, in dollars."""
        return self.estimate.flavor.price(self.timeout_s)


def offer(errand: Errand, flavors: Sequence[Flavor], timeout_s: int | None = None) -> Offer:
    """Return the cheapest machine that an errand fits.

    Args:
        errand: what is to be done.
        flavors: the machines.
        timeout_s: after which the Job ends; None: three times what it takes, and half an hour at
            least.

    Raises:
        RecipeError: it fits none.
    """
    best = ranked(flavors, errand.seconds_on, errand.lack_of)[0]
    if not best.fits:
        largest = max(flavors, key=lambda it: (it.gpu_gb / it.gpus, it.memory_gb))
        raise RecipeError(
            f"no machine of the Hub fits this {errand.what}: on {largest.name}, "
            f"{errand.lack_of(largest)}."
        )
    return Offer(best, timeout_s or timeout_for(best.seconds))


def start(jobs: HubJobs, errand: Errand, taken: Offer) -> str:
    """Start a Job, and return its id.

    Args:
        jobs: of the namespace that pays.
        errand: what is to be done.
        taken: the machine, which somebody agreed to pay for.

    Raises:
        JobRefusedError: the Hub starts none for this account.
        PublishError: its files cannot be sent.
    """
    files = JobFiles()
    command = job_command(errand.commands(files), files, taken.estimate.flavor, errand.needs)
    return jobs.start(
        command,
        labels=errand.labels,
        flavor=taken.estimate.flavor.name,
        timeout=taken.timeout_s,
        volume=jobs.upload(files.contents, mount=MOUNT),
    )
