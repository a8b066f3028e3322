"""Command lines in forks of one process, in which one operation on files goes wrong.

`FaultServer` starts this module as a process, whose imports and compiled loops every fork has.
What is done below some folders is counted, each kind of it by itself: operations (opening, listing,
looking, renaming, removing, making, flushing), files opened to write, and reads and writes of open
files. The one with the number that is asked for fails, or is where the process is killed. See
`KINDS`.
"""

import _pyio
import builtins
import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.checkpoints import ROOT, child_environment

# What is harmed → what is counted for it. A full disk stays full. A write of which the disk takes
# half is the first that fails of a full disk, and the last of a process that is killed there.
KINDS = {
    "EIO": "operations",
    "ENOSPC": "opened",
    "kill": "operations",
    "EIO in a read": "reads",
    "EIO in a write": "writes",
    "ENOSPC in a write": "writes",
    "kill in a write": "writes",
}
COUNTED = ("operations", "opened", "reads", "writes")
_AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir",
            "os.truncate", "os.chmod", "os.utime", "os.link", "os.symlink"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; negative for a signal.
        said: what it printed.
        counts: how often it did what is counted, by `COUNTED`.
    """

    code: int
    said: str
    counts: Mapping[str, int]

    def cases(self, kind: str) -> int:
        """Return at how many places of such a run a kind of harm can be done."""
        return self.counts[KINDS[kind]]


class FaultServer:
    """The process that forks; a context.

    Args:
        root: the folder that commands run in.
        others: further folders whose operations count.
        environment: of the process; None: this one's, with a cache below `root`, and no network.
    """

    def __init__(
        self, root: Path, others: Sequence[Path] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.root, self._others, self._environment = root, others, environment

    def __enter__(self) -> "FaultServer":
        offline = child_environment() | {
            "XDG_CACHE_HOME": str(self.root / "cache"), "HF_HOME": str(self.root / "hf"),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults", *map(str, (self.root, *self._others))],
            cwd=ROOT, env=offline if self._environment is None else {**self._environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def run(self, args: Sequence[str], kind: str = "", number: int = 0) -> Ended:
        """Run a command line, the operation with a number going wrong; 0: none does.

        Of the kind "here" it runs in the process that forks, so that each fork is warm.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([args, kind, number]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return Ended(**json.loads(line))


class _Fault:
    """Counts what is done below folders, and does one kind of harm at one place."""

    def __init__(self, roots: Sequence[str], kind: str, number: int, counts: Any) -> None:
        self._roots, self._kind, self._number, self._counts = tuple(roots), kind, number, counts
        self._lock, self._is_full = threading.Lock(), False

    def install(self) -> None:
        """Watch every operation of this process from here on."""
        self._full = os.open("/dev/full", os.O_WRONLY)
        for module, name in ((os, "stat"), (os, "lstat")):
            setattr(module, name, self._looked(getattr(module, name)))
        os.fsync = self._flushed(os.fsync)  # type: ignore[assignment]
        # Python's own files in Python: they read and write by the functions of `os`.
        self._open = builtins.open
        io.open = builtins.open = self._in_python  # type: ignore[assignment]
        os.open = self._opened(os.open)
        os.read, os.write = self._read(os.read), self._written(os.write)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _AUDITED:
            self._operation(args[0])

    def _is_now(self, counted: str) -> bool:
        """Count one; whether it is the one that goes wrong."""
        place = COUNTED.index(counted)
        with self._lock:
            self._counts[place] += 1
            return KINDS.get(self._kind) == counted and self._counts[place] == self._number

    def _operation(self, path: object) -> None:
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if isinstance(path, str) and path.startswith(self._roots) and self._is_now("operations"):
            self._harm(path)

    def _harm(self, path: str | None = None) -> None:
        if self._kind.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self._kind.split()[0])
        raise OSError(number, os.strerror(number), path)

    def _looked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any, *args: Any, **kwargs: Any) -> Any:
            self._operation(path)
            return function(path, *args, **kwargs)

        return look

    def _flushed(self, function: Callable[[int], None]) -> Callable[[int], None]:
        def flush(fd: int) -> None:
            path = _place(fd)
            if path != "/dev/full":  # which cannot be flushed
                self._operation(path)
                function(fd)

        return flush

    def _in_python(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        place = _place(file) if isinstance(file, int) else os.path.abspath(os.fspath(file))
        is_ours = isinstance(place, str) and place.startswith(self._roots)
        return (_pyio.open if is_ours else self._open)(file, mode, *args, **kwargs)

    def _opened(self, function: Callable[..., int]) -> Callable[..., int]:
        def opened(*args: Any, **kwargs: Any) -> int:
            fd: int = function(*args, **kwargs)
            if _writes(fd) and _place(fd).startswith(self._roots):
                self._is_full |= self._is_now("opened")
                if self._is_full:
                    os.dup2(self._full, fd, inheritable=False)
            return fd

        return opened

    def _read(self, function: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        def read(fd: int, size: int) -> bytes:
            if _place(fd).startswith(self._roots) and self._is_now("reads"):
                self._harm()
            return function(fd, size)

        return read

    def _written(self, function: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def write(fd: int, data: Any) -> int:
            if not _place(fd).startswith(self._roots):
                return function(fd, data)
            if self._is_full:
                self._harm()
            if self._is_now("writes"):
                self._is_full = self._kind.startswith("ENOSPC")
                half = bytes(data)[: memoryview(data).nbytes // 2]  # a view would hold a buffer
                if self._is_full and half:
                    return function(fd, half)
                if self._kind.startswith("kill"):
                    function(fd, half)
                self._harm()
            return function(fd, data)

        return write


def _place(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _writes(fd: int) -> bool:
    import fcntl

    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return mode != os.O_RDONLY and not os.path.isdir(f"/proc/self/fd/{fd}")


def _run(args: Sequence[str]) -> int:
    from resmerge_stream.cli.main import main

    try:
        return main(list(args))
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _serve(roots: Sequence[str]) -> None:
    import mmap

    import torch

    answers, sys.stdout = sys.stdout, io.StringIO()
    os.chdir(roots[0])
    for line in sys.stdin:
        args, kind, number = json.loads(line)
        counts = memoryview(mmap.mmap(-1, 8 * len(COUNTED))).cast("q")  # shared with the fork
        said = Path(roots[0]).parent / "said"
        pid = 0 if kind == "here" else os.fork()
        if pid == 0:
            with said.open("w") as file, contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(file))
                stack.enter_context(contextlib.redirect_stderr(file))
                if kind != "here":
                    # After a fork torch makes its threads anew; two that ask at once find none.
                    torch.set_num_threads(1)
                    _Fault(roots, kind, number, counts).install()
                code = _run(args)
            if kind != "here":
                os._exit(code)
        _, status = os.waitpid(pid, 0) if pid else (0, code << 8)
        answer = {
            "code": os.waitstatus_to_exitcode(status), "said": said.read_text(),
            "counts": dict(zip(COUNTED, counts, strict=True)),
        }  # fmt: skip
        print(json.dumps(answer), file=answers, flush=True)


def _prepare() -> None:
    """Import what commands import as they run, and leave the pictures empty, which take longest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from resmerge_stream.report import card
    from resmerge_stream.studies import analyse, analysis_report, compare_report, extract  # noqa: F401

    for module in (card, analysis_report, compare_report):
        for name in vars(module):
            if name.endswith("_png"):
                setattr(module, name, lambda *_, **__: b"")


if __name__ == "__main__":
    _prepare()
    _serve(sys.argv[1:])
