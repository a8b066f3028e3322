"""Vocabularies: rows matched by token, as mergekit matches them; what was added, cut, or made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Tokenizers
from tokenizers.models import WordLevel

from resmerge_stream.errors import PlanRefusedError
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import load_recipe
from resmerge_stream.planning.tokens import plain_entry
from resmerge_stream.recipe import ModelRef, Tokenizer, TokenRow
from resmerge_stream.run.engine import run_merge
from resmerge_stream.run.verify import verify_folder
from resmerge_stream.studies.compare import run_comparison
from resmerge_stream.studies.compare_plan import plan_comparison
from tests.support.checkpoints import (
    Group,
    edit_config,
    edit_tensors,
    make_group,
    read_tensors,
    recipe_of,
)

MERGEKIT = Path(__file__).parents[1] / "data" / "mergekit_tokens"
RECIPES = sorted(path.stem for path in (MERGEKIT / "recipes").glob("*.yml"))
TABLES = ("model.embed_tokens.weight", "lm_head.weight")

pytestmark = pytest.mark.usefixtures("without_picture")


def tokens_of(folder):
    """Return the tokens that transformers sees in a folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("name", RECIPES)
def test_every_tokens_row_is_mergekits(name, tmp_path, monkeypatch):
    """Token by token, whatever number each tool gives it; no token more or less; padding too."""
    monkeypatch.chdir(MERGEKIT)
    out = tmp_path / "out"
    plan = plan_merge(load_recipe(f"recipes/{name}.yml"), out=out)

    list(run_merge(plan, out=out))

    expected = json.loads((MERGEKIT / "expected.json").read_text())[name]
    values = load_file(MERGEKIT / "expected.safetensors")
    merged, tokens = read_tensors(out), tokens_of(out)
    assert set(tokens) == set(expected["tokens"])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == expected["vocab_size"]
    for table in TABLES:
        wanted, found = values[f"{name}/{table}"], merged[table]
        assert found.shape == wanted.shape
        for token, number in expected["tokens"].items():
            assert torch.allclose(found[tokens[token]], wanted[number], atol=1e-6), token
        padding = slice(len(tokens), None)
        assert torch.allclose(found[padding], wanted[padding], atol=1e-6)
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(merged[other], values[f"{name}/{other}"], atol=1e-6)


