"""What is decided before anything is read: every rule of compatibility, sizes, and the target."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from resmerge_stream.cli.console import show_plan
from resmerge_stream.errors import PlanRefusedError, RecipeError
from resmerge_stream.planning import target
from resmerge_stream.planning.plan import Options, RefusedPlan, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from tests.support.checkpoints import (
    edit_config,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    recipe_of,
    run_python,
    write_json,
)

pytestmark = pytest.mark.usefixtures("without_picture")

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def only_problem(plan, *words):
    """Assert that a plan is refused for one reason, and that it says these words."""
    assert plan.refused
    assert len(plan.problems) == 1, plan.problems
    for word in words:
        assert str(word) in plan.problems[0]


def only_warning(plan, *words):
    """Assert that a plan goes on with one warning, and that it says these words."""
    assert not plan.refused, plan.problems
    assert len(plan.warnings) == 1, plan.warnings
    for word in words:
        assert str(word) in plan.warnings[0]


def test_a_plan_says_what_will_happen(group, tmp_path):
    """Tensors, rules, shards, bytes and memory are known before anything is read."""
    plan = plan_group(group, out=tmp_path / "out")

    document = json.loads(json.dumps(plan.to_dict()))
    size = (group.base / "model.safetensors").stat().st_size
    assert not document["refused"]
    assert document["problems"] == document["warnings"] == []
    assert document["tensors"] == 2 * 12 + 2
    assert document["by_rule"] == {"mean": 2 * 5 + 2, "resmerge": 2 * 7}
    assert document["shards"] == [{"name": "model.safetensors", "bytes": size, "tensors": 26}]
    assert document["write_bytes"] == document["peak_disk_bytes"] == size
    assert document["read_bytes"] == 4 * sum(t.spec.nbytes for t in plan.tensors.values())
    assert document["peak_memory_bytes"] > 0
    assert len(document["sources"]) == 4
    assert not (tmp_path / "out").exists()


def test_a_plan_has_the_fixed_keys(group):
    """plan --json is one object with the keys that the design fixes."""
    keys = set(plan_group(group).to_dict())

    assert keys >= {
        "refused", "problems", "warnings", "tensors", "by_rule", "shards", "read_bytes",
        "write_bytes", "peak_memory_bytes", "peak_disk_bytes", "seconds_estimate", "sources",
        "plan_hash",
    }  # fmt: skip


def test_a_plan_lists_its_rules_by_pattern(group, capsys):
    """Names with a star for every number, how many tensors they stand for, and their rule."""
    plan = plan_group(group)

    rows = plan.to_dict()["patterns"]
    show_plan(plan)
    shown = capsys.readouterr().out

    assert {"pattern": "model.layers.*.mlp.up_proj.weight", "tensors": 2, "rule": "resmerge",
            "role": "ffn", "settings": {}} in rows  # fmt: skip
    assert sum(row["tensors"] for row in rows) == len(plan.tensors)
    assert re.search(r"2 × resmerge +ffn +model\.layers\.\*\.mlp\.up_proj\.weight", shown)
    assert re.search(r"1 × mean +embedding +model\.embed_tokens\.weight", shown)


def test_planning_reads_no_weights(tmp_path):
    """Weight files whose data is unreadable garbage are planned like any other."""
    group = make_group(tmp_path)
    for folder in group.folders:
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            length = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(length)
            file.truncate(length + 10**6)
        data = bytearray(path.read_bytes()[:length])
        header = json.loads(data[8:])
        end = max(entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__")
        with path.open("r+b") as file:
            file.truncate(length + end)

    assert not plan_group(group).refused


def test_planning_does_not_import_torch(group):
    """A plan and everything that it needs work without torch."""
    code = """
