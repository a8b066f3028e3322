"""Hub to Hub, on a loopback Hub (S5, M4, M5, R1, R2): ``python -m benchmarks.hub NAME``.

s5  wall time of a throttled merge beside download alone, upload alone and merge alone
line  wall time beside what the slower of the two lines needs for the bytes alone
m4  the largest disk use of shards while a merge runs, with two shards and with ``--max-disk 0``
m5  planning of models that exist as headers only: 405B dense, 671B mixture of experts
r1  SIGKILL at random moments, then the same command until it is done
r2  every fault of the loopback Hub: alone at every kind of request, and at random 5 %
checks  time of a merge from the Hub into a folder, with its source check and without, in turn

Each prints a table. --layers and --hidden make the group larger, --dir says where it is kept.
"""

import argparse
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.synthetic import Shape, tensor_shapes
from loopback_hub import FAULTS, LoopbackHub, Sparse
from resmerge_stream.sinks.layout import index_json, plan_shards
from resmerge_stream.specs import TensorSpec
from tests.support.hub_runs import MODELS, Bench, Run, make_bench, weight_files

from .measure import run, scratch_folder

_RATE, _LATENCY_S = 40e6, 0.05
# MB/s down and up; None for no limit.
_LINES = ((20, 20), (40, 40), (80, 20), (40, 10), (None, None))


@contextmanager
def bench(args: argparse.Namespace, *, xet: bool = False) -> Iterator[Bench]:
    """A fresh Hub with a group on it."""
    folder = args.dir / args.name
    shutil.rmtree(folder, ignore_errors=True)
    shape = Shape(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        vocab_size=8 * args.hidden,
    )
    with LoopbackHub(folder / "hub") as hub:
        made = make_bench(folder, hub, xet=xet, shape=shape, max_shard_bytes=args.shard * 1_000_000)
        try:
            yield made
        finally:
            made.close()


def timed(action: Callable[[], Run]) -> tuple[float, Run]:
    """Run a command and return its wall time."""
    started = time.perf_counter()
    done = action()
    return time.perf_counter() - started, done


def s5(args: argparse.Namespace) -> None:
    """Print the wall time of a throttled Hub-to-Hub merge beside its three parts."""
    with bench(args) as made:
        code = "import sys, huggingface_hub as h; [h.snapshot_download(m) for m in sys.argv[1:]]"
        push = (
            "import sys, huggingface_hub as h; h.create_repo(sys.argv[1], private=True);"
            "h.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
        )
        out = made.folder / "alone"
        alone, _ = timed(lambda: made.fresh(["merge", *made.folders(), "--out", str(out)]))
        limits = made.hub.limits
        limits.down = limits.up = args.rate * 1e6
        limits.latency = _LATENCY_S
        models = [f"alice/{name}" for name in MODELS]
        started = time.perf_counter()
        env = made.env(home="downloads")
        subprocess.run([sys.executable, "-c", code, *models], env=env, check=True)
        down = time.perf_counter() - started
        started = time.perf_counter()
        # Other bytes than the merge's, which the Hub would know already.
        base = str(made.group / "base")
        for path in (made.group / "base").glob("*.safetensors"):
            made.hub._services.objects.path(_sha256(path)).unlink(missing_ok=True)
        subprocess.run([sys.executable, "-c", push, "alice/up", base], env=env, check=True)
        up = time.perf_counter() - started
        both, done = timed(
            lambda: made.fresh(["merge", *made.sources(), "--push-to", "alice/merged"], home="new")
        )
        if done.code:
            raise RuntimeError(done.err)
    bound = 1.25 * max(down, up, alone) + 5
    table(
        ("download alone", "upload alone", "merge alone", "Hub to Hub", "bound"),
        [(f"{down:.1f} s", f"{up:.1f} s", f"{alone:.1f} s", f"{both:.1f} s", f"{bound:.1f} s")],
    )


