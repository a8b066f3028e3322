"""Which token a row stands for: read from any file that says it, refused or said where unknown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resmerge_stream.errors import CheckpointFormatError
from resmerge_stream.planning.options import Options
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.tokens import read_tokens
from resmerge_stream.planning.vocabulary import with_numbers
from resmerge_stream.recipe import ModelRef, Tokenizer
from resmerge_stream.run.engine import run_merge
from resmerge_stream.sources import open_checkpoint
from tests.support.checkpoints import (
    edit_config,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
    recipe_of,
    write_json,
)

SENTENCEPIECE = Path(__file__).parents[1] / "data" / "sentencepiece"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")

pytestmark = pytest.mark.usefixtures("without_picture")


def words_of(folder):
    """Return the tokens in a tokenizer.json by their numbers."""
    document = json.loads((folder / "tokenizer.json").read_text())
    words = dict(document["model"]["vocab"])
    words |= {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    return sorted(words, key=words.__getitem__)


def tokens_in(folder):
    """Return what is read of a folder's tokens."""
    tokens = read_tokens(open_checkpoint(ModelRef(str(folder))))
    return None if tokens is None else dict(tokens.numbers)


def message(number, data):
    """Return a field of a protobuf message that holds bytes."""
    return bytes([number << 3 | 2, len(data)]) + data


def in_older_files(folder, kind, added=()):
    """Put a folder's tokens into older files, and its tokenizer.json away; some as added ones."""
    words = words_of(folder)
    numbers = {word: number for number, word in enumerate(words) if word not in added}
    (folder / "tokenizer.json").unlink()
    if kind == "vocab.json":
        write_json(folder / "vocab.json", numbers)
        (folder / "merges.txt").write_text("#version: 0.2\n")
    elif kind == "vocab.txt":
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in numbers))
    else:
        score = bytes([2 << 3 | 5]) + bytes(4)
        pieces = [message(1, message(1, word.encode()) + score) for word in numbers]
        (folder / "tokenizer.model").write_bytes(b"".join(pieces))
    return {word: words.index(word) for word in added}


def shuffled(folder, left="w5", right="w9"):
    """Swap two words of a tokenizer, and leave the table as it is."""
    document = json.loads((folder / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    words[left], words[right] = words[right], words[left]
    write_json(folder / "tokenizer.json", document)


def with_added(folder, *tokens, rows=None):
    """Give a checkpoint added tokens and a table with room for them."""
    document = json.loads((folder / "tokenizer.json").read_text())
    size = len(document["model"]["vocab"])
    document["added_tokens"] += [
        {"id": size + i, "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False} for i, token in enumerate(tokens)
    ]  # fmt: skip
    write_json(folder / "tokenizer.json", document)
    widened(folder, rows or size + len(tokens))


def widened(folder, rows):
    """Give a checkpoint's tables more rows, of seeded values."""
    random = torch.Generator().manual_seed(rows)

    def change(tensors):
        for name in TABLES:
            if name in tensors:
                old = tensors[name]
                new = torch.randn(rows, old.shape[1], generator=random).to(old.dtype)
                new[: len(old)] = old
                tensors[name] = new

    edit_tensors(folder, change)
    edit_config(folder, vocab_size=rows)


def matched(group, out, source):
    """Merge a group by token; return its tensors and its tokens."""
    recipe = replace(recipe_of(group, method="mean"), tokenizer=Tokenizer(source))
    list(run_merge(plan_merge(recipe, out=out), out=out))
    return read_tensors(out), tokens_in(out)


def test_a_sentencepiece_models_pieces_have_the_numbers_that_sentencepiece_gives(tmp_path):
    """The file and the pieces were written by sentencepiece 0.2; letters of any script are read."""
    group = make_group(tmp_path, experts=1)
    (group.base / "tokenizer.json").unlink()
    (group.base / "tokenizer_config.json").unlink()
    (group.base / "tokenizer.model").write_bytes((SENTENCEPIECE / "tokenizer.model").read_bytes())

    pieces = json.loads((SENTENCEPIECE / "pieces.json").read_text())
    assert tokens_in(group.base) == {piece: number for number, piece in enumerate(pieces)}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "bert"])
def test_older_files_say_the_tokens_that_transformers_reads(kind, tmp_path):
    """Words by number, those of added_tokens_decoder, and special tokens that are in neither."""
    from transformers import AutoTokenizer

    group = make_group(tmp_path, experts=1)
    folder = group.base
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "a", "b", "ab"]
    if kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        config = {"tokenizer_class": "BertTokenizer"}
        edit_config(folder, model_type="bert")
    else:
        write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
        name = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}[kind]
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        entry = {"content": "<|im_end|>", "special": True, **flags}
        config = {"tokenizer_class": name, "eos_token": "<|im_end|>", "pad_token": "<pad>",
                  "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
                  "added_tokens_decoder": {"9": entry}}  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)

    assert tokens_in(folder) == AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("added", ["added_tokens.json", "added_tokens_decoder"])
