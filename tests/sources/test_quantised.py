"""Quantised tensors: values against transformers' own dequantisation and written-out formulas."""

import pytest
import torch
from safetensors.torch import save_file

from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from resmerge_stream.sources.quantised import dequantised, inspect
from tests.support.checkpoints import write_json


def opened(folder, tensors, config=None):
    """A checkpoint with these tensors."""
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "none"} | (config or {}))
    return open_checkpoint(ModelRef(str(folder)))


def values_of(checkpoint, name):
    """A tensor of a dequantised checkpoint in which all is understood, read in two parts."""
    found = inspect(checkpoint)
    assert not found.problems
    view = dequantised(checkpoint, found)
    spec = view.tensors[name].spec
    cut = max(spec.shape[0] // 3, 1)
    data = bytes(view.read(name, slice(cut))) + bytes(view.read(name, slice(cut, None)))
    assert spec.dtype == "F32"
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(spec.shape)


def fp8(*shape, seed=0):
    """Random codes, the largest and the smallest among them."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random).mul(30).to(torch.float8_e4m3fn)


def written_out(codes, scales, block):
    """FP8 by its formula, one element at a time over blocks; partial last blocks too."""
    values = torch.empty(codes.shape, dtype=torch.float64)
    for i in range(0, codes.shape[0], block[0]):
        for j in range(0, codes.shape[1], block[1]):
            part = codes[i : i + block[0], j : j + block[1]].double()
            values[i : i + block[0], j : j + block[1]] = (
                part * scales[i // block[0], j // block[1]].double()
            )
    return values


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_blocks_have_the_bits_that_transformers_gives(tmp_path, shape, target):
    """Whole blocks, rounded to a dtype, equal transformers' Fp8Dequantize bit for bit."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = fp8(*shape)
    scales = torch.rand(shape[0] // 128, shape[1] // 128) * 1e-3
    checkpoint = opened(tmp_path / "c", {"w.weight": codes, "w.weight_scale_inv": scales})

    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=target)

    assert torch.equal(values_of(checkpoint, "w.weight").to(target), theirs)


@pytest.mark.parametrize("shape", [(576, 200), (130, 129), (64, 300)])
def test_a_partial_last_block_has_its_own_scale(tmp_path, shape):
    """Grids of ⌈size/128⌉ scales follow value = code · scale to the edges."""
    codes = fp8(*shape)
    grid = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 1e-2
    checkpoint = opened(tmp_path / "c", {"w.weight": codes, "w.weight_scale_inv": grid})

    exact = written_out(codes, grid, (128, 128))

    assert torch.equal(values_of(checkpoint, "w.weight"), exact.to(torch.float32))


@pytest.mark.parametrize(
    ("scales", "block"),
    [
        (torch.tensor(0.25), (48, 40)),
        (torch.tensor([0.25]), (48, 40)),
        (torch.rand(48, 1), (1, 40)),
        (torch.rand(48), (1, 40)),
        (torch.rand(48, 1).bfloat16(), (1, 40)),
    ],
    ids=["scalar", "one", "channels", "flat channels", "bfloat16 channels"],
)
def test_scales_of_tensors_and_of_channels(tmp_path, scales, block):
    """compressed-tensors' per-tensor and per-channel scales follow the same formula."""
    codes = fp8(48, 40)
    tensors = {"w.weight": codes, "w.weight_scale": scales, "w.input_scale": torch.ones(1)}
    checkpoint = opened(tmp_path / "c", tensors)

    grid = scales.reshape(-1, 1).expand(-(-48 // block[0]), 1)

    assert torch.equal(
        values_of(checkpoint, "w.weight"), written_out(codes, grid, block).to(torch.float32)
    )
    assert list(dequantised(checkpoint, inspect(checkpoint)).tensors) == ["w.weight"]


def test_a_stack_of_fp8_experts_has_a_grid_a_slice(tmp_path):
    """[E, m, n] codes with [E, ⌈m/128⌉, ⌈n/128⌉] scales: each slice with its own."""
    codes, grid = fp8(3, 130, 64), torch.rand(3, 2, 1)
    checkpoint = opened(tmp_path / "c", {"experts.up": codes, "experts.up_scale_inv": grid})

    exact = torch.stack([written_out(c, g, (128, 128)) for c, g in zip(codes, grid, strict=True)])

    assert torch.equal(values_of(checkpoint, "experts.up"), exact.to(torch.float32))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_mxfp4_has_the_bits_that_transformers_gives(tmp_path, target):
    """gpt-oss blocks and scales, rounded to a dtype, equal transformers' own conversion."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 10, 2), generator=random, dtype=torch.uint8)
    checkpoint = opened(
        tmp_path / "c", {"m.gate_up_proj_blocks": blocks, "m.gate_up_proj_scales": scales}
    )

    theirs = convert_moe_packed_tensors(blocks, scales, dtype=target)

    assert torch.equal(values_of(checkpoint, "m.gate_up_proj").to(target), theirs)


@pytest.mark.parametrize(
    ("tensors", "wrong"),
    [
        ({"w.weight": fp8(256, 256), "w.weight_scale_inv": torch.ones(2, 3)}, r"\[2, 2\]"),
        ({"w.weight": fp8(256, 256), "w.weight_scale_inv": torch.ones(3, 256)}, "blocks of 128"),
        ({"w.weight": fp8(8, 8)}, "without scales"),
        (
            {
                "m.x_blocks": torch.zeros(2, 4, 2, 16, dtype=torch.uint8),
                "m.x_scales": torch.zeros(2, 4, 3, dtype=torch.uint8),
            },
            "MXFP4 has",
        ),
        (
            {
                "w.qweight": torch.zeros(8, 8, dtype=torch.int32),
                "w.qzeros": torch.zeros(1, 1, dtype=torch.int32),
                "w.scales": torch.ones(1, 8).half(),
            },
            "GPTQ or AWQ",
        ),
        (
            {
                "w.weight": torch.zeros(32, 1, dtype=torch.uint8),
                "w.weight.absmax": torch.ones(1),
                "w.weight.quant_map": torch.ones(16),
            },
            "bitsandbytes",
        ),
        (
            {
                "w.weight": torch.zeros(8, 8, dtype=torch.int8),
                "w.weight_scale": torch.ones(8, 1),
            },
            "integers with scales",
        ),
        (
            {
                "w.weight": torch.zeros(8, 8, dtype=torch.uint32),
                "w.scales": torch.ones(8, 1).bfloat16(),
                "w.biases": torch.ones(8, 1).bfloat16(),
            },
            "MLX",
        ),
        (
            {
                "w.weight": torch.zeros(8, 8, dtype=torch.uint32),
                "w.scales": torch.ones(8, 2, dtype=torch.uint8),
            },
            "MLX",
        ),
        (
            {
                "w._weight_qdata": torch.zeros(8, 8, dtype=torch.int8),
                "w._weight_scale": torch.ones(8, 1),
            },
            "torchao",
        ),
        (
            {"w._weight_qdata": fp8(8, 8), "w._weight_scale": torch.ones(8, 1)},
            "torchao",
        ),
        (
            {
                "w.weight._data": torch.zeros(8, 8, dtype=torch.int8),
                "w.weight._scale": torch.ones(8, 1),
                "w.input_scale": torch.ones(()),
            },
            "quanto",
        ),
        (
            {
                "w.weight._data._data": torch.zeros(8, 4, dtype=torch.uint8),
                "w.weight._scale": torch.ones(8, 1),
                "w.weight._shift": torch.ones(8, 1),
            },
            "quanto",
        ),
        ({"w.weight._data": fp8(8, 8), "w.weight._scale": torch.ones(8, 1)}, "quanto"),
        (
            {
                # Four bits in a dtype of floats, as FSDP wants it (bnb_4bit_quant_storage).
                "w.weight": torch.zeros(32, 1).bfloat16(),
                "w.weight.absmax": torch.ones(1),
                "w.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
            },
            "bitsandbytes",
        ),
        (
            {"w.weight": torch.zeros(8, 8, dtype=torch.int8), "w.SCB": torch.ones(8)},
            "bitsandbytes",
        ),
        (
            {
                "w.W_q": torch.zeros(8, 4, dtype=torch.uint8),
                "w.scale": torch.ones(8, 1),
                "w.zero": torch.ones(8, 1),
            },
            "HQQ",
        ),
        (
            {
                "e.gate_up_proj": torch.zeros(2, 8, 8, dtype=torch.int8),
                "e.gate_up_proj_scale": torch.ones(2, 8, 1),
            },
            "integers with scales",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path, tensors, wrong):
    """A wrong grid, missing scales and packed integers are one clear problem each."""
    import re

    found = inspect(opened(tmp_path / "c", tensors))

    assert len(found.problems) == 1
    assert re.search(wrong, found.problems[0])


@pytest.mark.parametrize(
    "name",
    ["hc_attn_scale", "mlp.gate.global_scale", "router.per_expert_scale", "x.weight_scale_inv"],
)
def test_a_name_alone_decides_nothing(tmp_path, name):
    """Floats that are called scales, and bytes that are called blocks, are what they are."""
    tensors = {
        name: torch.ones(4),
        "w.weight": torch.ones(4, 4).bfloat16(),
        "y_blocks": torch.zeros(4, dtype=torch.uint8),
    }
    found = inspect(opened(tmp_path / "c", tensors))

    assert not found.problems
    assert not found.sources


@pytest.mark.parametrize(
    "said",
    [{"quantization": {"bits": 4}}, {"quantization_config": {"quant_method": "eetq"}}],
)
def test_a_config_is_believed_where_integers_lie_in_the_place_of_weights(tmp_path, said):
    """Matrices of integers in a model whose config speaks of a quantisation are codes."""
    tensors = {"w.weight": torch.zeros(8, 8, dtype=torch.int8), "n.weight": torch.ones(8)}

    assert inspect(opened(tmp_path / "c", tensors, said)).problems
    assert not inspect(opened(tmp_path / "d", tensors)).problems
    assert not inspect(opened(tmp_path / "e", {"w.weight": torch.ones(8, 8)}, said)).problems


def test_buffers_of_integers_are_no_codes(tmp_path):
    """Masks, positions and indices are what they are, whatever lies beside them."""
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "h.0.attn.logit_scale": torch.ones(2, 1, 1),
        "attn.relative_position_index": torch.ones(16, 16, dtype=torch.int64),
        "attn.tau_scale": torch.ones(2, 1, 1),
    }

    assert not inspect(opened(tmp_path / "c", tensors)).problems
