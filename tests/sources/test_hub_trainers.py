"""What trainers and llama.cpp leave, read on the Hub: to the bytes of the local folder."""

import random
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loopback_hub import Cut, Hook, LoopbackHub
from resmerge_stream.sources.blocks import BLOCK_BYTES, Blocks
from tests.sources.test_ggml import Type, as_folder, write
from tests.sources.test_ggml import values as values_of_gguf
from tests.support.checkpoints import file_bytes, make_group, read_tensors
from tests.support.hub_runs import Bench
from tests.support.trainers import save_by_ranks, saved_by_deepspeed

# Folders of the expert, as trainers leave it.
LEFT = ("dcp-rows", "dcp-columns", "dcp-both", "verl-rows", "verl-copies", "universal", "states",
        "bin")  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub with a base, and with the expert in a repository for each kind of folder."""
    folder = tmp_path_factory.mktemp("left")
    group = make_group(folder / "group", experts=1, vocab=20_011, layers=1)
    save_by_ranks(group.experts[0] / "model.safetensors", folder)
    for kind in ("universal", "states", "bin"):
        saved_by_deepspeed(read_tensors(group.experts[0]), folder / kind, kind)
    with LoopbackHub(folder / "hub") as hub:
        made = Bench(hub, folder, hub.add_user("alice"))
        hub.add_repo("alice/base", group.base)
        for kind in LEFT:
            hub.add_repo(f"alice/{kind}", files_of(folder / kind), private=True)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(autouse=True)
def calm(bench: Bench) -> Iterator[None]:
    """The Hub behaves, and has heard nothing yet."""
    bench.hub.log.clear()
    yield
    bench.hub.faults.clear()


def files_of(folder: Path, top: str = "") -> Mapping[str, Path]:
    """Return the files of a folder with those that are hidden, such as torch's metadata."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {top + path.relative_to(folder).as_posix(): path for path in paths}


def words(expert: object, base: object = "alice/base") -> list[str]:
    """Return the options of a merge of one expert."""
    return ["--base", str(base), "--expert", str(expert), "--method", "task_arithmetic", "--json"]


def merged(bench: Bench, out: Path, *arguments: str) -> dict[str, bytes]:
    """Merge into a folder and return weights and config."""
    done = bench.run("merge", *arguments, "--out", str(out))
    assert done.code == 0, done.err
    return file_bytes(out)


