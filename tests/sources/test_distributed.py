"""Checkpoints that a trainer's processes saved in parts: against torch's and verl's own converters.

The parts are saved by real processes that speak gloo; DeepSpeed's files by its own keys.
"""

import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resmerge_stream.errors import CheckpointFormatError, UnsupportedCheckpointError
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.pickled import loads
from tests.support.checkpoints import Group, file_bytes, make_group, merge, plan_group, read_tensors
from tests.support.trainers import CUTS, merged_as_verl_does, save_by_ranks, saved_by_deepspeed

NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A base and an expert, with rows that two ranks share unequally."""
    return make_group(tmp_path_factory.mktemp("group"), experts=1, vocab=51)


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """What ranks save of the expert: a folder for each kind and cut."""
    out = tmp_path_factory.mktemp("saved")
    save_by_ranks(group.experts[0] / "model.safetensors", out)
    return lambda kind, cut="rows": out / f"{kind}-{cut}"


def values(folder):
    """Return every tensor of a checkpoint, read in two parts."""
    checkpoint = open_checkpoint(ModelRef(str(folder)))
    found = {}
    for name, stored in checkpoint.tensors.items():
        spec = stored.spec
        cut = spec.matrix_shape[0] // 3 if spec.shape else None
        parts = [slice(cut), slice(cut, None)] if cut else [slice(None)]
        data = bytearray(b"".join(bytes(checkpoint.read(name, rows)) for rows in parts))
        found[name] = torch.frombuffer(data, dtype=NAMES[spec.dtype]).view(spec.shape)
    return found


def same(ours, theirs):
    """Check that two models are equal, bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("cut", CUTS)
def test_a_distributed_checkpoint_is_what_torchs_converter_makes_of_it(saved, tmp_path, cut):
    """Rows, columns, both, copies: the values of dcp_to_torch_save; the optimizer is not read."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = saved("dcp", cut)
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    theirs = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]

    same(values(folder), theirs)


@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "both"])
def test_verls_shards_are_what_its_merger_makes_of_them(saved, cut):
    """Local tensors joined by their placements; copies of the data-parallel ranks are left out."""
    folder = saved("verl", cut)

    same(values(folder), merged_as_verl_does(folder))


def test_verls_shards_of_two_kinds_at_once_are_refused_with_its_command(saved):
    """verl's own merger does not join FSDP with tensor parallelism either."""
    with pytest.raises(UnsupportedCheckpointError, match=r"verl\.model_merger merge"):
        open_checkpoint(ModelRef(str(saved("verl", "both"))))


@pytest.mark.parametrize("kind", ["universal", "states", "bin"])
def test_deepspeeds_weights_are_read(group, tmp_path, kind):
    """Universal in float32; the 16-bit weights of ZeRO 1 and 2, and what ZeRO 3 gathers."""
    tensors = read_tensors(group.experts[0])
    saved_by_deepspeed(tensors, tmp_path / "ds", kind)

    expected = {n: t.float() if kind == "universal" else t for n, t in tensors.items()}
    same(values(tmp_path / "ds"), expected)


@pytest.mark.parametrize("kind", ["dcp", "verl"])
def test_a_merge_of_a_trainers_parts_has_the_bytes_of_the_merge_of_the_whole(
    group, saved, tmp_path, kind
):
    """The config is that beside the parts, in verl's huggingface folder, or else the base's."""
    whole = merge(group, tmp_path / "whole", method="task_arithmetic")
    run = tmp_path / "run"
    at = run / ("actor" if kind == "verl" else "pytorch_model_fsdp_0")
    shutil.copytree(saved(kind), at)
    if kind == "verl":
        (at / "huggingface").mkdir()
        shutil.copy(group.experts[0] / "config.json", at / "huggingface")

    for number, folder in enumerate((run, at)):
        out = tmp_path / f"out{number}"
        made = merge(Group(group.base, (folder,)), out, method="task_arithmetic")

        assert file_bytes(out) == file_bytes(whole.out)
        assert any("read as it is" in text for text in made.report["summary"]["warnings"])


def test_a_base_of_parts_needs_a_config(group, saved, tmp_path):
    """Nothing else says what model it is; with one, it is a base as any other."""
    base = tmp_path / "base"
    shutil.copytree(saved("dcp"), base)

    (problem,) = plan_group(Group(base, group.experts), method="task_arithmetic").problems

    assert "has no config.json" in problem
    shutil.copy(group.base / "config.json", base)
    other = (group.base,)
    made = merge(Group(base, other), tmp_path / "out", method="task_arithmetic")
    same(made.tensors, read_tensors(group.base))


