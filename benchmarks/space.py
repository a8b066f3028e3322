"""What visitors who watch cost a merge: ``python -m benchmarks.space``.

A Space merges a group from its own disk, in turn alone and while visitors have its page open, each
asking for news of that merge every few seconds, as the page does. The server and its merge run on
one core, the visitors on another, so that the visitors' own work is not counted; on two cores of
its own a Space has more to spare. The time is the merge's own, from its plan to its last file.
Beside it stands the CPU time of server and merge together: on a core that they have to themselves
it is the same, and what else runs on the machine hardly changes it. ``--together`` lets all of them
have all cores, as on a Space of two: then the visitors' own work counts as well, an upper bound.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from gradio_client import Client

from benchmarks.synthetic import Shape, Updates, write_group
from loopback_hub import LoopbackHub
from resmerge_stream.experts.group import builtin_group
from tests.support.space_runs import Space, wait_for

from .measure import machine

ROOT = Path(__file__).resolve().parent.parent


def recipe() -> dict[str, Any]:
    """The built-in group, as the web names it."""
    base, *experts = builtin_group()
    models = [{"model": f"built-in/{name}"} for name in experts]
    return {"base_model": f"built-in/{base}", "models": models}


def copy_with_larger_models(root: Path, shape: Shape) -> None:
    """Copy the app, with larger models in place of its built-in ones, for longer merges."""
    base, *experts = (folder.relative_to(ROOT) for folder in builtin_group().values())
    ignored = shutil.ignore_patterns("__pycache__", base.parent.name)
    for name in ("resmerge_stream", "space"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "app.py", root)
    write_group(root / "group", shape, experts=len(experts), updates=Updates(gap=2.0))
    (root / base).parent.mkdir()
    (root / "group" / "base").rename(root / base)
    for number, expert in enumerate(experts):
        (root / "group" / f"expert{number}").rename(root / expert)


def ask(space: Space, endpoint: str, **arguments: Any) -> Any:
    """Call one of the Space's endpoints."""
    client = Client(space.url, verbose=False)
    try:
        return client.predict(**arguments, api_name=endpoint)
    finally:
        client.close()


def queue_merge(space: Space) -> tuple[str, Path]:
    """Queue a merge and return its job and the file of its record."""
    job = ask(space, "/merge", recipe=recipe(), push_to="", private=True)["job"]
    return job, next((space.folder / "cache").rglob(f"{job}.json"))


def read(record: Path) -> dict[str, Any]:
    """A job's record; it is replaced whole, so that it can be read at any time."""
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def seconds_of(record: Path) -> float:
    """Wait for a merge's end and return how long it took."""
    wait_for(lambda: read(record)["state"] == "done", "the end", patience_s=900.0, pause_s=0.5)
    done = read(record)
    return float(done["updated"] - done["started"])


async def watch(url: str, job: str, visitors: int, every: float) -> None:
    """Be so many visitors until told to stop, then print how it went."""
    limits = httpx.Limits(max_connections=None)
    took: list[float] = []
    failed: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=60.0, limits=limits) as http:
        config = (await http.get("/config")).json()
        stop, here = asyncio.Event(), list[int]()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

        async def visitor(number: int) -> None:
            await asyncio.sleep(every * number / visitors)
            await open_job(http, config, f"visitor{number}", job)
            shown = dict[str, str]()
            here.append(number)
            if len(here) == visitors:
                print("all here", flush=True)
            while not stop.is_set():
                started = time.perf_counter()
                try:
                    answer = await http.get(f"/news/{job}", params=shown)
                    answer.raise_for_status()
                except httpx.HTTPError as exc:  # the page, too, asks again at its next tick
                    failed.append(repr(exc))
                else:
                    news = answer.json()
                    shown = {"log": news["log_stamp"], "picture": news["gates_stamp"]}
                    took.append(time.perf_counter() - started)
                await asyncio.sleep(max(every - (time.perf_counter() - started), 0.0))

        crowd = [asyncio.create_task(visitor(number)) for number in range(visitors)]
        await stop.wait()
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    for error in failed[:1]:
        print(f"a question failed: {error}", file=sys.stderr)
    took.sort()
    slow = took[int(len(took) * 0.95)] if took else 0.0
    print(json.dumps({"polls": len(took), "failed": len(failed), "p95_ms": round(1000 * slow)}))