import sys
from resmerge_stream import Recipe, plan_merge
from resmerge_stream.recipe import ModelRef
plan = plan_merge(Recipe(ModelRef(sys.argv[1]), (ModelRef(sys.argv[2]),)), out=sys.argv[3])
assert not plan.refused, plan.problems
heavy = {"torch", "gradio", "transformers", "huggingface_hub", "safetensors"} & set(sys.modules)
print(sorted(heavy))
"""

    done = run_python(code, str(group.base), str(group.experts[0]), str(group.base.parent / "out"))

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_problems_are_collected_not_raised(tmp_path):
    """A plan with several problems has them all; running it raises them as one error."""
    group = make_group(tmp_path, experts=2)
    shutil.rmtree(group.experts[1])
    recipe = recipe_of(group, method="resmurge", parameters={})

    plan = plan_merge(recipe)

    assert len(plan.problems) == 2
    assert "Did you mean 'resmerge'" in plan.problems[0]
    assert str(group.experts[1]) in plan.problems[1]
    assert isinstance(plan, RefusedPlan)
    with pytest.raises(PlanRefusedError, match="resmurge"):
        plan.accepted()


def test_a_refused_plan_does_not_run(group, tmp_path):
    """Running a plan with problems raises them and leaves no folder."""
    edit_config(group.experts[0], hidden_size=17)

    with pytest.raises(PlanRefusedError, match="hidden_size"):
        merge(group, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_missing_leaves_the_others_their_numbers(group, tmp_path, capsys):
    """What is left of a refused plan is told under the numbers that were asked for."""
    first, second = (ModelRef(str(folder)) for folder in (tmp_path / "none", group.experts[1]))

    plan = plan_merge(Recipe(ModelRef(str(group.base)), (first, second), "mean"), Options())

    assert plan.refused
    assert plan.parts == ["base", "expert 2"]
    show_plan(plan)
    assert "budget" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing", "an empty folder", "a file"])
def test_a_source_that_is_no_model_is_a_problem(name, group, tmp_path):
    """A folder that is missing, empty, or a file is said to be so, by name."""
    path = tmp_path / "it"
    if name == "an empty folder":
        path.mkdir()
    elif name == "a file":
        path.write_text("x")

    plan = plan_merge(Recipe(ModelRef(str(path)), (ModelRef(str(group.experts[0])),)))

    only_problem(plan, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 3),
        ("hidden_size", 8),
        ("intermediate_size", 8),
        ("num_attention_heads", 1),
        ("num_key_value_heads", 2),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-5),
        ("tie_word_embeddings", False),
        ("model_type", "llama"),
    ],
)
def test_a_config_of_another_structure_is_refused(key, value, group):
    """What changes the meaning of the weights must agree, and is named with both values."""
    edit_config(group.experts[1], **{key: value})

    plan = plan_group(group)

    only_problem(plan, key, repr(value), group.experts[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 1e6),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("max_position_embeddings", 4096),
        ("sliding_window", 99),
        ("hidden_size", "absent"),
    ],
)
def test_another_difference_of_configs_is_a_warning(key, value, group):
    """What an expert may change by training on is named, and the base's is kept."""
    if value == "absent":
        document = json.loads((group.experts[1] / "config.json").read_text())
        del document[key]
        write_json(group.experts[1] / "config.json", document)
    else:
        edit_config(group.experts[1], **{key: value})

    plan = plan_group(group)

    only_warning(plan, key, "the base's is kept")


@pytest.mark.parametrize(
    "changes", [{"transformers_version": "4.0"}, {"_name_or_path": "x"}, {"use_cache": False},
                {"torch_dtype": "float32"}, {"architectures": ["X"]}]
)  # fmt: skip
def test_bookkeeping_in_a_config_is_not_a_difference(changes, group):
    """Versions, paths and dtypes say nothing about the model."""
    edit_config(group.experts[0], **changes)

    plan = plan_group(group)

    assert plan.problems == plan.warnings == ()


def test_a_structure_key_inside_a_section_is_checked(tmp_path):
    """A nested text config is compared like a flat one."""
    group = make_group(tmp_path, experts=1)
    for folder, layers in ((group.base, 2), (group.experts[0], 3)):
        edit_config(folder, text_config={"num_hidden_layers": layers})

    only_problem(plan_group(group), "text_config.num_hidden_layers")


def test_another_shape_is_refused(group):
    """A tensor of another shape is named with both shapes."""
    edit_tensors(group.experts[2], lambda t: t.update({Q: torch.ones(16, 15).bfloat16()}))

    only_problem(plan_group(group), Q, [16, 15], [16, 16], group.experts[2])


