"""A 7B model merged whole: ``python -m benchmarks.whole [disk] [hub]``.

Qwen2.5-7B's shapes, a base and experts in bfloat16 (low rank and noise), made once in ``--dir``; a
stopped call goes on. 46 GB with two experts, and 15 more for what is written.

`disk`: each method from the disk to the disk, from a cold page cache, beside reading and writing
the same bytes and beside what the plan promised; then the same merge killed twice, continued, and
its files compared; `verify` at the end. `hub`: the same on a loopback Hub with a slow line and
nothing kept on the disk, once calm and once with faults at random.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loopback_hub import LoopbackHub

from .core import group
from .growth import leave_page_cache
from .measure import Run, machine, merge_command, run
from .synthetic import QWEN25_7B, Updates

_METHODS = ("mean", "ties:density=0.2", "resmerge", "head_regression")
_KILLS = (0.3, 0.4)  # of the undisturbed time, after which each of the first runs is killed
_LATENCY_S, _CHANCE = 0.05, 0.002
# Not those that a person has to mend: a revoked token, a full namespace.
_FAULTS = ("429", "500", "502", "503", "html", "expired", "stale", "cut", "reset")


def main() -> None:
    """Make the group, then print the tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole", description=__doc__)
    parser.add_argument("what", nargs="*", help="disk, hub; default: disk")
    parser.add_argument("--methods", nargs="+", default=_METHODS, metavar="NAME[:KEY=VALUE]")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "resmerge-whole")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28, help="fewer, for a try")
    parser.add_argument("--vocab", type=int, default=152_064, help="fewer rows, for a try")
    parser.add_argument("--calm", action="store_true", help="disk: without the kills")
    parser.add_argument("--rate", type=float, default=50, help="hub: MB/s down (50)")
    args = parser.parse_args()
    shape = replace(QWEN25_7B, num_hidden_layers=args.layers, vocab_size=args.vocab)
    name = f"7b-{args.layers}-{args.vocab}-{args.experts}"
    models = group(args.dir, name, shape, Updates(gap=2.0), experts=args.experts)
    print(machine())
    for what in args.what or ["disk"]:
        {"disk": _disk, "hub": _hub}[what](args, models)


def _disk(args: argparse.Namespace, models: Path) -> None:
    out, work = args.dir / "out", args.dir / "work"
    floor = _floor(models, out, args.experts)
    print(f"\nreading {args.experts + 1} models and writing one: {floor.seconds:.0f} s "
          f"({floor.user + floor.system:.0f} s of CPU)\n")  # fmt: skip
    print("| method | plan says | wall s | ÷ copying | CPU s | plan: memory | peak private | "
          "killed twice, in all s | files |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|", flush=True)
    for method in args.methods:
        _forget(out, work)
        command = _command(models, out, work, method, args.experts)
        plan = _plan(command)
        leave_page_cache(models)
        calm = run(command)
        seconds, same = "", ""
        if not args.calm:
            wanted = _hashes(out)
            _forget(out, work)
            leave_page_cache(models)
            seconds = f"{_killed(command, [share * calm.seconds for share in _KILLS]):.0f}"
            same = "equal" if _hashes(out) == wanted else "DIFFERENT"
        print(
            f"| `{method}` | {plan['seconds_estimate']:.0f} s | {calm.seconds:.0f} "
            f"| {calm.seconds / floor.seconds:.2f} | {calm.user + calm.system:.0f} "
            f"| {plan['peak_memory_bytes'] / 1e6:,.0f} MB | {calm.peak_private / 1e6:,.0f} MB "
            f"| {seconds} | {same} |",
            flush=True,
        )
    verify = [sys.executable, "-m", "resmerge_stream", "verify", str(out)]
    checked = run([*verify, *_models(models, args.experts)])
    print(f"\nverify, the last of them: {checked.seconds:.0f} s, "
          f"{checked.peak_private / 1e6:,.0f} MB\n{checked.output}")  # fmt: skip
    _forget(out, work)


def _floor(models: Path, out: Path, experts: int) -> Run:
    """Read every file and write as many bytes as a merge does, none of them in the page cache."""
    out.mkdir(parents=True)
    leave_page_cache(models)
    names = " ".join(f"{models}/expert{number}/*.safetensors" for number in range(experts))
    script = f"cat {names} > /dev/null && cp {models}/base/*.safetensors {out} && sync {out}/*"
    return run(["sh", "-c", script])


def _command(models: Path, out: Path, work: Path, method: str, experts: int) -> list[str]:
    return merge_command(models, out, *_method(method), "--work-dir", str(work), experts=experts)


def _method(method: str) -> list[str]:
    name, _, settings = method.partition(":")
    words = ["--method", name]
    for setting in filter(None, settings.split(",")):
        words += ["--set", setting]
    return words


def _models(where: Path | str, experts: int) -> list[str]:
    words = ["--base", f"{where}/base"]
    for number in range(experts):
        words += ["--expert", f"{where}/expert{number}"]
    return words


def _plan(command: Sequence[str]) -> Mapping[str, float]:
    words = [("plan" if word == "merge" else word) for word in command]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    plan: Mapping[str, float] = json.loads(done.stdout)
    return plan


def _killed(command: Sequence[str], after: Sequence[float]) -> float:
    """Kill a merge after so many seconds each time, let it end at last; return seconds in all."""
    started = time.perf_counter()
    for seconds in after:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
    run(command)
    return time.perf_counter() - started


def _hashes(folder: Path) -> Mapping[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors*")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _forget(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _hub(args: argparse.Namespace, models: Path) -> None:
    """Merge from the loopback Hub to itself over a slow line, calm and with faults at random."""
    _forget(args.dir / "hub", args.dir / "home")
    with LoopbackHub(args.dir / "hub") as hub:
        token = hub.add_user("alice")
        names = ["base", *(f"expert{number}" for number in range(args.experts))]
        for name in names:
            hub.add_repo(f"alice/{name}", models / name, private=True)
        hub.limits.down = args.rate * 1e6
        hub.limits.latency = _LATENCY_S
        hub.faults.seed(0)
        env = {**os.environ, **hub.env(token, home=args.dir / "home")}
        print(f"\n{args.rate:.0f} MB/s down and {_LATENCY_S * 1e3:.0f} ms; --max-disk 0 (Xet)\n")
        print("| method | line | wall s | runs | down GB | peak MB |")
        print("|---|---|---:|---:|---:|---:|", flush=True)
        for method in args.methods:
            for line in ("calm", "faults"):
                hub.log.clear()
                if line == "faults":
                    for fault in _FAULTS:
                        hub.faults.add(fault, chance=_CHANCE)
                command = [sys.executable, "-m", "resmerge_stream", "merge", *_method(method)]
                command += _models("alice", args.experts)
                command += ["--push-to", f"alice/{method.partition(':')[0]}-{line}"]
                command += ["--max-disk", "0", "--work-dir", str(args.dir / "work")]
                runs = [run(command, env=env, check=False)]
                while runs[-1].code == 3:
                    runs.append(run(command, env=env, check=False))
                hub.faults.clear()
                if runs[-1].code:
                    raise RuntimeError(runs[-1].output[-2000:])
                sent = sum(entry.sent for entry in hub.log.find(method="GET", port="cdn"))
                print(
                    f"| `{method}` | {line} | {sum(one.seconds for one in runs):.0f} | {len(runs)} "
                    f"| {sent / 1e9:.1f} "
                    f"| {max(one.peak_private for one in runs) / 1e6:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
