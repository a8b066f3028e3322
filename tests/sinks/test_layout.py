"""Output shards from invented specs: no weights, no torch."""

import json

from hypothesis import given
from hypothesis import strategies as st

from resmerge_stream.sinks.layout import index_json, plan_shards
from resmerge_stream.sources.format import parse_header
from resmerge_stream.specs import DTYPES, TensorSpec

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
kinds = st.sampled_from(sorted(DTYPES))
groups_of_specs = st.lists(
    st.lists(st.tuples(kinds, shapes), max_size=6), min_size=1, max_size=4
).map(
    lambda groups: [
        [TensorSpec(f"t{g}.{i}", dtype, shape) for i, (dtype, shape) in enumerate(group)]
        for g, group in enumerate(groups)
    ]
)


@given(groups=groups_of_specs, limit=st.integers(1, 4000))
def test_every_tensor_is_in_exactly_one_shard(groups, limit):
    """Nothing is lost and nothing doubled, whatever the limit."""
    shards = plan_shards(groups, limit)

    placed = [spec for shard in shards for spec in shard.tensors]
    assert sorted(spec.name for spec in placed) == sorted(s.name for g in groups for s in g)


@given(groups=groups_of_specs, limit=st.integers(1, 4000))
def test_a_shard_is_over_the_limit_only_for_a_single_tensor(groups, limit):
    """A tensor above the limit stands alone; empty ones may stand beside it."""
    for shard in plan_shards(groups, limit):
        sizes = [spec.nbytes for spec in shard.tensors if spec.nbytes]

        assert sum(sizes) <= limit or len(sizes) == 1


@given(groups=groups_of_specs, limit=st.integers(1, 4000))
def test_groups_are_not_mixed(groups, limit):
    """Tensors of two of the base's shards never share an output shard."""
    for shard in plan_shards(groups, limit):
        assert len({spec.name.split(".")[0] for spec in shard.tensors}) == 1


@given(groups=groups_of_specs, limit=st.integers(1, 4000))
def test_a_planned_header_describes_the_planned_file(groups, limit):
    """The header is aligned, its offsets are contiguous, and it says the size of the file."""
    for shard in plan_shards(groups, limit):
        length = int.from_bytes(shard.header[:8], "little")
        assert len(shard.header) == 8 + length
        assert length % 8 == 0

        tensors = parse_header(shard.header[8:], shard.nbytes, file=shard.name, where="w")

        assert [t.spec for t in tensors.values()] == [*shard.tensors] or any(
            spec.nbytes == 0 for spec in shard.tensors
        )


def test_one_shard_has_the_plain_name_and_several_are_numbered():
    """One file is model.safetensors; several count from 1, five digits each."""
    specs = [TensorSpec(name, "F32", (10,)) for name in "abc"]

    assert [s.name for s in plan_shards([specs], 1000)] == ["model.safetensors"]
    assert [s.name for s in plan_shards([specs], 80)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [len(s.tensors) for s in plan_shards([specs], 40)] == [1, 1, 1]


def test_tensors_stand_by_descending_dtype_then_by_name():
    """The order inside a file is that of save_file, not that of the plan."""
    specs = [
        TensorSpec("b", "BF16", (1,)),
        TensorSpec("z", "I64", (1,)),
        TensorSpec("a", "BF16", (1,)),
        TensorSpec("m", "F32", (1,)),
    ]

    (shard,) = plan_shards([specs], 1000)

    assert [spec.name for spec in shard.tensors] == ["z", "m", "a", "b"]


def test_the_index_maps_every_name_and_counts_bytes_and_parameters():
    """The weight map is sorted by name, and the total size is that of the tensors."""
    groups = [[TensorSpec("b", "BF16", (4, 4))], [TensorSpec("a", "F32", (3,))]]
    shards = plan_shards(groups, 10**9)

    document = json.loads(index_json(shards))

    assert list(document["weight_map"]) == ["a", "b"]
    assert document["weight_map"]["b"] == "model-00001-of-00002.safetensors"
    assert document["metadata"] == {"total_parameters": 19, "total_size": 44}
