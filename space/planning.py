"""A visitor's plan: made from headers within limits, with what hardware it would need."""

import json
import threading
import time
from collections import deque
from typing import Any

from resmerge_stream.device import available_memory, free_disk, usable_cores
from resmerge_stream.errors import RecipeError, Remedy
from resmerge_stream.planning.plan import Plan, plan_merge
from resmerge_stream.planning.request import Request

from .asked import needs_account
from .examples import on_this_machine, web_names
from .hardware import Machine, fits
from .identity import Visitor
from .remedies import plan_said
from .settings import Settings


class Allowance:
    """How often something may be done in a minute.

    Args:
        per_minute: the limit.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Return whether it may be done now, and count it if so."""
        now = time.monotonic()
        with self._lock:
            while self._times and now - self._times[0] > 60:
                self._times.popleft()
            if len(self._times) >= self._per_minute:
                return False
            self._times.append(now)
            return True


def plan_for(
    asked: Request, visitor: Visitor, settings: Settings, allowance: Allowance
) -> dict[str, Any]:
    """Return a plan as `Plan.to_dict` gives it, and beside it what the page shows of hardware.

    Args:
        asked: with ids that are checked.
        visitor: whose token reads; a target is only looked at for somebody signed in.
        settings: limits and folder.
        allowance: of plans without an account.

    Raises:
        RecipeError: too many plans without an account at the moment.
        StoppedError: the network or the Hub kept failing.
    """
    if not visitor.name and needs_account(asked) and not allowance.take():
        raise RecipeError(
            "too many plans without an account at the moment. Try again in a minute.",
            Remedy.SIGN_IN,
            kind="busy",
        )
    publication = asked.publication if visitor.token else None
    # Never made: only its disk is looked at.
    out = None if asked.publication else settings.folder / "results" / "planned" / "merged"
    plan = plan_merge(
        on_this_machine(asked.recipe),
        asked.options,
        out=out,
        publication=publication,
        token=visitor.token_or_nobody,
        work_dir=settings.folder / "work" / "planned",
    )
    try:
        found = _named(plan)
        found["hardware"] = [] if plan.refused else fits(plan, this_machine(settings))
        found["target_checked"] = publication is not None
        return found
    finally:
        plan.close()


def this_machine(settings: Settings) -> Machine:
    """Return what this machine has, by what is free now."""
    return Machine(usable_cores(), available_memory(), free_disk(settings.folder))


def _named(plan: Plan) -> dict[str, Any]:
    found = plan_said(json.loads(web_names(json.dumps(plan.to_dict()))))
    return found
