"""GGUF files, written by llama.cpp's package: against what transformers reads in them."""

import random
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from resmerge_stream.errors import CheckpointFormatError, UnsupportedCheckpointError
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.ggml import read_header
from tests.support.checkpoints import (
    Group,
    file_bytes,
    merge,
    plan_group,
    qwen2_config,
    read_tensors,
    write_checkpoint,
    write_json,
)

HIDDEN, MIDDLE, VOCAB, LAYERS, HEADS, KV = 256, 512, 48, 2, 8, 2
OF_QWEN3 = 2, 1  # heads of 128, which is what transformers takes whatever such a file says
CONFIG = qwen2_config(LAYERS, HIDDEN, VOCAB, False, torch.bfloat16) | {
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": MIDDLE,
}  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "qwen3")
Type = gguf.GGMLQuantizationType
TYPES = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.F16,
         Type.BF16, Type.F32)  # fmt: skip


def shapes(architecture):
    """Yield llama.cpp's names of a small model, with their shapes, outermost first."""
    yield "token_embd.weight", (VOCAB, HIDDEN)
    heads, kv = OF_QWEN3 if architecture == "qwen3" else (HEADS, KV)
    head = HIDDEN // heads
    kv *= head
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (MIDDLE, HIDDEN),
            "ffn_up": (MIDDLE, HIDDEN), "ffn_down": (HIDDEN, MIDDLE),
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        }.items():  # fmt: skip
            yield f"{block}.{name}.weight", shape
        if architecture == "qwen2":
            yield from ((f"{block}.attn_{n}.bias", (s,))
                        for n, s in (("q", HIDDEN), ("k", kv), ("v", kv)))  # fmt: skip
        if architecture == "qwen3":
            yield from ((f"{block}.attn_{n}_norm.weight", (head,)) for n in "qk")
    yield "output_norm.weight", (HIDDEN,)
    yield "output.weight", (VOCAB, HIDDEN)


def coded(kind, shape, draw):
    """Return codes of a type for a matrix: random bytes, whose scales are small numbers."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    values = draw.standard_normal(shape).astype(np.float32)
    if kind in (Type.F32, Type.F16, Type.BF16):
        return values if kind == Type.F32 else gguf.quantize(values, kind)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:  # of the K types the package only reads
        codes = draw.integers(0, 256, (shape[0], shape[1] // block, nbytes), np.uint8)
        scales = draw.uniform(1e-3, 1e-2, (shape[0], shape[1] // block, 2)).astype(np.float16)
        if kind == Type.Q6_K:
            codes[..., -2:] = scales[..., :1].view(np.uint8)
        else:
            codes[..., :4] = scales.view(np.uint8)
        return codes.reshape(shape[0], -1)


def write(path, architecture="llama", kind=Type.Q8_0, *, said=(), without=(), tokens=VOCAB):
    """Write a small model; `said` changes what its metadata says, `tokens` how many it lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv = OF_QWEN3 if architecture == "qwen3" else (HEADS, KV)
    numbers = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": HIDDEN,
        "feed_forward_length": MIDDLE, "attention.head_count": heads,
        "attention.head_count_kv": kv, "rope.dimension_count": HIDDEN // heads,
        "vocab_size": VOCAB,
    } | dict(said)  # fmt: skip
    for key, number in numbers.items():
        if isinstance(number, list):
            writer.add_array(f"{architecture}.{key}", number)
        elif number is not None:
            writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(tokens)])
    for name, shape in shapes(architecture):
        if name in without:
            continue
        is_matrix = len(shape) == 2
        data = coded(kind if is_matrix else Type.F32, shape, draw)
        writer.add_tensor(name, data, raw_dtype=kind if is_matrix else Type.F32)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(path):
    """Return every tensor of a checkpoint as float32, read in two parts."""
    checkpoint = open_checkpoint(ModelRef(str(path)))
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found = {}
    for name, stored in checkpoint.tensors.items():
        cut = stored.spec.matrix_shape[0] // 3 + 1  # inside of a head
        parts = [checkpoint.read(name, rows) for rows in (slice(cut), slice(cut, None))]
        data = bytearray(b"".join(bytes(part) for part in parts))
        found[name] = torch.frombuffer(data, dtype=dtypes[stored.spec.dtype]).view(
            stored.spec.shape
        )
    return {name: tensor.float() for name, tensor in found.items()}


