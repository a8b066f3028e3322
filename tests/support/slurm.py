"""A SLURM of two nodes on this one machine: munge, slurmctld and a slurmd for each, of one's own.

Nothing of the system's is used or touched: key, sockets, ports, state and logs are in one folder.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NODES = ("one", "two")
PROGRAMS = (
    "munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "sdiag", "squeue", "scontrol",
)  # fmt: skip
# Debian has its daemons where only root looks.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_WAIT_S = 120.0


def missing() -> str:
    """Return why no such cluster can be started here, or an empty string."""
    if os.geteuid() != 0:
        return "slurmd has to be root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(absent)} (slurm-wlm, munge)" if absent else ""


class NotStartedError(Exception):
    """SLURM's daemons do not run on this machine."""


class Cluster:
    """Two nodes that run.

    Args:
        folder: for everything of it; its name must be short, as sockets' are.

    Attributes:
        env: the environment of a command that talks to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._outputs: list[Path] = []
        (folder / "state").mkdir(parents=True)
        config = folder / "slurm.conf"
        config.write_text(self._config())
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(config)}

    def __enter__(self) -> "Cluster":
        folder = self._folder
        try:
            self._start(
                "munged", "munged", "--foreground", "--force",
                f"--key-file={folder / 'munge.key'}", f"--socket={folder / 'munge'}",
                f"--pid-file={folder / 'munged.pid'}", f"--log-file={folder / 'munged.log'}",
                f"--seed-file={folder / 'munge.seed'}",
            )  # fmt: skip
            self.wait((folder / "munge").exists, "munged listens")
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait_until_idle()
        except BaseException as exc:
            self.close()
            if isinstance(exc, AssertionError):
                raise NotStartedError(str(exc)) from exc
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node as a loss of power does: its daemon, what runs there, and who watches that."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        tasks = [one for one in Path("/proc").glob("[0-9]*") if self._runs(one, node)]
        steps = {one for one in map(_parent, tasks) if b"slurmstepd" in _read(one / "cmdline")}
        # The watchers first, which would report the end of what they watch.
        for process in (*steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)

    def waiting(self, job: str) -> list[str]:
        """Wait until a job, or some of its array, wait again, and return their numbers."""
        asked = ["squeue", "-h", "-o", "%i", "-t", "PENDING", "-j", job]
        self.wait(lambda: self.run(*asked), f"job {job} waits again")
        return self.run(*asked).split()

    def start_again(self, job: str) -> None:
        """Start a job that waits again, or those of its array, without the delay."""
        for one in self.waiting(job):
            # SLURM lets two minutes pass before it starts a job again.
            self.run("scontrol", "update", f"JobId={one}", "StartTime=now")

    def run(self, *words: str) -> str:
        """Run one of SLURM's commands, and return what it printed."""
        done = subprocess.run(
            words, env=self.env, cwd=self._folder, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout, done.stderr, self.logs())
        return done.stdout.strip()

    def submit(self, script: Path, env: Mapping[str, str], *options: str) -> str:
        """Submit a batch file, and return the number of the job."""
        self._outputs.append(script.parent)
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)], env={**self.env, **env},
            cwd=script.parent, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stderr, self.logs())
        return done.stdout.strip()

    def states(self, job: str) -> set[str]:
        """Return the states of a job, or of all tasks of an array."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return {word.partition("=")[2] for word in text.split() if word.startswith("JobState=")}

    def finish(self, job: str) -> set[str]:
        """Wait until a job has ended, and return how."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self.wait(lambda: self.states(job) <= over, f"job {job} ends", 300)
        return self.states(job)

    def logs(self) -> str:
        """Return the last lines of every log, and of what the last job printed."""
        found = []
        printed = self._outputs[-1].glob("slurm-*.out") if self._outputs else ()
        for path in (*sorted(self._folder.glob("*.log")), *sorted(printed)):
            found.append(f"--- {path.name}\n{path.read_text(errors='replace')[-700:]}")
        return "\n".join(found)

    def close(self) -> None:
        """End everything."""
        for name in reversed(list(self._daemons)):
            self._end(name)

    def _start(self, name: str, *words: str) -> None:
        with (self._folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def wait_until_idle(self) -> None:
        """Wait until both nodes run, nothing runs on them, and nothing is on its way to them."""
        self.wait(lambda: self._are_idle() and not self._sends(), "both nodes are idle")

    def _sends(self) -> bool:
        """Return whether the controller has something to say that a node has not answered yet."""
        counts = re.findall(r"^Agent (?:queue size|count): +(\d+)", self.run("sdiag"), re.M)
        return any(int(count) for count in counts)

    def _runs(self, process: Path, node: str) -> bool:
        """Return whether a process is of a job of this cluster on a node: another has its own."""
        settings = _read(process / "environ").split(b"\0")
        return {
            f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        } <= set(settings)  # fmt: skip

    def _are_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], env=self.env, capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * len(NODES)

    def wait(self, is_so: Callable[[], object], what: str, seconds: float = _WAIT_S) -> None:
        """Wait until something is so, and fail with the logs where it takes too long."""
        until = time.monotonic() + seconds
        while not is_so():
            gone = [name for name, one in self._daemons.items() if one.poll() is not None]
            assert not gone, f"{gone} ended before {what}\n{self.logs()}"
            assert time.monotonic() < until, f"not in {seconds:.0f} s: {what}\n{self.logs()}"
            time.sleep(0.2)

    def _config(self) -> str:
        folder = self._folder
        ports = [_free_port() for _ in range(1 + len(NODES))]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 "
            "RealMemory=16000 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        return f"""\
ClusterName=here
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={1 + os.getpid() % 19_000}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder / "munge"}
CredType=cred/munge
StateSaveLocation={folder / "state"}
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=20
MinJobAge=3600
SchedulerParameters=sched_interval=1,sched_min_interval=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _read(path: Path) -> bytes:
    """Return what a process's file says; nothing where the process has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parent(process: Path) -> Path:
    # The name in brackets may hold anything; what follows is the state and the parent's number.
    fields = _read(process / "stat").rpartition(b")")[2].split()
    return Path("/proc", fields[1].decode() if fields else "0")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
