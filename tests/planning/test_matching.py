"""Experts whose names, layout or storage differ from the base's, through plan and written file."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from resmerge_stream.errors import NonFiniteError
from resmerge_stream.planning.options import Options
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.recipe import ModelRef
from resmerge_stream.run.engine import run_merge
from tests.support.checkpoints import (
    Group,
    edit_config,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
    recipe_of,
    write_json,
)

pytestmark = pytest.mark.usefixtures("without_picture")
Q = "model.layers.0.self_attn.q_proj.weight"


def renamed(folder, pattern, replacement):
    """Rename the tensors of a checkpoint's only file."""
    path = folder / "model.safetensors"
    tensors = {re.sub(pattern, replacement, n): t.clone() for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def inside_a_multimodal_model(folder):
    """Name a text model's tensors and config as trainers of multimodal models write them."""
    renamed(folder, r"^model\.", "model.language_model.")
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    write_json(folder / "config.json", whole | {"text_config": config})


def equal(left, right):
    """Whether two folders hold the same tensors, bit for bit."""
    ours, theirs = read_tensors(left), read_tensors(right)
    return set(ours) == set(theirs) and all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours
    )


@pytest.mark.parametrize("method", ["mean", "resmerge"])
@pytest.mark.parametrize("which", ["experts", "base"])
def test_a_wrapper_around_the_text_model_changes_nothing(tmp_path, which, method):
    """`model.layers` and `model.language_model.layers` are the same tensors, either way round."""
    group = make_group(tmp_path / "a", experts=2)
    merge(group, tmp_path / "plain", method=method)
    for folder in [group.base] if which == "base" else group.experts:
        inside_a_multimodal_model(folder)

    plan = plan_group(group, method=method)
    merge(group, tmp_path / "merged", method=method)

    assert any("were matched" in text for text in plan.warnings)
    if which == "base":
        renamed(tmp_path / "merged", r"^model\.language_model\.", "model.")
    assert equal(tmp_path / "plain", tmp_path / "merged")


def test_names_that_nothing_pairs_are_refused_with_the_pairs(tmp_path):
    """Tensors without a counterpart on both sides, of one module and shape: never carried."""
    group = make_group(tmp_path, experts=2)
    renamed(group.experts[1], r"^model\.layers\.", "decoder.units.")

    plan = plan_group(group)

    (problem,) = (text for text in plan.problems if "look like" in text)
    assert re.search(r"model\.layers\.(\S+) ↔ decoder\.units\.\1'", problem)


@pytest.mark.parametrize("whose", ["base", "experts"])
def test_another_layer_of_one_shape_is_no_other_name(tmp_path, whose):
    """A pooler's map is not a head's: each side's own is left as it is, and that is said."""
    group = make_group(tmp_path, experts=2)
    names = ["pooler.dense.weight", "cls.transform.dense.weight"]
    ours, theirs = names if whose == "base" else names[::-1]
    for name, folders in ((ours, [group.base]), (theirs, group.experts)):
        for folder in folders:
            edit_tensors(
                folder, lambda tensors, name=name: tensors.update({name: torch.ones(9, 9)})
            )

    plan = plan_group(group)

    assert not plan.refused, plan.problems
    assert any(theirs in text for text in plan.warnings)


def test_experts_of_another_model_are_refused(tmp_path):
    """Where no tensor of the base is in any expert, nothing can be merged."""
    group = make_group(tmp_path, experts=2)
    for folder in group.experts:
        edit_tensors(folder, lambda tensors: (tensors.clear(), tensors.update(x=torch.ones(1))))

    plan = plan_group(group)

    assert any("nothing to merge" in text for text in plan.problems)


def test_a_base_that_is_barely_touched_is_said_first(tmp_path):
    """Fewer than half of the base's bytes in any expert: the first warning says how many."""
    group = make_group(tmp_path, experts=2)
    tower = {"visual.blocks.0.weight": torch.ones(400, 400)}
    edit_tensors(group.base, lambda tensors: tensors.update(tower))

    plan = plan_group(group)

    assert "of the base's bytes are touched" in plan.warnings[0]
    assert not plan.problems


