"""Whole processes measured from outside: wall time, and private memory sampled by a watcher."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process.

    Attributes:
        seconds: wall time.
        peak_private: highest RssAnon + RssShmem that was sampled, in bytes.
        code: exit code.
        output: standard output and error together.
        user, system: processor seconds, its children's as well.
        faults: page faults that needed no disk.
    """

    seconds: float
    peak_private: int
    code: int
    output: str
    user: float = 0.0
    system: float = 0.0
    faults: int = 0


def run(command: Sequence[str], *, env: dict[str, str] | None = None, check: bool = True) -> Run:
    """Run a command to its end, and watch its memory (and its children's).

    Raises:
        RuntimeError: it failed, and `check` is true.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if check and process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(
        seconds,
        peak[0],
        process.returncode,
        output,
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        after.ru_minflt - before.ru_minflt,
    )


def alternate(
    commands: dict[str, Sequence[str]], *, times: int, before=None, warm: int = 1
) -> dict[str, list[Run]]:
    """Run commands in turn, so that a drifting machine touches all alike.

    Args:
        commands: by name.
        times: rounds that count.
        before: called with the name before each run.
        warm: rounds that are run first and do not count.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(warm + times):
        for name, command in commands.items():
            if before is not None:
                before(name)
            result = run(command)
            if number >= warm:
                runs[name].append(result)
    return runs


def median_seconds(runs: Sequence[Run]) -> float:
    """Return the median wall time."""
    return statistics.median(run.seconds for run in runs)


def private_bytes(pid: int) -> int:
    """Return RssAnon + RssShmem of a process, 0 when it is gone."""
    try:
        lines = (
            Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        )
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssShmem") if k in fields)


def scratch_folder(name: str = "") -> Path:
    """Return where generated groups are kept: in memory where the system has such a folder."""
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return root / "resmerge-bench" / name


def machine() -> str:
    """Return one line about the machine and the versions."""
    import torch

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"


def merge_command(group: Path, out: Path, *options: str, experts: int = 3) -> list[str]:
    """Return the command that merges a generated group."""
    command = [sys.executable, "-m", "resmerge_stream", "merge", "--base", str(group / "base")]
    for number in range(experts):
        command += ["--expert", str(group / f"expert{number}")]
    return [*command, "--out", str(out), *options]


def _watch(pid: int, peak: list[int]) -> None:
    while Path(f"/proc/{pid}").exists():
        peak[0] = max(peak[0], private_bytes(pid))
        if not private_bytes(pid):
            return
        time.sleep(_SAMPLE_SECONDS)