async def open_job(http: httpx.AsyncClient, config: Any, session: str, job: str) -> None:
    """Load the page as somebody who watched before: the server's side of a tab learns the job."""
    load = next(
        dep for dep in config["dependencies"] if any(t[1] == "load" for t in dep["targets"])
    )
    # The browser sends what it remembers, the server keeps the rest.
    kept = [None] * (len(load["inputs"]) - 1)
    event = {
        "data": [{"job": job, "secret": "visitor"}, *kept],
        "fn_index": load["id"],
        "session_hash": session,
        "trigger_id": None,
        "event_data": None,
    }
    await http.post("/gradio_api/queue/join", json=event)
    async with http.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
        async for line in stream.aiter_lines():
            if "process_completed" in line or "close_stream" in line:
                return


def main() -> None:
    """Measure, and print a table."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.space", description=__doc__)
    options.add_argument("--visitors", type=int, default=200)
    options.add_argument("--every", type=float, default=5.0, metavar="SECONDS")
    options.add_argument("--times", type=int, default=3)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--hidden", type=int, default=896)
    options.add_argument(
        "--together", action="store_true",
        help="server, merge and visitors on all cores: what the visitors do counts, too",
    )  # fmt: skip
    options.add_argument("--watch", metavar="URL?job=JOB", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.watch:
        url, _, job = args.watch.partition("?job=")
        asyncio.run(watch(url, job, args.visitors, args.every))
        return
    cores = sorted(os.sched_getaffinity(0))
    shape = Shape(
        hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=4096,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    try:
        with LoopbackHub(folder / "hub") as hub:
            copy_with_larger_models(folder / "app", shape)
            quiet = {"RESMERGE_SPACE_PROMPTS": "0"}  # the merge alone, no questions after it
            space = Space(hub, folder / "space", quiet, in_space=False, root=folder / "app")
            os.sched_setaffinity(0, cores if args.together else cores[:1])  # inherited by both
            space.start()
            os.sched_setaffinity(0, cores if args.together else cores[-1:])
            try:
                measure(space, args)
            finally:
                space.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(space: Space, args: argparse.Namespace) -> None:
    """Merge in turn alone and watched, and print both."""
    assert space.jobs.process is not None
    server = psutil.Process(space.process.pid)
    alone: list[tuple[float, float]] = []
    watched: list[tuple[float, float]] = []
    command = [sys.executable, "-m", "benchmarks.space", "--visitors", str(args.visitors)]
    where = "visitors with them" if args.together else "server and merge on one core"
    print(f"{machine()}; {where}\n")
    print("| merge | seconds | CPU s | of it the server | polls | failed | 95 % answered within |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for number in range(args.times + 1):
        for name, times in (("alone", alone), ("watched", watched)):
            # Another merge goes first, until all visitors have opened their pages.
            first, _ = queue_merge(space)
            job, record = queue_merge(space)
            crowd = None
            if name == "watched":
                crowd = subprocess.Popen(
                    [*command, "--every", str(args.every), f"--watch={space.url}?job={job}"],
                    stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                assert crowd.stdout is not None
                crowd.stdout.readline()
            if read(record)["state"] != "queued":
                if crowd is not None:
                    crowd.terminate()
                raise SystemExit("the visitors came too late: use more --layers")
            ask(space, "/cancel", job=first)
            wait_for(
                lambda r=record: read(r)["state"] != "queued",
                "the merge to start",
                patience_s=300.0,
            )
            before = server.cpu_times()
            seconds = seconds_of(record)
            after = server.cpu_times()
            own = sum(after[:2]) - sum(before[:2])
            cpu = own + sum(after[2:4]) - sum(before[2:4])  # of its children that ended: the merge
            said = {"polls": 0, "failed": 0, "p95_ms": 0}
            if crowd is not None:
                crowd.terminate()
                said = json.loads(crowd.communicate()[0].splitlines()[-1])
            if number:  # the first round warms up
                times.append((seconds, cpu))
            print(
                f"| {name}{'' if number else ', warm-up'} | {seconds:.1f} | {cpu:.1f} | {own:.1f} "
                f"| {said['polls']} | {said['failed']} | {said['p95_ms']} ms |",
                flush=True,
            )
    print(f"\nmedians; {args.visitors} visitors, every {args.every:g} s; target: below +15 %")
    for what, (a, b) in {
        "seconds": [statistics.median(t[0] for t in times) for times in (alone, watched)],
        "CPU seconds": [statistics.median(t[1] for t in times) for times in (alone, watched)],
    }.items():
        print(f"{what}: alone {a:.2f}, watched {b:.2f}: {b / a - 1:+.1%}")


if __name__ == "__main__":
    main()