@pytest.mark.parametrize("kind", ["vocab.json", "vocab.txt", "tokenizer.model"])
def test_an_expert_with_older_files_merges_as_with_a_tokenizer_json(kind, added, source, tmp_path):
    """Rows are matched by token, whatever file says which row is which token's; bit for bit."""
    found = []
    for older in (False, True):
        group = make_group(tmp_path / str(older), experts=2)
        (expert, _) = group.experts
        shuffled(expert)
        with_added(expert, "<tool>", "<end>")
        if older:
            more = in_older_files(expert, kind, ("<tool>", "<end>"))
            if added == "added_tokens.json":
                write_json(expert / "added_tokens.json", more)
            else:
                path = expert / "tokenizer_config.json"
                decoder = {str(n): {"content": t, "special": True} for t, n in more.items()}
                config = json.loads(path.read_text()) | {"added_tokens_decoder": decoder}
                write_json(path, config)
        found.append(matched(group, tmp_path / f"out{older}", source))

    (tensors, tokens), (again, same) = found
    assert tokens == same
    assert ("<tool>" in tokens) == (source == "union")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_a_base_with_older_files_is_written_with_what_experts_add(tmp_path):
    """The files of the base stay, and say its tokens beside the added ones."""
    group = make_group(tmp_path / "group", experts=1)
    with_added(group.experts[0], "<tool>")
    in_older_files(group.base, "vocab.txt")

    tensors, tokens = matched(group, tmp_path / "out", "union")

    assert (tmp_path / "out" / "vocab.txt").is_file()
    assert tokens["<tool>"] == 48
    assert len(tensors[TABLES[0]]) == len(tokens) == 49


@pytest.mark.parametrize("source", ["base", "union"])
def test_tokens_that_nothing_reads_are_refused_by_name(source, tmp_path):
    """Files of another kind that differ are neither believed nor passed over."""
    group = make_group(tmp_path, experts=1)
    (group.experts[0] / "tokenizer.json").unlink()
    (group.experts[0] / "tekken.json").write_text("{}")
    recipe = replace(recipe_of(group, method="mean"), tokenizer=Tokenizer(source))

    (problem,) = plan_merge(recipe).problems

    assert "tekken.json" in problem
    assert "expert0" in problem


def test_the_same_files_of_any_kind_need_not_be_read(tmp_path):
    """Equal files say equal tokens; without a recipe's word on tokens that is all that counts."""
    group = make_group(tmp_path, experts=2)
    for folder in group.folders:
        (folder / "tokenizer.json").unlink()
        (folder / "tiktoken.model").write_text("QQ== 0\n")

    plan = plan_group(group, method="mean")

    assert not plan.refused
    assert not [warning for warning in plan.warnings if "token" in warning]


def test_files_that_differ_and_are_not_read_are_said(tmp_path):
    """Merged by number, the merge says that it does not know which tokens the rows stand for."""
    group = make_group(tmp_path, experts=1)
    for number, folder in enumerate(group.folders):
        (folder / "tokenizer.json").unlink()
        (folder / "tekken.json").write_text(f"[{number}]")

    plan = plan_group(group, method="mean")

    assert not plan.refused
    assert any("tekken.json" in text and "merged by number" in text for text in plan.warnings)