@pytest.mark.parametrize("kind", LEFT)
def test_a_trainers_folder_on_the_hub_gives_the_bytes_of_the_folder(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    """Whatever the format and the cut; and the merge says what was read."""
    there = merged(bench, tmp_path / "there", *words(f"alice/{kind}"))

    here = merged(bench, tmp_path / "here", *words(bench.folder / kind, bench.group / "base"))
    assert there == here
    assert "read as it is" in (tmp_path / "there/resmerge/report.json").read_text()


@pytest.mark.parametrize("kind", ["dcp-rows", "verl-rows"])
def test_a_plan_reads_what_says_where_the_tensors_lie(bench: Bench, kind: str) -> None:
    """Of files of megabytes some blocks are asked for, at one commit."""
    done = bench.run("plan", *words(f"alice/{kind}"))

    assert done.code == 0, done.err
    files = bench.hub.files(f"alice/{kind}")
    objects = "|".join(entry.sha256 for entry in files.values())
    asked = [
        map(int, (entry.range or "").removeprefix("bytes=").split("-"))
        for entry in bench.hub.log.find(path=f"/file/({objects})", method="GET")
    ]
    assert asked
    read = sum(last - first + 1 for first, last in asked)
    assert read < 0.3 * sum(entry.size for entry in files.values())
    paths = [entry.path for entry in bench.hub.log.find(path=f"/{kind}/resolve/")]
    assert all(re.search(r"/resolve/[0-9a-f]{40}/", path) for path in paths)


def test_a_step_is_read_at_the_commit_that_is_named(bench: Bench, tmp_path: Path) -> None:
    """In a folder of a repository whose main moved on; config and tokenizer lie beside the step."""
    top = "global_step_40/actor/"
    files = {**files_of(bench.folder / "verl-rows", top),
             **files_of(bench.group / "base", f"{top}huggingface/")}  # fmt: skip
    weights = [name for name in files if name.endswith(".safetensors")]
    step = {name: path for name, path in files.items() if name not in weights}
    old = bench.hub.add_repo("alice/steps", step)
    bench.hub.push("alice/steps", {name: b"torn" for name in step if name.endswith(".pt")})
    expert = bench.group / "base"  # of which the step is the base
    here = merged(bench, tmp_path / "here", *words(expert, bench.group / "expert0"))

    for number, place in enumerate((f"alice/steps@{old}", f"alice/steps@{old}:global_step_40")):
        assert merged(bench, tmp_path / f"{number}", *words(expert, place)) == here
        assert (tmp_path / f"{number}/tokenizer.json").exists()

    torn = bench.run("plan", *words("alice/steps"))
    assert torn.code == 2
    assert re.search(r"cannot be read here.*Download it first\. .*verl\.model_merger", torn.out)


def test_a_pattern_stands_for_the_steps_that_a_trainer_left(bench: Bench, tmp_path: Path) -> None:
    """`org/run:checkpoint-*` are folders of DeepSpeed's too, as they are on this machine."""
    for step, name in ((9, "base"), (10, "expert0")):
        folder = tmp_path / f"run/checkpoint-{step}"
        saved_by_deepspeed(read_tensors(bench.group / name), folder, "bin")
        shutil.copy(bench.group / "base/config.json", folder)
    bench.hub.add_repo("alice/run", files_of(tmp_path / "run"))

    for place, out in (("alice/run:", "there"), (f"{tmp_path}/run/", "here")):
        done = bench.run("average", f"{place}checkpoint-*", "--out", str(tmp_path / out))
        assert done.code == 0, done.err
    assert file_bytes(tmp_path / "there") == file_bytes(tmp_path / "here")


@pytest.mark.parametrize(
    "fault",
    ["503", "cut", *(pytest.param(one, marks=pytest.mark.slow) for one in ("expired", "reset"))],
)
def test_a_fault_that_passes_is_survived(bench: Bench, tmp_path: Path, fault: str) -> None:
    """While metadata is read, and while tensors are."""
    whole = merged(bench, tmp_path / "whole", *words("alice/dcp-rows"))
    reads = len(bench.hub.log.find(path="/file/", method="GET"))
    for skip in (1, reads - 2):
        rule = bench.hub.faults.add(fault, path="/file/", port="cdn", times=2, skip=skip)
        assert merged(bench, tmp_path / f"{skip}", *words("alice/dcp-rows")) == whole
        assert rule.hits == 2


def test_a_killed_merge_of_a_trainers_parts_continues(bench: Bench, tmp_path: Path) -> None:
    """The same command ends with the bytes of a merge that was not killed."""
    options = [*words("alice/verl-rows"), "--max-shard-size", "100KB"]
    whole = merged(bench, tmp_path / "whole", *options)
    reads = len(bench.hub.log.find(path="/file/", method="GET"))
    process = bench.start(["merge", *options, "--out", str(tmp_path / "out")])
    bench.hub.faults.add(
        Hook(call=lambda: process.send_signal(signal.SIGKILL)),
        path="/file/",
        skip=reads - 2,
        times=1,
    )
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL

    assert merged(bench, tmp_path / "out", *options) == whole


def test_a_gguf_of_a_repository_is_read_by_its_path(bench: Bench, tmp_path: Path) -> None:
    """Several are named, and each can be given; the bytes are those of the local file."""
    few = write(tmp_path / "gguf/model-q4.gguf", "qwen2", Type.Q4_0)
    many = write(tmp_path / "gguf/model-q8.gguf", "qwen2", Type.Q8_0, tokens=90_000)
    assert many.stat().st_size - few.stat().st_size > 1_000_000
    tensors = {name: tensor + 0.01 for name, tensor in values_of_gguf(many).items()}
    base = as_folder(tensors, tmp_path / "base")
    bench.hub.add_repo("alice/gguf", files_of(tmp_path / "gguf"))

    several = bench.run("plan", *words("alice/gguf", base))

    assert several.code == 2
    assert re.search(r"2 GGUF files in alice/gguf.*model-q4.*model-q8", several.out)
    for file in (few, many):
        there = merged(
            bench, tmp_path / f"{file.stem}-there", *words(f"alice/gguf:{file.name}", base)
        )
        here = merged(bench, tmp_path / f"{file.stem}-here", *words(file, base))
        assert there == here


def test_a_gguf_is_read_in_one_request_a_piece(bench: Bench, tmp_path: Path) -> None:
    """What is read ahead is what is dequantised: no byte of a tensor crosses the network twice."""
    path = write(tmp_path / "gguf/model.gguf", "qwen2", Type.Q8_0)
    base = as_folder(values_of_gguf(path), tmp_path / "base")
    base_tensors = {name: tensor + 0.01 for name, tensor in read_tensors(base).items()}
    other = as_folder(base_tensors, tmp_path / "other")
    bench.hub.add_repo("alice/one-gguf", files_of(path.parent))
    bench.hub.log.clear()

    merged(bench, tmp_path / "out", *words("alice/one-gguf", other))

    ranges = [entry.range or "" for entry in bench.hub.log.find(path="/file/", method="GET")]
    spans = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in ranges]
    read = sum(last - first + 1 for first, last in spans)
    assert read < 2.2 * path.stat().st_size  # the header, a look at some rows, and once all


