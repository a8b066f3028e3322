"""Trees of stored tensors against the same moves written in torch."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.assembly import (
    Item,
    Joined,
    Part,
    Reshaped,
    Rounded,
    Stacked,
    Transposed,
    Woven,
)
from tests.support.checkpoints import write_json

E, M, N = 3, 4, 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint of a few bfloat16 tensors, and its values."""
    folder = tmp_path_factory.mktemp("stored")
    random = torch.Generator().manual_seed(0)
    values = {
        "stack": torch.randn(E, M, N, generator=random).bfloat16(),
        "a": torch.randn(M, N, generator=random).bfloat16(),
        "b": torch.randn(M, N, generator=random).bfloat16(),
        "f32": torch.randn(M, N, generator=random),
        "conv": torch.randn(M, 3, 2, 1, generator=random).bfloat16(),
    }
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {"model_type": "none"})
    return open_checkpoint(ModelRef(str(folder))), values


def trees(checkpoint, values):
    """Every kind of node with its values in torch, and trees of several kinds."""
    at = {name: checkpoint.trees[name] for name in values}
    a, b, stack = values["a"], values["b"], values["stack"]
    woven = torch.stack((a, b), dim=2).flatten(1)
    return {
        "stored": (at["a"], a),
        "turned": (Transposed(at["a"], (1, 0)), a.T),
        "turned stack": (Transposed(at["stack"], (2, 0, 1)), stack.permute(2, 0, 1)),
        "part": (Part(at["a"], 0, 1, 2), a[1:3]),
        "every second": (Part(at["stack"], 2, 1, 3, 2), stack[..., 1::2]),
        "item": (Item(at["stack"], 1), stack[1]),
        "stacked": (Stacked([at["a"], at["b"]]), torch.stack((a, b))),
        "joined rows": (Joined([at["a"], at["b"]], 0), torch.cat((a, b))),
        "joined columns": (Joined([at["a"], at["b"]], 1), torch.cat((a, b), 1)),
        "woven": (Woven([at["a"], at["b"]], 1), woven),
        "reshaped": (Reshaped(at["conv"], (M, 6)), values["conv"].reshape(M, 6)),
        "rounded": (Rounded(at["f32"], "BF16"), values["f32"].bfloat16()),
        "fused and turned": (
            Transposed(Stacked([Joined([at["a"], at["b"]], 0)] * 2), (0, 2, 1)),
            torch.stack([torch.cat((a, b))] * 2).transpose(1, 2),
        ),
        "half of a slice": (
            Part(Item(Transposed(at["stack"], (0, 2, 1)), 2), 0, 3, 3),
            stack[2].T[3:],
        ),
    }


@pytest.mark.parametrize("kind", [
    "stored", "turned", "turned stack", "part", "every second", "item", "stacked", "joined rows",
    "joined columns", "woven", "reshaped", "rounded", "fused and turned", "half of a slice",
])  # fmt: skip
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_rows_of_a_tree_are_those_of_the_tensor_it_stands_for(stored, kind, data):
    """A view reads any range of rows as slicing the assembled tensor would."""
    checkpoint, values = stored
    tree, expected = trees(checkpoint, values)[kind]
    view = checkpoint.with_trees({"it": tree})
    start = data.draw(st.integers(0, len(expected) - 1))
    stop = data.draw(st.integers(start + 1, len(expected)))

    read = torch.frombuffer(bytearray(view.read("it", slice(start, stop))), dtype=expected.dtype)

    assert view.tensors["it"].spec.shape == tuple(expected.shape)
    assert torch.equal(read.view(stop - start, *expected.shape[1:]), expected[start:stop])


def test_what_is_as_stored_is_mapped_and_what_is_made_is_counted(stored):
    """Handed-through tensors take no private memory; a made one takes its own size."""
    checkpoint, values = stored
    trees = checkpoint.trees
    view = checkpoint.with_trees({"a": trees["a"], "half": Part(trees["stack"], 1, 0, 2)})

    assert view.made_bytes("a") == 0
    assert view.made_bytes("half") == values["stack"].nbytes // 2
    assert view.read_cost("half") == values["stack"].nbytes
    assert [one.tensor.spec.name for one in view.readings("half")] == ["stack"]
