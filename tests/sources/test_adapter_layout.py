"""An adapter's tensors find their places in a base, or it is said why they don't."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers
from safetensors.torch import load_file, save_file

from resmerge_stream.errors import UnsupportedCheckpointError
from resmerge_stream.sources.adapter import Adapter
from resmerge_stream.sources.adapter_layout import _TRANSPOSED
from tests.support import adapters

TINKER = Path(__file__).parents[1] / "data" / "tinker"
PEFT = "base_model.model."


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model._fsdp_wrapped_module."),
        ("lora_B.weight", "lora_B.default.weight"),
        ("base_model.model.lm_head", "base_model.model.model.unembed_tokens"),
    ],
    ids=["no prefix", "FSDP", "the adapter's name", "Tinker's head"],
)
def test_other_trainers_names_mean_the_same(tmp_path, ours, theirs):
    """Without PEFT's prefix, with a wrapper's, with another word for the head: the same update."""
    made = adapters.KINDS["embeddings"]
    base = adapters.make_base(tmp_path / "base", made)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, made)
    other = tmp_path / "other"
    other.mkdir()
    stored = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace(ours, theirs, 1): tensor for key, tensor in stored.items()}
    save_file(renamed, other / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", other)

    found, expected = adapters.deltas(base, other), adapters.deltas(base, adapter)

    assert set(renamed) != set(stored)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


def test_a_part_whose_place_is_not_known_is_refused(tmp_path):
    """Where a part of a layer begins, only the parts before it say; without them it is refused."""
    shutil.copytree(TINKER / "qwen3_5_moe", tmp_path / "family")
    file = tmp_path / "family" / "adapter" / "adapter_model.safetensors"
    save_file(
        {key: value for key, value in load_file(file).items() if "in_proj_q" not in key}, file
    )

    with pytest.raises(UnsupportedCheckpointError, match="in_proj_q, which comes before it"):
        adapters.deltas(tmp_path / "family" / "base", tmp_path / "family" / "adapter")


EXPERTS = ("w1", "w2", "w3")


@pytest.mark.parametrize(
    ("kind", "parent", "leaves"),
    [
        ("experts by themselves", "mlp", ("gate_proj", "down_proj", "up_proj")),
        ("mixtral", "block_sparse_moe", EXPERTS),
    ],
)
def test_a_stack_of_factors_changes_each_expert(tmp_path, kind, parent, leaves):
    """Tinker's form: factors of all experts in one tensor, those they share stored once; each
    expert's own matrix gets s·Bₑ·Aₑ."""
    experts, rank, alpha = 4, 2, 3
    sizes = {"num_local_experts": experts, "num_experts_per_tok": 2}
    model = adapters.KINDS.get(kind, adapters.Kind("mixtral", {}, sizes))
    base = adapters.make_base(tmp_path / "base", model)
    stored = adapters.weights(base)
    random = torch.Generator().manual_seed(0)
    factors, expected = {}, {}
    for name, leaf in zip(EXPERTS, leaves, strict=True):
        module = f"model.layers.1.{parent}.experts"
        m, n = stored[f"{module}.0.{leaf}.weight"].shape
        inner, outer = (experts, 1) if name == "w2" else (1, experts)
        down = torch.randn(inner, rank, n, generator=random)
        up = torch.randn(outer, m, rank, generator=random)
        factors[f"base_model.model.{module}.{name}.lora_A.weight"] = down
        factors[f"base_model.model.{module}.{name}.lora_B.weight"] = up
        products = alpha / rank * up.double() @ down.double()
        for e in range(experts):
            expected[f"{module}.{e}.{leaf}.weight"] = products[e]
    adapter = adapters.written(tmp_path / "adapter", factors, r=rank, lora_alpha=alpha)

    found = adapters.deltas(base, adapter)

    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert (found[name].double() - delta).norm() <= 1e-6 * delta.norm(), name


def test_factors_that_fit_two_ways_are_refused(tmp_path):
    """Of a stack of square matrices no shape says whether it is stored transposed."""
    made = adapters.KINDS["fused experts"]
    square = replace(made, sizes={**made.sizes, "intermediate_size": adapters.SMALL["hidden_size"]})
    base = adapters.make_base(tmp_path / "base", square)
    module = "base_model.model.model.layers.0.feed_forward.experts"
    factors = {f"{module}.lora_A.weight": torch.ones(8, 16)}
    factors[f"{module}.lora_B.weight"] = torch.ones(16, 8)
    target = ["experts.down_proj"]
    adapter = adapters.written(
        tmp_path / "adapter", factors, r=2, lora_alpha=3, target_parameters=target
    )

    with pytest.raises(UnsupportedCheckpointError, match="fit in more than one way"):
        adapters.deltas(base, adapter)


