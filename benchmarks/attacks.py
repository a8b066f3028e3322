"""An innocent visitor beside strangers who take all they can: ``python -m benchmarks.attacks``.

A Space and a loopback Hub run on this machine. While each attack goes on, a visitor plans the
built-in example again and again; the table has the slowest answer, and the most memory that the
server, and all its processes together, had meanwhile. Strangers and visitor are processes of their
own: in one, the strangers' threads would keep the visitor waiting for Python's lock, not the Space.
Takes at most four minutes.
"""

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.measure import machine
from tests.support.space_runs import Town, running_town

BUILT_IN = {"base_model": "built-in/base", "models": ["built-in/rl-add", "built-in/rl-sort"]}
CONFIG = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
SECONDS = 20.0
TARGET_S, TARGET_BYTES = 3.0, 700_000_000


def call(http: httpx.Client, endpoint: str, **body: Any) -> str:
    """Call an endpoint and return what it answers."""
    event = http.post(f"/gradio_api/call/v2/{endpoint}", json=body).json()["event_id"]
    return http.get(f"/gradio_api/call/{endpoint}/{event}").text


def header(tensors: int) -> bytes:
    """A checkpoint that has so many tensors, of no bytes each."""
    entries = {
        f"model.layers.{n // 9}.part{n % 9}.w": {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
        for n in range(tensors)
    }
    data = json.dumps(entries, separators=(",", ":")).encode()
    return len(data).to_bytes(8, "little") + data


Attack = Callable[[httpx.Client, int], object]


def attacks() -> dict[str, Attack]:
    """What a stranger does again and again, by name; the number tells the calls apart."""
    many = {"base_model": "alice/many", "models": ["alice/many2"]}
    huge = {"base_model": "alice/huge", "models": ["alice/huge2"]}
    address = lambda n: {"x-forwarded-for": f"8.8.{n % 4}.{n % 250}"}  # noqa: E731
    text = b'{"recipe": "' + b"x" * 100_000_000 + b'"}'

    def start(http: httpx.Client, number: int) -> None:
        http.headers.update(address(number))
        call(http, "merge", recipe=BUILT_IN)

    return {
        "nothing": lambda http, n: time.sleep(0.1),
        "malformed tokens": lambda http, n: call(http, "plan", recipe=BUILT_IN, oauth_token="x\n"),
        "wrong tokens": lambda http, n: call(http, "jobs", oauth_token=f"hf_wrong{n}"),
        "plans of one address": lambda http, n: call(http, "plan", recipe=BUILT_IN),
        "plans of 200,000 tensors": lambda http, n: call(http, "plan", recipe=many),
        "plans of 600,000 tensors": lambda http, n: call(http, "plan", recipe=huge),
        "merges of many addresses": start,
        "uploads": lambda http, n: http.post("/gradio_api/upload", files={"files": b"x" * 1000}),
        "100 MB of JSON": lambda http, n: http.post("/gradio_api/call/v2/plan", content=text),
        "500 pages": lambda http, n: http.get("/"),
    }


def strike(url: str, name: str, at_once: int, stop: Any, calls: Any) -> None:
    """Attack from this process, by so many threads, until told to stop; count the calls."""
    attack = attacks()[name]

    def go_on(number: int) -> None:
        with httpx.Client(
            base_url=url, timeout=120, headers={"x-forwarded-for": "8.8.8.8"}
        ) as http:
            while not stop.is_set():
                with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                    attack(http, number + at_once * calls.value)
                with calls.get_lock():
                    calls.value += 1

    with ThreadPoolExecutor(at_once) as pool:
        for number in range(at_once):
            pool.submit(go_on, number)


def worst(town: Town, name: str, at_once: int, lasts: float) -> tuple[int, float, int, int]:
    """Attack for some seconds; return calls, the slowest innocent plan, and the most memory."""
    server = psutil.Process(town.space.process.pid if town.space.process else 0)
    spawned = multiprocessing.get_context("spawn")
    stop, calls, most = spawned.Event(), spawned.Value("q", 0), [0, 0]
    strangers = spawned.Process(target=strike, args=(town.space.url, name, at_once, stop, calls))

    def watch() -> None:
        while not stop.wait(0.1):
            with contextlib.suppress(psutil.NoSuchProcess):
                own = server.memory_info().rss
                all_of = own + sum(p.memory_info().rss for p in server.children(recursive=True))
                most[:] = [max(most[0], own), max(most[1], all_of)]

    strangers.start()
    threading.Thread(target=watch).start()
    try:
        while not calls.value:  # until the first has come through
            time.sleep(0.1)
        slowest = _slowest_plan(town.space.url, lasts)
    finally:
        stop.set()
        strangers.join()
    return calls.value, slowest, most[0], most[1]


def _slowest_plan(url: str, lasts: float) -> float:
    slowest, end = 0.0, time.monotonic() + lasts
    with httpx.Client(
        base_url=url, timeout=300, headers={"x-forwarded-for": "1.1.1.1"}
    ) as innocent:
        while time.monotonic() < end:
            began = time.monotonic()
            answer = call(innocent, "plan", recipe=BUILT_IN)
            slowest = max(slowest, time.monotonic() - began)
            if '"refused": false' not in answer:
                raise SystemExit(f"the innocent visitor got no plan: {answer[:500]}")
            time.sleep(0.5)
    return slowest


def main() -> None:
    """Attack in every way, and print a table."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    options.add_argument("--at-once", type=int, default=40)
    options.add_argument("--seconds", type=float, default=SECONDS, help="of each attack")
    options.add_argument("names", nargs="*", metavar="NAME")
    args = options.parse_args()
    print(f"{machine()}; {args.at_once} strangers at once, {args.seconds:.0f} s each\n")
    print("| attack | calls | slowest innocent plan | server | all its processes |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder, running_town(Path(folder)) as town:
        for name, count in (("many", 200_000), ("huge", 600_000)):
            weights = header(count)
            for repo in (name, f"{name}2"):
                files = {"config.json": CONFIG, "model.safetensors": weights}
                town.hub.add_repo(f"alice/{repo}", files)
        for name in attacks():
            if args.names and name not in args.names:
                continue
            calls, seconds, own, all_of = worst(town, name, args.at_once, args.seconds)
            print(
                f"| {name} | {calls} | {seconds:.1f} s | {own / 1e6:.0f} MB "
                f"| {all_of / 1e6:.0f} MB |",
                flush=True,
            )
    print(f"\ntarget: below {TARGET_S:.0f} s, the server below {TARGET_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
