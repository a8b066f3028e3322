"""What trainers, downloads and converters leave instead of a model: each way out is followed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from tests.support.checkpoints import (
    Group,
    edit_config,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
)


@pytest.fixture
def group(tmp_path):
    """A base and an expert."""
    return make_group(tmp_path / "group", experts=1, dtype=torch.float32)


def problem_of(group):
    """Return the only problem of a group's plan."""
    (problem,) = plan_group(group, method="task_arithmetic").problems
    return problem


def emptied(folder: Path) -> Path:
    """Take a model's weights away, and leave what lies beside them."""
    (folder / "model.safetensors").unlink()
    return folder


def gives_the_expert(group, folder, out):
    """Check that a merge with a folder in the expert's place is the expert."""
    expected = read_tensors(group.experts[0])
    made = merge(Group(group.base, (folder,)), out, method="task_arithmetic")
    for name, value in made.tensors.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("with_config", [True, False])
def test_a_run_with_checkpoints_names_them_and_the_last_one_merges(group, tmp_path, with_config):
    """checkpoint-500 and checkpoint-1000 below a folder: both are named, by number."""
    run = tmp_path / "run"
    for step in (500, 1000):
        shutil.copytree(group.experts[0], run / f"checkpoint-{step}")
    if with_config:
        shutil.copy(group.experts[0] / "config.json", run)

    problem = problem_of(Group(group.base, (run,)))

    assert "'checkpoint-500', 'checkpoint-1000'" in problem
    gives_the_expert(group, Path(re.search(r"such as (\S+)\.", problem)[1]), tmp_path / "out")


def test_what_cannot_be_looked_at_beside_checkpoints_is_passed_over(group, tmp_path):
    """A link that the system refuses to follow hides no checkpoint and ends no plan."""
    run = tmp_path / "run"
    shutil.copytree(group.experts[0], run / "checkpoint-500")
    (run / "logs").mkdir()
    (run / "logs" / "latest").symlink_to("x" * 300)  # longer than a name may be: stat fails

    assert "'checkpoint-500'" in problem_of(Group(group.base, (run,)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_or_converted_as_the_message_says(group, tmp_path):
    """torch's sharded state, as accelerate's FSDP saves it; torn, its own command is named."""
    import torch.distributed.checkpoint as dcp

    run = tmp_path / "run"
    shutil.copytree(group.experts[0], run)
    state = {"model": load_file(run / "model.safetensors")}
    dcp.save(state, checkpoint_id=str(run / "pytorch_model_fsdp_0"), no_dist=True)
    emptied(run)

    gives_the_expert(group, run, tmp_path / "out")
    metadata = run / "pytorch_model_fsdp_0" / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole[:-40])
    problem = problem_of(Group(group.base, (run,)))
    metadata.write_bytes(whole)

    at = re.search(r"accelerate merge-weights (\S+) OUT", problem)[1]
    merged = tmp_path / "merged"
    pytest.importorskip("accelerate")
    code = "from accelerate.commands.accelerate_cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", code, "merge-weights", at, str(merged)], check=True, timeout=300
    )
    for file in run.glob("*.json"):
        shutil.copy(file, merged)
    gives_the_expert(group, merged, tmp_path / "converted")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["actor/model_world_size_8_rank_0.pt", "actor/extra_state_world_size_8_rank_0.pt"],
         "verl.model_merger merge --backend fsdp --local_dir {at}/actor "),
        (["zero_to_fp32.py", "latest", "global_step7/mp_rank_00_model_states.pt"],
         "zero_to_fp32.py {at} OUT --safe_serialization"),
        (["zero_to_fp32.py", "latest", "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt"],
         "python {at}/zero_to_fp32.py {at} OUT --safe_serialization"),
        (["global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt",
          "global_step7/zero_pp_rank_1_mp_rank_00_model_states.pt"],
         "python {at}/zero_to_fp32.py {at} OUT --safe_serialization"),
        (["global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
        (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
         "accelerate merge-weights {at}/pytorch_model_fsdp_0 OUT"),
        ([".metadata", "__0_0.distcp"], "accelerate merge-weights {at} OUT"),
        (["consolidated.safetensors", "params.json"], "convert_mistral_weights_to_hf"),
        (["optimizer.pt", "pytorch_model.bin"], "'pytorch_model.bin', a pickle"),
        (["optimizer.pt", "rng_state.pth"], "has no *.safetensors file"),
    ],
)  # fmt: skip
def test_what_a_trainer_leaves_is_named_with_its_converter(group, files, words):
    """Each format is told by its files; the command that makes a model of it is in the message."""
    folder = emptied(group.experts[0])
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_bytes(b"x" * 8)

    assert words.format(at=folder) in problem_of(group)


