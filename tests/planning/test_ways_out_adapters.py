"""Every way out that a message about an adapter names ends in a merge when it is followed."""

import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("peft")

import peft
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from resmerge_stream import Options, Recipe, plan_merge, run_merge
from resmerge_stream.cli.main import main
from resmerge_stream.recipe import ModelRef
from tests.support import adapters

pytestmark = pytest.mark.usefixtures("without_picture")
TIED = adapters.KINDS["tied embedding"]


def problem(base, expert, folder):
    """Return the one problem of a merge."""
    [text] = planned(base, expert, folder / "refused").problems
    return text


def planned(base, expert, out):
    """Return a plan of one expert."""
    recipe = Recipe(ModelRef(str(base)), (ModelRef(str(expert)),), "mean", {}, "float32")
    return plan_merge(recipe, Options(), out=out)


def merged(base, expert, folder):
    """Merge one expert; return the weights."""
    plan = planned(base, expert, folder / "out")
    assert not plan.refused, plan.problems
    list(run_merge(plan, out=folder / "out"))
    return adapters.weights(folder / "out")


def edited(folder, **settings):
    """Change a folder's adapter_config.json or config.json in place."""
    file = next(
        path for path in sorted(folder.glob("*config.json")) if "generation" not in path.name
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def close(found, expected):
    """Return whether all weights of a merge are the expected ones, up to rounding."""
    return all(
        torch.allclose(found[name].double(), W.double(), rtol=1e-5, atol=1e-6)
        for name, W in expected.items()
    )


def test_lora_alpha_is_set_to_the_trained_value(tmp_path):
    """An adapter whose config says 0 merges as PEFT merges it once the value is there."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)
    expected = adapters.weights(adapters.whole(base, adapter, tmp_path / "whole"))
    edited(adapter, lora_alpha=0)
    assert "set lora_alpha there" in problem(base, adapter, tmp_path)

    edited(adapter, lora_alpha=kind.lora["lora_alpha"])

    assert close(merged(base, adapter, tmp_path), expected)


@pytest.mark.parametrize(
    "lora",
    [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
     {"target_modules": ["lm_head"]}],
    ids=["embedding", "head", "adapted head"],
)  # fmt: skip
def test_a_tied_base_is_untied(tmp_path, lora):
    """With a head of its own in file and config, the result writes the trained model's logits."""
    base = adapters.make_base(tmp_path / "base", TIED)
    kind = replace(TIED, lora={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **lora})
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)
    with adapters.quiet():
        model = adapters.loaded(base, torch.float32)
        trained = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokens = torch.arange(20)[None]
    assert "Untie the base first" in problem(base, adapter, tmp_path)

    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    edited(base, tie_word_embeddings=False)
    merged(base, adapter, tmp_path)

    with torch.no_grad():
        ours = adapters.loaded(tmp_path / "out", torch.float32).eval()(tokens).logits
        assert torch.allclose(ours, trained(tokens).logits, atol=1e-4)


def test_the_release_of_peft_is_said(tmp_path):
    """Factors that fit two ways merge as PEFT does, once the config says which release it was."""
    made = adapters.KINDS["fused experts"]
    sizes = {**made.sizes, "intermediate_size": adapters.SMALL["hidden_size"]}
    lora = {**made.lora, "target_parameters": ["experts.down_proj"]}
    kind = replace(made, sizes=sizes, lora=lora)
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)
    expected = adapters.weights(adapters.whole(base, adapter, tmp_path / "whole"))
    release = json.loads((adapter / "adapter_config.json").read_text())["peft_version"]
    edited(adapter, peft_version=None)
    assert "(peft_version)" in problem(base, adapter, tmp_path)

    edited(adapter, peft_version=release)

    assert close(merged(base, adapter, tmp_path), expected)


def test_an_adapter_with_more_tokens_is_merged_into_its_base_by_peft(tmp_path):
    """A table of another size: resized and merged with peft, it merges with the tokens matched."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    size = adapters.SMALL["vocab_size"]
    (base / "tokenizer.json").write_text(words(size))

    def resized():
        model = adapters.loaded(base, torch.float32)
        model.resize_token_embeddings(size + 2)
        return model

    with adapters.quiet():
        trained = peft.get_peft_model(resized(), peft.LoraConfig(**kind.lora))
        trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    said = problem(base, tmp_path / "adapter", tmp_path)
    assert "resize_token_embeddings" in said
    assert "union" in said

    with adapters.quiet():
        whole = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter")
        whole.merge_and_unload().save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text(words(size + 2))
    command = ["merge", "--base", str(base), "--expert", str(tmp_path / "whole")]
    command += ["--tokenizer-source", "union", "--dtype", "float32", "--out", str(tmp_path / "out")]

    assert main(command) == 0
    assert close(adapters.weights(tmp_path / "out"), adapters.weights(tmp_path / "whole"))


def words(size):
    """Return a tokenizer of so many words."""
    vocabulary = {f"w{number}": number for number in range(size)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).to_str()


def test_an_adapter_of_another_type_is_merged_into_its_base_by_peft(tmp_path):
    """(IA)³ is refused with a call of peft's, whose result merges."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    with adapters.quiet():
        model = peft.get_peft_model(adapters.loaded(base, torch.float32), config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ia3" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
    assert "merge_and_unload, save_pretrained" in problem(base, tmp_path / "adapter", tmp_path)

    whole = adapters.whole(base, tmp_path / "adapter", tmp_path / "whole")

    assert close(merged(base, whole, tmp_path), adapters.weights(whole))


def test_a_pickled_adapter_is_saved_again(tmp_path):
    """`save_pretrained` of peft writes safetensors, which merge."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind, safe_serialization=False)
    assert "save_pretrained" in problem(base, adapter, tmp_path)

    with adapters.quiet():
        model = peft.PeftModel.from_pretrained(adapters.loaded(base, torch.float32), adapter)
        model.save_pretrained(tmp_path / "again")
    expected = adapters.weights(adapters.whole(base, adapter, tmp_path / "whole"))

    assert close(merged(base, tmp_path / "again", tmp_path), expected)


def test_a_folder_with_both_is_one_of_them(tmp_path):
    """A whole model and an adapter in one folder: the adapter's files alone merge."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)
    shutil.copytree(adapter, tmp_path / "both")
    shutil.copy(base / "model.safetensors", tmp_path / "both")
    assert "Give a folder that holds one of them" in problem(base, tmp_path / "both", tmp_path)

    (tmp_path / "both" / "model.safetensors").unlink()

    expected = adapters.weights(adapters.whole(base, adapter, tmp_path / "whole"))
    assert close(merged(base, tmp_path / "both", tmp_path), expected)
