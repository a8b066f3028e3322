"""Merges Hub to Hub while everything goes wrong: ``python -m benchmarks.soak --minutes 60``.

Each case draws a group, a method, options and troubles: faults of the Hub at random, SIGKILL and
SIGTERM, a full disk, a second writer, a stranger's commit, shards replaced on the staging branch.
The same command is repeated until it is done, the last times in peace. What must hold:

* weights, index and config have the bytes of a calm merge from folders into a folder;
* main holds nothing of the merge, or all of it, whenever it is looked at;
* sources, bystanders and a stranger's files stay as they are;
* no token and no signed link is printed or left in a file;
* private memory and disk stay within the plan;
* exit codes are the documented ones, and no traceback is shown.

A case is drawn from the seed and its number alone: ``--seed 3 --only 17`` draws it again. (Threads
and processes race as they like, so a repeated case need not meet its troubles at the same byte.)
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import Shape, Updates, write_group
from loopback_hub import FAULTS, Hook, LoopbackHub
from resmerge_stream.cli.main import main as run_command
from tests.support.hub_runs import Bench, weight_files

SHAPE = Shape(hidden_size=32, intermediate_size=96, num_hidden_layers=2, vocab_size=128)
GROUPS = ("bfloat16", "float16", "float32", "adapters", "fp8")
METHODS = ("resmerge", "mean", "task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs",
           "iso_c", "tsv_m", "sce", "head_regression", "sar")  # fmt: skip
# What is said where a stranger's commit came first: to the run that it met, and to one that begins
# after it. Both name --update.
MOVED = ("was changed while this merge ran", "that this merge did not make")
TROUBLES = ("faults", "kill", "term", "full disk", "second writer", "stranger", "replaced", "none")
# Not what the Hub may answer and mean: no right, no token, no room, another commit.
RETRIED = tuple(name for name in FAULTS if name not in ("forbidden", "revoked", "quota", "stale"))
TARGET = "alice/merged"
ROUNDS, TROUBLED = 10, 4
# More than the sampling of a run's memory can be off by.
MEMORY_SLACK = 64_000_000
# Seconds that a run may take before it is said to hang: a busy machine is slow.
RUN_S = 900
FULL = (
    "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
    "from resmerge_stream.cli.main import main; sys.exit(main(sys.argv[2:]))"
)


@dataclass(frozen=True, slots=True)
class Case:
    """What one case does, drawn from the seed and its number.

    Attributes:
        group: one of `GROUPS`.
        merging: options that decide the bytes.
        publishing: options that do not.
        troubles: some of `TROUBLES`.
        xet: whether the client uses Xet storage.
        exists: whether the target is there already, public and empty.
        moments: after how many requests each trouble strikes, in turn.
        chance: of a fault, for each request.
    """

    number: int
    group: str
    merging: tuple[str, ...]
    publishing: tuple[str, ...]
    troubles: tuple[str, ...]
    xet: bool
    exists: bool
    moments: tuple[int, ...]
    chance: float

    @classmethod
    def drawn(cls, seed: int, number: int) -> "Case":
        """Draw a case."""
        random = Random(f"{seed} {number}")
        group, xet = random.choice(GROUPS), random.random() < 0.3
        merging = ["--method", random.choice(METHODS), "--seed", str(random.randrange(3))]
        if random.random() < 0.3:
            merging += ["--rounding", "stochastic"]
        if random.random() < 0.3:
            merging += ["--dtype", random.choice(("bfloat16", "float16", "float32"))]
        merging += ["--max-shard-size", random.choice(("10KB", "30KB", "1MB"))]
        publishing = ["--public"] if random.random() < 0.4 else []
        if xet and random.random() < 0.4:
            publishing += ["--max-disk", "0"]
        return cls(
            number, group, tuple(merging), tuple(publishing),
            tuple(random.sample(TROUBLES, random.choice((1, 1, 2)))), xet,
            random.random() < 0.25,
            tuple(random.randrange(2, 70) for _ in range(TROUBLED)),
            random.choice((0.02, 0.05, 0.1)),
        )  # fmt: skip

    def __str__(self) -> str:
        """Return it in one line."""
        words = [self.group, *self.merging, *self.publishing, "xet" if self.xet else "lfs"]
        words += ["into a public repository"] if self.exists else []
        return f"{self.number}: {' '.join(words)}; {', '.join(self.troubles)}"


@dataclass(slots=True)
class Soak:
    """Runs cases below a folder.

    Attributes:
        root: where groups and calm merges are kept, and one folder for the case that runs.
        seed: of the cases.
    """

    root: Path
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, number: int) -> list[str]:
        """Run one case; return what did not hold."""
        case = Case.drawn(self.seed, number)
        expected = self.calm(case)
        folder = self.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        with LoopbackHub(folder / "hub") as hub:
            hub.faults.seed(number)
            models = self.group(case.group)
            token = hub.add_user("alice")
            for model in models:
                hub.add_repo(f"alice/{model.name}", model, private=model.name != "base")
            hub.add_repo("alice/bystander", {"notes.md": b"mine"}, private=True)
            if case.exists:
                hub.add_repo(TARGET, {".gitattributes": b""})
            running = _Running(case, Bench(hub, folder, token, case.xet), expected, self.counts)
            running.until_done([f"alice/{model.name}" for model in models])
            return running.wrong

    def calm(self, case: Case) -> dict[str, bytes]:
        """Return weights, index and config of the case's merge, made in peace from folders."""
        key = hashlib.sha256(repr((case.group, case.merging)).encode()).hexdigest()[:16]
        out = self.root / "calm" / key
        if not out.exists():
            base, *experts = map(str, self.group(case.group))
            words = ["merge", *sources(base, experts), *case.merging, "--out", str(out), "--json"]
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = run_command([*words, "--work-dir", str(self.root / "calm-work")])
            if code:
                raise RuntimeError(f"{case}: {said.getvalue()[-2000:]}")
        files = (path for path in out.iterdir() if path.is_file())
        return {path.name: path.read_bytes() for path in files if _is_merged(path.name)}

    def group(self, kind: str) -> list[Path]:
        """Return the folders of a group's models, made when first asked for; the base first."""
        folder = self.root / "groups" / kind
        if not folder.exists():
            dtype = {"float16": "F16", "float32": "F32"}.get(kind, "BF16")
            shards = 5_000_000_000 if kind == "fp8" else 40_000
            write_group(
                folder, SHAPE, updates=Updates(unchanged=0.3), dtype=dtype, max_shard_bytes=shards
            )
            for number in range(3):
                expert = folder / f"expert{number}"
                if kind == "adapters":
                    shutil.rmtree(expert)
                    _write_adapter(expert, number)
                elif kind == "fp8":
                    _quantise(expert)
        return [folder / name for name in ("base", "expert0", "expert1", "expert2")]