def test_a_cut_while_blocks_are_read_goes_on_where_it_broke(bench: Bench, tmp_path: Path) -> None:
    """The same bytes as undisturbed, and none is asked for twice for a body that was cut."""
    expected = merged(bench, tmp_path / "calm", *words("alice/universal"))
    rule = bench.hub.faults.add(Cut(fraction=0.5), path="/file/", times=3)

    assert merged(bench, tmp_path / "out", *words("alice/universal")) == expected

    assert rule.hits == 3


def test_what_only_a_converter_reads_is_to_be_downloaded_first(bench: Bench) -> None:
    """ZeRO 3 has its weights in parts that DeepSpeed puts together: its command, and where."""
    bench.hub.add_repo(
        "alice/zero3",
        {"zero_to_fp32.py": b"", "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt": b"PK"},
    )

    done = bench.run("plan", *words("alice/zero3"))

    assert done.code == 2
    assert "Download it first. Write it as safetensors with 'python ./zero_to_fp32.py" in done.out


@pytest.mark.parametrize("seed", range(10))
def test_blocks_are_the_bytes_of_the_files(seed: int) -> None:
    """Whatever is expected, and in whatever order it is read, also beyond what is kept."""
    draw = random.Random(seed)
    files = {name: draw.randbytes(draw.choice([0, 5, 70_000, 20_000_000])) for name in "abc"}
    blocks = Blocks(
        lambda file, begin, end: memoryview(files[file])[begin:end],
        {name: len(data) for name, data in files.items()},
    )

    def ranges() -> Iterator[tuple[str, int, int]]:
        for _ in range(300):
            file = draw.choice("abc")
            begin = draw.randrange(len(files[file]) + 1)
            yield file, begin, min(begin + draw.choice([0, 30, 9000, 1_500_000]), len(files[file]))

    reads = list(ranges())
    blocks.expect([*draw.sample(reads, 200), ("a", 0, 1 << 60)][: draw.randrange(202)])
    for file, begin, end in reads:
        assert blocks.read(file, begin, end) == files[file][begin:end]


def test_what_is_expected_is_fetched_together() -> None:
    """A thousand places far apart take a request each, once, whatever the order of the files."""
    size, asked = 400_000_000, list[tuple[int, int]]()

    def fetch(file: str, begin: int, end: int) -> memoryview:
        asked.append((begin, end))
        return memoryview(bytes(end - begin))

    blocks = Blocks(fetch, {"a": size})
    reads = [("a", at, at + 100) for at in range(0, size - 100, 400_000)]
    blocks.expect(reads)
    for read in reads:
        blocks.read(*read)
        blocks.read(*read)

    assert len(asked) == len(reads)
    assert sum(end - begin for begin, end in asked) <= 2 * BLOCK_BYTES * len(reads)
