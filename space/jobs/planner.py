"""A process that plans: requests on standard input, a line each, plans on standard output.

Whatever a stranger's repository makes of it, time and memory, ends with this process.
"""

import contextlib
import json
import os
import sys
from typing import Any

from resmerge_stream.device import available_memory, free_disk, private_memory, usable_cores
from resmerge_stream.errors import ResMergeError
from resmerge_stream.planning.plan import Plan, plan_merge

from ..asked import web_request
from ..examples import on_this_machine, web_names
from ..hardware import Machine, fits
from ..remedies import plan_said
from ..settings import Settings, read_settings

_MEMORY_BYTES = 1_500_000_000
# What it has grown to is not given back to the system: a new process starts small.
_KEPT_BYTES = 300_000_000


def main() -> int:
    """Answer requests until there are no more, or too much memory is held."""
    _limit_memory()
    os.nice(5)  # the page and the merges come first
    settings = read_settings()
    from resmerge_stream.hub import client  # noqa: F401 - loaded before anybody waits for it

    for line in sys.stdin:
        try:
            answer = {"plan": plan_of(json.loads(line), settings)}
        except ResMergeError as exc:
            answer = exc.to_dict()
        # A visitor knows the built-in models by name; where they lie is this machine's business.
        print(web_names(json.dumps(answer)), flush=True)
        if private_memory() > _KEPT_BYTES:
            break
    return 0


def plan_of(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the plan that a request asks for, as plain data.

    Args:
        request: ``asked`` as `Request.to_dict`, ``token`` to read with, ``target``: whether it may
            also write, so that the target is looked at.
        settings: limits and folder.

    Raises:
        ResMergeError: as `plan_merge`.
    """
    asked = web_request(request["asked"], settings)
    publication = asked.publication if request["target"] else None
    # Never made: only its disk is looked at.
    out = None if asked.publication else settings.folder / "results" / "planned" / "merged"
    plan = plan_merge(
        on_this_machine(asked.recipe),
        asked.options,
        out=out,
        publication=publication,
        token=request["token"],
        work_dir=settings.folder / "work" / "planned",
    )
    try:
        here = Machine(usable_cores(), available_memory(), free_disk(settings.folder))
        found = plan_said(json.loads(web_names(json.dumps(plan.to_dict()))))
        found["hardware"] = (
            [fit.to_dict() for fit in fits(plan, here)] if isinstance(plan, Plan) else []
        )
        found["target_checked"] = publication is not None
        return found
    finally:
        plan.close()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(main())
