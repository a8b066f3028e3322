"""A tokenizer's files as data: its tokens by number, and the same files with other tokens."""

import json
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointFormatError, listed
from ..sources.checkpoint import Checkpoint
from ..sources.format import parse_object
from .sidefiles import json_file, same_small_file, vocabulary_files

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ADDED, MAP, SENTENCES = "added_tokens.json", "special_tokens_map.json", "tokenizer.model"
# Other files that say which tokens there are; without them tokenizer.json alone counts.
OTHERS = (ADDED, "vocab.json", "merges.txt", "vocab.txt", SENTENCES, "spiece.model")
MAX_TOKENS = 4_000_000
_NUMBER = re.compile(r"[0-9]{1,9}")
# The tokens with a name of their own in a tokenizer's settings, by what they are for.
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Kind of the problem that a model's tokens are in files of another kind.
UNREAD = "tokens-unread"
# With these, vocab.json and vocab.txt are not a list of tokens by number.
_OTHERWISE = ("bpe.codes", "dict.txt", "vocab-src.json", "target_vocab.json", "emoji.json")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer knows.

    Attributes:
        numbers: every token and its number.
        added: entries of ``added_tokens`` by token.
        document: ``tokenizer.json``; empty where the tokens are in older files.
        config: ``tokenizer_config.json``.
    """

    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def read_tokens(checkpoint: Checkpoint) -> Tokens | None:
    """Return a checkpoint's tokens; None where it has no file that says any.

    Raises:
        CheckpointFormatError: its files are of a kind that is not read, or are none.
    """
    if not vocabulary_files(checkpoint):
        return None
    if FILE in checkpoint.small_files:
        return _of_document(_json_file(checkpoint, FILE) or {}, checkpoint)
    there = set(checkpoint.small_files)
    numbers: dict[str, int] | None = None
    if SENTENCES in there:
        numbers = _sentencepiece(checkpoint.read_small(SENTENCES))
    elif "vocab.json" in there and not there & set(_OTHERWISE):
        numbers = _numbers(_json_file(checkpoint, "vocab.json"))
    elif "vocab.txt" in there and not there & set(_OTHERWISE):
        lines = checkpoint.read_small("vocab.txt").decode("utf-8", "replace").split("\n")
        numbers = {line.rstrip("\r"): number for number, line in enumerate(lines) if line}
    if numbers is None:
        return _by_transformers(checkpoint)
    return _with_added(numbers, checkpoint)


def same_vocabulary(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether the files of two models that say their tokens are the same, byte for byte."""
    files = vocabulary_files(one)
    if files != vocabulary_files(other):
        return False
    decoders = [(_json_file(c, CONFIG) or {}).get("added_tokens_decoder") for c in (one, other)]
    return decoders[0] == decoders[1] and all(same_small_file(one, other, f) for f in files)


def cut_alike(one: Tokens, other: Tokens) -> bool:
    """Return whether two tokenizers of the same tokens cut a text alike, as far as is known."""
    left, right = (
        {k: v for k, v in tokens.document.items() if k not in ("padding", "truncation")}
        for tokens in (one, other)
    )
    return not left or not right or left == right


def _of_document(document: Mapping[str, Any], checkpoint: Checkpoint) -> Tokens:
    """Return the tokens of a ``tokenizer.json``, and those that its config adds."""
    config = _json_file(checkpoint, CONFIG) or {}
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
    return _checked(checkpoint, numbers, added, document, config)


def _with_added(numbers: dict[str, int], checkpoint: Checkpoint) -> Tokens:
    """Return tokens of older files, and those that were added: by number, or at the end."""
    config = _json_file(checkpoint, CONFIG) or {}
    added = {entry["content"]: entry for entry in _entries([], config)}
    for token, number in (_numbers(_json_file(checkpoint, ADDED)) or {}).items():
        added.setdefault(token, plain_entry(token, number))
    known = numbers | {token: entry["id"] for token, entry in added.items()}
    last = max((n for n in known.values() if type(n) is int), default=-1)
    for token in special_tokens(checkpoint).values():
        if token not in known and token not in added:
            last += 1
            added[token] = plain_entry(token, last) | {"special": True}
    return _checked(checkpoint, numbers, added, {}, config)


