"""What is wrong with an adapter is said while planning, in one message."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

from resmerge_stream import Options, Recipe, plan_merge
from resmerge_stream.cli.main import main
from resmerge_stream.errors import RecipeError
from resmerge_stream.recipe import ModelRef
from tests.support import adapters

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a base and a plain adapter of it."""
    folder = tmp_path_factory.mktemp("pair")
    base = adapters.make_base(folder / "base", adapters.KINDS["plain"])
    return base, adapters.make_adapter(folder / "adapter", base, adapters.KINDS["plain"])


def changed(pair, folder, *, config=None, tensors=None):
    """Write the adapter with other settings or tensors; None takes one away."""
    folder.mkdir()
    settings = json.loads((pair[1] / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = load_file(pair[1] / "adapter_model.safetensors") | (tensors or {})
    kept = {key: value for key, value in found.items() if value is not None}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def planned(base, *experts, method="mean"):
    """Return a plan of a base and experts."""
    refs = tuple(ModelRef.parse(str(expert)) for expert in experts)
    return plan_merge(Recipe(ModelRef(str(base)), refs, method))


WRONG = {
    "a missing factor": ({}, {f"{Q}.lora_B.weight": None}, "no lora_B"),
    "transposed factors": (
        {},
        {f"{Q}.lora_A.weight": torch.ones(16, 4), f"{Q}.lora_B.weight": torch.ones(4, 16)},
        "transposed",
    ),
    "factors that do not fit": ({}, {f"{Q}.lora_B.weight": torch.ones(16, 3)}, "fit together"),
    "another rank": ({"r": 8}, {}, "the rank 8, but its factors have 4"),
    "rank 0": ({"r": 0}, {}, "rank of 1 or more"),
    "no number": ({"lora_alpha": "many"}, {}, "lora_alpha must be a number"),
    "a target that the base lacks": (
        {},
        {
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 16),
            "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(16, 4),
        },
        "the base has no 'model.layers.9.self_attn.q_proj.weight'",
    ),
    "an adapter of another base": (
        {},
        {f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(32, 4)},
        "trained on another base",
    ),
    "a name that no LoRA has": ({}, {f"{Q}.vera_lambda_b": torch.ones(4)}, "not one of LoRA's"),
    "whole numbers": ({}, {f"{Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}, "holds I8"),
    "another type of adapter": ({"peft_type": "IA3"}, {}, "only LoRA adapters"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, {}, "aLoRA"),
    "KaSA": ({"kasa_config": {"beta": 1}}, {}, "KaSA"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, {}, "BD-LoRA"),
    "QALoRA": ({"use_qalora": True}, {}, "QALoRA"),
    "repeated layers": ({"layer_replication": [[0, 1], [0, 2]]}, {}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, {}, "Convert it to LoRA"),
    "OLoRA": ({"init_lora_weights": "olora"}, {}, "Convert it to LoRA"),
    "LoftQ": ({"init_lora_weights": "loftq"}, {}, "Convert it to LoRA"),
    "a pattern that looks ahead": (
        {"rank_pattern": {"(?=q).*": 4}},
        {},
        "assert, not matched here",
    ),
    "a pattern with flags": ({"rank_pattern": {"(?i)q_proj": 4}}, {}, "flags"),
    "no yes or no": ({"use_rslora": "no"}, {}, "use_rslora must be true or false"),
    "a scale of 0": ({"lora_alpha": 0}, {}, "set lora_alpha there to the value of the training"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, {}, "not a regex"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_bad_adapter_is_refused_in_one_message(pair, tmp_path, what):
    """Each is one problem of the plan that says what is wrong."""
    config, tensors, words = WRONG[what]
    bad = changed(pair, tmp_path / "bad", config=config, tensors=tensors)

    problems = planned(pair[0], bad).problems

    assert len(problems) == 1
    assert words in problems[0]


def test_a_module_whose_alpha_is_0_is_named(pair, tmp_path):
    """PEFT adds nothing there, and so do we; the plan says so."""
    pattern = {"alpha_pattern": {"layers.0.self_attn.q_proj": 0}}

    plan = planned(pair[0], changed(pair, tmp_path / "still", config=pattern, tensors={}))

    assert not plan.refused
    assert [text for text in plan.warnings if "alpha_pattern is 0" in text and "layers.0" in text]


@pytest.mark.parametrize(
    "what",
    [
        "a missing factor",
        "transposed factors",
        "another rank",
        "rank 0",
        "a target that the base lacks",
        "an adapter of another base",
        "NaN",
        "a huge config",
    ],
)
def test_a_bad_adapter_ends_the_command_with_2(pair, tmp_path, capsys, what):
    """The command line prints one message, exits with 2, and leaves no output folder."""
    bad_values = {f"{Q}.lora_B.weight": torch.full((16, 4), float("nan"))}
    late = {"NaN": ({}, bad_values, "NaN"), "a huge config": ({"n": "x" * 5_000_000}, {}, "larger")}
    config, tensors, words = (WRONG | late)[what]
    bad = changed(pair, tmp_path / "bad", config=config, tensors=tensors)
    out = tmp_path / "out"

    code = main(["merge", "--base", str(pair[0]), "--expert", str(bad), "--out", str(out)])

    err = capsys.readouterr().err
    assert code == 2
    assert err.count("resmerge-stream:") == 1
    assert words in err
    assert not out.exists()


def test_a_config_larger_than_any_is_refused(pair, tmp_path):
    """A config of many megabytes is not parsed."""
    bad = changed(pair, tmp_path / "bad", config={"note": "x" * 5_000_000})

    [problem] = planned(pair[0], bad).problems

    assert "larger than" in problem


def test_a_pickled_adapter_is_refused(pair, tmp_path):
    """Pickles can run code; how to convert one is said."""
    bad = changed(pair, tmp_path / "bad")
    (bad / "adapter_model.safetensors").rename(bad / "adapter_model.bin")

    [problem] = planned(pair[0], bad).problems

    assert "pickle" in problem
    assert "save_pretrained" in problem


def test_a_head_that_the_base_ties_cannot_be_adapted(tmp_path):
    """A tied model has no place for a head of its own."""
    tied = adapters.KINDS["tied embedding"]
    base = adapters.make_base(tmp_path / "base", tied)
    kind = adapters.Kind("qwen2", {"r": 2, "target_modules": ["lm_head"]}, tied.sizes)
    bad = adapters.make_adapter(tmp_path / "bad", base, kind)

    [problem] = planned(base, bad).problems

    assert "which the base ties to its embedding" in problem


def test_an_adapter_as_the_base_is_refused(pair):
    """The base has to be a whole model."""
    [problem] = planned(pair[1], pair[1]).problems

    assert "adapter, not a whole model" in problem


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("org/another", "trained on org/another"),
        ("unsloth/base-other-bnb-4bit", "a quantised copy of unsloth/base-other"),
    ],
)
def test_another_base_by_name_is_a_warning(pair, tmp_path, said, words):
    """Its shapes fit, so it may be meant; the user is told."""
    named = changed(pair, tmp_path / "named", config={"base_model_name_or_path": said})

    plan = planned(pair[0], named)

    assert not plan.problems
    assert any(words in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"modules_to_save": ["lm_head", "score"]}, "it brings lm_head (modules_to_save)"),
        ({"trainable_token_indices": [1, 2]}, "it brings trained tokens"),
        ({"bias": "all"}, "it brings biases"),
        ({"bias": "lora_only"}, "it brings biases"),
    ],
)
def test_weights_that_are_announced_and_absent_are_a_warning(pair, tmp_path, said, words):
    """PEFT keeps the base's there and warns; a module that the base lacks too is no matter."""
    less = changed(pair, tmp_path / "less", config=said)

    plan = planned(pair[0], less)

    assert not plan.problems
    assert [text for text in plan.warnings if words in text and "score" not in text]
    assert not [text for text in planned(pair[0], pair[1]).warnings if "it brings" in text]


