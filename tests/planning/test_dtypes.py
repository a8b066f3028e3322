"""Which dtype each tensor is written in, and what the plan says of it."""

import json

import pytest
import torch

from resmerge_stream.planning.dtypes import written_dtypes
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from tests.support.checkpoints import (
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
    write_checkpoint,
)
from tests.zoo.kept_dtypes import TABLE, table

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def dtypes_of(folder, tensors, asked, **config):
    """Return the dtypes that a model's tensors are written in."""
    write_checkpoint(folder, tensors, {"model_type": "none"} | config)
    return written_dtypes(open_checkpoint(ModelRef(str(folder))), asked, list(tensors))


@pytest.mark.parametrize("asked", ["bfloat16", "float16"])
def test_an_untouched_float32_tensor_keeps_its_bits(tmp_path, asked):
    """A router's bias in float32, in a bfloat16 model, is written as it is whatever the dtype."""
    bias = 6.817 + 0.246 * torch.rand(64, generator=torch.Generator().manual_seed(7))
    group = make_group(tmp_path, experts=2, extra={BIAS: bias})

    made = merge(group, tmp_path / "out", method="mean", dtype=asked)

    assert torch.equal(made.tensors[BIAS], bias)
    assert made.tensors["model.norm.weight"].dtype == getattr(torch, asked)
    told = [w for w in made.report["summary"]["warnings"] if BIAS in w]
    assert len(told) == 1


def test_a_float32_tensor_that_experts_changed_stays_float32(tmp_path):
    """What was learned in it is not rounded either."""
    group = make_group(tmp_path, experts=2, extra={BIAS: torch.ones(64)})
    for number, folder in enumerate(group.experts):
        edit_tensors(folder, lambda t, n=number: t.update({BIAS: t[BIAS] + 1e-4 * (n + 1)}))

    made = merge(group, tmp_path / "out", method="mean", dtype="bfloat16")

    expected = torch.stack([read_tensors(folder)[BIAS] for folder in group.experts]).mean(0)
    assert torch.allclose(made.tensors[BIAS], expected, rtol=1e-6)


def test_a_float32_model_is_rounded_save_what_transformers_keeps(tmp_path):
    """Where all is float32, the names tell: transformers' own list for the architecture."""
    names = {"model.norm.weight": "BF16", BIAS: "F32", "model.layers.1.mlp.gate.weight": "F32"}
    tensors = {name: torch.ones(4, 4) for name in names}

    assert dtypes_of(tmp_path / "a", tensors, "bfloat16", model_type="deepseek_v3") == names
    assert set(dtypes_of(tmp_path / "b", tensors, "bfloat16").values()) == {"BF16"}
    assert set(dtypes_of(tmp_path / "c", tensors, "float32").values()) == {"F32"}


def test_some_tensors_are_kept_from_float16_alone(tmp_path):
    """T5's output projections overflow in float16, and in no other dtype."""
    tensors = {"decoder.block.0.layer.2.DenseReluDense.wo.weight": torch.ones(4, 4)}

    (half,) = dtypes_of(tmp_path / "a", tensors, "float16", model_type="t5").values()
    (brain,) = dtypes_of(tmp_path / "b", tensors, "bfloat16", model_type="t5").values()

    assert (half, brain) == ("F32", "BF16")


def test_a_model_type_inside_another_counts(tmp_path):
    """A text model's list holds in the multimodal model around it."""
    tensors = {"language_model." + BIAS: torch.ones(4)}

    written = dtypes_of(
        tmp_path / "a", tensors, "bfloat16", text_config={"model_type": "deepseek_v3"}
    )

    assert set(written.values()) == {"F32"}


def test_the_table_holds_what_transformers_says():
    """For an architecture of each kind: the class that loads it has the patterns of the table."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel
    from transformers.models.t5.modeling_t5 import T5PreTrainedModel

    stored = json.loads(TABLE.read_text())

    strict = DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict
    assert stored["any"]["deepseek_v3"] == sorted(strict)
    assert stored["float16"]["t5"] == sorted(T5PreTrainedModel._keep_in_fp32_modules)


@pytest.mark.slow
def test_the_whole_table_is_transformers_own():
    """`python -m tests.zoo.kept_dtypes` would write the same file."""
    assert json.loads(TABLE.read_text()) == table()


def test_rounding_that_would_be_merged_is_said(tmp_path):
    """A float32 base with bfloat16 experts is named; on the base as rounded nothing is said."""
    group = make_group(tmp_path, experts=1, dtype=torch.float32)
    edit_tensors(group.experts[0], lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))

    told = [w for w in plan_group(group, method="mean").warnings if "what rounding did" in w]

    assert len(told) == 1
    assert "passthrough" in told[0]


def test_a_float64_model_is_rounded_as_asked(tmp_path):
    """What all of a model is stored in is no wider than the model."""
    tensors = {"model.norm.weight": torch.ones(4, dtype=torch.float64)}

    assert set(dtypes_of(tmp_path / "a", tensors, "bfloat16").values()) == {"BF16"}
