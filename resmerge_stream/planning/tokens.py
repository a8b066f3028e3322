"""A tokenizer's files as data: its tokens by number, and the same files with other tokens."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointFormatError, shown
from ..sources.checkpoint import Checkpoint

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# Other files that say which tokens there are; without them tokenizer.json alone counts.
OTHERS = ("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
          "spiece.model")  # fmt: skip
MAX_TOKENS = 4_000_000


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer knows.

    Attributes:
        numbers: every token and its number.
        added: entries of ``added_tokens`` by token.
        document: ``tokenizer.json``.
        config: ``tokenizer_config.json``.
    """

    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def read_tokens(checkpoint: Checkpoint) -> Tokens | None:
    """Return a checkpoint's tokens; None where it has no ``tokenizer.json``.

    Raises:
        CheckpointFormatError: the file is not one.
    """
    if FILE not in checkpoint.small_files:
        return None
    where = f"{FILE} of {checkpoint.id}"
    document = _mapping(checkpoint.read_small(FILE), where)
    config: Mapping[str, Any] = {}
    if CONFIG in checkpoint.small_files:
        config = _mapping(checkpoint.read_small(CONFIG), f"{CONFIG} of {checkpoint.id}")
    model, entries = document.get("model"), document.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        numbers = dict(vocabulary)
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score, in order
        numbers = {
            pair[0]: i for i, pair in enumerate(vocabulary) if isinstance(pair, list) and pair
        }
    added: dict[str, Mapping[str, Any]] = {}
    for entry in _entries(entries, config):
        added.setdefault(entry["content"], entry)
    numbers |= {token: entry["id"] for token, entry in added.items()}
    are_right = all(
        isinstance(token, str) and type(number) is int and 0 <= number < MAX_TOKENS
        for token, number in numbers.items()
    )
    if not numbers or not are_right:
        raise CheckpointFormatError(f"{where} has no vocabulary of tokens and their numbers.")
    return Tokens(numbers, added, document, config)


def with_tokens(tokens: Tokens, more: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """Return the tokenizer's files with further added tokens.

    Args:
        tokens: what there is.
        more: entries of ``added_tokens``, their numbers included.
    """
    extra = list(more)
    document = {**tokens.document, "added_tokens": [*tokens.added.values(), *extra]}
    document["added_tokens"].sort(key=lambda entry: entry["id"])
    return {FILE: _json(document), CONFIG: _json(_config_with(tokens.config, extra))}


def without_tokens(tokens: Tokens, gone: Collection[str]) -> Tokens | None:
    """Return a tokenizer that lacks some tokens; None where its kind allows no such cut."""
    model = tokens.document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return None
    kept = {token: number for token, number in model["vocab"].items() if token not in gone}
    merges = [one for one in model.get("merges", []) if not set(_parts(one)) & set(gone)]
    added = {token: entry for token, entry in tokens.added.items() if token not in gone}
    numbers = {token: number for token, number in tokens.numbers.items() if token not in gone}
    document = {
        **tokens.document,
        "model": {**model, "vocab": kept, "merges": merges},
        "added_tokens": list(added.values()),
    }
    config = dict(tokens.config)
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] = {
            number: entry
            for number, entry in config["added_tokens_decoder"].items()
            if not isinstance(entry, dict) or entry.get("content") not in gone
        }
    return Tokens(numbers, added, document, config)


def plain_entry(token: str, number: int) -> dict[str, Any]:
    """Return the ``added_tokens`` entry of a token that is like any other."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": number, "content": token, **flags, "normalized": True, "special": False}


def chat_template(checkpoint: Checkpoint) -> str | None:
    """Return a checkpoint's chat template, the default one of several; None without any."""
    if TEMPLATE in checkpoint.small_files:
        return checkpoint.read_small(TEMPLATE).decode("utf-8", "replace")
    if CONFIG not in checkpoint.small_files:
        return None
    said = _mapping(checkpoint.read_small(CONFIG), CONFIG).get("chat_template")
    if isinstance(said, list):
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
    return said if isinstance(said, str) else None


def with_template(config: bytes | None, template: str) -> dict[str, bytes]:
    """Return the files that hold a chat template, and no other one.

    Args:
        config: ``tokenizer_config.json``, where there is one.
        template: Jinja.
    """
    files = {TEMPLATE: template.encode()}
    if config is not None:
        said = {k: v for k, v in _mapping(config, CONFIG).items() if k != "chat_template"}
        files[CONFIG] = _json(said)
    return files


def _entries(entries: object, config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield {**entry, "id": entry.get("id")}
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and number.isdigit():
            yield {**entry, "id": int(number)}


def _config_with(config: Mapping[str, Any], extra: list[Mapping[str, Any]]) -> dict[str, Any]:
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return dict(config)
    more = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in extra
    }
    return {**config, "added_tokens_decoder": {**decoder, **more}}


def _parts(merge: object) -> list[str]:
    """Return the two tokens that a merge joins, and the token that it makes."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    parts = [part for part in pair if isinstance(part, str)] if isinstance(pair, list) else []
    return [*parts, "".join(parts)]


def _mapping(data: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise CheckpointFormatError(f"{where} is not JSON: {shown(str(exc))}.") from exc
    if not isinstance(document, dict):
        raise CheckpointFormatError(f"{where} is not a JSON object.")
    return document


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