def _checked(
    checkpoint: Checkpoint,
    numbers: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    document: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Tokens:
    every = {**numbers, **{token: entry["id"] for token, entry in added.items()}}
    are_right = all(
        isinstance(token, str) and type(number) is int and 0 <= number < MAX_TOKENS
        for token, number in every.items()
    )
    if not every or not are_right:
        files = listed(vocabulary_files(checkpoint), limit=3)
        raise CheckpointFormatError(
            f"{files} of {checkpoint.id} has no vocabulary of tokens and their numbers."
        )
    return Tokens(every, added, document, config)


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what a tokenizer's settings call its special tokens: ``eos`` → the token, and so on.

    Raises:
        CheckpointFormatError: a file is not JSON.
    """
    said: dict[str, str] = {}
    for file in (MAP, CONFIG):
        for kind in SPECIAL:
            token = (_json_file(checkpoint, file) or {}).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                said[kind] = token
    return said


def _sentencepiece(data: bytes) -> dict[str, int] | None:
    """Return the pieces of a SentencePiece model by number; None where it is none.

    The format is protobuf, sentencepiece_model.proto of https://github.com/google/sentencepiece:
    field 1 of the model, repeated, is a piece, whose field 1 is its text.
    """
    pieces: list[str] = []
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                texts = [text for key, text in _fields(value) if key == 1]
                pieces.append(texts[0].decode() if isinstance(texts[0], bytes) else "")
    except (IndexError, ValueError):
        return None
    return {piece: number for number, piece in enumerate(pieces)} if pieces else None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protobuf message: a number, and a varint or bytes.

    Raises:
        IndexError, ValueError: it is none, or is cut short.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a varint is too long")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("no such kind of field")
        size = {1: 8, 5: 4}.get(kind) or varint()
        if kind == 2 and not size:
            yield key >> 3, b""
            continue
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _by_transformers(checkpoint: Checkpoint) -> Tokens:
    """Return the tokens that transformers' own class finds in other files.

    Raises:
        CheckpointFormatError: it finds none without code of strangers.
    """
    files = vocabulary_files(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        for name in (*files, CONFIG, MAP):
            if name in checkpoint.small_files:
                Path(folder, name).write_bytes(checkpoint.read_small(name))
        config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
        Path(folder, "config.json").write_text(json.dumps(config))
        # It imports torch, which a plan does without unless such files have to be read.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            numbers: dict[str, int] = dict(tokenizer.get_vocab())
            entries = {
                token.content: plain_entry(token.content, number) | {"special": token.special}
                for number, token in tokenizer.added_tokens_decoder.items()
            }
        # What a tokenizer's class raises over files of strangers, or for want of a package.
        except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
                TypeError, ValueError) as exc:  # fmt: skip
            raise CheckpointFormatError(
                f"which tokens {checkpoint.id} has stands in {listed(files, limit=3)}, which "
                "cannot be read here. Save its tokenizer with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(…).save_pretrained(…), with sentencepiece or "
                "tiktoken installed), or leave the matching of tokens out if all models have the "
                "same tokens.",
                kind=UNREAD,
            ) from exc
    return _checked(checkpoint, numbers, entries, {}, _json_file(checkpoint, CONFIG) or {})


def with_tokens(tokens: Tokens, more: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """Return the tokenizer's files with further added tokens.

    Args:
        tokens: what there is.
        more: entries of ``added_tokens``, their numbers included.
    """
    extra = list(more)
    if not tokens.document:  # older files, which a list of added tokens stands beside
        numbers = {token: entry["id"] for token, entry in tokens.added.items()}
        numbers |= {entry["content"]: entry["id"] for entry in extra}
        every = [*tokens.added.values(), *extra]
        config = _config_with({"added_tokens_decoder": {}} | dict(tokens.config), every)
        return {ADDED: json_file(numbers), CONFIG: json_file(config)}
    document = {**tokens.document, "added_tokens": [*tokens.added.values(), *extra]}
    document["added_tokens"].sort(key=lambda entry: entry["id"])
    return {FILE: json_file(document), CONFIG: json_file(_config_with(tokens.config, extra))}


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
    said = parse_object(checkpoint.read_small(CONFIG), where=CONFIG).get("chat_template")
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
        said = {k: v for k, v in parse_object(config, where=CONFIG).items() if k != "chat_template"}
        files[CONFIG] = json_file(said)
    return files


def _entries(entries: object, config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield {**entry, "id": entry.get("id")}
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield {**entry, "id": int(number) if _NUMBER.fullmatch(number) else None}


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


def _numbers(document: Mapping[str, Any] | None) -> dict[str, int] | None:
    """Return a mapping of tokens to numbers; None where it is another one."""
    if not document or not all(type(number) is int for number in document.values()):
        return None
    return dict(document)


def _json_file(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """Return one of a checkpoint's files; None where it has none of that name.

    Raises:
        CheckpointFormatError: it is not a JSON object.
    """
    if name not in checkpoint.small_files:
        return None
    return parse_object(checkpoint.read_small(name), where=f"{name} of {checkpoint.id}")