def test_a_model_without_tokenizer_files_is_said(tmp_path):
    """Its rows are taken for the base's tokens, with and without a recipe's word on tokens."""
    group = make_group(tmp_path, experts=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (group.experts[0] / name).unlink()
    asked = replace(recipe_of(group, method="mean"), tokenizer=Tokenizer("union"))

    for plan in (plan_group(group, method="mean"), plan_merge(asked)):
        assert not plan.refused
        assert any("expert0 has no tokenizer files" in text for text in plan.warnings)


@pytest.mark.parametrize("older", [False, True])
def test_tables_of_one_size_in_another_order_are_refused(older, tmp_path):
    """Row by row they would mix tokens; the way out that is named leads to the right merge."""
    group = make_group(tmp_path / "group", experts=1)
    shuffled(group.experts[0])
    if older:
        in_older_files(group.experts[0], "vocab.json")

    (problem,) = plan_group(group, method="mean").problems
    tensors, tokens = matched(group, tmp_path / "out", "base")

    assert "w5 is row 5 and 9" in problem
    assert "--tokenizer-source base" in problem
    base, expert = (read_tensors(folder)[TABLES[0]] for folder in group.folders)
    assert tokens["w5"] == 5
    assert torch.allclose(tensors[TABLES[0]][5], expert[9], rtol=0.01)
    assert not torch.allclose(expert[9], base[5], rtol=0.01)


def test_a_reserved_token_may_have_another_name(tmp_path):
    """It stays in its row, so the merge is right, and the plan says that the name is lost."""
    group = make_group(tmp_path, experts=1)
    with_added(group.base, "<reserved>")
    with_added(group.experts[0], "<tool>")

    plan = plan_group(group, method="mean")

    assert not plan.refused
    (said,) = [warning for warning in plan.warnings if "<tool>" in warning]
    assert "--tokenizer-from" in said


def test_a_token_in_the_padding_is_taken_along_with_its_tokenizer(tmp_path):
    """The named way out, that expert's tokenizer, has the token, and nothing more is said."""
    group = make_group(tmp_path / "group", experts=1)
    widened(group.base, 50)
    with_added(group.experts[0], "<think>", rows=50)
    options = Options(tokenizer_from=str(group.experts[0]))

    said = [text for text in plan_group(group, method="mean").warnings if "<think>" in text]
    merged = merge(group, tmp_path / "out", method="mean", options=options)

    assert "--tokenizer-from" in said[0]
    assert tokens_in(tmp_path / "out")["<think>"] == 48
    assert not [text for text in merged.report["summary"]["warnings"] if "<think>" in text]


@pytest.mark.parametrize("how", ["order", "beyond"])
def test_a_tokenizer_that_does_not_fit_the_tables_is_refused(how, tmp_path):
    """Taken alone, tokens would have other rows or none; matched by token they have their own."""
    group = make_group(tmp_path / "group", experts=1)
    other = make_group(tmp_path / "other", experts=0).base
    if how == "order":
        shuffled(other)
    else:
        with_added(other, "<x>")

    (problem,) = plan_group(
        group, method="mean", options=Options(tokenizer_from=str(other))
    ).problems
    _, tokens = matched(group, tmp_path / "out", ModelRef(str(other)))

    assert f"--tokenizer-source {other}" in problem
    assert tokens == tokens_in(other)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    """A vocabulary without numbers is no vocabulary."""
    group = make_group(tmp_path, experts=1)
    (group.base / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}')

    with pytest.raises(CheckpointFormatError, match="no vocabulary"):
        tokens_in(group.base)


def test_a_number_whose_token_is_gone_names_no_other():
    """What ends a turn is told by token: where the merge lacks it, its old number is another's."""
    said = {"eos_token_id": [301, 0], "pad_token_id": 301, "bos_token_id": 999, "top_k": 301}

    now = with_numbers(said, {"<end>": 0, "<turn>": 301}, {"<think>": 301, "<end>": 5})

    assert now == {"eos_token_id": [5], "pad_token_id": None, "bos_token_id": 999, "top_k": 301}