def test_more_vocabulary_rows_are_refused_with_a_remedy(group):
    """Embeddings with added tokens are named, with the recipe's key that matches tokens."""
    edit_tensors(group.experts[0], lambda t: t.update({EMBEDDING: torch.ones(50, 16).bfloat16()}))

    only_problem(plan_group(group), EMBEDDING, 50, 48, "tokenizer_source")


def test_a_tensor_that_one_expert_lacks_is_refused(group):
    """An incomplete expert is named with the tensor."""
    edit_tensors(group.experts[1], lambda tensors: tensors.pop(Q))

    only_problem(plan_group(group), Q, group.experts[1])


def test_a_tensor_that_no_expert_has_is_carried_with_a_warning(group, tmp_path):
    """The base's own tensor is kept byte for byte, and the plan says so."""
    own = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    edit_tensors(group.base, lambda tensors: tensors.update({"vision.proj.weight": own}))

    only_warning(plan_group(group), "vision.proj.weight", "no expert has it")
    merged = merge(group, tmp_path / "out")

    assert torch.equal(merged.tensors["vision.proj.weight"], own)
    assert merged.row("vision.proj.weight")["rule"] == "carried"


def test_a_buffer_of_integers_is_carried_with_a_warning(group, tmp_path):
    """Positions and the like are copied from the base, even where an expert's differ."""
    name, ids = "model.position_ids", torch.arange(5)
    for folder in group.folders:
        edit_tensors(folder, lambda tensors: tensors.update({name: ids.clone()}))
    edit_tensors(group.experts[0], lambda tensors: tensors[name].add_(1))

    only_warning(plan_group(group), name, "I64")
    merged = merge(group, tmp_path / "out")

    assert torch.equal(merged.tensors[name], ids)


def test_a_tensor_that_the_base_lacks_is_left_out_with_a_warning(group, tmp_path):
    """An expert's value head is not part of the merged model, and the plan says so."""
    edit_tensors(group.experts[0], lambda t: t.update({"v_head.weight": torch.ones(2, 2)}))

    only_warning(plan_group(group), "v_head.weight", "left out")
    merged = merge(group, tmp_path / "out")

    assert "v_head.weight" not in merged.tensors
    assert "v_head.weight" in merged.report["summary"]["left_out"]


def test_integers_against_floats_are_refused(group):
    """A tensor that is floating point in the base only cannot be merged."""
    edit_tensors(group.experts[0], lambda t: t.update({Q: torch.ones(16, 16).to(torch.int8)}))

    only_problem(plan_group(group), Q, "I8", "BF16")


def test_floats_of_several_kinds_merge(group, tmp_path):
    """An expert in float32 merges into a bfloat16 base, and the base's dtype stays."""
    edit_tensors(group.experts[0], lambda t: t.update({name: v.float() for name, v in t.items()}))

    merged = merge(group, tmp_path / "out")

    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}


def test_a_tied_head_that_equals_the_embedding_is_left_out(tmp_path):
    """A redundant LM head of a tied model is not written, by whichever checkpoint holds it."""
    group = make_group(tmp_path, experts=2)
    for folder in (group.base, group.experts[1]):
        edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))

    plan = plan_group(group)

    only_warning(plan, "lm_head.weight", "tied")
    assert "lm_head.weight" not in plan.tensors


def test_a_head_that_the_base_ties_by_its_config_only_is_merged(tmp_path):
    """Where the base itself holds another head than its embedding, both are merged: so it loads."""
    group = make_group(tmp_path, tied=False, experts=2)
    for folder in group.folders:
        edit_config(folder, tie_word_embeddings=True)

    plan = plan_group(group)

    only_warning(plan, "lm_head.weight", "different values")
    assert plan.tensors["lm_head.weight"].rule is not None


def test_an_untied_head_is_merged(tmp_path):
    """Where the config does not tie it, the LM head is a tensor like the embedding."""
    group = make_group(tmp_path, tied=False, experts=2)

    plan = plan_group(group)

    assert plan.tensors["lm_head.weight"].rule.name == "mean"
    assert plan.warnings == ()


