"""How long a merge takes here, as the ones that finished here tell."""

import statistics
from collections.abc import Iterable

from .records import DONE, Job

# Shorter plans tell what every merge costs beside its bytes; longer ones how fast this machine is.
_SHORT_S = 30.0
_LAST = 20


def expected_seconds(planned: float, jobs: Iterable[Job]) -> float | None:
    """Return how long a visitor will wait for a merge that runs alone; None if nothing tells.

    Args:
        planned: the plan's own estimate.
        jobs: all that are remembered; those count that finished without having been stopped.
    """
    told = [job for job in jobs if job.state == DONE and job.took > 0 and not job.bytes_kept]
    pairs = [
        (float(job.plan["seconds_estimate"]), job.took)
        for job in sorted(told, key=lambda job: -job.created)[:_LAST]
        if job.plan.get("seconds_estimate")
    ]
    if not pairs:
        return None
    short = [took - estimate for estimate, took in pairs if estimate < _SHORT_S]
    beside = max(statistics.median(short), 0.0) if short else 0.0
    long = [max(took - beside, 0.0) / estimate for estimate, took in pairs if estimate >= _SHORT_S]
    return beside + planned * (statistics.median(long) if long else 1.0)
