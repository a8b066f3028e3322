"""Running a Job for real: its command as a process of this machine, its volumes as folders.

What differs from the Hub: no container, and in place of uv a stand-in (`UV`) that unpacks the
wheel that `--from` names and starts it with the packages of this Python. So the code that runs is
the code that was uploaded; only its dependencies are not downloaded.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .repo import now

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
    """One Job: what the Hub answers about it, its log, and its process where it has one."""

    answer: dict[str, Any]
    log: list[dict[str, str]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    timer: threading.Timer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ended(self) -> bool:
        """Whether it will say no more."""
        return self.answer["status"]["stage"] not in ("RUNNING", "SCHEDULING")

    def say(self, text: str) -> None:
        """Add a line to the log."""
        self.log.append({"timestamp": now(), "data": text})

    def end(self, stage: str, message: str | None = None) -> None:
        """End it, unless it has ended; its process and all that it started are killed."""
        with self.lock:
            if self.ended:
                return
            self.answer["status"] = {"stage": stage, "message": message}
        if self.timer is not None:
            self.timer.cancel()
        if self.process is not None:
            kill(self.process)

    def run(
        self, folder: Path, volumes: Mapping[str, Mapping[str, Path]], env: Mapping[str, str]
    ) -> None:
        """Start its command.

        Args:
            folder: of its own, empty.
            volumes: mount path → (path in it → file).
            env: of the command, beside what is always there.
        """
        mounts = {mount: folder / "mounts" / str(n) for n, mount in enumerate(volumes)}
        for mount, files in volumes.items():
            for name, file in files.items():
                (mounts[mount] / name).parent.mkdir(parents=True, exist_ok=True)
                (mounts[mount] / name).symlink_to(file.resolve())
        uv = folder / "bin" / "uv"
        uv.parent.mkdir(parents=True)
        uv.write_text(UV.format(python=sys.executable))
        uv.chmod(0o755)
        command = [_mounted(word, mounts) for word in self.answer["command"]]
        own = {"PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
        self.process = subprocess.Popen(
            command,
            env={**own, "JOB_ID": self.answer["id"], **env},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        seconds = self.answer.get("timeoutSeconds") or 1800
        self.timer = threading.Timer(seconds, self.end, ("ERROR", "Job timeout"))
        self.timer.daemon = True
        self.timer.start()
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
        code = process.wait()
        failed = ("ERROR", f"Job failed with exit code: {code}")
        self.end(*(("COMPLETED", None) if code == 0 else failed))


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process and what it started; wait for none of them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _mounted(word: str, mounts: Mapping[str, Path]) -> str:
    for mount, folder in mounts.items():
        word = word.replace(f"{mount}/", f"{folder}/")
    return word
