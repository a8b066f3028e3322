"""What the tests of the Space share: the app as a process, and a small group on a Hub."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client

from benchmarks.synthetic import Shape, Updates, write_group
from loopback_hub import Hook, LoopbackHub, Reset
from loopback_hub.faults import Rule
from tests.support.hub_runs import MODELS, ROOT

SHAPE = Shape(hidden_size=64, intermediate_size=160, num_hidden_layers=4, vocab_size=512)
PATIENCE_S = 60.0  # how long the tests wait for what should happen at once; a busy machine is slow


@dataclass(slots=True)
class Space:
    """The app in a process that can be ended and started again.

    Attributes:
        folder: its home, where everything that it writes must be.
        extra: environment variables beside those of the Hub.
        in_space: sign-in and environment as on the Hub; else as on a laptop without an account.
        root: the repository that it runs from.
    """

    hub: LoopbackHub
    folder: Path
    extra: Mapping[str, str] = field(default_factory=dict)
    in_space: bool = True
    root: Path = ROOT
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What it printed, over all its lives."""
        return self.folder / "app.log"

    def start(self, *, locked: bool = False) -> None:
        """Start it, and wait until it answers; where it is locked, until it prints its address."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        log = self.log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(self.root / "app.py")],
            env=self._env(), cwd=self.folder, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        there = self._prints if locked else self._answers
        wait_for(there, "the app to answer", patience_s=300.0)

    def _prints(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        return "?key=" in self.log.read_text()

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/config", timeout=10.0).status_code == 200
        except httpx.TransportError:
            return False

    def _env(self) -> dict[str, str]:
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "OAUTH_"))}
        return {
            **mine,
            **self.hub.env(xet=False, home=self.folder / "hf"),
            **(self.hub.space_env("alice/space") if self.in_space else {}),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.root),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(self.port),
            **self.extra,
        }

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it, by default as a Space is ended; SIGKILL if that takes too long."""
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def restart(self, how: int = signal.SIGKILL) -> None:
        """End it and start it again at the same address."""
        self.stop(how)
        self.start()


@dataclass(slots=True)
class Town:
    """A Hub with a group and two users, and a Space for them."""

    hub: LoopbackHub
    space: Space
    folder: Path
    alice: str
    bob: str

    @contextmanager
    def held(self, repo_id: str, *, commits: int = 2, lost: bool = False) -> Iterator[Rule]:
        """Meanwhile a merge into a repository stands still, before its next commit.

        Args:
            repo_id: the merge's target.
            commits: so many pass first: an owner's mark, then one a shard.
            lost: the waiting commit is dropped at the end, as when its sender is gone.

        Yields:
            The rule that holds it; once it has hits, the merge stands still.
        """
        go_on = threading.Event()
        path = f"/api/models/{repo_id}/commit/"
        held = self.hub.faults.add(Hook(call=go_on.wait), path=path, skip=commits, times=1)
        rules = [held]
        if lost:
            rules.append(self.hub.faults.add(Reset(), path=path, skip=commits, times=1))
        try:
            yield held
        finally:
            go_on.set()
            for rule in rules:
                self.hub.faults.remove(rule)

    def published(self, repo_id: str) -> dict[str, bytes]:
        """Weights, index and config on the main branch of a repository."""
        names = [
            name
            for name in self.hub.files(repo_id)
            if name.endswith(".safetensors") or name in ("config.json", INDEX)
        ]
        return {name: self.hub.read(repo_id, name) for name in names}


INDEX = "model.safetensors.index.json"


@contextmanager
def running_town(
    folder: Path, *, shape: Shape = SHAPE, shard_bytes: int = 200_000, **options: Any
) -> Iterator[Town]:
    """A Hub and a Space that run: a public base, alice's private experts, bob with nothing."""
    write_group(
        folder / "group",
        shape,
        updates=Updates(gap=2.0, unchanged=0.4),
        max_shard_bytes=shard_bytes,
    )
    with LoopbackHub(folder / "hub") as hub:
        alice, bob = hub.add_user("alice"), hub.add_user("bob")
        for name in MODELS:
            hub.add_repo(f"alice/{name}", folder / "group" / name, private=name != "base")
        space = Space(hub, folder / "space", **options)
        try:
            space.start()
            yield Town(hub, space, folder, alice, bob)
        finally:
            space.stop()


def recipe(prefix: str = "alice/", **more: Any) -> dict[str, Any]:
    """The group's recipe, as a page or a program sends it."""
    base, *experts = (f"{prefix}{name}" for name in MODELS)
    return {
        "merge_method": "resmerge",
        "base_model": base,
        "models": [{"model": name} for name in experts],
        **more,
    }


@contextmanager
def client_of(town: Town, token: str | None = None) -> Iterator[Client]:
    """A program that calls the Space, on somebody's behalf where a token is given."""
    client = Client(town.space.url, oauth_token=token, verbose=False)
    try:
        yield client
    finally:
        client.close()


def status(client: Client, job: str) -> dict[str, Any]:
    """What the Space says of a job."""
    answer: dict[str, Any] = client.predict(job=job, api_name="/status")
    return answer


def ended(client: Client, job: str) -> dict[str, Any]:
    """Wait for a job's end and return its last status."""
    done = ("done", "failed", "cancelled", "resumable")

    def look() -> dict[str, Any] | None:
        answer = status(client, job)
        return answer if answer["state"] in done else None

    answer: dict[str, Any] = wait_for(look, f"the end of {job}", patience_s=180.0)
    return answer


def wait_for(
    there: Callable[[], Any], what: str, *, patience_s: float = PATIENCE_S, pause_s: float = 0.1
) -> Any:
    """Return the first true answer of a function; fail when it does not come."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        answer = there()
        if answer:
            return answer
        time.sleep(pause_s)
    raise AssertionError(f"waited {patience_s:.0f} s for {what}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
