"""Running a Job for real: its command as a process of this machine, its volumes as folders.

What differs from the Hub: no container, and in place of uv a stand-in (`UV`) that unpacks the
wheel that `--from` names and starts it with the packages of this Python. So the code that runs is
the code that was uploaded; only its dependencies are not downloaded. The machines of a network
group are this one: where a command names an alias of its group, it gets an address of this machine,
and in place of the port that it names one that no other group uses.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .repo import now

# How a command names a machine of its network group, and the port there.
_ALIAS = re.compile(r"\$\{HF_NETWORK_GROUP_PREFIX\}[a-z0-9-]+")
_PORT = re.compile(r"(MASTER_PORT=)\d+")
UV = """#!{python}
import os, sys, zipfile
words = sys.argv[1:]
assert words[:2] == ["tool", "run"], words
wheel = words[words.index("--from") + 1]
name, *arguments = words[words.index("--from") + 2 :]
site = os.path.join(os.environ["HOME"], "site")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site)
    points = next(n for n in archive.namelist() if n.endswith("/entry_points.txt"))
    lines = dict(line.split(" = ") for line in archive.read(points).decode().splitlines()[1:])
print(f"Installed {{os.path.basename(wheel)}}", file=sys.stderr, flush=True)
module, function = lines[name].split(":")
code = f"import sys; from {{module}} import {{function}}; sys.exit({{function}}())"
os.environ["PYTHONPATH"] = site
os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
"""


@dataclass(slots=True)
class JobRecord:
    """One Job.

    Attributes:
        answer: what the Hub says about it.
        log: its lines.
        port: that its network group has for itself on this machine; 0 without a group.
        process: of the attempt that runs; None where Jobs are not run.
        attempt: which one that is.
        ended_at: when it ended, as `time.monotonic`.
    """

    answer: dict[str, Any]
    log: list[dict[str, str]] = field(default_factory=list)
    port: int = 0
    process: subprocess.Popen[str] | None = None
    timer: threading.Timer | None = None
    attempt: int = 0
    ended_at: float | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    _created: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether it will say no more."""
        return self.answer["status"]["stage"] not in ("RUNNING", "SCHEDULING")

    @property
    def group(self) -> str:
        """The network group that it is in, or an empty string."""
        return str((self.answer.get("network") or {}).get("group", ""))

    def told(self) -> dict[str, Any]:
        """Return what the Hub answers about it now, with its times."""
        total = int((self.ended_at or time.monotonic()) - self._created)
        return {
            **self.answer,
            "durations": {"schedulingSecs": 0, "runningSecs": total, "totalSecs": total},
        }

    def say(self, text: str) -> None:
        """Add a line to the log."""
        self.log.append({"timestamp": now(), "data": text})

    def end(self, stage: str, message: str | None = None) -> None:
        """End it, unless it has ended; its process and all that it started are killed."""
        with self.lock:
            if self.ended:
                return
            self.answer["status"] = {"stage": stage, "message": message}
            self.ended_at = time.monotonic()
        if self.timer is not None:
            self.timer.cancel()
        if self.process is not None:
            kill(self.process)

    def run(
        self, folder: Path, volumes: Mapping[str, Mapping[str, Path]], env: Mapping[str, str]
    ) -> None:
        """Start its command; one that fails is started again as often as was asked for.

        Args:
            folder: of its own, empty; each attempt has one in it.
            volumes: mount path → (path in it → file).
            env: of the command, beside what is always there.
        """
        seconds = self.answer.get("timeoutSeconds") or 1800
        self.timer = threading.Timer(seconds, self.end, ("ERROR", "Job timeout"))
        self.timer.daemon = True
        self.timer.start()
        self._start(folder, volumes, env)
        threading.Thread(target=self._follow, args=(folder, volumes, env), daemon=True).start()

    def _start(
        self, folder: Path, volumes: Mapping[str, Mapping[str, Path]], env: Mapping[str, str]
    ) -> None:
        self.attempt += 1
        own = folder / str(self.attempt)
        mounts = {mount: own / "mounts" / str(n) for n, mount in enumerate(volumes)}
        for mount, files in volumes.items():
            for name, file in files.items():
                (mounts[mount] / name).parent.mkdir(parents=True, exist_ok=True)
                (mounts[mount] / name).symlink_to(file.resolve())
        uv = own / "bin" / "uv"
        uv.parent.mkdir(parents=True)
        uv.write_text(UV.format(python=sys.executable))
        uv.chmod(0o755)
        self.process = subprocess.Popen(
            [self._here(word, mounts) for word in self.answer["command"]],
            env={
                "PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}",
                "HOME": str(own),
                "JOB_ID": self.answer["id"],
                **env,
            },
            cwd=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _follow(
        self, folder: Path, volumes: Mapping[str, Mapping[str, Path]], env: Mapping[str, str]
    ) -> None:
        while True:
            process = self.process
            assert process is not None
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    self.say(line.rstrip("\n"))
            code = process.wait()
            with self.lock:
                if not code:
                    self.end("COMPLETED")
                elif self.attempt >= self.answer.get("attempts", 1):
                    self.end("ERROR", f"Job failed with exit code: {code}")
                elif not self.ended:
                    self._start(folder, volumes, env)
                if self.ended:
                    return

    def _here(self, word: str, mounts: Mapping[str, Path]) -> str:
        """Return a word of its command with folders and addresses of this machine."""
        for mount, folder in mounts.items():
            word = word.replace(f"{mount}/", f"{folder}/")
        if self.port:
            word = _ALIAS.sub("127.0.0.1", _PORT.sub(rf"\g<1>{self.port}", word))
        return word


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process and what it started; wait for none of them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
