"""Bases of packed codes under adapters: carried to the byte, not needed, or refused by name."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

from resmerge_stream import Options, Recipe, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.errors import UnsupportedCheckpointError
from resmerge_stream.recipe import ModelRef
from tests.support import adapters

ATTENTION = replace(
    adapters.KINDS["plain"], lora={"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
)
LINEAR = adapters.KINDS["plain"]


def compressed(m, n):
    """INT4 of compressed-tensors, as Kimi-K2's experts are stored."""
    return {
        "weight_packed": torch.randint(0, 2**31 - 1, (m, n // 8), dtype=torch.int32),
        "weight_scale": torch.rand(m, n // 8).bfloat16(),
        "weight_shape": torch.tensor([m, n]),
    }


def gptq(m, n):
    """Four bits, eight in an integer, along the inputs."""
    return {
        "qweight": torch.randint(0, 2**31 - 1, (n // 8, m), dtype=torch.int32),
        "qzeros": torch.randint(0, 2**31 - 1, (1, m // 8), dtype=torch.int32),
        "scales": torch.rand(1, m).half(),
        "g_idx": torch.zeros(n, dtype=torch.int32),
    }


def bitsandbytes(m, n):
    """NF4: two values a byte in one column, and a state."""
    return {
        "weight": torch.randint(0, 255, (m * n // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(m * n // 64),
        "weight.quant_map": torch.rand(16),
        "weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
    }


def nvfp4(m, n):
    """Two values a byte, FP8 scales of 16, and one for all."""
    return {
        "weight_packed": torch.randint(0, 255, (m, n // 2), dtype=torch.uint8),
        "weight_scale": torch.rand(m, n // 8).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.rand(1),
    }


def fp8(m, n):
    """Blocks of 128, as DeepSeek publishes them."""
    return {
        "weight": torch.randn(m, n).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(1, 1),
    }


def awq(m, n):
    """Four bits, eight in an integer, along the outputs."""
    return {
        "qweight": torch.randint(0, 2**31 - 1, (n, m // 8), dtype=torch.int32),
        "qzeros": torch.randint(0, 2**31 - 1, (1, m // 8), dtype=torch.int32),
        "scales": torch.rand(1, m).half(),
    }


def mlx(m, n):
    """Four bits, eight in a word, with a scale and an offset for each group."""
    return {
        "weight": torch.randint(0, 2**31 - 1, (m, n // 8), dtype=torch.int32).view(torch.uint32),
        "scales": torch.rand(m, n // 8).bfloat16(),
        "biases": torch.rand(m, n // 8).bfloat16(),
    }


FORMATS = {
    "compressed-tensors": compressed,
    "gptq": gptq,
    "bitsandbytes": bitsandbytes,
    "nvfp4": nvfp4,
    "fp8": fp8,
    "awq": awq,
    "mlx": mlx,
}
UNREADABLE = sorted(set(FORMATS) - {"fp8"})


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A plain base, and two adapters on its attention, two on all of its linear layers."""
    folder = tmp_path_factory.mktemp("group")
    base = adapters.make_base(folder / "base", LINEAR)
    made = {
        f"{name}{seed}": adapters.make_adapter(folder / f"{name}{seed}", base, kind, seed=seed)
        for name, kind in (("attention", ATTENTION), ("linear", LINEAR))
        for seed in (1, 2)
    }
    return base, made


def packed(base, folder, name, modules=("gate_proj", "up_proj", "down_proj")):
    """Write the base with the weights of some modules packed; return its folder."""
    folder.mkdir()
    torch.manual_seed(3)
    tensors = {}
    for key, value in load_file(base / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            tensors |= {f"{module}.{k}": v for k, v in FORMATS[name](*value.shape).items()}
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": name}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merged(base, experts, out, *, method="mean", **options):
    """Plan and merge; return the plan's problems, or what was written."""
    refs = tuple(ModelRef(str(expert)) for expert in experts)
    plan = plan_merge(Recipe(ModelRef(str(base)), refs, method), Options(**options), out=out)
    if plan.problems:
        return list(map(str, plan.problems))
    list(run_merge(plan, out=out))
    plan.close()
    return load_file(next(out.glob("*.safetensors")))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_packed_tensors_that_no_adapter_changes_are_carried(group, tmp_path, name):
    """Their bytes and the config's quantisation stay; the rest is what the plain base gives."""
    base, made = group
    experts = [made["attention1"], made["attention2"]]
    there = packed(base, tmp_path / "base", name)

    written = merged(there, experts, tmp_path / "out")
    plain = merged(base, experts, tmp_path / "plain")

    stored = load_file(there / "model.safetensors")
    assert sorted(written) == sorted(stored)
    for key, value in stored.items():
        is_changed = key.endswith(("q_proj.weight", "v_proj.weight"))
        expected = plain[key] if is_changed else value
        assert written[key].dtype == expected.dtype
        assert torch.equal(written[key].view(torch.uint8), expected.view(torch.uint8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": name}
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_adapters_change_and_the_base_packs_is_refused_by_name(group, tmp_path, name):
    """The tensors are named, with the way out; no word of another base."""
    base, made = group
    there = packed(base, tmp_path / "base", name)

    problems = merged(there, [made["linear1"], made["linear2"]], tmp_path / "out")

    assert len(problems) == 1
    assert "6 tensor(s)" in problems[0]
    assert "model.layers.0.mlp.down_proj.weight" in problems[0]
    assert "--as adapter" in problems[0]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_adapter_of_adapters_needs_no_value_of_the_base(group, tmp_path, name):
    """Whatever the base's format, the merged adapter is that over the plain base, to the byte."""
    base, made = group
    experts = [made["linear1"], made["linear2"]]
    every = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    there = packed(base, tmp_path / "base", name, every)

    written = merged(there, experts, tmp_path / "out", output="adapter")
    plain = merged(base, experts, tmp_path / "plain", output="adapter")

    assert written.keys() == plain.keys()
    assert all(torch.equal(written[key], plain[key]) for key in plain)


@pytest.mark.parametrize(("method", "needs"), [("head_regression", False), ("ties", True)])
def test_a_method_that_needs_values_says_so(group, tmp_path, method, needs):
    """One that keeps to the factors merges; one that decides about each element is refused."""
    base, made = group
    there = packed(base, tmp_path / "base", "gptq")

    written = merged(
        there, [made["linear1"], made["linear2"]], tmp_path / "out", method=method,
        output="adapter", adapter_rank=4,
    )  # fmt: skip

    assert ("packed codes" in written[0]) if needs else "problem" not in written


def trained(there, folder, change=None):
    """Write a whole expert of a packed base that moved its attention; perhaps more."""
    folder.mkdir()
    tensors = load_file(there / "model.safetensors")
    draw = torch.Generator().manual_seed(len(folder.name))
    for key, value in tensors.items():
        if key.endswith(("q_proj.weight", "v_proj.weight")) and value.is_floating_point():
            tensors[key] = value + 0.01 * torch.randn(value.shape, generator=draw).to(value.dtype)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((there / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_whole_experts_that_changed_plain_tensors_alone_carry_the_rest(group, tmp_path, name):
    """Codes, scales and the config's quantisation are the base's; the attention is the mean."""
    base, made = group
    there = packed(base, tmp_path / "base", name)
    experts = [trained(there, tmp_path / "one"), trained(there, tmp_path / "another")]

    written = merged(there, experts, tmp_path / "out")

    stored, *theirs = [load_file(f / "model.safetensors") for f in (there, *experts)]
    assert sorted(written) == sorted(stored)
    for key, value in stored.items():
        assert written[key].dtype == value.dtype
        if key.endswith(("q_proj.weight", "v_proj.weight")):
            mean = (theirs[0][key].float() + theirs[1][key].float()) / 2
            torch.testing.assert_close(written[key].float(), mean, rtol=1e-2, atol=1e-4)
        else:
            assert torch.equal(written[key].view(torch.uint8), value.view(torch.uint8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": name}
    assert main(["verify", str(tmp_path / "out")]) == 0
    beside = merged(there, [experts[0], made["attention1"]], tmp_path / "beside")
    assert sorted(beside) == sorted(stored)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_packed_tensor_that_an_expert_changed_is_refused_by_name(group, tmp_path, name):
    """Told while planning, tensor by tensor; nothing is written."""
    base, _ = group
    there = packed(base, tmp_path / "base", name)
    first = next(k for k, v in load_file(there / "model.safetensors").items()
                 if "up_proj" in k and v.numel() > 8)  # fmt: skip

    def change(tensors):
        data = tensors[first].view(torch.uint8)
        data.copy_(data + 1)

    problems = merged(there, [trained(there, tmp_path / "one", change)], tmp_path / "out")

    assert any("1 packed tensor(s)" in text and first in text for text in problems)
    assert not (tmp_path / "out").exists()


def test_a_difference_in_a_row_that_no_plan_looked_at_stops_the_merge(group, tmp_path):
    """Every byte is compared when it is carried: the tensor and the model are named."""
    base, _ = group
    there = packed(base, tmp_path / "base", "compressed-tensors")
    key = "model.layers.0.mlp.up_proj.weight_packed"

    def change(tensors):
        tensors[key][1] += 1

    with pytest.raises(UnsupportedCheckpointError, match=f"{key} of .*one is packed, and differs"):
        merged(there, [trained(there, tmp_path / "one", change)], tmp_path / "out")