def test_one_adapter_under_two_names_is_a_warning(pair, tmp_path):
    """A copy counts twice, which is said; another adapter of the same shapes is none."""
    copy = changed(pair, tmp_path / "copy")
    other = changed(pair, tmp_path / "other", tensors={f"{Q}.lora_B.weight": torch.ones(16, 4)})

    twice, apart = planned(pair[0], pair[1], copy), planned(pair[0], pair[1], other)

    assert any("hold the same adapter" in text for text in twice.warnings)
    assert not any("hold the same adapter" in text for text in apart.warnings)


def test_a_switch_is_on_where_peft_takes_it_for_true(pair, tmp_path):
    """``use_rslora: 1`` is what ``true`` is: the scale is α/√r."""
    one, true = (
        changed(pair, tmp_path / name, config={"use_rslora": value})
        for name, value in (("one", 1), ("true", True))
    )

    plans = [planned(pair[0], folder) for folder in (one, true, pair[1])]

    ours, theirs, plain = (plan.experts[0].edits for plan in plans)
    assert ours == theirs
    assert ours != plain


def test_the_full_twin_of_a_quantised_base_is_its_base(pair, tmp_path):
    """An adapter of ``base-bnb-4bit`` fits ``base`` without a word."""
    named = changed(pair, tmp_path / "named", config={"base_model_name_or_path": "x/base-bnb-4bit"})

    assert not any("base-bnb" in warning for warning in planned(pair[0], named).warnings)