@pytest.mark.parametrize(("kind", "said"), [("plain", True), ("gpt2", False)])
def test_the_layers_class_tells_how_a_square_matrix_lies(tmp_path, kind, said):
    """Not the adapter's `fan_in_fan_out`, which PEFT corrects with a warning."""
    made = adapters.KINDS[kind]
    base = adapters.make_base(tmp_path / "base", made)
    adapter = adapters.make_adapter(tmp_path / "made", base, made)
    other = adapters.changed(tmp_path / "adapter", adapter, config={"fan_in_fan_out": said})
    expected = adapters.weights(adapters.whole(base, other, tmp_path / "whole"))
    before = adapters.weights(base)

    found = adapters.deltas(base, other)

    assert any(len(set(delta.shape)) == 1 for delta in found.values() if delta.dim() == 2)
    for name, delta in found.items():
        right = expected[name] - before[name].double()
        assert (delta.double() - right).norm() <= 1e-5 * right.norm(), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return an untied base and an adapter of its linear layers and tables."""
    folder = tmp_path_factory.mktemp("plain")
    base = adapters.make_base(folder / "base", adapters.KINDS["embeddings"])
    adapter = adapters.make_adapter(folder / "adapter", base, adapters.KINDS["embeddings"])
    return base, adapter, adapters.deltas(base, adapter)


@pytest.mark.parametrize(
    "around",
    [
        lambda key: PEFT + key,
        lambda key: f"module.{key}",
        lambda key: key.replace(PEFT, f"{PEFT}_orig_mod."),
        lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
        lambda key: key.replace(PEFT, f"pretrained_model.{PEFT}"),
    ],
    ids=["twice", "parallel", "compiled", "checkpointed", "TRL"],
)
def test_what_trainers_put_around_a_model_is_looked_through(tmp_path, plain, around):
    """Wrappers' names, and PEFT's own twice, change nothing."""
    base, adapter, expected = plain
    other = adapters.changed(tmp_path / "other", adapter, rename=around)

    found = adapters.deltas(base, other)

    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


def test_two_tensors_for_one_factor_are_refused(tmp_path, plain):
    """A module that is there under two names has no one meaning."""
    base, adapter, _ = plain
    stored = load_file(adapter / "adapter_model.safetensors")
    twice = stored | {
        PEFT + key: tensor.clone() for key, tensor in stored.items() if "layers.0" in key
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = adapters.written(tmp_path / "other", twice, **settings)

    with pytest.raises(UnsupportedCheckpointError, match="are factors of one module"):
        adapters.deltas(base, other)


def test_the_copies_of_a_whole_state_dict_are_left_out(tmp_path):
    """``original_module`` is the base's own; a trainer's value head is left out by name."""
    kind = adapters.KINDS["modules_to_save"]
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)
    stored = load_file(adapter / "adapter_model.safetensors")
    head = adapters.weights(base)["lm_head.weight"]
    more = {
        f"{PEFT}lm_head.original_module.weight": head,
        f"{PEFT}model.layers.0.self_attn.q_proj.base_layer.weight": adapters.weights(base)[
            "model.layers.0.self_attn.q_proj.weight"
        ],
        "v_head.summary.weight": torch.ones(1, 16),
    }
    more |= {
        key.replace("lm_head.", "lm_head.modules_to_save.default."): tensor
        for key, tensor in stored.items()
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = adapters.written(tmp_path / "other", more, **settings)

    found, expected = adapters.deltas(base, other), adapters.deltas(base, adapter)
    notes = Adapter.of(adapters.opened(other), adapters.opened(base)).notes

    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], delta, atol=1e-7) for name, delta in expected.items())
    assert any("v_head.summary.weight" in note and "left out" in note for note in notes)


# What releases of PEFT took for the input's side of a stack (experts, a, b), read in their source.
RELEASES = {
    "0.17.1": lambda is_transposed: True,
    "0.18.1": lambda is_transposed: True,
    "0.19.0": lambda is_transposed: not is_transposed,
    "0.19.1": lambda is_transposed: is_transposed,
    "0.21.3.dev0@abc": lambda is_transposed: is_transposed,
}


@pytest.mark.parametrize("release", list(RELEASES))
@pytest.mark.parametrize(
    ("model", "is_transposed", "parent", "target"),
    [
        ("olmoe", False, "mlp", "gate_up_proj"),
        ("gpt_oss", True, "mlp", "down_proj"),
        # Stored as (in, out), but nothing in transformers says so: PEFT takes it for (out, in).
        ("llama4_text", False, "feed_forward", "down_proj"),
    ],
)
def test_the_release_that_made_it_tells_how_factors_of_a_square_stack_lie(
    tmp_path, release, model, is_transposed, parent, target
):
    """Where both ways fit, ``peft_version`` says whether A is the first axis or the second."""
    made = adapters.KINDS["fused experts"]
    sizes = {
        "olmoe": {"num_key_value_heads": 4, "intermediate_size": 8, "num_experts": 4},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
        "llama4_text": made.sizes,
    }
    square = {} if model == "olmoe" else {"intermediate_size": 16}
    kind = replace(made, model=model, sizes={**sizes[model], **square})
    base = adapters.make_base(tmp_path / "base", kind)
    parent = f"model.layers.0.{parent}.experts"
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 16, generator=random), torch.randn(16, 8, generator=random)
    adapter = adapters.written(
        tmp_path / "adapter",
        {f"{PEFT}{parent}.lora_A.weight": A, f"{PEFT}{parent}.lora_B.weight": B},
        r=2,
        lora_alpha=3,
        target_parameters=[f"experts.{target}"],
        peft_version=release,
    )
    BA = torch.einsum("ore,eri->eoi", B.reshape(16, 2, 4).double(), A.reshape(4, 2, 16).double())
    if RELEASES[release](is_transposed):
        BA = BA.mT

    found = adapters.deltas(base, adapter)

    for expert in range(4):
        if model == "olmoe":
            parts = (f"{parent}.{expert}.{part}_proj.weight" for part in ("gate", "up"))
            delta = torch.cat([found[part] for part in parts])
        else:
            delta = found[f"{parent}.{target}"][expert]
        assert torch.allclose(delta.double(), 1.5 * BA[expert], rtol=1e-5, atol=1e-6)


def test_the_architectures_that_say_that_they_are_transposed_are_transformers():
    """The table names every architecture whose experts' class says so in the installed release."""
    models = Path(transformers.__file__).parent / "models"
    said = re.compile(r"use_experts_implementation\([^)]*is_transposed=True")

    found = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if said.search(path.read_text(encoding="utf-8"))
    }

    assert found == _TRANSPOSED - {"aria_text"}


