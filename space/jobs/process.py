"""Processes of merges and plans: started without the Space's secrets, asked, listened to."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..settings import Settings

_ROOT = Path(__file__).resolve().parents[2]
_REAPED_AFTER_S = 0.1
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OAUTH_CLIENT_SECRET")


def start_worker(settings: Settings, module: str = "space.jobs.worker") -> "subprocess.Popen[str]":
    """Start a worker; it knows neither the Space's secrets nor, yet, any visitor's token."""
    env = {key: value for key, value in os.environ.items() if key not in _SECRETS}
    env |= {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "RESMERGE_SPACE_DIR": str(settings.folder),
        "RESMERGE_SPACE_MAX_EXPERTS": str(settings.max_experts),
        "RESMERGE_SPACE_MAX_HEADER_BYTES": str(settings.max_header_bytes),
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=_ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C on the server is told through the pipe
    )


def send(process: "subprocess.Popen[str]", request: Mapping[str, Any]) -> None:
    """Hand a worker its request, unless it ended or was cancelled before."""
    # Closed by a cancel: ValueError; ended: BrokenPipeError.
    with contextlib.suppress(BrokenPipeError, ValueError):
        if process.stdin is not None:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()


def end(process: "subprocess.Popen[str]") -> None:
    """End a worker that waits for a request, or has ended, and free what it had."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError, ValueError):
            if pipe is not None:
                pipe.close()
    process.kill()
    process.wait()


def events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """Yield a worker's events until it ends; a line that was cut when it was killed is none."""
    for line in process.stdout or ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def let_end(process: "subprocess.Popen[str]") -> None:
    """Wait until a worker has ended, and a moment more before the caller reaps it.

    Linux 6.18 spins while it reaps a process whose last thread is not gone from ``/proc`` yet; on a
    core that both share that thread then does not run, and reaping took minutes in 16 of 29 watched
    rounds; waited for so, in none of 42. No small script does it, so no test holds it.
    """
    if sys.platform == "linux":
        with contextlib.suppress(ChildProcessError):  # reaped by the system
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        time.sleep(_REAPED_AFTER_S)
