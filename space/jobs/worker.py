"""One merge in a process of its own: a request on standard input, events on standard output.

The page's server stays free, a merge's memory goes back to the system with its process, and a stop
takes seconds wherever the merge is: when standard input closes, this process interrupts itself, and
ends by force if that is not done in time. What was finished stays, as after any interruption.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resmerge_stream.device import private_memory, share_heaps
from resmerge_stream.errors import ResMergeError, StoppedError, system_errors
from resmerge_stream.experts.group import on_this_machine
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.run.events import Event, Finished

from ..asked import web_request
from ..examples import web_names
from ..settings import read_settings
from .examiner import ask_built_in, ask_own, compared

# How long an interrupted merge may take to end by itself.
_GRACE_S = 3.0


def main() -> int:
    """Run the merge that standard input asks for; return its exit code, as the command line's."""
    share_heaps()
    # A server that a shell started in the background ignores interrupts, and so would this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = sys.stdin.readline()
    if not asked:
        return 130  # cancelled before it was asked for anything
    request = json.loads(asked)
    threading.Thread(target=_stop_when_told, daemon=True).start()
    try:
        with system_errors():
            compares = bool(request["asked"].get("methods"))
            for event in compared(request, _say) if compares else _events(request):
                memory_bytes = private_memory()  # the merge's, before other models are asked
                if isinstance(event, Finished) and not compares:
                    _ask(request, event.where)
                _say({**event.to_dict(), "memory_bytes": memory_bytes})
    except ResMergeError as exc:
        _say({"event": "refused" if exc.exit_code == 2 else "stopped", **exc.to_dict()})
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _events(request: dict[str, Any]) -> Iterator[Event]:
    asked = web_request(request["asked"], read_settings())
    # Without a token a visitor is nobody: never whoever runs this Space.
    token = request.get("token") or False
    out = Path(request["out"]) if request.get("out") else None
    plan = plan_merge(
        on_this_machine(asked.recipe),
        asked.options,
        out=out,
        publication=asked.publication,
        token=token,
        work_dir=request["work_dir"],
    )
    try:
        if plan.target is not None and not plan.target.account:
            # The account could not be asked for: signing in again mends it, so nothing is lost.
            raise StoppedError.of(plan.problems)
        from resmerge_stream.run.engine import run_merge

        events = run_merge(plan.accepted(), out=out, work_dir=request["work_dir"])
        try:
            yield from events
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator; closing it cancels
    finally:
        plan.close()


def _ask(request: dict[str, Any], merged: str) -> None:
    """Ask a visitor's questions, or the built-in ones."""
    asked, folder = request["asked"], Path(request["work_dir"]) / "asked"
    if not asked.get("questions"):
        ask_built_in(merged, request.get("prompts") or 0, folder=folder, say=_say)
        return
    ask_own(
        web_request(asked, read_settings()),
        str(asked["questions"]),
        str(asked.get("push_to") or merged),
        token=request.get("token") or False,
        folder=folder,
        seconds=float(request.get("ask_seconds") or 0.0),
        say=_say,
    )


def _say(line: dict[str, Any]) -> None:
    # A visitor knows the built-in models by name; where they lie is this machine's business.
    print(web_names(json.dumps(line)), flush=True)


def _stop_when_told() -> None:
    # The descriptor, not the file object: a thread that waits inside one breaks the exit.
    while os.read(0, 4096):
        pass
    # A signal to the process itself also ends a wait for a lock, as setting a flag would not.
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_S)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
