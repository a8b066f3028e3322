"""Codes with scales of groups: the bits that the libraries which write them read."""

import pytest
import torch

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from resmerge_stream.sources.quantised import dequantised, inspect
from tests.sources.test_quantised import opened, values_of

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SCHEMES = {
    "INT4 in groups": ("pack-quantized", INT4),
    "INT4 with zeros": ("pack-quantized", INT4 | {"symmetric": False}),
    "INT4 by row": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
    ),
    "INT8 in groups": ("pack-quantized", INT4 | {"num_bits": 8}),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
         "group_size": 16},
    ),
    "MXFP4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
         "scale_dtype": "torch.uint8"},
    ),
    "MXFP8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
         "scale_dtype": "torch.uint8"},
    ),
}  # fmt: skip


def compressed(said, kind, weight):
    """Return a module's tensors as compressed-tensors writes them, and the weight it reads."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said))
    size = said.get("group_size", weight.shape[1])
    parts = weight.float().unflatten(1, (-1, size))
    low, high = parts.amin(-1), parts.amax(-1)
    state = {"weight": weight}
    if kind == "nvfp4-pack-quantized":
        state["weight_global_scale"] = (448.0 * 6.0 / weight.abs().max().float()).reshape(1)
        scale = parts.abs().amax(-1) / 6.0 * state["weight_global_scale"]
        state["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
    elif kind.startswith("mx"):
        most = 6.0 if said["num_bits"] == 4 else 448.0
        state["weight_scale"] = torch.exp2(torch.ceil(torch.log2(parts.abs().amax(-1) / most)))
    else:
        scale, zero = calculate_qparams(low, high, scheme.weights)
        state |= {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("rows", [24, 40])
def test_compressed_tensors_codes_have_its_bits(tmp_path, name, rows):
    """Values, rounded to bfloat16, are those of the library that wrote the codes."""
    kind, said = SCHEMES[name]
    torch.manual_seed(rows)
    weight = (0.05 * torch.randn(rows, 128)).bfloat16()
    stored, theirs = compressed(said, kind, weight)
    assert (theirs.float() - weight.float()).norm() < 0.3 * weight.float().norm()
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": kind,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}},
        }
    }  # fmt: skip

    checkpoint = opened(tmp_path / "c", {f"w.{k}": v for k, v in stored.items()}, config)

    ours = values_of(checkpoint, "w.weight")
    assert torch.equal(ours.bfloat16(), theirs.bfloat16())
    view = dequantised(checkpoint, inspect(checkpoint))
    assert list(view.tensors) == ["w.weight"]
    assert "quantization_config" not in view.config


def test_modelopts_names_of_nvfp4_are_read(tmp_path):
    """`weight`, `weight_scale`, `weight_scale_2`: the last is a factor, not a divisor."""
    torch.manual_seed(1)
    codes = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    scales = torch.rand(8, 4).to(torch.float8_e4m3fn)
    tensors = {"w.weight": codes, "w.weight_scale": scales, "w.weight_scale_2": torch.tensor(0.3)}
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    expected = torch.empty(8, 64)
    for i in range(8):
        for j in range(64):
            code = int(codes[i, j // 2]) >> (4 * (j % 2)) & 15
            expected[i, j] = e2m1[code] * (scales[i, j // 16].float() * torch.tensor(0.3))

    assert torch.equal(values_of(opened(tmp_path / "c", tensors), "w.weight"), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [96, 128])
def test_bitsandbytes_codes_have_its_bits(tmp_path, kind, is_nested, dtype, columns):
    """Four bits with scales of 64 values, also where the scales are codes themselves."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.default import ops as default

    torch.manual_seed(5)
    weight = (0.05 * torch.randn(50, columns)).to(dtype)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_nested, quant_type=kind
    )
    if columns % 64:
        # Its compiled loop for CPUs is off where a row ends inside of a block (0.50.2).
        scales = state.absmax
        if is_nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        theirs = default._dequantize_4bit_compute(
            codes.flatten(), scales, state.code, 64, weight.shape, dtype
        )
    else:
        theirs = functional.dequantize_4bit(codes, state)
    assert (theirs.float() - weight.float()).norm() < 0.15 * weight.float().norm()
    packed = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}

    checkpoint = opened(tmp_path / "c", {"w.weight": codes, **packed})

    assert torch.equal(values_of(checkpoint, "w.weight").to(dtype), theirs)