class _Running:
    """One case on its Hub."""

    def __init__(
        self, case: Case, bench: Bench, expected: dict[str, bytes], counts: Counter[str]
    ) -> None:
        self.case, self.bench, self.expected, self.counts = case, bench, expected, counts
        self.wrong: list[str] = []
        self.others: dict[str, bytes] = {}
        self.said = ""
        self.disk = 0

    def until_done(self, models: Sequence[str]) -> None:
        """Repeat the command until it is done, the last times in peace; check what must hold."""
        hub, case = self.bench.hub, self.case
        before = {name: hub.repo(name).refs() for name in (*models, "alice/bystander")}
        base, *experts = models
        words = ["merge", *sources(base, experts), *case.merging, *case.publishing]
        words += ["--push-to", TARGET, "--patience", "20", "--json"]
        for number in range(ROUNDS):
            code, out, err = self._once([*words, "--work-dir", "work"], number)
            self.said += out + err
            self.counts[f"exit {code}"] += 1
            self._check_main()
            if "Traceback" in err:
                self.wrong.append(f"a traceback: {err[-1500:]}")
            if code == 0:
                self._check_plan(out)
                break
            if self._met_a_stranger(code, err):
                words = [word for word in words if word != "--update"] + ["--update"]
            elif code not in self._allowed(number):
                self.wrong.append(f"exit code {code}: {err[-1500:]}")
        else:
            self.wrong.append(f"not done in {ROUNDS} runs: {err[-1500:]}")
        self._check_result()
        if before != {name: hub.repo(name).refs() for name in before}:
            self.wrong.append("a source or a bystander was changed")
        self._check_secrets()

    def _once(self, words: list[str], number: int) -> tuple[int, str, str]:
        faults = self.bench.hub.faults
        faults.clear()
        program = ["-m", "resmerge_stream"]
        if "full disk" in self.case.troubles and number == 0:
            program = ["-c", FULL, "15000"]
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            env=self.bench.env(), cwd=self.bench.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if number < TROUBLED:
            self._trouble(process, words, number)
        faults.add(Hook(call=self._look_at_disk))  # last: of several hooks the first is called
        try:
            out, err = process.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            self.wrong.append(f"a run did not end within {RUN_S} s")
        faults.clear()
        return process.returncode, out, err

    def _trouble(self, process: subprocess.Popen[str], words: list[str], number: int) -> None:
        faults, moment = self.bench.hub.faults, self.case.moments[number]

        def at(moment: int, call: Callable[[], object], path: str | None = None) -> None:
            faults.add(Hook(call=call), skip=moment, times=1, path=path)

        for trouble in self.case.troubles:
            if trouble == "faults":
                for name in RETRIED:
                    # Links expire at the storage; from the Hub's own addresses a 403 is an answer.
                    port = "cdn" if name == "expired" else None
                    faults.add(name, chance=self.case.chance / len(RETRIED), port=port)
            elif trouble == "kill":
                at(moment, lambda: process.send_signal(signal.SIGKILL))
            elif trouble == "term":
                at(moment, lambda: process.send_signal(signal.SIGTERM))
            elif number:
                continue  # once a case is enough of the rest
            elif trouble == "second writer":
                at(moment % 4, lambda: self._second(words), path="/commit/resmerge")
            elif trouble == "stranger":
                at(1 + moment % 3, self._stranger, path="/commit/resmerge")
            elif trouble == "replaced":
                at(1 + moment % 3, self._replace, path="/commit/resmerge")

    def _second(self, words: list[str]) -> None:
        done = self.bench.fresh([*words[:-1], "other-work"], home="other")
        self.said += done.out + done.err
        if done.code not in (0, 3) and not self._met_a_stranger(done.code, done.err):
            self.wrong.append(f"a second writer ended with {done.code}: {done.err[-1500:]}")

    def _met_a_stranger(self, code: int, err: str) -> bool:
        return code == 2 and bool(self.others) and any(said in err for said in MOVED)

    def _stranger(self) -> None:
        if self.bench.hub.has_repo(TARGET):
            self.others = {"stranger.md": b"theirs"}
            self.bench.hub.push(TARGET, self.others)

    def _replace(self) -> None:
        for repo in self.bench.hub._services.store.repos("models"):
            for ref in repo.refs():
                branch = ref.removeprefix("refs/heads/")
                shards = [name for name in repo.at(branch).files if name.endswith(".safetensors")]
                if branch.startswith("resmerge-") and shards:
                    self.bench.hub.push(repo.id, {shards[0]: b"x" * 600}, branch=branch)

    def _look_at_disk(self) -> None:
        sizes = []
        for path in weight_files(self.bench.folder / "work"):
            with contextlib.suppress(OSError):
                sizes.append(path.stat().st_size)
        self.disk = max(self.disk, sum(sizes))

    def _allowed(self, number: int) -> set[int]:
        codes, troubled = {3}, number < TROUBLED
        codes |= {-signal.SIGKILL} if troubled and "kill" in self.case.troubles else set()
        codes |= {143} if troubled and "term" in self.case.troubles else set()
        return codes

    def _check_main(self) -> None:
        hub = self.bench.hub
        if not hub.has_repo(TARGET):
            return
        there = {name for name in hub.files(TARGET) if "/" not in name}
        if there & set(self.expected) and not set(self.expected) <= there:
            self.wrong.append(f"main is partial: {sorted(there)}")

    def _check_plan(self, out: str) -> None:
        events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        plans = [event["plan"] for event in events if event["event"] == "planned"]
        if not plans:
            return  # another run had finished it
        peak = events[-1]["report"]["summary"]["peak_private_bytes"]
        if peak > plans[0]["peak_memory_bytes"] + MEMORY_SLACK:
            self.wrong.append(f"{peak} bytes of memory, planned {plans[0]['peak_memory_bytes']}")
        if self.disk > plans[0]["peak_disk_bytes"]:
            self.wrong.append(f"{self.disk} bytes of disk, planned {plans[0]['peak_disk_bytes']}")

    def _check_result(self) -> None:
        hub = self.bench.hub
        if not hub.has_repo(TARGET):
            self.wrong.append("there is no result")
            return
        files = hub.files(TARGET)
        for name, data in {**self.expected, **self.others}.items():
            if name not in files:
                self.wrong.append(f"{name} is missing")
            elif hub.read(TARGET, name) != data:
                self.wrong.append(f"{name} has other bytes")
        left = [repo.id for repo in hub._services.store.repos("models") if "-resmerge-" in repo.id]
        left += [ref for ref in hub.repo(TARGET).refs() if "resmerge-" in ref]
        if left:
            self.wrong.append(f"staging is left: {left}")

    def _check_secrets(self) -> None:
        token, link = self.bench.token.encode(), b"ignature="
        places = {"the output": self.said.encode()}
        for name in ("home", "other", "work", "other-work"):
            for path in (self.bench.folder / name).rglob("*"):
                if path.is_file():
                    places[str(path)] = path.read_bytes()
        if self.bench.hub.has_repo(TARGET):
            for name in self.bench.hub.files(TARGET):
                places[f"{TARGET}/{name}"] = self.bench.hub.read(TARGET, name)
        for place, data in places.items():
            if token in data or link in data:
                self.wrong.append(f"a secret in {place}")