def line(args: argparse.Namespace) -> None:
    """Print how far merges over lines of several speeds are from the slower line's own time."""
    rows = []
    with bench(args) as made:
        made.expected()  # what is compiled at first use is there
        for down, up in _LINES:
            limits = made.hub.limits
            limits.down, limits.up = (rate and rate * 1e6 for rate in (down, up))
            limits.latency = _LATENCY_S
            made.forget_uploads()
            made.hub.log.clear()
            target = f"alice/line-{down}-{up}"
            words = ["merge", *made.sources(), "--push-to", target]
            wall, done = timed(lambda words=words: made.fresh(words))  # type: ignore[misc]
            if done.code:
                raise RuntimeError(done.err)
            sent = [entry.sent for entry in made.hub.log.find(method="GET", port="cdn")]
            received = [entry.received for entry in made.hub.log.find(method="PUT", port="cdn")]
            seconds = [
                sum(nbytes) / (rate * 1e6) if rate else 0.0
                for nbytes, rate in ((sent, down), (received, up))
            ]
            bound = 1.1 * max(seconds) + 4
            rows.append(
                (
                    f"{down} / {up} MB/s" if down else "unthrottled",
                    f"{sum(sent) / 1e6:.0f} MB, {seconds[0]:.1f} s",
                    f"{sum(received) / 1e6:.0f} MB in {len(received)}, {seconds[1]:.1f} s",
                    f"{wall:.1f} s",
                    f"{bound:.1f} s",
                    "met" if wall <= bound else "MISSED",
                )
            )
    table(("down / up", "download", "upload", "wall", "bound", ""), rows)


def m4(args: argparse.Namespace) -> None:
    """Print the largest use of the work folder, sampled every 2 ms, and the largest shard."""
    rows = []
    for name, options, xet in (("two shards", [], False), ("no file", ["--max-disk", "0"], True)):
        with bench(args, xet=xet) as made:
            largest = max(path.stat().st_size for path in (made.group / "base").glob("*.safe*"))
            work = made.folder / "work"
            with watched(work) as peak:
                command = ["merge", *made.sources(), "--push-to", "alice/merged"]
                done = made.fresh([*command, "--work-dir", str(work), *options])
            if done.code:
                raise RuntimeError(done.err)
            rows.append((name, f"{peak[0] / 1e6:.2f} MB", f"{largest / 1e6:.2f} MB"))
    table(("allowed", "most on disk", "largest shard"), rows)


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Sample the bytes of weight files below a folder; the list holds the largest sum."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            total = 0
            for path in weight_files(folder):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def giants() -> dict[str, dict[str, tuple[int, ...]]]:
    """Return names and shapes of the models of which only headers exist."""
    llama = Shape(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        tied=False,
    )
    smaller = replace(
        llama,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
    )
    return {
        "70B dense": dict(tensor_shapes(smaller)),
        "405B dense": dict(tensor_shapes(llama)),
        "671B experts": dict(_mixture()),
        "1T experts": dict(_mixture(experts=384, dense_layers=1, vocab=163840)),
    }