def test_a_model_beside_an_adapter_is_refused(group):
    """A folder with a whole model and an adapter says neither which of them is meant."""
    write_json(group.experts[0] / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"x": torch.ones(1)}, group.experts[0] / "adapter_model.safetensors")

    only_problem(plan_group(group), "LoRA", "not known which")


def test_a_stray_config_of_an_adapter_is_noted(group):
    """Without weights of its own it changes nothing: the whole model beside it is read."""
    plain = plan_group(group)
    write_json(group.experts[0] / "adapter_config.json", {"peft_type": "LORA"})

    plan = plan_group(group)

    assert set(plan.warnings) - set(plain.warnings) == {
        text for text in plan.warnings if "adapter_config.json" in text
    }
    assert not plan.problems
    assert plan.by_rule() == plain.by_rule()


@pytest.mark.parametrize(
    ("file", "word"), [("pytorch_model.bin", "pickle"), ("model.gguf", "GGUF")]
)
def test_other_formats_are_refused(file, word, group):
    """Pickles and GGUF files are refused by name, with what to give instead."""
    (group.experts[0] / "model.safetensors").rename(group.experts[0] / file)

    only_problem(plan_group(group), file, word)


def test_weights_without_an_index_are_refused(group):
    """Several weight files need an index that says which of them make the model."""
    path = group.experts[0] / "model.safetensors"
    path.rename(path.with_name("a.safetensors"))
    save_file({"x": torch.ones(1)}, path.with_name("b.safetensors"))

    only_problem(plan_group(group), "2 safetensors files", "index")


def test_a_shard_that_is_missing_is_refused(tmp_path):
    """An index that names a file which is not there is an incomplete download."""
    group = make_group(tmp_path, sharded=True)
    (group.experts[0] / "model-00002-of-00002.safetensors").unlink()

    only_problem(plan_group(group), "model-00002-of-00002.safetensors", "missing")


def test_a_shard_that_is_cut_short_is_refused(tmp_path):
    """A weight file shorter than its header says is a broken download."""
    group = make_group(tmp_path, sharded=True)
    path = group.experts[0] / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    only_problem(plan_group(group), path.name, "cut short")


def test_another_tokenizer_is_a_warning(group):
    """Of an expert that cuts otherwise, the plan says whose is kept and how to choose."""
    path = group.experts[2] / "tokenizer.json"
    document = json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}
    path.write_text(json.dumps(document))

    only_warning(plan_group(group), "tokenizer.json", "--tokenizer-from", group.experts[2])


def test_weights_for_each_expert_are_refused_by_resmerge(group):
    """A method that measures agreement takes no factors, and says which methods do."""
    only_problem(plan_group(group, weights=[1.0, 2.0, 3.0]), "weight", "task_arithmetic")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rnk": 2}, "Did you mean 'rank'"),
        ({"rank": 0}, "from 1 to 64"),
        ({"rank": 1.5}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"rank": "many"}, "whole number"),
        ({"rho": -1}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"rho": [0.2, -1]}, "rho"),
        ({"rho": []}, "rho"),
        ({"rho": [{"filter": "mlp"}]}, "filter: …, value: …"),
        ({"rho": [{"filtr": "mlp", "value": 1}]}, "'filtr'"),
        ({"rho": {"value": "many"}}, "rho"),
        ({"variant": "papr"}, "release-2026-07"),
        ({"variant": 3}, "release-2026-07"),
    ],
)
def test_a_wrong_parameter_is_refused(parameters, words, group):
    """Unknown names and values out of range are problems of the plan."""
    only_problem(plan_group(group, parameters=parameters), words)


def test_an_expert_listed_twice_is_a_warning(group):
    """A repeated expert counts twice, and the plan says so."""
    twice = type(group)(group.base, (group.experts[0], group.experts[0]))

    only_warning(plan_group(twice), "more than once", group.experts[0])


def test_the_output_dtype_is_planned(group):
    """Another dtype changes merged tensors, the config and the bytes to write."""
    plan = plan_group(group, dtype="float32")

    assert {tensor.spec.dtype for tensor in plan.tensors.values()} == {"F32"}
    assert json.loads(plan.config)["torch_dtype"] == "float32"
    assert plan.write_bytes > 1.8 * plan_group(group).write_bytes