def test_several_steps_below_a_folder_are_named(saved, tmp_path):
    """None of them is chosen in silence; the last one is the example."""
    for step in (900, 1000):
        shutil.copytree(saved("dcp"), tmp_path / f"checkpoint-{step}" / "pytorch_model_fsdp_0")
    shutil.copytree(saved("dcp"), tmp_path / "checkpoint-1000" / "optimizer_0")

    with pytest.raises(
        FileNotFoundError, match=r"such as \S+/checkpoint-1000/pytorch_model_fsdp_0"
    ):
        open_checkpoint(ModelRef(str(tmp_path)))
    assert values(tmp_path / "checkpoint-1000")


class Runs:
    """What a pickle of an attacker holds: a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_called(group, tmp_path):
    """A pickle that would make a file is read as data: of a state, the weights."""
    trap = tmp_path / "ran"
    tensors = dict(read_tensors(group.experts[0]))
    held = {"module": tensors, "trap": Runs(trap), "extra": {(1, 2): {3}, b"x": [1.5, None]}}
    (tmp_path / "ds").mkdir()
    torch.save(held, tmp_path / "ds" / "mp_rank_00_model_states.pt")

    same(values(tmp_path / "ds"), tensors)
    assert loads(pickle.dumps(Runs(trap)), where="x").what.endswith(".Path.touch")

    assert not trap.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol):
    """Numbers, texts, bytes, lists and tuples are themselves; dictionaries are their pairs."""
    value = [1, -1, 1 << 40, 1 << 90, 2.5, "ä", b"b", None, True, (), (1,), (1, 2, 3, 4), [[]]]
    read = loads(pickle.dumps([value, {"k": 1, 2: "v"}], protocol), where="x")

    is_kept = [one == other for one, other in zip(read[0], value, strict=True)]
    assert all(is_kept) or (protocol == 2 and is_kept.count(False) == 1)  # bytes are encoded there
    assert list(read[1]) == [("k", 1), (2, "v")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 8,
        b"\x80\x04}\x94(",
        b".",
        b"\x80\x02q\x00.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"r\xff\xff\xff\xff.",
    ],
)
def test_a_torn_pickle_is_refused(data):
    """Nothing to take, no mark, no end, or more bytes announced than there are."""
    with pytest.raises(CheckpointFormatError):
        loads(data, where="x")


def zip_edited(path, change):
    """Rewrite a file of torch.save with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def shorten(entries):
    """Take half of a storage away."""
    name = next(name for name in entries if name.endswith("/data/0"))
    entries[name] = entries[name][: len(entries[name]) // 2]


TORN = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 4]),
    "emptied": lambda path: path.write_bytes(b""),
    "no zip": lambda path: path.write_bytes(b"PK\3\4" + b"x" * 500),
    "short storage": lambda path: zip_edited(path, shorten),
    "no pickle": lambda path: zip_edited(path, lambda e: e.pop(next(n for n in e if "pkl" in n))),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", TORN)
@pytest.mark.parametrize(
    ("kind", "name", "command"),
    [
        ("verl", "model_world_size_2_rank_1.pt", "verl.model_merger merge"),
        ("dcp", "__1_0.distcp", "accelerate merge-weights"),
    ],
)
def test_a_torn_part_is_refused_with_the_converters_command(
    saved, tmp_path, kind, name, command, how
):
    """Whatever is wrong with a part, nothing is read in its place."""
    if kind == "dcp" and how in ("short storage", "no pickle"):
        return  # a part there is several files in one
    folder = tmp_path / "torn"
    shutil.copytree(saved(kind), folder)
    TORN[how](folder / name)

    with pytest.raises(UnsupportedCheckpointError, match=command):
        open_checkpoint(ModelRef(str(folder)))


def test_views_are_read_where_they_lie(tmp_path):
    """A storage that two tensors share, a turned matrix, a scalar; what has holes is refused."""
    flat = torch.randn(60)
    held = {"a": flat[4:16].view(3, 4), "t": flat[20:40].view(4, 5).T, "s": torch.tensor(3),
            "one": flat[:1], "p": torch.nn.Parameter(flat[:6])}  # fmt: skip
    folder = tmp_path / "ds"
    folder.mkdir()
    torch.save({"module": held}, folder / "mp_rank_00_model_states.pt")

    same(values(folder), {n: t.detach() for n, t in held.items()})
    torch.save({"module": {"h": flat.view(6, 10)[:, :3]}}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedCheckpointError, match="not side by side"):
        open_checkpoint(ModelRef(str(folder)))


