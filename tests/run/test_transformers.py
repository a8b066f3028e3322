"""What was merged is a model that transformers loads and runs."""

import pytest
import torch

from benchmarks.synthetic import Shape, write_group
from tests.support.checkpoints import make_group, merge, read_tensors

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("without_picture")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_merged_folder_loads_with_equal_weights_and_generates(tied, sharded, tmp_path):
    """AutoModelForCausalLM loads every weight as merged and generates the same tokens twice."""
    group = make_group(tmp_path / "group", tied=tied, sharded=sharded, dtype=torch.float32)
    merged = merge(group, tmp_path / "out")

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        merged.out, output_loading_info=True, dtype=torch.float32
    )
    # AutoTokenizer takes Qwen2's own class, which would cut words in another way.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(merged.out)
    prompt = tokenizer("w3 w4 w5", return_tensors="pt")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    first = model.generate(**prompt, **options)
    second = model.generate(**prompt, **options)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = model.state_dict()
    for name, tensor in read_tensors(merged.out).items():
        assert torch.equal(state[name], tensor), name
    assert first.shape[1] == prompt["input_ids"].shape[1] + 5
    assert torch.equal(first, second)


def test_a_merge_in_another_dtype_loads_in_it(group, tmp_path):
    """The config names the output dtype, so that loading keeps it."""
    merged = merge(group, tmp_path / "out", dtype="float16")

    model = transformers.AutoModelForCausalLM.from_pretrained(merged.out, dtype="auto")

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_made_up_model_reads_and_writes_text(tmp_path):
    """The tokenizer of a made-up group is one that transformers loads for it."""
    write_group(tmp_path, Shape(), experts=1)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = tokenizer("Merge: 1 + 2 = é")["input_ids"]

    assert len(ids) == len("Merge: 1 + 2 = é".encode())
    assert tokenizer.decode(ids) == "Merge: 1 + 2 = é"