def test_shards_mirror_the_bases(tmp_path):
    """Without a limit the output has the base's shards, with the base's tensors in each."""
    group = make_group(tmp_path, sharded=True)

    plan = plan_group(group)

    assert [shard.name for shard in plan.shards] == sorted(
        path.name for path in group.base.glob("*.safetensors")
    )
    for shard in plan.shards:
        names = {spec.name for spec in shard.tensors}
        assert names == {n for n, t in plan.base.tensors.items() if t.file == shard.name}


def test_a_limit_cuts_shards(group):
    """--max-shard-size cuts files, and a single tensor above it stands alone."""
    plan = plan_group(group, options=Options(max_shard_bytes=1000))

    assert len(plan.shards) > 5
    for shard in plan.shards:
        assert sum(s.nbytes for s in shard.tensors) <= 1000 or len(shard.tensors) == 1


@pytest.mark.parametrize("wrong", [{"rounding": "up"}, {"max_shard_bytes": 0}])
def test_wrong_options_are_refused(wrong):
    """An option out of its choices is refused when it is given."""
    with pytest.raises(RecipeError):
        Options(**wrong)


def test_the_plan_hash_tells_runs_apart(group):
    """Recipe and output options change the hash; device and memory do not."""
    first = plan_group(group).plan_hash
    others = [
        plan_group(group, parameters={"rho": 0.3}),
        plan_group(group, method="mean"),
        plan_group(group, dtype="float32"),
        plan_group(group, options=Options(seed=1, rounding="stochastic")),
        plan_group(group, options=Options(max_shard_bytes=1000)),
    ]
    same = [
        plan_group(group),
        plan_group(group, parameters={"rho": 0.2}),
        plan_group(group, options=Options(device="cpu", memory_budget=10**9)),
    ]

    assert len({first, *(plan.plan_hash for plan in others)}) == 6
    assert {plan.plan_hash for plan in same} == {first}


def test_a_folder_counts_by_its_absolute_path(group, monkeypatch):
    """The working directory from which a folder is named does not matter."""
    absolute = plan_group(group).plan_hash
    monkeypatch.chdir(group.base.parent)
    experts = tuple(ModelRef(f"./expert{i}") for i in range(3))

    assert plan_merge(Recipe(ModelRef("base"), experts, "resmerge")).plan_hash == absolute


def test_code_that_the_base_needs_is_copied_and_said(group, tmp_path):
    """Custom modules travel only with a config that needs them."""
    (group.base / "modeling_own.py").write_text("x = 1\n")
    assert "modeling_own.py" not in plan_group(group).side_files()
    edit_config(group.base, auto_map={"AutoModel": "modeling_own.X"})

    plan = plan_group(group)

    only_warning(plan, "modeling_own.py")
    assert plan.side_files()["modeling_own.py"] == b"x = 1\n"


def test_the_tokenizer_may_come_from_elsewhere(group, tmp_path):
    """--tokenizer-from takes tokenizer files from one model, and the rest from the base."""
    for name in ("tokenizer.json", "generation_config.json"):
        path = group.experts[0] / name
        path.write_text(path.read_text() + " ")

    plan = plan_group(group, options=Options(tokenizer_from=str(group.experts[0])))

    files = plan.side_files()
    assert files["tokenizer.json"] == (group.experts[0] / "tokenizer.json").read_bytes()
    name = "generation_config.json"
    assert files[name] == (group.base / name).read_bytes()


def test_a_tokenizer_that_is_not_there_is_a_problem(group, tmp_path):
    """A missing --tokenizer-from is said like a missing expert."""
    plan = plan_group(group, options=Options(tokenizer_from=str(tmp_path / "none")))

    only_problem(plan, tmp_path / "none")