TIED = adapters.KINDS["tied embedding"]


def tied(folder, **lora):
    """Write a tied base and an adapter of it."""
    base = adapters.make_base(folder / "base", TIED)
    kind = replace(TIED, lora={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **lora})
    return base, adapters.make_adapter(folder / "adapter", base, kind)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "the head would move with it"),
        ({"modules_to_save": ["lm_head"]}, "cannot hold a head of its own"),
        ({"target_modules": ["lm_head"]}, "cannot hold a head of its own"),
    ],
)
def test_what_a_tied_base_cannot_hold_is_refused(tmp_path, lora, words):
    """A head apart from the embedding, either way round, is named with the way out."""
    base, adapter = tied(tmp_path, **lora)

    with pytest.raises(UnsupportedCheckpointError, match=f"{words}.*Untie the base first"):
        adapters.deltas(base, adapter)


@pytest.mark.parametrize(
    ("lora", "save"),
    [
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, {}),
        ({"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}, {}),
        ({}, {"save_embedding_layers": True}),
    ],
    ids=["saved", "adapted", "adapted head", "only kept"],
)
def test_tables_that_were_trained_as_one_are_merged_on_a_tied_base(tmp_path, lora, save):
    """Where head and embedding are one in the adapter too, the table moves once.

    PEFT's merge adds the factors of head and embedding to the one table, and moves it twice.
    """
    base = adapters.make_base(tmp_path / "base", TIED)
    kind = replace(TIED, lora={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **lora})
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind, **save)
    before, stored = adapters.weights(base), load_file(adapter / "adapter_model.safetensors")
    table = f"{PEFT}model.embed_tokens"
    expected = stored.get(f"{table}.weight", before["model.embed_tokens.weight"]).double()
    if f"{table}.lora_embedding_A" in stored:
        A, B = (stored[f"{table}.lora_embedding_{side}"].double() for side in "AB")
        expected = expected + 2 * (B @ A).T

    found = adapters.deltas(base, adapter)

    delta = found.get("model.embed_tokens.weight", torch.zeros(()))
    merged = before["model.embed_tokens.weight"].double() + delta.double()
    assert torch.allclose(merged, expected, atol=1e-6)
    assert not [name for name in found if "lm_head" in name]