def test_an_adapter_inside_a_whole_model_is_named(group):
    """A PEFT model saved whole: merge_and_unload is what it lacks."""
    name = "model.layers.0.mlp.up_proj"
    edit_tensors(
        group.experts[0],
        lambda t: t.update({f"{name}.base_layer.weight": t.pop(f"{name}.weight")}),
    )

    assert "merge_and_unload()" in problem_of(group)


@pytest.mark.parametrize("whose", ["base", "expert"])
def test_tensors_that_zero_3_did_not_gather_are_named(group, whose):
    """A shape of [0] is no weight: the cause is said, and how to gather."""
    folder = group.base if whose == "base" else group.experts[0]
    edit_tensors(folder, lambda t: t.update({n: torch.zeros(0) for n in list(t) if "proj" in n}))

    problem = problem_of(group)

    assert "stage3_gather_16bit_weights_on_model_save" in problem
    assert str(folder) in problem


def test_a_float32_base_is_rounded_first_as_the_warning_says(group, tmp_path):
    """On the base that passthrough wrote in bfloat16, an untouched tensor has no update."""
    rounded = {n: t.bfloat16() for n, t in read_tensors(group.base).items()}
    rounded["model.norm.weight"] = rounded["model.norm.weight"] + 1
    save_file(rounded, group.experts[0] / "model.safetensors", {"format": "pt"})
    said = "what rounding did"
    assert any(said in text for text in plan_group(group, method="mean").warnings)

    from resmerge_stream.run.engine import run_merge

    plan = plan_merge(Recipe(None, (ModelRef(str(group.base)),), "passthrough", {}, "bfloat16"))
    list(run_merge(plan, out=tmp_path / "base"))
    made = merge(Group(tmp_path / "base", group.experts), tmp_path / "out", method="mean")

    assert not any(said in text for text in made.report["summary"]["warnings"])
    changed = [row["name"] for row in made.report["tensors"] if row.get("update_norm")]
    assert changed in ([], ["model.norm.weight"])
    assert torch.equal(made.tensors["model.norm.weight"], rounded["model.norm.weight"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_type": "default"}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_theta": 1000000, "rope_type": "yarn", "factor": 4.0},
        ),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ],
)
@pytest.mark.parametrize("is_base", [True, False])
def test_one_rope_in_two_spellings_is_no_difference(group, old, new, is_base):
    """transformers 4 and 5 write it under other keys; values that agree are not warned of."""
    first, second = (group.experts[0], group.base) if is_base else (group.base, group.experts[0])
    edit_config(first, rope_parameters=new)
    edit_config(second, **old)

    assert not [w for w in plan_group(group, method="mean").warnings if "rope" in w]


def test_another_rope_is_said_once_whatever_the_spelling(group):
    """A base of 1e4 in the old words, an expert of 1e6 in the new: one warning with both values."""
    edit_config(group.base, rope_theta=1e4)
    edit_config(group.experts[0], rope_parameters={"rope_theta": 1e6, "rope_type": "default"})

    (told,) = [w for w in plan_group(group, method="mean").warnings if "rope" in w]

    assert "1000000.0" in told
    assert "10000.0" in told


def test_json_that_is_none_is_named(group):
    """Whatever a model's side files hold, there is an answer and no traceback."""
    (group.experts[0] / "config.json").write_text(json.dumps({"a": 1})[:-1])

    assert "config.json" in problem_of(group)
