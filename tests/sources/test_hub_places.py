"""Where in a repository a model lies: folders, revisions, pull requests, pages of the Hub."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from torch import Tensor

from resmerge_stream.recipe import DEFAULT_METHOD
from tests.sources.test_fused import fused_mixture, split_mixture, written_both_ways
from tests.support.checkpoints import merge, read_tensors
from tests.support.hub_runs import MODELS, Bench, running_bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub where one repository holds the experts as snapshots of one run."""
    with running_bench(tmp_path_factory.mktemp("places")) as bench:
        run = bench.folder / "run"
        for number, name in enumerate(MODELS[1:]):
            shutil.copytree(bench.group / name, run / f"step-{number}00")
        bench.hub.add_repo("alice/run", run)
        api = HfApi(endpoint=bench.hub.endpoint, token=bench.token)
        for number, name in enumerate(MODELS[1:]):
            api.create_branch("alice/base", branch=f"step-{number}00")
            bench.hub.push("alice/base", bench.group / name, branch=f"step-{number}00")
        yield bench


def merged(bench: Bench, out: Path, *experts: str) -> dict[str, bytes]:
    """Merge the base and some experts into a folder; return what the group's merge has too."""
    chosen = [word for expert in experts for word in ("--expert", expert)]
    done = bench.run("merge", "--base", "alice/base", *chosen, "--json", "--out", str(out))
    assert done.code == 0, done.err
    return {name: (out / name).read_bytes() for name in bench.expected()}


def test_a_model_in_a_folder_of_a_repository_is_read_there(bench: Bench, tmp_path: Path) -> None:
    """Experts in folders of one repository, at a revision or not, merge as they would alone."""
    names = [f"step-{number}00" for number in range(len(MODELS) - 1)]
    experts = [f"alice/run@main:{names[0]}", *(f"alice/run:{name}" for name in names[1:])]

    assert merged(bench, tmp_path / "out", *experts) == bench.expected()
    report = json.loads((tmp_path / "out" / "resmerge" / "report.json").read_text())
    assert [source["subfolder"] for source in report["sources"]] == [None, *names]
    recipe = (tmp_path / "out" / "resmerge" / "recipe.yml").read_text()
    assert all(f":{name}" in recipe for name in names)


def test_snapshots_of_one_run_are_experts(bench: Bench, tmp_path: Path) -> None:
    """Branches of one repository are as many experts."""
    experts = [f"alice/base@step-{number}00" for number in range(len(MODELS) - 1)]

    assert merged(bench, tmp_path / "out", *experts) == bench.expected()


@pytest.mark.parametrize("pattern", ["alice/base@step-*", "alice/run:step-*"])
def test_a_pattern_is_the_snapshots_that_fit(bench: Bench, tmp_path: Path, pattern: str) -> None:
    """Branches or folders of a repository: each that fits is an expert, in the order of steps."""
    assert merged(bench, tmp_path / "out", pattern) == bench.expected()
    recipe = (tmp_path / "out" / "resmerge" / "recipe.yml").read_text()
    assert "*" not in recipe


def test_a_page_of_the_hub_names_its_model(bench: Bench, tmp_path: Path) -> None:
    """What a browser shows in its address is understood."""
    numbers = range(len(MODELS) - 1)
    experts = [f"https://huggingface.co/alice/run/tree/main/step-{n}00" for n in numbers]

    assert merged(bench, tmp_path / "out", *experts) == bench.expected()


def test_folders_with_models_are_named_where_the_top_has_none(bench: Bench) -> None:
    """Who gives a repository of snapshots is told how to write one of them."""
    done = bench.run("plan", "--base", "alice/base", "--expert", "alice/run@main")

    assert done.code == 2
    assert re.search(r"such as alice/run@main:step-\d+", done.out)


def test_pickles_are_refused_with_the_pull_request_that_converted_them(bench: Bench) -> None:
    """Where somebody offers the weights as safetensors, the message says how to read them."""
    config = (bench.group / MODELS[1] / "config.json").read_bytes()
    weights = {path.name: path for path in (bench.group / MODELS[1]).glob("*.safetensors*")}
    bench.hub.add_repo("alice/old", {"config.json": config, "pytorch_model.bin": b"PK"})
    api = HfApi(endpoint=bench.hub.endpoint, token=bench.token)

    before = bench.run("plan", "--base", "alice/base", "--expert", "alice/old")
    api.create_commit(
        "alice/old",
        [CommitOperationAdd(name, str(path)) for name, path in weights.items()],
        commit_message="Adding `safetensors` variant of this model",
        create_pr=True,
    )
    after = bench.run("plan", "--base", "alice/base", "--expert", "alice/old")
    read = bench.run("plan", "--base", "alice/base", "--expert", "alice/old@refs/pr/1")

    assert before.code == after.code == 2
    assert "save_pretrained" in before.out
    assert "alice/old@refs/pr/1" in after.out
    assert read.code == 0, read.err


def test_fused_matrices_come_out_as_at_home(bench: Bench, tmp_path: Path) -> None:
    """Gate and up of a stack's matrices, read from the Hub together, are merged as in a folder."""

    def turned(tensors: dict[str, Tensor]) -> None:
        fused_mixture(tensors, turned=True)

    _, group = written_both_ways(tmp_path, split_mixture, turned, model_type="llama4")
    for folder in group.folders:
        bench.hub.add_repo(f"alice/fused-{folder.name}", folder)
    names = [f"alice/fused-{folder.name}" for folder in group.folders]
    here = merge(group, tmp_path / "here", method=DEFAULT_METHOD)

    experts = [word for name in names[1:] for word in ("--expert", name)]
    out = tmp_path / "there"
    done = bench.run("merge", "--base", names[0], *experts, "--out", str(out), "--json")

    assert done.code == 0, done.err
    there = read_tensors(out)
    assert all(torch.equal(there[name], tensor) for name, tensor in here.tensors.items())
