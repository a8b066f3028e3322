"""Reads the JSON and YAML that strangers wrote: within bounds, and what is wrong is one line."""

import json
import re
from collections.abc import Callable
from typing import Any

from .errors import shown

# Bytes of a document, how deep it may be nested, digits of a whole number in it, and values of a
# YAML document once its aliases are written out.
MAX_BYTES = 100_000_000
MAX_DEPTH = 128
MAX_DIGITS = 300
MAX_NODES = 20_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MERGE_KEY = "tag:yaml.org,2002:merge"


def load_json(
    data: bytes | str,
    *,
    max_bytes: int = MAX_BYTES,
    parse_int: Callable[[str], Any] | None = None,
    **hooks: Any,
) -> Any:
    """Return what a JSON text says; NaN is a number, and of equal keys the last counts.

    Args:
        data: UTF-8, where they are bytes.
        max_bytes: the most it may have.
        parse_int: makes whole numbers of their text; `int` when None.
        hooks: others of `json.loads`.

    Raises:
        ValueError: it is no JSON, or out of bounds; the message is one line.
    """

    def whole(text: str) -> Any:
        if len(text) > MAX_DIGITS:
            raise ValueError(f"the number {text[:40]}… is too large")
        return (parse_int or int)(text)

    text = _text(data, max_bytes)
    try:
        value = json.loads(text, parse_int=whole, **hooks)
        _check_depth(value)
        if _SURROGATE.search(text):  # half a character is not text, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise ValueError(_in_a_line(exc)) from exc
    return value


def load_yaml(data: bytes | str, *, max_bytes: int, has_tags: bool = False) -> Any:
    """Return what a YAML text says, as plain data in which nothing is shared.

    Args:
        data: UTF-8, where they are bytes.
        max_bytes: the most it may have.
        has_tags: whether what has a tag (``!function f``) reads as None; else it is refused.

    Raises:
        ValueError: it is no YAML, or out of bounds; a key stands twice; the message is one line.
    """
    import yaml

    text = _text(data, max_bytes)
    try:
        value = yaml.load(text, Loader=_loader(has_tags=has_tags))
        _check_depth(value)
        return _plain(value)
    # The library's own, and what its constructors of dates and numbers let through.
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, AttributeError) as exc:
        raise ValueError(_in_a_line(exc)) from exc


def _text(data: bytes | str, max_bytes: int) -> str:
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    nbytes = len(data) if isinstance(data, bytes) else len(text.encode(errors="replace"))
    if nbytes > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return text


def _in_a_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            item
            for part in level
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, dict | list)
        ]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _plain(value: Any) -> Any:
    """Return a copy of plain data in which nothing stands twice, and no number is endless."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:  # of base 16, which has no bound
        raise ValueError("a number in it is too large")
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _loader(*, has_tags: bool) -> Any:
    """Return a safe YAML loader that refuses duplicate keys, tags, and aliases that blow up."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if getattr(event, "tag", None) is not None and not has_tags:
                raise yaml.YAMLError("tags (!name) are not used here")
            return super().compose_node(parent, index)

        def construct_document(self, node: Any) -> Any:
            _written_out(node, {}, set())
            return super().construct_document(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == _MERGE_KEY:
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str | int | float | bool | None):
                    raise yaml.YAMLError(f"a key must be a plain word, not {type(key).__name__}")
                if key in seen:
                    raise yaml.YAMLError(f"the key {shown(key)} stands twice")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    return Loader


def _written_out(node: Any, known: dict[int, int], above: set[int]) -> int:
    """Return how many values a node comes to with its aliases written out.

    Args:
        node: of PyYAML.
        known: the counts of nodes that were looked at before, by identity.
        above: the nodes that this one lies in.

    Raises:
        YAMLError: they are more than `MAX_NODES`, or it lies in itself.
    """
    import yaml

    if id(node) in above:
        raise yaml.YAMLError("an alias (*name) stands inside what it repeats")
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else []
        inner = [item for part in parts for item in (part if isinstance(part, tuple) else [part])]
        count = 1 + sum(_written_out(item, known, above | {id(node)}) for item in inner)
        if count > MAX_NODES:
            raise yaml.YAMLError(f"aliases (*name) repeat more than {MAX_NODES} values")
        known[id(node)] = count
    return known[id(node)]
