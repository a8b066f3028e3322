"""Adapters Hub to Hub, as experts and as the result: killed, resumed, by two processes."""

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loopback_hub import Hook, LoopbackHub
from tests.run.test_launchers import ACCELERATE, launch
from tests.support.hub_runs import Bench, Run, make_bench

ADAPTERS = ("lora0", "lora1")
KINDS = {
    "to a model": ("--method", "resmerge"),
    "to an adapter": ("--as", "adapter"),
    "to an adapter of a rank": ("--expert", "alice/expert0", "--as", "adapter"),
}
KINDS["to an adapter of a rank"] += ("--adapter-rank", "3")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub with a base, whole experts and two private adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    with LoopbackHub(folder / "hub") as hub:
        bench = make_bench(folder, hub, max_shard_bytes=100_000)
        for number, name in enumerate(ADAPTERS):
            write_adapter(bench.group / name, bench.group / "base", seed=number)
            hub.add_repo(f"alice/{name}", bench.group / name, private=True)
        yield bench
        bench.close()


def write_adapter(folder: Path, base: Path, *, seed: int, rank: int = 4) -> None:
    """Write an adapter of every linear layer of a base."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
        for name, shape in shapes.items():
            if "proj" in name and len(shape) == 2:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                    values = 0.02 * torch.randn(size, generator=generator)
                    tensors[f"{module}.lora_{side}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": "all-linear", "base_model_name_or_path": "alice/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def words(kind: str, where: str = "alice/") -> list[str]:
    """Return the options that name the models and the kind of result."""
    named = [
        "--base",
        "alice/base",
        *(w for name in ADAPTERS for w in ("--expert", f"alice/{name}")),
    ]
    return [word.replace("alice/", where) for word in (*named, *KINDS[kind])]


def expected(bench: Bench, kind: str) -> dict[str, bytes]:
    """Return the weights that the same folders merge to in a folder."""
    out = bench.folder / kind.replace(" ", "-")
    if not out.exists():
        done = bench.run("merge", *words(kind, f"{bench.group}/"), "--out", str(out), "--json")
        assert done.code == 0, done.err
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def published(bench: Bench, repo_id: str) -> dict[str, bytes]:
    """Return the weights on a repository's main."""
    names = [name for name in bench.hub.files(repo_id) if name.endswith(".safetensors")]
    return {name: bench.hub.read(repo_id, name) for name in names}


def forget(bench: Bench, weights: dict[str, bytes]) -> None:
    """Remove merged files from the Hub's storage, so that they have to be sent again."""
    for data in weights.values():
        path = bench.hub._services.objects.path(hashlib.sha256(data).hexdigest())
        path.unlink(missing_ok=True)


def killed(bench: Bench, arguments: list[str], method: str, path: str, **when: object) -> None:
    """Run a command that is killed at a request."""
    process = bench.start(arguments)
    rule = bench.hub.faults.add(
        Hook(call=lambda: process.send_signal(signal.SIGKILL)),
        method=method,
        path=path,
        times=1,
        **when,  # type: ignore[arg-type]
    )
    process.communicate(timeout=300)
    bench.hub.faults.clear()
    assert (rule.hits, process.returncode) == (1, -signal.SIGKILL)


def finished(bench: Bench, *arguments: str) -> Run:
    """Run a command until it is done; every stop on the way can be continued."""
    for _ in range(8):
        done = bench.run(*arguments)
        if done.code == 0:
            return done
        assert done.code == 3, done.err
    raise AssertionError(done.err)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_merge_of_adapters_is_finished_by_the_same_command(
    bench: Bench, kind: str
) -> None:
    """Killed when the first shard was staged, Hub to Hub: a rerun gives a folder's bytes."""
    weights = expected(bench, kind)
    forget(bench, weights)
    repo_id = f"alice/out-{list(KINDS).index(kind)}"
    arguments = ["merge", *words(kind), "--push-to", repo_id, "--json"]
    killed(bench, arguments, "POST", "/commit/resmerge", after=True, skip=1)

    done = finished(bench, *arguments)

    assert published(bench, repo_id) == weights
    assert bench.history(repo_id) == ["Merge with ResMerge Stream", "initial commit"]
    assert list(bench.hub.repo(repo_id).refs()) == ["refs/heads/main"]
    assert any(event.get("resumed") for event in done.events)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["to a model", "to an adapter"])
def test_two_processes_merge_adapters_to_the_same_bytes(bench: Bench, kind: str) -> None:
    """`accelerate launch` with two processes, Hub to Hub; an adapter's one file has one maker."""
    weights = expected(bench, kind)
    forget(bench, weights)
    repo_id = f"alice/two-{list(KINDS).index(kind)}"

    done = launch(bench, ACCELERATE, 2, *words(kind), "--push-to", repo_id)

    assert done.code == 0, done.err
    assert published(bench, repo_id) == weights
    assert bench.history(repo_id) == ["Merge with ResMerge Stream", "initial commit"]


def test_an_adapter_reads_no_weight_of_the_base_from_the_hub(bench: Bench) -> None:
    """Each of the base's files is asked for once, for its header; a whole model asks again."""
    files = sorted((bench.group / "base").glob("*.safetensors"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    asked = {}
    for kind in ("to an adapter", "to a model"):
        forget(bench, expected(bench, kind))
        bench.hub.log.clear()
        done = bench.run("merge", *words(kind), "--push-to", f"alice/asked-{len(asked)}")
        assert done.code == 0, done.err
        asked[kind] = [len(bench.hub.log.find(method="GET", path=sha256)) for sha256 in hashes]

    assert set(asked["to an adapter"]) == {1}
    assert all(count > 1 for count in asked["to a model"])


def test_an_expert_is_extracted_hub_to_hub(bench: Bench) -> None:
    """Killed before the last commit and continued, `extract` gives the bytes of folders."""
    options = ["--base", f"{bench.group}/base", "--rank", "5", "--json"]
    out = bench.folder / "extracted"
    assert bench.run("extract", f"{bench.group}/expert1", *options, "--out", str(out)).code == 0
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    forget(bench, weights)
    arguments = ["extract", "alice/expert1", "--base", "alice/base", "--rank", "5", "--json"]
    arguments += ["--push-to", "alice/extracted"]
    killed(bench, arguments, "POST", "/commit/main")

    finished(bench, *arguments)

    assert list(weights) == ["adapter_model.safetensors"]
    assert published(bench, "alice/extracted") == weights
    config = json.loads(bench.hub.read("alice/extracted", "adapter_config.json"))
    assert config["base_model_name_or_path"] == "alice/base"