def test_what_only_deepspeed_puts_together_is_refused_with_its_command(tmp_path):
    """ZeRO 3 leaves empty tensors in its states; several model-parallel ranks, parts of each."""
    saved_by_deepspeed({"w": torch.zeros(0)}, tmp_path / "three", "states")
    saved_by_deepspeed({"w": torch.ones(2)}, tmp_path / "two", "states")
    states = tmp_path / "two" / "global_step7"
    shutil.copy(states / "mp_rank_00_model_states.pt", states / "mp_rank_01_model_states.pt")

    for name in ("three", "two"):
        with pytest.raises(UnsupportedCheckpointError, match=r"zero_to_fp32\.py"):
            open_checkpoint(ModelRef(str(tmp_path / name)))


def test_a_part_that_changes_after_planning_stops_the_merge(group, saved, tmp_path):
    """As with any other weight file, what was read of two states is not used."""
    from resmerge_stream.errors import SourceChangedError
    from resmerge_stream.run.engine import run_merge

    folder = tmp_path / "run"
    shutil.copytree(saved("dcp"), folder)
    plan = plan_group(Group(group.base, (folder,)), method="mean", out=tmp_path / "out")
    (folder / "__0_0.distcp").write_bytes((saved("dcp") / "__0_0.distcp").read_bytes())

    with pytest.raises(SourceChangedError):
        list(run_merge(plan, out=tmp_path / "out"))


def test_safetensors_beside_a_trainers_state_are_the_model(group, saved, tmp_path):
    """What transformers would load comes first."""
    folder = tmp_path / "both"
    shutil.copytree(saved("dcp"), folder)
    shutil.copy(group.experts[0] / "config.json", folder)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})

    assert list(open_checkpoint(ModelRef(str(folder))).tensors) == ["w"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "verl"])
def test_changed_parts_are_refused_in_one_message_or_rightly_read(saved, tmp_path, name):
    """Bits flipped, bytes cut, repeated or put in: no other error, and no shape that is not there.

    A changed value is a value: that the bytes are whole, only a hash could say.
    """
    folder = tmp_path / "changed"
    shutil.copytree(saved("verl" if name == "verl" else "dcp"), folder)
    path = folder / ("model_world_size_2_rank_1.pt" if name == "verl" else name)
    whole = path.read_bytes()
    expected = {n: t.spec.shape for n, t in open_checkpoint(ModelRef(str(folder))).tensors.items()}
    chance, refused = random.Random(name), list[str]()
    for _ in range(60):
        data = bytearray(whole)
        at = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + 40]
        else:
            data[at : at + 8] = bytes(chance.randrange(256) for _ in range(8))
        path.write_bytes(data)
        try:
            opened = open_checkpoint(ModelRef(str(folder)))
        except UnsupportedCheckpointError as exc:
            refused.append(str(exc))
            continue
        for own in opened.tensors:
            bytes(opened.read(own))
        if name != ".metadata" and set(opened.tensors) == set(expected):
            assert {n: t.spec.shape for n, t in opened.tensors.items()} == expected

    assert len(refused) > 5
    assert all(len(text) < 2000 for text in refused)
    assert all("verl.model_merger" in text or "merge-weights" in text for text in refused)


def test_a_merge_of_parts_that_was_stopped_continues(group, saved, tmp_path):
    """What was finished stays; the bytes are those of a merge that was not stopped."""
    from resmerge_stream import Options
    from resmerge_stream.run.engine import run_merge
    from resmerge_stream.run.events import ShardFinished

    parts = Group(group.base, (saved("dcp"),))
    options = Options(max_shard_bytes=4000)
    whole = merge(parts, tmp_path / "whole", method="mean", options=options)
    plan = plan_group(parts, method="mean", out=tmp_path / "out", options=options)
    for event in (events := run_merge(plan, out=tmp_path / "out")):
        if isinstance(event, ShardFinished):
            break
    events.close()
    plan.close()

    made = merge(parts, tmp_path / "out", method="mean", options=options)

    assert any(isinstance(event, ShardFinished) and event.resumed for event in made.events)
    assert file_bytes(tmp_path / "out") == file_bytes(whole.out)
