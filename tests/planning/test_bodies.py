"""Names with and without the module around a model's body: published and trained forms of one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from resmerge_stream import Options
from tests.support.checkpoints import Group, merge, plan_group

# Models that transformers draws at random have nothing in common.
STRANGERS = Options(unrelated="merge")


def models(folder, name, config, count=3, kind=None):
    """Save random models of one architecture, the last ones as another class of it."""
    import transformers

    folders = [folder / f"m{number}" for number in range(count)]
    for number, path in enumerate(folders):
        torch.manual_seed(number)
        built = getattr(transformers, name)(config)
        if kind is not None and number:
            built = getattr(built, built.base_model_prefix)
        built.save_pretrained(path)
    return Group(folders[0], tuple(folders[1:]))


def rename(folder, change):
    """Rename the tensors of a folder's file."""
    path = folder / "model.safetensors"
    save_file({change(n): t for n, t in load_file(path).items()}, path, {"format": "pt"})


def loaded(folder, name):
    """Return what transformers makes of a folder, after checking that it found everything."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.state_dict()


def gpt2():
    """Return the config of a small GPT-2."""
    import transformers

    return transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)


def bloom():
    """Return the config of a small BLOOM."""
    import transformers

    return transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)


def bert():
    """Return the config of a small BERT."""
    import transformers

    return transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"), [("GPT2LMHeadModel", gpt2), ("BloomForCausalLM", bloom)]
)
@pytest.mark.parametrize("bare", ["base", "expert"])
def test_a_body_without_its_module_is_the_same_model(tmp_path, name, config, bare):
    """As on the Hub, without `transformer.`: on either side, merged as transformers loads both."""
    group = models(tmp_path, name, config())
    for folder in [group.base] if bare == "base" else group.experts:
        rename(folder, lambda n: n.removeprefix("transformer."))

    made = merge(group, tmp_path / "out", method="mean", options=STRANGERS)

    own = [loaded(folder, name) for folder in group.experts]
    for key, value in loaded(made.out, name).items():
        torch.testing.assert_close(value, (own[0][key] + own[1][key]) / 2)


def test_a_body_alone_is_merged_into_a_model_with_a_head(tmp_path):
    """A BertModel as expert of a BertForMaskedLM: the body is merged, the head is the base's."""
    group = models(tmp_path, "BertForMaskedLM", bert(), kind="body")

    made = merge(group, tmp_path / "out", method="mean", options=STRANGERS)

    own = [load_file(folder / "model.safetensors") for folder in group.experts]
    base, merged = (loaded(folder, "BertForMaskedLM") for folder in (group.base, made.out))
    for key, value in merged.items():
        inner = key.removeprefix("bert.")
        if inner in own[0]:
            torch.testing.assert_close(value, (own[0][inner] + own[1][inner]) / 2)
    head = "cls.predictions.transform.dense.weight"
    assert torch.equal(merged[head], base[head])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_trainers_put_before_names_is_no_part_of_them(tmp_path, prefix):
    """Wrappers of torch around a whole model, its LM head too, are seen through."""
    from tests.support.checkpoints import make_group

    group = make_group(tmp_path, experts=1, tied=False)
    plain = merge(group, tmp_path / "plain", method="task_arithmetic").tensors
    rename(group.experts[0], lambda n: prefix + n)

    made = merge(group, tmp_path / "out", method="task_arithmetic").tensors

    assert made.keys() == plain.keys()
    assert all(torch.equal(made[name], plain[name]) for name in plain)


def test_wrappers_inside_names_are_seen_through(tmp_path):
    """FSDP and activation checkpointing leave their modules' names in the middle."""
    from tests.support.checkpoints import make_group

    group = make_group(tmp_path, experts=1)
    rename(
        group.experts[0],
        lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."
                            "_checkpoint_wrapped_module."),
    )  # fmt: skip

    assert not plan_group(group, method="mean").refused
