"""What the tests of the Hub share: a small expert group on a loopback Hub, and runs against it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.synthetic import Shape, Updates, write_group
from loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(hidden_size=64, intermediate_size=160, num_hidden_layers=4, vocab_size=512)
MODELS = ("base", "expert0", "expert1", "expert2")


@dataclass(slots=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict]:
        """The JSON lines that it printed."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def last(self) -> dict:
        """The last of them."""
        return self.events[-1]


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files below a folder, unfinished ones too; not a journal's rows of them."""
    every = folder.rglob("*.safetensors*")
    return [path for path in every if ".safetensors.json" not in path.name]


@dataclass(slots=True)
class Bench:
    """A Hub with a group of models on it, the same group in folders, and a merged folder."""

    hub: LoopbackHub
    folder: Path
    token: str
    xet: bool = False
    _workers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def group(self) -> Path:
        """The folder of the models' folders."""
        return self.folder / "group"

    def env(self, token: str | None = None, home: str = "home") -> dict[str, str]:
        """The environment of a command that talks to this Hub."""
        mine = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return {
            **mine,
            **self.hub.env(token or self.token, xet=self.xet, home=self.folder / home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.folder / home / "cache"),
        }

    def start(self, arguments: Sequence[str], **kwargs: str) -> subprocess.Popen:
        """Start a command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "resmerge_stream", *arguments],
            env=self.env(**kwargs),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fresh(self, arguments: Sequence[str], **kwargs: str) -> Run:
        """Run a command in a process of its own."""
        process = self.start(arguments, **kwargs)
        out, err = process.communicate(timeout=300)
        return Run(process.returncode, out, err)

    def run(self, *arguments: str) -> Run:
        """Run a command in a process that stays, so that its imports are paid once."""
        if not self._workers or self._workers[-1].poll() is not None:
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.hub_worker"],
                    env=self.env(),
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        worker = self._workers[-1]
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(json.dumps(arguments), file=worker.stdin, flush=True)
        answer = json.loads(worker.stdout.readline())
        return Run(answer["code"], answer["out"], answer["err"])

    def merge(self, *arguments: str) -> Run:
        """Merge the group's repositories."""
        return self.run("merge", *self.sources(), "--json", *arguments)

    def sources(self, prefix: str = "alice/") -> list[str]:
        """The options that name the group's models."""
        base, *experts = (f"{prefix}{name}" for name in MODELS)
        return ["--base", base, *(word for name in experts for word in ("--expert", name))]

    def folders(self) -> list[str]:
        """The options that name the group's folders."""
        return self.sources(f"{self.group}/")

    def forget_uploads(self) -> None:
        """Make the Hub forget the merged shards, so that they have to be sent again."""
        for name, data in self.expected().items():
            if name.endswith(".safetensors"):
                path = self.hub._services.objects.path(hashlib.sha256(data).hexdigest())
                path.unlink(missing_ok=True)

    def expected(self) -> dict[str, bytes]:
        """Weights, index, config and tokenizer of the group merged from folders into a folder."""
        out = self.folder / "expected"
        if not out.exists():
            done = self.run("merge", *self.folders(), "--out", str(out), "--json")
            assert done.code == 0, done.err
        return {
            path.name: path.read_bytes()
            for path in out.iterdir()
            if path.is_file() and path.name != "README.md"
        }

    def published(self, repo_id: str) -> dict[str, bytes]:
        """The same files of a repository's main."""
        names = [name for name in self.hub.files(repo_id) if "/" not in name]
        kept = [name for name in names if name not in ("README.md", ".gitattributes")]
        return {name: self.hub.read(repo_id, name) for name in kept}

    def history(self, repo_id: str) -> list[str]:
        """The titles of main's commits, newest first."""
        repo = self.hub.repo(repo_id)
        return [commit.title for commit in repo.history(repo.refs()["refs/heads/main"])]

    def close(self) -> None:
        """End the processes that stayed."""
        for worker in self._workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


def make_bench(
    folder: Path,
    hub: LoopbackHub,
    *,
    xet: bool = False,
    shape: Shape = SHAPE,
    max_shard_bytes: float = 200_000,
) -> Bench:
    """Put a group on a Hub that runs: the base is public, the experts are private."""
    write_group(
        folder / "group",
        shape,
        updates=Updates(gap=2.0, unchanged=0.4),
        max_shard_bytes=int(max_shard_bytes),
    )
    token = hub.add_user("alice")
    for name in MODELS:
        hub.add_repo(f"alice/{name}", folder / "group" / name, private=name != "base")
    return Bench(hub, folder, token, xet)


@contextmanager
def running_bench(folder: Path, *, xet: bool = False) -> Iterator[Bench]:
    """A Hub that runs with a group on it, and the folder merge to compare with."""
    with LoopbackHub(folder / "hub") as hub:
        bench = make_bench(folder, hub, xet=xet)
        try:
            bench.expected()
            yield bench
        finally:
            bench.close()