def test_layers_that_some_experts_lack_are_merged_among_the_others(tmp_path):
    """Layers for predicting further tokens: merged where they are, with what they are listed."""
    group = make_group(tmp_path / "group", experts=2)
    extra = {"model.mtp.proj.weight": torch.eye(32, dtype=torch.bfloat16)}
    edit_tensors(group.base, lambda tensors: tensors.update(extra))
    theirs = {name: tensor * 3 for name, tensor in extra.items()}
    edit_tensors(group.experts[1], lambda tensors: tensors.update(theirs))

    plan = plan_group(group, method="mean")
    merge(group, tmp_path / "merged", method="mean")

    assert plan.tensors["model.mtp.proj.weight"].experts == (1,)
    assert any("are merged without" in text for text in plan.warnings)
    merged = read_tensors(tmp_path / "merged")["model.mtp.proj.weight"]
    assert torch.equal(merged, theirs["model.mtp.proj.weight"])


def test_an_expert_keeps_its_own_parameters_where_others_lack_the_tensor(tmp_path):
    """Densities are the experts' own, whoever else has the tensor."""
    group = make_group(tmp_path / "group", experts=3)
    extra = {"model.mtp.proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16)}
    edit_tensors(group.base, lambda tensors: tensors.update(extra))
    ramp = torch.arange(1.0, 65.0).reshape(8, 8).to(torch.bfloat16)
    for folder in group.experts[1:]:
        edit_tensors(folder, lambda tensors: tensors.update({"model.mtp.proj.weight": ramp}))
    recipe = replace(
        recipe_of(group, method="ties"),
        experts=tuple(
            ModelRef(str(folder), parameters={"density": density})
            for folder, density in zip(group.experts, (1.0, 0.5, 0.25), strict=True)
        ),
        parameters={"normalize": False},
    )

    list(run_merge(plan_merge(recipe), out=tmp_path / "merged"))

    merged = read_tensors(tmp_path / "merged")["model.mtp.proj.weight"].float()
    wanted = ramp.float() * (ramp >= 33).float() + ramp.float() * (ramp >= 49).float()
    assert torch.equal(merged, wanted.to(torch.bfloat16).float())


def test_a_partial_expert_can_be_refused(tmp_path):
    """Who wants every tensor from every expert says so, and is told what lacks."""
    group = make_group(tmp_path / "group", experts=2)
    extra = {"model.mtp.proj.weight": torch.eye(32, dtype=torch.bfloat16)}
    for folder in (group.base, group.experts[1]):
        edit_tensors(folder, lambda tensors: tensors.update(extra))

    plan = plan_group(group, options=Options(missing="refuse"))

    (problem,) = plan.problems
    assert "model.mtp.proj.weight" in problem
    assert str(group.experts[0]) in problem


@pytest.mark.parametrize("how", ["itself", "link"])
def test_experts_that_are_the_base_are_refused(tmp_path, how):
    """Where every expert is the base's own folder, under whatever name, nothing differs."""
    group = make_group(tmp_path / "group", experts=1)
    expert = group.base
    if how == "link":
        expert = tmp_path / "expert"
        expert.symlink_to(group.base)

    plan = plan_group(Group(group.base, (expert, group.base)))

    assert any("nothing differs" in text for text in plan.problems)


def test_the_report_says_what_was_matched(tmp_path):
    """Each expert's tensors with other names stand in the report beside the base's."""
    group = make_group(tmp_path / "group", experts=2)
    inside_a_multimodal_model(group.experts[1])

    merged = merge(group, tmp_path / "merged", method="mean")

    same, other = merged.report["matched"]
    assert same == {}
    assert other[Q] == [Q.replace("model.", "model.language_model.", 1)]


def test_a_layer_that_the_config_promises_is_missed(tmp_path):
    """An expert without a tensor of its own layers is not complete, and refused."""
    group = make_group(tmp_path, experts=2)
    edit_tensors(group.experts[0], lambda tensors: tensors.pop(Q))

    plan = plan_group(group)

    assert any("whose config says" in text and Q in text for text in plan.problems)


def quantised(folder, names, scale=0.01):
    """Store tensors of a checkpoint as FP8 with a scale for each block of 128 × 128."""

    def change(tensors):
        for name in names:
            m, n = tensors[name].shape
            grid = torch.full((-(-m // 128), -(-n // 128)), scale)
            tensors[f"{name}_scale_inv"] = grid
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)

    edit_tensors(folder, change)
    edit_config(folder, quantization_config={"quant_method": "fp8"})


@pytest.mark.parametrize("which", ["base", "experts", "all"])
def test_fp8_is_read_as_numbers(tmp_path, which):
    """FP8 base, experts or both: the mean of their values, in bfloat16, and a config to match."""
    group = make_group(tmp_path / "group", experts=2)
    folders = {"base": [group.base], "experts": group.experts, "all": group.folders}[which]
    for folder in folders:
        quantised(folder, [Q])
    values = []
    for folder in group.folders:
        tensors = read_tensors(folder)
        scales = tensors.get(f"{Q}_scale_inv", torch.ones(1, 1))
        values.append(tensors[Q].double() * float(scales[0, 0].double()))
    base, *experts = values
    expected = base + sum(expert - base for expert in experts) / 2

    plan = plan_group(group, method="mean")
    merge(group, tmp_path / "merged", method="mean")

    got = read_tensors(tmp_path / "merged")
    said = [text for text in plan.warnings if "is quantised (1 × FP8" in text]
    assert len(said) == len(folders)
    # Of an expert it matters how much of its update is rounding; a base has none.
    wary = [text for text in said if "Rounding may have changed" in text]
    assert len(wary) == {"base": 0, "experts": 2, "all": 2}[which]
    assert got[Q].dtype is torch.bfloat16
    assert f"{Q}_scale_inv" not in got
    assert (got[Q].double() - expected).abs().max() <= expected.abs().max() * 2**-8
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_stop_the_merge(tmp_path, wrong):
    """A NaN or infinite scale is found when its tensor is read, and named with its checkpoint."""
    group = make_group(tmp_path / "group", experts=2)
    quantised(group.experts[1], [Q])
    edit_tensors(group.experts[1], lambda tensors: tensors[f"{Q}_scale_inv"].fill_(wrong))

    with pytest.raises(NonFiniteError, match=f"{Q} of .*expert1 holds NaN or infinite"):
        merge(group, tmp_path / "merged")


def test_a_config_that_lies_about_its_scales_is_refused(tmp_path):
    """Blocks of 64 × 64 in the config, scales for 128 × 128 beside the codes: one message."""
    group = make_group(tmp_path, experts=2, hidden=256)
    quantised(group.experts[0], [Q])
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    edit_config(group.experts[0], quantization_config=config)

    (problem,) = plan_group(group).problems

    assert "blocks of 64" in problem
    assert str(group.experts[0]) in problem


def test_mxfp4_without_a_word_in_the_config_is_read(tmp_path):
    """Blocks and scales speak for themselves: experts as gpt-oss stores them, a base in bf16."""
    group = make_group(tmp_path / "group", layers=1, experts=2)
    name = "model.layers.0.mlp.experts.down_proj"
    random = torch.Generator().manual_seed(0)
    base = torch.randn(3, 64, 10, generator=random).bfloat16()
    edit_tensors(group.base, lambda tensors: tensors.update({name: base}))
    theirs = []
    for folder in group.experts:
        blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(120, 130, (3, 10, 2), generator=random, dtype=torch.uint8)
        codes = {f"{name}_blocks": blocks, f"{name}_scales": scales}
        edit_tensors(folder, lambda tensors, codes=codes: tensors.update(codes))
        theirs.append(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))

    merged = merge(group, tmp_path / "merged", method="mean", dtype="float32")

    expected = sum(values.double() for values in theirs) / 2
    assert torch.allclose(merged.tensors[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_text_experts_merge_into_a_multimodal_base(tmp_path):
    """The text model is matched and merged; the image tower stays the base's, and is listed."""
    group = make_group(tmp_path / "group", experts=2)
    plain = merge(group, tmp_path / "plain")
    inside_a_multimodal_model(group.base)
    tower = {"model.visual.blocks.0.attn.qkv.weight": torch.ones(6, 4, dtype=torch.bfloat16)}
    edit_tensors(group.base, lambda tensors: tensors.update(tower))

    merged = merge(group, tmp_path / "merged")

    assert merged.row(*tower)["rule"] == "carried"
    for name, tensor in plain.tensors.items():
        ours = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(merged.tensors[ours], tensor)
    assert any(
        "qkv" in text and "kept as in the base" in text
        for text in merged.report["summary"]["warnings"]
    )


def test_the_card_says_first_that_little_is_touched(tmp_path):
    """Whoever opens the card of a near no-op reads so above the list of experts."""
    group = make_group(tmp_path / "group", experts=2)
    tower = {"visual.blocks.0.weight": torch.ones(400, 400)}
    edit_tensors(group.base, lambda tensors: tensors.update(tower))

    merge(group, tmp_path / "out")

    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("of the base's bytes are touched") < card.index("- Base:")


def test_a_quantised_tensor_that_no_expert_has_is_carried_unquantised(tmp_path):
    """What only a quantised base has is written in the output's dtype, its values rounded once."""
    group = make_group(tmp_path / "group", experts=2)
    edit_tensors(group.base, lambda tensors: tensors.update({"mtp.w.weight": torch.randn(64, 32)}))
    quantised(group.base, ["mtp.w.weight"], scale=0.5)
    codes = read_tensors(group.base)["mtp.w.weight"]

    merge(group, tmp_path / "merged", method="mean")

    got = read_tensors(tmp_path / "merged")["mtp.w.weight"]
    assert torch.equal(got, (codes.float() * 0.5).to(torch.bfloat16))


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_a_config_alone_does_not_make_weights_quantised(tmp_path, method):
    """Plain weights with a quantisation's config left over merge as plain weights, with a note."""
    group = make_group(tmp_path / "group", experts=2)
    merge(group, tmp_path / "plain", method="mean")
    for folder in group.folders:
        edit_config(folder, quantization_config={"quant_method": method})

    plan = plan_group(group, method="mean")
    merge(group, tmp_path / "merged", method="mean")

    assert sum("the config is not believed" in text for text in plan.warnings) == 3
    assert equal(tmp_path / "plain", tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.parametrize(
    "name", ["hc_attn_scale", "mlp.gate.global_scale", "mlp.router.per_expert_scale"]
)
def test_a_scale_in_bfloat16_is_a_parameter(tmp_path, name):
    """Parameters that are called scales (DeepSeek V4, inkling, Gemma 4) merge like any other."""
    group = make_group(tmp_path / "group", experts=2)
    full = f"model.layers.0.{name}"
    for number, folder in enumerate(group.folders):
        value = {full: torch.full((4,), float(number), dtype=torch.bfloat16)}
        edit_tensors(folder, lambda tensors, value=value: tensors.update(value))

    merge(group, tmp_path / "merged", method="mean")

    assert torch.equal(read_tensors(tmp_path / "merged")[full], torch.full((4,), 1.5).bfloat16())


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model.x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "without scales"),
        (
            {
                "model.x.weight": torch.ones(256, 256).to(torch.float8_e4m3fn),
                "model.x.weight_scale_inv": torch.ones(3, 2),
            },
            "blocks of 128",
        ),
        (
            {
                "model.x.qweight": torch.ones(2, 2, dtype=torch.int32),
                "model.x.scales": torch.ones(2, 2),
            },
            "GPTQ or AWQ",
        ),
    ],
    ids=["no scales", "wrong grid", "packed"],
)
def test_codes_that_cannot_be_read_are_refused(extra, said, group):
    """8-bit floats without scales or with another grid, and packed integers: one message each."""
    edit_tensors(group.experts[0], lambda tensors: tensors.update(extra))

    plan = plan_group(group)

    (problem,) = (text for text in plan.problems if said in text)
    assert str(group.experts[0]) in problem


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of experts by transformers (base and two experts), as it saves and as it runs."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    home = tmp_path_factory.mktemp("mixture")
    config = Qwen3MoeConfig(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=3,
        num_experts_per_tok=2, vocab_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    for number, name in enumerate(("base", "expert0", "expert1")):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(home / "split" / name)
        fused = home / "fused" / name
        shutil.copytree(home / "split" / name, fused)
        tensors = {n: t.clone().contiguous() for n, t in model.state_dict().items()}
        save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    return home


def fused_from(tensors):
    """Split experts put together as transformers runs them, written out."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        gates = [
            torch.cat([tensors[f"{at}.{e}.gate_proj.weight"], tensors[f"{at}.{e}.up_proj.weight"]])
            for e in range(3)
        ]
        found[f"{at}.gate_up_proj"] = torch.stack(gates)
        downs = [tensors[f"{at}.{e}.down_proj.weight"] for e in range(3)]
        found[f"{at}.down_proj"] = torch.stack(downs)
    return found


@pytest.mark.parametrize(("base", "experts"), [("split", "fused"), ("fused", "split")])
def test_split_and_fused_experts_of_a_mixture_are_the_same(tmp_path, mixture, base, experts):
    """transformers' two layouts of one model pair up; the output has the base's."""

    def group(base, experts):
        names = ("expert0", "expert1")
        return Group(mixture / base / "base", tuple(mixture / experts / name for name in names))

    merge(group("split", "split"), tmp_path / "plain", method="mean")
    plan = plan_group(group(base, experts), method="mean")
    merge(group(base, experts), tmp_path / "merged", method="mean")

    plain, merged = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "merged")
    expected = plain if base == "split" else fused_from(plain)
    assert not plan.problems
    assert "carried" not in plan.by_rule()
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_interleaved_experts_of_gpt_oss_pair_with_split_ones(tmp_path):
    """gpt-oss takes gate and up by turns, [experts, in, out]; split experts follow that order."""
    random = torch.Generator().manual_seed(5)
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1}
    at = "model.layers.0.mlp.experts"
    for name in ("base", "expert0", "expert1"):
        fused = {
            f"{at}.gate_up_proj": torch.randn(2, 6, 8, generator=random),
            f"{at}.gate_up_proj_bias": torch.randn(2, 8, generator=random),
            f"{at}.down_proj": torch.randn(2, 4, 6, generator=random),
            f"{at}.down_proj_bias": torch.randn(2, 6, generator=random),
        }
        split = {}
        for e in range(2):
            for k, module in enumerate(("gate_proj", "up_proj")):
                split[f"{at}.{e}.{module}.weight"] = fused[f"{at}.gate_up_proj"][e, :, k::2].T
                split[f"{at}.{e}.{module}.bias"] = fused[f"{at}.gate_up_proj_bias"][e, k::2]
            split[f"{at}.{e}.down_proj.weight"] = fused[f"{at}.down_proj"][e].T
            split[f"{at}.{e}.down_proj.bias"] = fused[f"{at}.down_proj_bias"][e]
        for layout, tensors in (("fused", fused), ("split", split)):
            folder = tmp_path / layout / name
            folder.mkdir(parents=True)
            stored = {n: t.contiguous().clone() for n, t in tensors.items()}
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
            write_json(folder / "config.json", config)

    def group(experts):
        names = ("expert0", "expert1")
        return Group(
            tmp_path / "fused" / "base", tuple(tmp_path / experts / name for name in names)
        )

    merge(group("fused"), tmp_path / "plain", method="mean")
    merge(group("split"), tmp_path / "merged", method="mean")

    assert equal(tmp_path / "plain", tmp_path / "merged")