def test_lora_on_a_tied_embedding_is_a_note(tmp_path):
    """PEFT's merge moves the head too, which the training did not: that is said."""
    base, adapter = tied(tmp_path, target_modules=["embed_tokens", "q_proj"])

    notes = Adapter.of(adapters.opened(adapter), adapters.opened(base)).notes

    assert len(notes) == 1
    assert "in training only the embedding did" in notes[0]


def test_a_head_that_a_tied_base_stores_too_is_its_embedding(tmp_path):
    """Some checkpoints store both: an adapter of that head is refused all the same."""
    base, adapter = tied(tmp_path, modules_to_save=["lm_head"])
    file = base / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, file)

    with pytest.raises(UnsupportedCheckpointError, match="cannot hold a head of its own"):
        adapters.deltas(base, adapter)


BERT = adapters.Kind(
    "bert", {"r": 2, "target_modules": ["query"], "modules_to_save": ["LayerNorm"]}
)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (adapters.KINDS["gpt2"], lambda name: name.removeprefix("transformer.")),
        (
            BERT,
            lambda name: re.sub(
                r"LayerNorm\.(weight|bias)",
                lambda found: f"LayerNorm.{ {'weight': 'gamma', 'bias': 'beta'}[found[1]]}",
                name.removeprefix("bert."),
            ),
        ),
    ],
    ids=["GPT-2", "BERT"],
)  # fmt: skip
def test_a_base_under_the_names_it_was_published_with_is_matched(tmp_path, kind, stored):
    """Without the prefix of a model under a head, with gamma and beta: the same updates."""
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)
    published = shutil.copytree(base, tmp_path / "published")
    tensors = {stored(name): W for name, W in adapters.weights(base).items()}
    save_file(tensors, published / "model.safetensors", {"format": "pt"})

    found, expected = adapters.deltas(published, adapter), adapters.deltas(base, adapter)

    assert found.keys() == {stored(name) for name in expected}
    assert found.keys() != expected.keys()
    assert all(torch.equal(found[stored(name)], delta) for name, delta in expected.items())


def test_factors_of_a_layer_go_to_the_parts_that_the_base_stores(tmp_path):
    """A fused layer's factors are cut by rows, and each expert has its own."""
    made = adapters.KINDS["experts by themselves"]
    kind = replace(made, lora={**made.lora, "target_parameters": ["experts.gate_up_proj"]})
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)

    edits = Adapter.of(adapters.opened(adapter), adapters.opened(base)).edits

    names = [f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up")]
    (gate,), (up,) = (edits[name].terms for name in names)
    assert (gate.expert, up.expert) == (3, 3)
    assert (gate.left.rows, up.left.rows) == (slice(0, 12, 1), slice(12, 24, 1))
    assert not gate.is_whole


def test_a_convolution_is_a_matrix_of_rows_by_the_rest(tmp_path):
    """PEFT's factors of a patch embedding, B of size 1, are merged as their product."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "base")
    before = adapters.weights(tmp_path / "base")
    with adapters.quiet():
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["projection"])
        live = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        live.save_pretrained(tmp_path / "adapter")
        live.double().merge_and_unload().save_pretrained(tmp_path / "whole")
    after = adapters.weights(tmp_path / "whole")

    found = adapters.deltas(tmp_path / "base", tmp_path / "adapter")

    (name,) = found
    assert len(before[name].shape) == 4
    assert torch.allclose(found[name].double(), after[name] - before[name].double(), atol=1e-6)


def test_a_key_that_is_no_name_is_refused_without_being_shown_raw(tmp_path, plain):
    """Control characters of a stranger's keys don't reach a terminal."""
    base, adapter, _ = plain
    other = adapters.changed(
        tmp_path / "other", adapter, rename=lambda key: key.replace("q_proj", "\x1b[31mq")
    )

    with pytest.raises(UnsupportedCheckpointError, match="no module's name") as caught:
        adapters.deltas(base, other)

    assert "\x1b" not in str(caught.value)


def test_more_modules_than_the_base_has_rows_are_refused_at_once(tmp_path, plain, monkeypatch):
    """No base has as many; none of them is looked for under the names of transformers."""
    base, adapter, _ = plain
    factors = {
        f"{PEFT}model.n{number}.lora_{side}.weight": torch.zeros(1, 1)
        for number in range(5000)
        for side in "AB"
    }
    stored = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = adapters.written(tmp_path / "other", stored | factors, **settings)
    monkeypatch.setattr("resmerge_stream.sources.adapter_layout.transforms_of", None)

    with pytest.raises(UnsupportedCheckpointError, match=r"adapts 5,\d+ modules.* another base"):
        adapters.deltas(base, other)