def as_transformers_reads(path):
    """Return the tensors of a file as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.state_dict()


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_has_the_values_that_transformers_reads(architecture, kind, tmp_path):
    """Names, order of rows and values, bit for bit, whatever the type of the codes."""
    path = write(tmp_path / "model.gguf", architecture, kind)

    ours, theirs = values(path), as_transformers_reads(path)

    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def as_folder(tensors, folder):
    """Save tensors as a Qwen2 model; return its folder."""
    write_checkpoint(folder, tensors, CONFIG)
    return folder


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.BF16], ids=lambda kind: kind.name)
def test_a_merge_of_a_gguf_expert_has_the_bytes_of_the_merge_of_its_values(kind, tmp_path):
    """By its path or its folder's, with the base's config; and the merge says what was read."""
    path = write(tmp_path / "expert/model.gguf", "qwen2", kind)
    (path.parent / "mmproj-model.gguf").write_bytes(b"GGUF, of another model")
    tensors = values(path)
    plain = as_folder(tensors, tmp_path / "plain")
    base = as_folder({n: t + 0.01 * torch.randn(t.shape) for n, t in tensors.items()},
                     tmp_path / "base")  # fmt: skip
    whole = merge(Group(base, (plain,)), tmp_path / "whole", method="task_arithmetic")

    for number, expert in enumerate((path, path.parent)):
        out = tmp_path / f"out{number}"
        made = merge(Group(base, (expert,)), out, method="task_arithmetic")

        assert file_bytes(out) == file_bytes(whole.out)
        assert any("a GGUF file" in text for text in made.report["summary"]["warnings"])


def test_a_gguf_base_is_written_in_bfloat16(tmp_path):
    """With the config beside it; norms, which a GGUF has in float32, too."""
    path = write(tmp_path / "base/model.gguf", "qwen2", Type.Q8_0)
    tensors = values(path)
    expert = as_folder({n: t + 0.01 for n, t in tensors.items()}, tmp_path / "expert")

    assert "no config.json" in plan_group(Group(path.parent, (expert,))).problems[0]
    write_json(path.parent / "config.json", CONFIG)
    made = merge(Group(path.parent, (expert,)), tmp_path / "out", method="task_arithmetic")

    for name, value in read_tensors(made.out).items():
        assert value.dtype == torch.bfloat16, name
        assert torch.equal(value, (tensors[name] + 0.01).to(torch.bfloat16)), name


def test_a_choice_among_gguf_files_is_the_users(tmp_path):
    """Several in a folder are named, each can be given by its path; a pickle stands above them."""
    few = write(tmp_path / "model-q4.gguf", kind=Type.Q4_0)
    many = write(tmp_path / "model-q8.gguf", kind=Type.Q8_0)

    with pytest.raises(UnsupportedCheckpointError, match=r"2 GGUF files.*model-q4.*model-q8"):
        open_checkpoint(ModelRef(str(tmp_path)))
    assert not torch.equal(values(few)["lm_head.weight"], values(many)["lm_head.weight"])
    few.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedCheckpointError, match="a pickle"):
        open_checkpoint(ModelRef(str(tmp_path)))


@pytest.mark.parametrize(
    ("architecture", "said", "words"),
    [
        ("gemma2", {}, r"architecture 'gemma2'; those that are read are 'llama', 'qwen2', 'qwen3'"),
        ("llama", {"block_count": None}, "how many layers"),
        ("llama", {"block_count": LAYERS - 1}, r"blk\.1\.\S+, which transformers' llama has not"),
        ("llama", {"attention.head_count": [8, 8]}, "of how many heads"),
        ("llama", {"attention.head_count": 7}, "of how many heads"),
    ],
)
def test_what_is_not_known_of_a_file_is_said(architecture, said, words, tmp_path):
    """Each refusal has transformers' command, which reads more architectures."""
    path = write(tmp_path / "model.gguf", architecture, said=said)

    with pytest.raises(UnsupportedCheckpointError, match=rf"{words}.*save_pretrained\('OUT'\)"):
        open_checkpoint(ModelRef(str(path)))


def test_without_llama_cpps_package_its_name_is_said(tmp_path, monkeypatch):
    """Nothing else needs it, so it is not installed with the rest."""
    path = write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(UnsupportedCheckpointError, match="pip install gguf"):
        open_checkpoint(ModelRef(str(path)))


@pytest.mark.parametrize("seed", range(200))
def test_a_damaged_header_is_one_error(seed, tmp_path_factory, damaged):
    """Cut anywhere, or with bytes and lengths changed: it is read, or refused in words."""
    draw = random.Random(seed)
    data = bytearray(damaged)
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(max(len(data) - 8, 1))
        struct.pack_into("<Q", data, at, draw.choice([0, 1, 255, 2**31, 2**40, 2**64 - 1]))
    path = tmp_path_factory.mktemp("torn") / "model.gguf"
    path.write_bytes(data)

    try:
        open_checkpoint(ModelRef(str(path)))
    except (UnsupportedCheckpointError, CheckpointFormatError) as exc:
        assert str(exc).endswith((".", "OUT"))  # noqa: PT017


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The header of a file, and a little of what follows it."""
    path = write(tmp_path_factory.mktemp("whole") / "model.gguf")
    data = path.read_bytes()
    return data[: read_header(memoryview(data), "it").begin + 1000]