def sources(base: str, experts: Sequence[str]) -> list[str]:
    """Return the options that name models."""
    return ["--base", base, *(word for name in experts for word in ("--expert", name))]


def _is_merged(name: str) -> bool:
    return name.startswith("model") or name in ("config.json", "tokenizer.json")


def _write_adapter(folder: Path, seed: int) -> None:
    folder.mkdir()
    random, hidden, rank = torch.Generator().manual_seed(seed), SHAPE.hidden_size, 4
    tensors = {}
    for layer in range(SHAPE.num_hidden_layers):
        for name in ("q_proj", "o_proj"):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for side, shape in (("A", (rank, hidden)), ("B", (hidden, rank))):
                tensors[f"{key}.lora_{side}.weight"] = 0.02 * torch.randn(shape, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "base",
              "target_modules": ["q_proj", "o_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _quantise(folder: Path) -> None:
    """Store an expert's linear maps as FP8 with one scale for each block of 128 x 128."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        tensors[name] = value.clone()
        if value.ndim == 2 and "embed" not in name:
            scale = value.float().abs().max().reshape(1, 1) / 448
            tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


def main() -> int:
    """Run cases until the time is over; return 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case and no other")
    parser.add_argument("--dir", type=Path, help="where to keep the groups (default: a new folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(args.dir or Path(scratch), args.seed)
        until, number, cases, failed = time.monotonic() + 60 * args.minutes, 0, 0, 0
        while time.monotonic() < until:
            number = number if args.only is None else args.only
            started = time.monotonic()
            wrong = soak.run(number)
            state = "FAILED" if wrong else "ok"
            print(f"{state} {Case.drawn(args.seed, number)} ({time.monotonic() - started:.0f} s)")
            if wrong:
                failed += 1
                print("\n".join(f"  {line}" for line in wrong))
                print(f"  again: python -m benchmarks.soak --seed {args.seed} --only {number}")
            sys.stdout.flush()
            number, cases = number + 1, cases + 1
            if args.only is not None:
                break
        counts = ", ".join(f"{count} × {name}" for name, count in sorted(soak.counts.items()))
        print(f"{cases} cases, {failed} failed; runs: {counts}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
