"""A merge written in FP8: the bits of another quantiser, what transformers loads, what is left."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from resmerge_stream import Options
from resmerge_stream.cli.main import main
from resmerge_stream.errors import PlanRefusedError
from resmerge_stream.maths.quantise import fp8_blocks, fp8_rounded
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support.checkpoints import (
    Group,
    file_bytes,
    make_group,
    merge,
    plan_group,
    recipe_of,
    write_checkpoint,
)

HIDDEN = 128


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A base whose matrices are one block wide and several blocks tall."""
    return make_group(tmp_path_factory.mktemp("group"), experts=2, layers=2, hidden=HIDDEN)


@pytest.fixture(scope="module")
def made(group, tmp_path_factory):
    """Merges in FP8 and in float32, by method; each made once."""
    out, known = tmp_path_factory.mktemp("made"), {}

    def make(method, dtype="fp8"):
        if (method, dtype) not in known:
            place = out / f"{method}-{dtype}"
            known[method, dtype] = merge(group, place, method=method, dtype=dtype)
        return known[method, dtype]

    return make


def theirs(weights):
    """Return codes and scales by transformers' own quantiser, which takes whole blocks alone."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    said = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=None)
    m, n = weights.shape
    whole = torch.nn.functional.pad(weights, (0, -n % 128, 0, -m % 128))
    found = Fp8Quantize(SimpleNamespace(quantization_config=said))._quantize_one("w", whole)
    return found["w"][:m, :n], found["w_scale_inv"]


@pytest.mark.parametrize("method", ["mean", "ties", "head_regression"])
def test_codes_and_scales_are_those_of_transformers(made, method):
    """Of the merge in float32, to the bit: by row blocks, decided whole, and decomposed."""
    whole, written = made(method, "float32").tensors, made(method).tensors
    codes = [n for n, t in written.items() if t.dtype == torch.float8_e4m3fn]

    assert len(codes) == 14
    for name in codes:
        ours, scales = written[name], written[f"{name}_scale_inv"]
        expected, inverse = theirs(whole[name])
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(scales, inverse), name
    rest = set(written) - {*codes, *(f"{name}_scale_inv" for name in codes)}
    assert rest == set(whole) - set(codes)
    assert all(written[n].dtype == torch.bfloat16 for n in rest)
    assert all(torch.equal(written[n], whole[n].bfloat16()) for n in rest)


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (128, 128), (129, 257), (300, 4)])
def test_blocks_at_the_edges_have_scales_of_their_own(shape):
    """Written out, a block at a time; a block of zeros stays one."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    weights[:128, :128] *= 0
    codes, scales = fp8_blocks(weights)

    back = fp8_rounded(weights)
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            part = weights[i : i + 128, j : j + 128]
            scale = part.abs().max().double() / 448
            assert scales[i // 128, j // 128].item() == pytest.approx(float(scale) or 1.0)
            error = (back[i : i + 128, j : j + 128] - part).abs()
            assert bool((error <= part.abs() / 16 + scale.float() * 2**-10).all())
    assert codes.shape == weights.shape


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it(made):
    """On a CPU it is read back unquantised: every value is code times scale."""
    transformers = pytest.importorskip("transformers")
    folder = made("mean").out
    config = json.loads((folder / "config.json").read_text())["quantization_config"]

    assert config["weight_block_size"] == [128, 128]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.FineGrainedFP8Config(
            dequantize=True, modules_to_not_convert=config["modules_to_not_convert"]
        ),
    )
    stored, state = made("mean").tensors, loaded.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    m, n = stored[name].shape
    expected = stored[name].float() * scales[:m, :n]
    assert torch.equal(state[name].bfloat16(), expected.bfloat16())


def test_what_is_left_of_the_update_is_told_tensor_by_tensor(made, group):
    """Kept norm and cosine are those between base and merge, both in FP8; the plan announces it."""
    whole, base = made("mean", "float32").tensors, load_file(group.base / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        row = made("mean").row(name)
        delta = whole[name].double() - base[name].double()
        kept = fp8_rounded(whole[name]).double() - fp8_rounded(base[name].float()).double()
        assert row["kept_norm"] == pytest.approx(float(kept.norm() / delta.norm()), rel=1e-4)
        cosine = (kept * delta).sum() / kept.norm() / delta.norm()
        assert row["kept_cosine"] == pytest.approx(float(cosine), rel=1e-4)
    assert any("14 of " in text and "FP8" in text for text in plan_group(
        group, method="mean", dtype="fp8").warnings)  # fmt: skip


def test_an_fp8_merge_verifies_and_is_read_again(made, group, tmp_path):
    """`verify` merges tensors again; as a base it is dequantised, and merged in FP8 once more."""
    assert main(["verify", str(made("mean").out)]) == 0
    again = merge(
        Group(made("mean").out, group.experts), tmp_path / "out", method="mean", dtype="fp8"
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert again.tensors[name].dtype == torch.float8_e4m3fn


def test_scales_and_codes_are_in_one_file_and_a_stopped_merge_continues(group, tmp_path):
    """In many small shards too; what was finished stays."""
    from resmerge_stream.run.engine import run_merge
    from resmerge_stream.run.events import ShardFinished

    options = Options(max_shard_bytes=20_000)
    recipe = {"method": "mean", "dtype": "fp8", "options": options}
    whole = merge(group, tmp_path / "whole", **recipe)
    plan = plan_group(group, out=tmp_path / "out", **recipe)
    for event in (events := run_merge(plan, out=tmp_path / "out")):
        if isinstance(event, ShardFinished):
            break
    events.close()
    plan.close()
    made = merge(group, tmp_path / "out", **recipe)

    assert any(isinstance(event, ShardFinished) and event.resumed for event in made.events)
    assert file_bytes(tmp_path / "out") == file_bytes(whole.out)
    index = json.loads((whole.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert all(index[n.removesuffix("_scale_inv")] == f for n, f in index.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "adapter", "adapter_rank": 4}, "an adapter's factors"),
        ({"rounding": "stochastic"}, "rounded to nearest"),
    ],
)
def test_what_has_no_fp8_is_refused(group, options, words):
    """An adapter's factors, and rounding at random."""
    plan = plan_group(group, method="mean", dtype="fp8", options=Options(**options))

    assert any(words in problem for problem in plan.problems)


def test_a_comparison_is_not_written_in_fp8(group, tmp_path):
    """Its methods share row blocks, and FP8's scales belong to other ones: it says so."""
    recipe = recipe_of(group, dtype="fp8")

    with pytest.raises(PlanRefusedError, match="a comparison is not written in fp8"):
        plan_comparison(recipe, ["mean", "ties"], out=tmp_path / "out")


def test_a_model_without_linear_maps_in_layers_is_refused(group, tmp_path):
    """Nothing would be in FP8: a plan says what would be, and which dtypes there are."""
    folders = [tmp_path / name for name in ("base", "expert")]
    for number, folder in enumerate(folders):
        config = json.loads((group.base / "config.json").read_text())
        write_checkpoint(folder, {"model.norm.weight": torch.ones(8) + number}, config)

    plan = plan_group(Group(folders[0], (folders[1],)), method="mean", dtype="fp8")

    assert any("no linear map" in problem for problem in plan.problems)