def test_base_plus_adapter_names_an_adapter_on_the_recipes_base(pair):
    """mergekit's ``base+adapter`` is the adapter, if that base is the recipe's."""
    plan = planned(pair[0], f"{pair[0]}+{pair[1]}")
    other = planned(pair[0], f"org/other+{pair[1]}")

    assert not plan.problems
    assert plan.experts[0].id == str(pair[1])
    assert "another model than the base of the merge" in other.problems[0]
    assert "merge_method: passthrough" in other.problems[0]
    with pytest.raises(RecipeError):
        ModelRef.parse("org/base+org/lora@not a revision")


def test_a_plan_counts_the_adapters_bytes_and_not_a_models(pair):
    """The base is read once; of the adapters only their factors."""
    base = (pair[0] / "model.safetensors").stat().st_size
    own = (pair[1] / "adapter_model.safetensors").stat().st_size

    plan = planned(pair[0], pair[1])

    assert base < plan.read_bytes + 10_000
    assert plan.read_bytes <= base + own


def test_a_factor_that_is_not_a_number_stops_the_merge(pair, tmp_path):
    """NaN in a factor ends with exit code 2 and the tensor's name; nothing is left behind."""
    factor = torch.ones(4, 16)
    factor[0, 0] = float("nan")
    bad = changed(pair, tmp_path / "bad", tensors={f"{Q}.lora_A.weight": factor})
    command = [sys.executable, "-m", "resmerge_stream", "merge", "--base", str(pair[0])]
    command += ["--expert", str(bad), "--expert", str(pair[1]), "--out", str(tmp_path / "out")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "model.layers.0.self_attn.q_proj.weight" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_plan_of_factors_takes_less_time_than_one_of_whole_models(pair, tmp_path):
    """The estimate goes by the ranks: with large matrices, factors are many times as fast."""
    base = write_headers(tmp_path / "base", 4096)
    adapter = changed(pair, tmp_path / "adapter", tensors={}, config={"r": 4})
    keep = {f"{Q}.lora_A.weight": torch.ones(4, 4096), f"{Q}.lora_B.weight": torch.ones(4096, 4)}
    save_file(keep, adapter / "adapter_model.safetensors")
    other = write_headers(tmp_path / "other", 4096, extra=b" ")
    refs = [Recipe(ModelRef(str(base)), (ModelRef(str(e)),), "tsv_m") for e in (adapter, other)]

    plans = [plan_merge(refs[0], Options(output="adapter")), *map(plan_merge, refs)]

    to_adapter, to_model, whole = (plan.compute_seconds - 3 for plan in plans)
    assert to_adapter < to_model < whole / 2


def write_headers(folder, size, extra=b""):
    """Write a model of one matrix of zeros, of which only the header takes room."""
    spec = {"dtype": "BF16", "shape": [size, size], "data_offsets": [0, 2 * size * size]}
    name = "model.layers.0.self_attn.q_proj.weight"
    header = json.dumps({name: spec}).encode() + extra
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * size * size)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder
