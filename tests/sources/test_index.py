"""Indexes that differ from their shards: what is merged is what transformers loads."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from tests.support.checkpoints import make_group, merge, plan_group, read_tensors

LOST = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
LAST = "model-00002-of-00002.safetensors"


def forget(folder: Path, name: str = LOST) -> None:
    """Take a tensor out of a folder's index, not out of its shards."""
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


def loaded(folder: Path):
    """Return what transformers loads, after checking that it found everything."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    return model.state_dict()


@pytest.mark.parametrize("whose", ["base", "expert0", "all"])
def test_a_tensor_that_an_index_forgets_is_merged(tmp_path, whose):
    """Whoever's index lacks what a shard holds: the merge has it, and the plan says so."""
    group = make_group(tmp_path, experts=2, dtype=torch.float32, sharded=True, tied=False)
    forgetful = [f for f in group.folders if whose in (f.name, "all")]
    for folder in forgetful:
        forget(folder)

    made = merge(group, tmp_path / "out", method="mean")

    experts = [loaded(folder) for folder in group.experts]
    torch.testing.assert_close(loaded(made.out)[LOST], (experts[0][LOST] + experts[1][LOST]) / 2)
    told = [w for w in made.report["summary"]["warnings"] if "less than its shards hold" in w]
    assert len(told) == len(forgetful)


def test_of_a_tensor_in_two_shards_the_last_file_counts(tmp_path):
    """As transformers loads it, whatever the index says; and it is said."""
    group = make_group(tmp_path, experts=1, dtype=torch.float32, sharded=True, tied=False)
    folder = group.experts[0]
    name = "model.embed_tokens.weight"
    last = load_file(folder / LAST)
    last[name] = load_file(folder / FIRST)[name] + 1
    save_file(last, folder / LAST, {"format": "pt"})

    made = merge(group, tmp_path / "out", method="task_arithmetic")

    torch.testing.assert_close(made.tensors[name], loaded(folder)[name])
    told = [w for w in made.report["summary"]["warnings"] if "has two shards that hold" in w]
    assert len(told) == 1
    assert name in told[0]


def test_a_shard_that_the_index_does_not_name_is_said(tmp_path):
    """It is not read, as transformers does not; the plan names it."""
    group = make_group(tmp_path, experts=1, sharded=True)
    extra = group.base / "model-00003-of-00007.safetensors"
    save_file({"x": torch.zeros(2)}, extra, {"format": "pt"})

    with closing(open_checkpoint(ModelRef(str(group.base)))) as base:
        assert "x" not in base.tensors
        assert extra.name in base.remarks[0]


def test_an_index_that_forgets_a_whole_shard_is_refused(tmp_path):
    """A file that by its number is one of the index's shards holds a part of the model."""
    group = make_group(tmp_path, experts=1, sharded=True)
    index = group.base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = {k: v for k, v in document["weight_map"].items() if v != LAST}
    index.write_text(json.dumps(document))

    refused = plan_group(group, method="mean")

    assert "by its number is one of its shards" in refused.problems[0]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, file):
    """In the place of weights or of a side file it is refused, with the way out."""
    group = make_group(tmp_path, experts=1)
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 15231233024\n"
    )
    kept = (group.base / file).read_bytes()
    (group.base / file).write_text(pointer)

    refused = plan_group(group, method="mean")

    assert len(refused.problems) == 1
    assert file in refused.problems[0]
    assert "git lfs pull" in refused.problems[0]
    (group.base / file).write_bytes(kept)
    assert not plan_group(group, method="mean").refused
    assert read_tensors(group.base)
