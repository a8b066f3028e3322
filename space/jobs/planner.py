"""A process that plans and reads reports: requests on standard input, a line each, answers out.

Whatever a stranger's repository makes of it, time and memory, ends with this process.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resmerge_stream.device import available_memory, free_disk, private_memory, usable_cores
from resmerge_stream.errors import ResMergeError, VerificationError, system_errors
from resmerge_stream.experts.group import on_this_machine
from resmerge_stream.planning.plan import Plan, plan_merge
from resmerge_stream.planning.recipe_places import recipe_on_the_hub
from resmerge_stream.recipe import ModelRef

from ..asked import check_id, web_recipe, web_request
from ..examples import web_names
from ..explore import OWN_BYTES, STRANGERS_BYTES, pinned_recipe, read_report, report_in
from ..hardware import hardware_for
from ..remedies import plan_said
from ..settings import Settings, read_settings

_MEMORY_BYTES = 1_500_000_000
# What it has grown to is not given back to the system: a new process starts small.
_KEPT_BYTES = 300_000_000


def main() -> int:
    """Answer requests until there are no more, or too much memory is held."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    os.nice(5)  # the page and the merges come first
    settings = read_settings()
    from resmerge_stream.hub import client  # noqa: F401 - loaded before anybody waits for it

    answers = {"plan": plan_of, "advice": advice_of, "report": report_of, "recipe": recipe_of}
    for line in sys.stdin:
        request = json.loads(line)
        kind = request["kind"]
        try:
            with system_errors():
                text = json.dumps({kind: answers[kind](request, settings)})
        except ResMergeError as exc:
            text = json.dumps(exc.to_dict())
        # A visitor knows the built-in models by name; where they lie is this machine's business.
        print(web_names(text), flush=True)
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
        here = {
            "cores": usable_cores(),
            "memory": available_memory(),
            "disk": free_disk(settings.folder),
        }
        found = plan_said(plan.to_dict())
        found["hardware"] = (
            [asdict(one) for one in hardware_for(plan, **here)] if isinstance(plan, Plan) else []
        )
        found["target_checked"] = publication is not None
        return found
    finally:
        plan.close()


def advice_of(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what the weights of built-in experts say of them, and which methods to compare.

    Args:
        request: ``asked`` as `Request.to_dict`, of built-in models: all of their weights are read.
        settings: the limits.

    Raises:
        ResMergeError: as `plan_merge`.
    """
    from resmerge_stream.studies.advice import advise, read_regime

    asked = web_request(request["asked"], settings)
    plan = plan_merge(on_this_machine(asked.recipe), asked.options, token=False).accepted()
    try:
        *_, (_, _, regime) = read_regime(plan)
    finally:
        plan.close()
    return {} if regime is None else advise(regime).to_dict()


def report_of(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the report in a repository, or in a file of one of the Space's own jobs.

    Args:
        request: ``place``; ``name`` of a file; ``token`` to read with.
        settings: not used.

    Raises:
        ResMergeError: there is none, or it is larger than one may be here.
    """
    place, name = str(request["place"]), str(request["name"])
    if name:
        return report_in(Path(place).read_bytes(), name=name, max_bytes=OWN_BYTES)
    return report_in(read_report(place, request["token"]), name=place, max_bytes=STRANGERS_BYTES)


def recipe_of(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the recipe of a merged model: its report's with the commits that were read, or,
    where another tool made it, the one in its files or its card.

    Args:
        request: ``place`` of the repository; ``token`` to read with.
        settings: the limits.

    Raises:
        ResMergeError: there is none, or it names what is no repository.
    """
    ref = ModelRef.parse(request["place"])
    check_id(ref)
    try:
        report = report_of({**request, "place": str(ref), "name": ""}, settings)
    except VerificationError:
        return recipe_on_the_hub(ref, token=request["token"]).to_dict()
    return web_recipe(pinned_recipe(report), settings).to_dict()


if __name__ == "__main__":
    sys.exit(main())