def grown(folder, tokens, *, rows=None, shuffled=()):
    """Give a checkpoint further tokens with rows of their own, and swap two ordinary ones."""
    document = json.loads((folder / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    size = len(words)
    for left, right in shuffled:
        words[left], words[right] = words[right], words[left]
    document["added_tokens"] += [
        plain_entry(token, size + number) | {"special": True} for number, token in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    rows = rows or size + len(tokens)
    random = torch.Generator().manual_seed(size)

    def change(tensors):
        for name in TABLES:
            if name not in tensors:
                continue
            old = tensors[name]
            new = torch.randn(rows, old.shape[1], generator=random).to(old.dtype)
            new[:size] = old
            tensors[name] = new

    if (folder / "model.safetensors").exists():
        edit_tensors(folder, change)
    edit_config(folder, vocab_size=rows)


def merged(group, out, source, **options):
    """Merge a group with a tokenizer's source; return the tensors and the plan."""
    recipe = replace(recipe_of(group, **options), tokenizer=Tokenizer(source))
    plan = plan_merge(recipe, out=out)
    list(run_merge(plan, out=out))
    return read_tensors(out), plan


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("tied", [True, False])
def test_grown_experts_merge_and_the_model_speaks(tmp_path, source, tied):
    """Each token's row is the mean of its rows in the models; transformers loads and generates."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    group = make_group(tmp_path / "group", experts=2, tied=tied)
    grown(group.experts[0], ["<pad>", "<tool>"], rows=64)
    grown(group.experts[1], ["<tool>"], shuffled=[("w5", "w9")])

    found, plan = merged(group, tmp_path / "out", source, method="mean")

    models = [read_tensors(folder) for folder in group.folders]
    tokens = [tokens_of(folder) for folder in group.folders]
    have = tokens_of(tmp_path / "out")
    assert set(have) == (set().union(*tokens) if source == "union" else set(tokens[0]))
    for table in TABLES[: 2 - tied]:
        assert found[table].shape[0] == len(have) == plan.layout.config["vocab_size"]
        for token, number in have.items():
            rows = [m[table][t[token]].double() if token in t else None
                    for m, t in zip(models, tokens, strict=True)]  # fmt: skip
            known = [row for row in rows if row is not None]
            # Of the base, else of the only one; of several without the base their mean.
            rows = [sum(known) / len(known) if row is None and rows[0] is None else row
                    for row in rows]  # fmt: skip
            rows = [rows[0] if row is None else row for row in rows]
            wanted = rows[0] + (rows[1] + rows[2] - 2 * rows[0]) / 2
            assert torch.allclose(found[table][number].double(), wanted, rtol=0.01, atol=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    inputs = tokenizer("w5 w9 <tool>", return_tensors="pt").input_ids
    assert model.generate(inputs, max_new_tokens=3, do_sample=False).shape[1] <= inputs.shape[1] + 3
    if source == "union":
        assert int(inputs[0, -1]) == have["<tool>"]


def test_tables_in_shards_and_in_blocks_are_the_same(tmp_path, monkeypatch):
    """Where a table lies and how it is cut changes no bit of it."""
    found = []
    for sharded in (False, True):
        group = make_group(tmp_path / str(sharded), experts=2, sharded=sharded, tied=False)
        grown(group.base, [], shuffled=[("w7", "w11"), ("w3", "w40")])
        if sharded:
            monkeypatch.setattr("resmerge_stream.run.pieces.PIECE_BYTES", 600)
        found.append(merged(group, tmp_path / f"out{sharded}", "union", method="mean")[0])

    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_merge_with_matched_tokens_verifies_and_compares(tmp_path):
    """Its recipe makes the same bytes again, and a comparison matches tokens once for each."""
    group = make_group(tmp_path / "group", experts=2)
    grown(group.experts[0], ["<pad>"], shuffled=[("w5", "w9")])
    one, _ = merged(group, tmp_path / "out", "union", method="mean")

    checks = list(verify_folder(tmp_path / "out"))
    recipe = replace(recipe_of(group), tokenizer=Tokenizer("union"))
    comparison = plan_comparison(recipe, ["task_arithmetic", "mean"], out=tmp_path / "several")
    list(run_comparison(comparison))

    assert not any(check.problems for check in checks)
    again = read_tensors(tmp_path / "several" / "mean")
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_special_tokens_are_named_by_their_new_numbers(tmp_path):
    """With another model's tokenizer the configs name the same tokens as before."""
    group = make_group(tmp_path / "group", experts=1)
    grown(group.experts[0], ["<pad>"], shuffled=[("</s>", "w9")])

    source = ModelRef(str(group.experts[0]))
    _, plan = merged(group, tmp_path / "out", source, method="mean")

    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == 9
    assert tokens_of(tmp_path / "out")["</s>"] == 9
    assert plan.experts[0].config["eos_token_id"] == 2


def test_tokens_beyond_the_table_are_cut_from_a_bpe_tokenizer(tmp_path):
    """A tokenizer that knows more than its model has rows is written without the rest."""
    shutil.copytree(MERGEKIT, tmp_path / "models")
    folder = tmp_path / "models" / "base"
    edit_tensors(folder, lambda t: t.update({name: t[name][:18].clone() for name in TABLES}))
    edit_config(folder, vocab_size=18)
    group = Group(folder, (tmp_path / "models" / "expert2",))

    _, plan = merged(group, tmp_path / "out", "base", method="mean")

    assert any("beyond its table" in text for text in plan.warnings)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [entry["content"] for entry in written["added_tokens"]] == ["<s>", "</s>"]


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (Tokenizer("union", (("<x>", TokenRow(ModelRef("o/other"))),)), "is not merged here"),
        (Tokenizer("union", (("<x>", TokenRow(ModelRef("E"))),)), "has no such row"),
        (Tokenizer("union", (("<x>", TokenRow(ModelRef("E"), token_id=99)),)), "has no such row"),
    ],
)
def test_a_row_that_is_not_there_is_refused(tmp_path, tokenizer, words):
    """The token and the model are named."""
    group = make_group(tmp_path / "group", experts=1)
    rows = tuple(
        (token, replace(row, model=ModelRef(str(group.experts[0]))))
        if row.model == ModelRef("E")
        else (token, row)
        for token, row in tokenizer.tokens
    )
    recipe = replace(recipe_of(group, method="mean"), tokenizer=replace(tokenizer, tokens=rows))

    (problem,) = plan_merge(recipe).problems

    assert words in problem
    assert "<x>" in problem


def test_a_base_without_tokens_is_refused(tmp_path):
    """Nothing is guessed where no tokenizer.json says which row is which token's."""
    group = make_group(tmp_path / "group", experts=1)
    (group.base / "tokenizer.json").unlink()
    recipe = replace(recipe_of(group, method="mean"), tokenizer=Tokenizer("base"))

    (problem,) = plan_merge(recipe).problems

    assert "tokenizer.json" in problem


def test_an_adapter_merges_beside_an_expert_with_more_tokens(tmp_path):
    """Its changes go on the base's tokens; where it changes the tables themselves it is refused."""
    adapters = pytest.importorskip("tests.support.adapters")
    kinds = adapters.KINDS
    base = adapters.make_base(tmp_path / "base", kinds["plain"])
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    words = {f"w{number}": number for number in range(vocabulary)}
    Tokenizers(WordLevel(words, unk_token="w0")).save(str(base / "tokenizer.json"))
    grown_one = shutil.copytree(base, tmp_path / "expert")
    grown(grown_one, ["<pad>"])
    plain = adapters.make_adapter(tmp_path / "plain", base, kinds["plain"])
    tables = adapters.make_adapter(tmp_path / "tables", base, kinds["embeddings"])

    group = Group(base, (grown_one, adapters.whole(base, plain, tmp_path / "whole")))
    found, _ = merged(Group(base, (grown_one, plain)), tmp_path / "out", "union", method="mean")
    shutil.copy(base / "tokenizer.json", group.experts[1])
    wanted, _ = merged(group, tmp_path / "wanted", "union", method="mean", dtype="float32")
    with pytest.raises(PlanRefusedError, match="Merge that adapter into its base first"):
        merged(Group(base, (grown_one, tables)), tmp_path / "no", "union", method="mean")

    assert found["model.embed_tokens.weight"].shape[0] == vocabulary + 1
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
