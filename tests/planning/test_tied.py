"""Tied and untied tables: one question, and transformers' own loading as judge of the answer."""

import pytest
import torch

from tests.support.checkpoints import (
    Group,
    edit_config,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_own_head(folder, moved=0.25):
    """Untie a model: its head is its embedding and something more."""
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING] + moved}))
    edit_config(folder, tie_word_embeddings=False)


def loaded(folder, kind="AutoModelForCausalLM"):
    """Return what transformers makes of a folder, after checking that it found everything."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.state_dict()


@pytest.mark.parametrize("base_is_tied", [True, False])
def test_tied_and_untied_experts_merge_as_what_they_compute(tmp_path, base_is_tied):
    """A tied model's head is its embedding; where one model has them apart, so has the merge."""
    group = make_group(tmp_path, experts=2, dtype=torch.float32)
    with_own_head(group.experts[1])
    if not base_is_tied:
        with_own_head(group.base, moved=0.0)

    made = merge(group, tmp_path / "out", method="mean")

    models = [loaded(folder) for folder in group.experts]
    for name, value in loaded(made.out).items():
        torch.testing.assert_close(value, (models[0][name] + models[1][name]) / 2)
    assert not torch.equal(made.tensors[HEAD], made.tensors[EMBEDDING])
    told = [text for text in made.report["summary"]["warnings"] if "ties lm_head" in text]
    assert len(told) == 1 + base_is_tied


def test_a_head_that_a_config_promises_and_no_file_holds_is_refused(tmp_path):
    """An untied expert without a head is incomplete, on a tied base and on an untied one."""
    tied = make_group(tmp_path / "tied", experts=1)
    edit_config(tied.experts[0], tie_word_embeddings=False)
    apart = make_group(tmp_path / "apart", experts=1, tied=False)
    edit_tensors(apart.experts[0], lambda t: t.pop(HEAD))

    for group in (tied, apart):
        (problem,) = plan_group(group, method="mean").problems
        assert "Give a complete checkpoint" in problem


def test_equal_tables_of_a_tied_model_are_merged_once(tmp_path):
    """Whoever stores the head beside an equal embedding: it is left out, and tied when loaded."""
    group = make_group(tmp_path, experts=2, dtype=torch.float32)
    edit_tensors(group.experts[0], lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    edit_config(group.experts[0], tie_word_embeddings=False)

    made = merge(group, tmp_path / "out", method="mean")

    assert HEAD not in made.tensors
    merged = loaded(made.out)
    assert torch.equal(merged[HEAD], merged[EMBEDDING])


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_shared_table_that_is_stored_three_times_is_one(tmp_path, kind):
    """A base as published, with every name of the table; experts as trainers save them."""
    import transformers

    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32,
            max_position_embeddings=64,
        )  # fmt: skip
        name, prefix = "BartForConditionalGeneration", "model."
    else:
        config = transformers.T5Config(
            vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        name, prefix = "T5ForConditionalGeneration", ""
    folders = [tmp_path / part for part in ("base", "expert0", "expert1")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        getattr(transformers, name)(config).save_pretrained(folder)
    shared = f"{prefix}shared.weight"
    copies = [f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", HEAD]
    edit_tensors(folders[0], lambda t: t.update({n: t[shared].clone() for n in copies}))

    made = merge(Group(folders[0], tuple(folders[1:])), tmp_path / "out", method="mean")

    models = [loaded(folder, name) for folder in folders[1:]]
    for key, value in loaded(made.out, name).items():
        torch.testing.assert_close(value, (models[0][key] + models[1][key]) / 2)
    assert not set(copies) & set(read_tensors(made.out))


def test_bert_as_published_stores_its_output_table_twice(tmp_path):
    """The table and the bias of BERT's predictions: copies in the base, absent in the experts."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    folders = [tmp_path / part for part in ("base", "expert0", "expert1")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = transformers.BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(folder)
    copies = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    edit_tensors(folders[0], lambda t: t.update({n: t[of].clone() for n, of in copies.items()}))
    for folder in folders[1:]:
        edit_tensors(folder, lambda t: [t.pop(name, None) for name in copies])

    made = merge(Group(folders[0], tuple(folders[1:])), tmp_path / "out", method="mean")

    models = [loaded(folder, "BertForMaskedLM") for folder in folders[1:]]
    for key, value in loaded(made.out, "BertForMaskedLM").items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (models[0][key] + models[1][key]) / 2)
