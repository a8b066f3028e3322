"""Every command under every failure of its files: an exit code of the table, a message, and the
same command once more ends with what it would have made undisturbed."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence

import pytest

from loopback_hub import Hook
from resmerge_stream.experts.group import builtin_group
from tests.support.checkpoints import ROOT, make_group
from tests.support.faults import KINDS, Ended, FaultServer
from tests.support.hub_jobs import jobs, no_jobs
from tests.support.hub_runs import Bench

MODELS = ["--base", "g/base", "--expert", "g/expert0", "--expert", "g/expert1"]
WORK = ["--work-dir", "work"]
COMMANDS = {
    "merge": ["merge", *MODELS, *WORK, "--out", "made"],
    "compare": ["compare", *MODELS, "--methods", "mean,ties", *WORK, "--out", "made"],
    "average": ["average", "g/expert0", "g/expert1", *WORK, "--out", "made"],
    "extract": ["extract", "g/expert0", "--base", "g/base", "--rank", "2", *WORK, "--out", "made"],
    "evaluate": ["evaluate", "asked/base", "asked/rl-sort", "--tasks", "q.jsonl", "--out", "made"],
    "analyse": ["analyse", *MODELS, "--out", "made"],
    "verify": ["verify", "there", *MODELS],
}
# What tells of a run beside its result: when, and how fast.
APART = ("README.md", "report.json", "comparison.json", "comparison.md", "analysis.json",
         "analysis.md", "evaluation.png")  # fmt: skip
# How a message begins: of the command, or of one of verify's checks.
MESSAGES = ("resmerge-stream: ", "\nskipped ", "\nFAILED ")


class Subject:
    """A command and what it makes in a folder."""

    def __init__(self, server: FaultServer, words: Sequence[str]) -> None:
        self.server, self.words = server, words

    def afresh(self) -> None:
        """Remove what earlier runs made."""
        for name in ("made", "work"):
            shutil.rmtree(self.server.root / name, ignore_errors=True)

    def run(self, kind: str = "", number: int = 0) -> Ended:
        """Run it, and do harm to it if asked to."""
        return self.server.run(self.words, kind, number)

    def has_left(self) -> bool:
        """Whether the next run is not like the first."""
        return any((self.server.root / name).exists() for name in ("made", "work"))

    def made(self) -> Mapping[str, object]:
        """Return what it made, but for what differs from run to run: file → content."""
        root = self.server.root / "made"
        return {
            str(path.relative_to(root)): b"" if path.name in APART else path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


class Submitted(Subject):
    """The command ``submit`` and what it has a Hub do; a Job ends when its log is asked for."""

    def __init__(self, server: FaultServer, bench: Bench) -> None:
        super().__init__(server, ["submit", *bench.sources(), "--push-to", "alice/made", "--yes"])
        self._bench = bench

    def afresh(self) -> None:
        """Forget the Jobs, and remove what the client keeps."""
        self._bench.hub.recorded.jobs.clear()
        self._bench.hub.recorded.payloads.clear()
        shutil.rmtree(self.server.root / "home", ignore_errors=True)

    def run(self, kind: str = "", number: int = 0) -> Ended:
        """Run it; of a Job that nobody pays for twice there is one at a time."""
        ended = super().run(kind, number)
        assert sum(not job.ended for job in jobs(self._bench)) <= (ended.code != 0)
        return ended

    def has_left(self) -> bool:
        """Whether the next run is not like the first: there may be a Job, or files for one."""
        return True

    def made(self) -> Mapping[str, object]:
        """Return the orders that the Hub was given: each a different one."""
        sent = [body for path, body in self._bench.hub.recorded.payloads if path.endswith("/alice")]
        return {json.dumps(body, sort_keys=True): b"" for body in sent}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Models, questions and a finished merge in a folder, and the process that forks there."""
    root = tmp_path_factory.mktemp("faults") / "root"
    make_group(root / "g", experts=2, sharded=True)
    for name in ("base", "rl-sort"):
        shutil.copytree(builtin_group()[name], root / "asked" / name)
    question = {"prompt": "sort:cab>", "answer": "abc", "max_new_tokens": 4}
    (root / "q.jsonl").write_text(json.dumps(question) + "\n")
    with FaultServer(root) as running:
        assert running.run([*COMMANDS["merge"][:-1], "there"], "here").code == 0
        assert running.run(COMMANDS["evaluate"], "here").code == 0
        yield running


@pytest.fixture(scope="module")
def submitted(bench: Bench) -> Iterator[Submitted]:
    """The command ``submit`` on a Hub; what it reads of its own package counts too."""
    root = bench.folder / "submits"
    root.mkdir()
    running = FaultServer(root, [ROOT / "resmerge_stream"], bench.env(home="submits/home"))
    with no_jobs(bench), running:
        bench.hub.faults.add(Hook(call=lambda: jobs(bench)[-1].end("COMPLETED")), path="/logs")
        yield Submitted(running, bench)


@pytest.fixture
def subject(name: str, request: pytest.FixtureRequest) -> Subject:
    """The command of a name."""
    if name == "submit":
        found: Submitted = request.getfixturevalue("submitted")
        return found
    return Subject(request.getfixturevalue("server"), COMMANDS[name])


def check(subject: Subject, kind: str, number: int, whole: Mapping[str, object]) -> None:
    """Do harm to one run of a command, and look at it and at the next."""
    subject.afresh()

    harmed = subject.run(kind, number)
    again = subject.run() if subject.has_left() or harmed.code == 0 else None

    told = (subject.words[0], kind, number, harmed.code, harmed.said, again and again.said)
    assert harmed.code in ((-9,) if kind.startswith("kill") else (0, 2, 3)), told
    assert "Traceback" not in harmed.said, told
    assert harmed.code in (0, -9) or any(it in f"\n{harmed.said}" for it in MESSAGES), told
    if again is not None:
        assert again.code == 0, told
        assert subject.made() == whole, told


def calm(subject: Subject) -> tuple[Ended, Mapping[str, object]]:
    """Run a command undisturbed; return how it ended, and what it made."""
    subject.afresh()
    ended = subject.run()
    assert ended.code == 0, ended.said
    return ended, subject.made()


@pytest.mark.faults
@pytest.mark.parametrize("name", [*COMMANDS, "submit"])
def test_a_failing_file_system_ends_a_command_in_words(name: str, subject: Subject) -> None:
    """A few of the cases below, drawn by a seed: one for each kind of harm."""
    clean, whole = calm(subject)
    draw = random.Random(name)

    for kind in KINDS:
        if count := clean.cases(kind):
            check(subject, kind, draw.randint(1, count), whole)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*COMMANDS, "submit"])
def test_operations_all_through_a_command_may_fail(kind: str, name: str, subject: Subject) -> None:
    """From the first operation to the last, a disk error, a full disk, a kill; all if asked to."""
    clean, whole = calm(subject)
    count = clean.cases(kind)

    # RESMERGE_EVERY_FAULT=1: each of them, in hours.
    step = 1 if "RESMERGE_EVERY_FAULT" in os.environ else max(count // 3, 1)
    first = random.Random(name + kind).randint(1, step)
    for number in range(first, count + 1, step):
        check(subject, kind, number, whole)
