"""Packed checkpoints with a part changed at random: merged, or refused in one message."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz import message_of, run_in_process
from tests.support.checkpoints import write_json

ROWS, COLUMNS = 64, 256
WEIGHT = "model.layers.0.mlp.down_proj.weight"
MODULE = WEIGHT.removesuffix(".weight")
CASES = 25


def _codes(*shape, dtype=torch.uint8):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, generator=torch.manual_seed(2)).to(dtype)


def _scales(*shape):
    return 0.01 * torch.rand(*shape, generator=torch.manual_seed(3)) + 0.001


def _compressed(kind, **weights):
    said = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 32} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": said}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


_FP8 = torch.randn(ROWS, COLUMNS, generator=torch.manual_seed(1)).to(torch.float8_e4m3fn)
_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
_GPTQ = {
    "qweight": _codes(COLUMNS // 8, ROWS, dtype=torch.int32),
    "qzeros": _codes(2, ROWS // 8, dtype=torch.int32),
    "scales": _scales(2, ROWS).half(),
}
# By format: what stands in the weight's place, by what follows the module's name, and what the
# config says.
FORMATS = {
    "FP8 in blocks": (
        {"weight": _FP8, "weight_scale_inv": _scales(1, 2)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "FP8 by row": (
        {"weight": _FP8, "weight_scale": _scales(ROWS, 1)},
        _compressed("float-quantized", num_bits=8, strategy="channel"),
    ),
    "INT4": (
        {
            "weight_packed": _codes(ROWS, COLUMNS // 8, dtype=torch.int32),
            "weight_scale": _scales(ROWS, COLUMNS // 32).bfloat16(),
            "weight_zero_point": _codes(ROWS // 8, COLUMNS // 32, dtype=torch.int32),
            "weight_shape": torch.tensor([ROWS, COLUMNS]),
        },
        _compressed("pack-quantized", type="int", symmetric=False, strategy="group"),
    ),
    "NVFP4": (
        {
            "weight_packed": _codes(ROWS, COLUMNS // 2),
            "weight_scale": _scales(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([3.0]),
        },
        _compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16),
    ),
    "MXFP8": (
        {"weight": _FP8, "weight_scale": _codes(ROWS, COLUMNS // 32) % 8 + 115},
        _compressed("mxfp8-quantized", num_bits=8, strategy="group", scale_dtype="torch.uint8"),
    ),
    "GPTQ": (
        _GPTQ | {"g_idx": (torch.arange(COLUMNS) // 128).to(torch.int32)},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    ),
    "AWQ": (
        {
            "qweight": _codes(COLUMNS, ROWS // 8, dtype=torch.int32),
            "qzeros": _GPTQ["qzeros"],
            "scales": _GPTQ["scales"],
        },
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    ),
    "NF4": (
        {
            "weight": _codes(ROWS * COLUMNS // 2, 1),
            "weight.absmax": _scales(ROWS * COLUMNS // 64),
            "weight.quant_map": torch.linspace(-1, 1, 16),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(_STATE).encode()), dtype=torch.uint8
            ),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}
# What a number, a word or a list of a config or a state may turn into.
_VALUES = (
    0, -1, 1, 3, 5, 7, 10**9, 10**30, 0.5, float("nan"), True, None, "", "4", "\x1b[31m", [],
    [0, 0], [-128, 128], [10**12, 10**12], {}, {"a": 1},
)  # fmt: skip
_NUMBERS = (0.0, -1.0, 255.0, 1e38, float("nan"), float("inf"), -(2.0**31))
_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32)


def _change_tensor(tensors, rng):
    """Change one tensor: drop it, cut it, turn it, enlarge it, cast it, or set some values."""
    suffix = rng.choice(sorted(tensors))
    tensor = tensors[suffix]
    how = rng.choice(("drop", "cut", "turn", "longer", "cast", "values", "flat", "empty", "twice"))
    if how == "drop" or not tensor.numel():
        del tensors[suffix]
    elif how == "cut" and tensor.dim():
        axis = rng.randrange(tensor.dim())
        tensors[suffix] = tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis]))
    elif how == "turn" and tensor.dim() == 2:
        tensors[suffix] = tensor.T
    elif how == "longer" and tensor.dim():
        axis = rng.randrange(tensor.dim())
        raw = torch.cat([tensor.view(torch.uint8) if tensor is _FP8 else tensor] * 2, dim=axis)
        tensors[suffix] = raw.view(tensor.dtype) if tensor is _FP8 else raw
    elif how == "cast":
        tensors[suffix] = tensor.float().nan_to_num().to(rng.choice(_DTYPES))
    elif how == "values":
        changed = tensor.float().flatten()
        changed[rng.randrange(len(changed))] = rng.choice(_NUMBERS)
        tensors[suffix] = changed.view(tensor.shape).to(tensor.dtype)
    elif how == "flat":
        tensors[suffix] = tensor.flatten()
    elif how == "empty":
        tensors[suffix] = tensor.flatten()[:0]
    elif how == "twice":
        tensors[rng.choice(("weight", "weight_scale", "scales", "g_idx", "biases"))] = tensor
    return f"{how} {suffix}"


def _change_document(document, rng):
    """Change one value of a config, wherever it lies; or lose it."""
    nodes, found = [document], []
    while nodes:
        node = nodes.pop()
        found += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
        nodes += [
            part
            for part in (node.values() if isinstance(node, dict) else node)
            if isinstance(part, dict | list)
        ]
    node, key = rng.choice(found)
    if rng.random() < 0.2:
        del node[key]
        return f"without {key}"
    node[key] = rng.choice(_VALUES)
    return f"{key} = {node[key]!r}"


def changed(form, number):
    """Return the tensors and the config of a case, and what was changed, in words."""
    rng = random.Random(f"{form} {number}")
    tensors, quantisation = FORMATS[form]
    tensors, quantisation = dict(tensors), json.loads(json.dumps(quantisation))
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        state = next((name for name in tensors if "quant_state" in name), None)
        kinds = ["tensor", "tensor", "config"] + ["state"] * (state is not None)
        kind = rng.choice(kinds)
        if kind == "tensor":
            done.append(_change_tensor(tensors, rng))
        elif kind == "config" and quantisation:
            done.append(_change_document(quantisation, rng))
        elif kind == "state":
            said = dict(_STATE, shape=[ROWS, COLUMNS])
            done.append(_change_document(said, rng))
            data = json.dumps(said).encode()
            if rng.random() < 0.3:
                data = data[: rng.randrange(len(data))]
            tensors[state] = torch.tensor(list(data), dtype=torch.uint8)
    return tensors, quantisation, ", ".join(done)


def write(folder, tensors, quantisation=None):
    """Write a checkpoint of one block, with these tensors for its matrix."""
    folder.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(7)
    plain = {
        "model.embed_tokens.weight": torch.randn(8, ROWS, generator=rng).bfloat16(),
        "model.norm.weight": torch.ones(ROWS).bfloat16(),
    }
    own = {
        f"{MODULE}.{suffix}": tensor.clone(memory_format=torch.contiguous_format)
        for suffix, tensor in tensors.items()
    }
    save_file(plain | own, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": ROWS}
    config |= {"vocab_size": 8, "num_hidden_layers": 1, "intermediate_size": COLUMNS}
    quantised = {} if quantisation is None else {"quantization_config": quantisation}
    write_json(folder / "config.json", config | quantised)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A plain base beside which packed experts are written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=torch.manual_seed(9))
    write(tmp_path / "base", {"weight": weight.bfloat16()})
    return tmp_path / "base"


def merged(base, expert, out):
    """Merge one expert, whatever it has in common with the base."""
    options = ["--base", str(base), "--expert", str(expert), "--unrelated", "merge"]
    return run_in_process("merge", *options, "--method", "mean", "--out", str(out))


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_expert_is_read(form, base, tmp_path):
    """As it is written here, each format is one that merges: what is changed below is right."""
    write(tmp_path / "expert", *FORMATS[form])

    outcome = merged(base, tmp_path / "expert", tmp_path / "out")

    assert outcome.code == 0, outcome.text + outcome.crash
    assert load_file(tmp_path / "out" / "model.safetensors")[WEIGHT].isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_packed_expert_is_merged_or_refused_in_one_message(form, base, tmp_path):
    """Exit 0 with finite weights of the right shape, or exit 2 and a line that names the model."""
    failures, refused = [], 0
    for number in range(CASES):
        tensors, quantisation, what = changed(form, number)
        expert, out = tmp_path / f"expert{number}", tmp_path / f"out{number}"
        write(expert, tensors, quantisation)

        outcome = merged(base, expert, out)

        message = message_of(outcome.text)
        case = f"{form} {number} ({what}): "
        if outcome.crash or outcome.code not in (0, 2):
            failures.append(f"{case}{outcome.code} {outcome.crash} {message[-300:]}")
        elif outcome.code == 0:
            weight = load_file(out / "model.safetensors")[WEIGHT]
            if weight.shape != (ROWS, COLUMNS) or not weight.isfinite().all():
                failures.append(f"{case}merged to {tuple(weight.shape)}")
        else:
            refused += 1
            if expert.name not in message or not 20 < len(message) < 1000 or "\x1b" in message:
                failures.append(f"{case}{message[:700]!r}")
            if out.exists() and list(out.glob("*.safetensors")):
                failures.append(f"{case}refused, and wrote weights")
    assert not failures, f"{len(failures)} wrong\n" + "\n".join(failures[:20])
    assert 0 < refused < CASES