@contextmanager
def header_hub(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[Bench]:
    """A Hub with a base and two experts of which only headers exist."""
    shutil.rmtree(folder, ignore_errors=True)
    with LoopbackHub(folder / "hub") as hub:
        specs = [TensorSpec(tensor, "BF16", shape) for tensor, shape in shapes.items()]
        made = Bench(hub, folder, hub.add_user("alice"))
        for number, model in enumerate(("base", "expert0", "expert1")):
            hub.add_repo(f"alice/{model}", _header_files(specs, padding=8 * number))
        yield made


def m5(args: argparse.Namespace) -> None:
    """Print time and memory of planning models of which only headers exist."""
    rows = []
    for name in ("405B dense", "671B experts"):
        shapes = giants()[name]
        with header_hub(args.dir / args.name, shapes) as made:
            command = ["plan", "--base", "alice/base", "--expert", "alice/expert0"]
            command += ["--expert", "alice/expert1", "--push-to", "alice/merged", "--json"]
            command += ["--memory-budget", "12.8GB"]
            done = run(
                [sys.executable, "-m", "resmerge_stream", *command], env=made.env(), check=False
            )
            plan = Run(done.code, done.output, "").last
        rows.append(
            (
                name,
                f"{len(shapes)}",
                f"{done.seconds:.1f} s",
                f"{done.peak_private / 1e6:.0f} MB",
                "refused" if plan.get("refused", True) else "accepted",
                f"{plan.get('peak_memory_bytes', 0) / 1e9:.1f} GB",
                f"{plan.get('peak_disk_bytes', 0) / 1e9:.1f} GB",
            )
        )
    table(("model", "tensors", "planning", "memory", "verdict", "needs memory", "needs disk"), rows)


def _header_files(specs: list[TensorSpec], padding: int) -> dict[str, bytes | Sparse]:
    """Return the files of a model; others with another padding, of spaces behind the header."""
    shards = plan_shards([specs], 5_000_000_000)
    files: dict[str, bytes | Sparse] = {}
    for shard in shards:
        length = len(shard.header) - 8 + padding
        head = length.to_bytes(8, "little") + shard.header[8:] + b" " * padding
        files[shard.name] = Sparse(head=head, size=shard.nbytes + padding)
    files["model.safetensors.index.json"] = index_json(shards)
    files["config.json"] = b'{"model_type": "made_up", "tie_word_embeddings": false}'
    return files


def _mixture(
    experts: int = 256, dense_layers: int = 3, vocab: int = 129280
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes like those of a mixture of experts: with 256 a layer, of 671B."""
    hidden, middle, narrow = 7168, 18432, 2048
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(61):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_a_proj.weight", (1536, hidden)
        yield f"{prefix}.self_attn.q_b_proj.weight", (24576, 1536)
        yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (576, hidden)
        yield f"{prefix}.self_attn.kv_b_proj.weight", (32768, 512)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, 16384)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        is_dense = layer < dense_layers
        routed = [*(f"experts.{n}." for n in range(experts)), "shared_experts."]
        for expert in [""] if is_dense else routed:
            width = middle if is_dense else narrow
            yield f"{prefix}.mlp.{expert}gate_proj.weight", (width, hidden)
            yield f"{prefix}.mlp.{expert}up_proj.weight", (width, hidden)
            yield f"{prefix}.mlp.{expert}down_proj.weight", (hidden, width)
        if not is_dense:
            yield f"{prefix}.mlp.gate.weight", (experts, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def r1(args: argparse.Namespace) -> None:
    """Kill a merge at random moments, finish it, and compare; print what was done twice."""
    rows = []
    draw = random.Random(args.seed)
    with bench(args) as made:
        expected = made.expected()
        typical, _ = timed(
            lambda: made.fresh(["merge", *made.sources(), "--push-to", "alice/first"])
        )
        for number in range(args.times):
            target = f"alice/killed{number}"
            for name, data in expected.items():
                if name.endswith(".safetensors"):
                    made.hub._services.objects.path(_sha256(data)).unlink(missing_ok=True)
            made.hub.log.clear()
            command = ["merge", *made.sources(), "--push-to", target, "--public", "--json"]
            moment = draw.uniform(0.3, typical)
            process = made.start(command)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            partial = made.hub.has_repo(target) and bool(
                set(made.hub.files(target)) - {".gitattributes"}
                and set(expected) - set(made.hub.files(target))
            )
            done = made.fresh(command)
            sent = len(made.hub.log.find(method="PUT", path="/upload/", status=200))
            again = sent - sum(name.endswith(".safetensors") for name in expected)
            same = done.code == 0 and made.published(target) == expected
            rows.append(
                (
                    f"{moment:.2f} s",
                    f"{done.code}",
                    "equal" if same else "DIFFERENT",
                    "PARTIAL" if partial else "all or nothing",
                    f"{max(again, 0)}",
                )
            )
    table(("killed after", "rerun's exit", "bytes", "main", "shards sent again"), rows)


def r2(args: argparse.Namespace) -> None:
    """Let every fault strike alone and at random; print how the merges ended."""
    places = [("GET", "/file/"), ("GET", "/api/"), ("POST", "/commit/"), ("POST", "/batch"),
              ("PUT", "/upload/"), ("POST", "/commit/main"), ("DELETE", "/branch/")]  # fmt: skip
    rows = []
    with bench(args) as made:
        expected = made.expected()
        for fault in FAULTS:
            for number, (method, path) in enumerate([*places, ("5 %", ".")]):
                chance = 0.05 if method == "5 %" else 1.0
                made.hub.faults.add(
                    fault,
                    method=None if method == "5 %" else method,
                    path=path,
                    times=None if method == "5 %" else 2,
                    chance=chance,
                )
                target = f"alice/{fault}-{number}"
                for name, data in expected.items():
                    if name.endswith(".safetensors"):
                        made.hub._services.objects.path(_sha256(data)).unlink(missing_ok=True)
                first = made.merge("--push-to", target)
                made.hub.faults.clear()
                last = first
                if first.code in (2, 3):  # 2: the token was not accepted before anything began
                    last = made.merge("--push-to", target)
                same = last.code == 0 and made.published(target) == expected
                verdict = "equal" if same else "DIFFERENT"
                rows.append((fault, f"{method} {path}", f"{first.code}", f"{last.code}", verdict))
    table(("fault", "where", "exit", "after a rerun", "bytes"), rows)


def checks(args: argparse.Namespace) -> None:
    """Print what comparing every source with the Hub's hash costs: medians of runs in turn."""
    wall: dict[str, list[float]] = {"checked": [], "--no-check-sources": []}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    with bench(args) as made:
        for number in range(args.times):
            for name in wall:
                out, before = made.folder / f"out{number}", _cpu_of_children()
                words = ["merge", *made.sources(), "--out", str(out), "--json"]
                words += [] if name == "checked" else [name]
                seconds, done = timed(lambda words=words: made.fresh(words))  # type: ignore[misc]
                if done.code:
                    raise RuntimeError(done.err)
                wall[name].append(seconds)
                cpu[name].append(_cpu_of_children() - before)
                shutil.rmtree(out)
    rows = []
    for what, taken in (("wall", wall), ("CPU", cpu)):
        checked, free = (statistics.median(seconds) for seconds in taken.values())
        cost = f"{100 * (checked / free - 1):+.1f} %"
        rows.append((what, f"{checked:.2f} s", f"{free:.2f} s", cost))
    table(("time", *wall, "cost"), rows)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _sha256(data: bytes | Path) -> str:
    import hashlib

    return hashlib.sha256(data if isinstance(data, bytes) else data.read_bytes()).hexdigest()


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


_MEASURES = {"s5": s5, "line": line, "m4": m4, "m5": m5, "r1": r1, "r2": r2, "checks": checks}


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=tuple(_MEASURES))
    parser.add_argument("--dir", type=Path, default=scratch_folder("hub"))
    parser.add_argument("--hidden", type=int, default=64, help="width of the model (64)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (4)")
    parser.add_argument("--shard", type=float, default=0.2, help="megabytes of a shard (0.2)")
    parser.add_argument("--rate", type=float, default=_RATE / 1e6, help="s5: MB/s each way (40)")
    parser.add_argument("--times", type=int, default=25, help="r1: how many kills; checks: runs")
    parser.add_argument("--seed", type=int, default=0, help="r1: of the moments (0)")
    args = parser.parse_args()
    _MEASURES[args.name](args)


if __name__ == "__main__":
    main()