def test_a_foreign_target_is_refused_by_the_plan(group, tmp_path):
    """A folder with anything of someone else's in it is not a target."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")

    only_problem(plan_group(group, out=tmp_path / "out"), "nothing there is overwritten")


def test_a_file_as_target_is_refused_by_the_plan(group, tmp_path):
    """A file is not a folder."""
    (tmp_path / "out").write_text("x")

    only_problem(plan_group(group, out=tmp_path / "out"), "is a file")


@pytest.mark.parametrize("place", ["out", "work_dir", "cache"])
def test_a_folder_that_cannot_be_made_is_a_problem(place, group, tmp_path, monkeypatch):
    """Output, `--work-dir` and the cache are tried; what is in the way is said by the plan."""
    (tmp_path / "file").touch()
    where = {"out": tmp_path / "out", "work_dir": tmp_path / "work"}
    if place == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "x"))
        del where["work_dir"]
    else:
        where[place] = tmp_path / "file" / "x"

    only_problem(plan_merge(recipe_of(group), **where), "can be written to", "Not a")


@pytest.mark.parametrize("name", ["a\x00b", "x" * 256, "a\udcffb"], ids=["NUL", "long", "no text"])
def test_what_cannot_be_a_folders_name_is_said_so(name, group, tmp_path):
    """Whatever a shell hands on: bytes that are no text come as half characters."""
    only_problem(plan_group(group, out=tmp_path / name), "cannot be a folder's name")


def test_a_finished_result_may_lie_where_nothing_can_be_written(group, tmp_path, monkeypatch):
    """Where nothing is left to do, no room is asked for."""
    merge(group, tmp_path / "out")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "x"))
    monkeypatch.setattr(target, "free_disk", lambda folder: 0)

    assert not plan_group(group, out=tmp_path / "out").refused


def test_missing_small_files_are_a_warning(tmp_path):
    """A base without a tokenizer or a generation config is merged, and the plan says what lacks."""
    group = make_group(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (group.base / name).unlink(missing_ok=True)

    plan = plan_group(group)

    assert not plan.refused
    assert any("no tokenizer files" in warning for warning in plan.warnings)
    assert any("generation_config.json" in warning for warning in plan.warnings)


def test_a_parameter_may_differ_by_layer_and_by_module(group):
    """A list is interpolated over the layers, a filter goes by the name; reports say it as given.

    SMALL has two layers, so a list of three ends at its first and its last value.
    """
    rho = [{"filter": "self_attn", "value": [0.1, 9, 0.5]}, {"value": 0.3}]

    plan = plan_group(group, parameters={"rho": rho})

    found = {name: tensor.method.rho for name, tensor in plan.tensors.items()}
    assert found["model.layers.0.self_attn.q_proj.weight"] == 0.1
    assert found["model.layers.1.self_attn.q_proj.weight"] == 0.5
    assert found["model.layers.1.mlp.up_proj.weight"] == 0.3
    assert plan.parameters["rho"] == rho
    assert plan.plan_hash != plan_group(group, parameters={"rho": 0.3}).plan_hash


def test_the_plan_shows_by_pattern_what_differs(group, capsys):
    """Values of layers and modules stand beside the tensors that have them, others nowhere."""
    parameters = {"rho": [{"filter": "mlp", "value": [0.1, 0.3]}, {"value": 0.2}]}

    plan = plan_group(group, parameters=parameters)
    show_plan(plan)

    rows = {row["pattern"]: row["settings"] for row in plan.to_dict()["patterns"]}
    assert rows["model.layers.*.mlp.up_proj.weight"] == {"rho": [0.1, 0.3]}
    assert rows["model.layers.*.self_attn.q_proj.weight"] == {"rho": [0.2]}
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "mlp.up_proj" in text)
    assert line.endswith("rho 0.1 to 0.3")


def test_numbers_of_the_whole_model_do_not_differ_between_tensors(group):
    """A threshold that is counted in the whole model has one density."""
    parameters = {"preset": "paper", "density": [0.1, 0.9]}

    only_problem(plan_group(group, method="ties", parameters=parameters), "density")


@pytest.mark.parametrize(
    ("method", "words"),
    [("slerp", "1 model beside the base"), ("nuslerp", "2 models"), ("passthrough", "1 model")],
)
def test_a_method_for_fewer_models_says_how_many(method, words, group):
    """Models are not left out quietly."""
    only_problem(plan_group(group, method=method), words)