def test_awq_codes_have_the_bits_of_their_converter(tmp_path):
    """compressed-tensors converts AutoAWQ's files; read as it decompresses them, they are ours."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    generator = torch.Generator().manual_seed(8)
    words = {"dtype": torch.int32, "generator": generator}
    tensors = {
        "w.qweight": torch.randint(-(2**31), 2**31 - 1, (96, 40 // 8), **words),
        "w.qzeros": torch.randint(-(2**31), 2**31 - 1, (3, 40 // 8), **words),
        "w.scales": torch.rand(3, 40, generator=generator).half(),
    }
    converted = AutoAWQConverter(group_size=32).process(dict(tensors))
    said = INT4 | {"symmetric": False}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.removeprefix("w."): value for name, value in converted.items()}
    theirs = compressor.decompress(state, scheme)["weight"]
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}

    ours = values_of(opened(tmp_path / "c", tensors, config), "w.weight")

    assert torch.equal(ours.half(), theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_gptq_codes_follow_the_formula(tmp_path, bits, form, is_ordered):
    """(code − zero) · scale of the input's group; the first format's zeros are one less.

    GPTQModel, whose formula it is, cannot be installed without its kernels.
    """
    generator = torch.Generator().manual_seed(bits)
    codes, zeros = (
        torch.randint(0, 2**bits, shape, generator=generator) for shape in ((64, 16), (4, 16))
    )
    scales = torch.rand(4, 16, generator=generator).half()
    group = torch.arange(64) // 16
    if not is_ordered:
        group = group[torch.randperm(64, generator=generator)]
    packed = 32 // bits

    def words(values):
        """Pack the first axis, the lowest bits first."""
        parts = (
            values.reshape(-1, packed, values.shape[1]) << (bits * torch.arange(packed))[:, None]
        )
        return parts.sum(1).to(torch.int64).to(torch.int32)

    tensors = {
        "w.qweight": words(codes),
        "w.qzeros": words(zeros.T.contiguous()).T.contiguous(),
        "w.scales": scales,
    }
    if not is_ordered:
        tensors["w.g_idx"] = group.to(torch.int32)
    said = {"quant_method": "gptq", "bits": bits, "group_size": 16}
    config = {"quantization_config": said | ({"checkpoint_format": form} if form else {})}
    expected = torch.empty(16, 64, dtype=torch.float64)
    for j in range(16):
        for i in range(64):
            zero = int(zeros[group[i], j]) + (form != "gptq_v2")
            expected[j, i] = (int(codes[i, j]) - zero) * float(scales[group[i], j])

    ours = values_of(opened(tmp_path / "c", tensors, config), "w.weight")

    assert torch.equal(ours.double(), expected)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"w.weight_scale": torch.ones(8, 3).bfloat16()}, "scales of another count"),
        ({"w.weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "columns in another order"),
        ({"w.weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "zeros of another shape"),
        ({"w.weight_packed": torch.zeros(8, 9, dtype=torch.int32)}, "words of another count"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, change, what):
    """A shape or an order that the formula does not cover is no value."""
    tensors = {
        "w.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "w.weight_scale": torch.ones(8, 2).bfloat16(),
        "w.weight_shape": torch.tensor([8, 64]),
    }
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": INT4}}}}
    assert not inspect(opened(tmp_path / "right", tensors, config)).problems

    found = inspect(opened(tmp_path / "wrong", tensors | change, config))

    assert found.problems, what


@pytest.mark.parametrize(
    "state", [b"{", b"[]", b'{"shape": [9, 9], "blocksize": 64}', b'{"shape": [4, 16]}']
)
def test_a_state_that_says_nothing_is_refused(tmp_path, state):
    """bitsandbytes' JSON may be broken, or of another shape than the codes."""
    tensors = {
        "w.weight": torch.zeros(32, 1, dtype=torch.uint8),
        "w.weight.absmax": torch.ones(1),
        "w.weight.quant_map": torch.ones(16),
        "w.weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(state), dtype=torch.uint8
        ),
    }

    found = inspect(opened(tmp_path / "c", tensors))

    assert len(found.problems) == 1
    assert "bitsandbytes" in found.problems[0]
