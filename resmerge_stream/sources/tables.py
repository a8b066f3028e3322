"""Tables that a model stores once and uses in several places: its embedding, its LM head, the
inputs of an encoder and a decoder; which of them are one, and a layout in which they are apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..roles import Role, layer_of, role_of
from .checkpoint import Checkpoint

_NOT_TOKENS = ("position", "token_type", "patch")


def embedding_of(checkpoint: Checkpoint) -> str | None:
    """Return the table that tokens go in by: the one of the head's shape where there are several.

    Args:
        checkpoint: under whatever names.
    """
    tables: list[str] = []
    heads = set()
    for name, stored in checkpoint.tensors.items():
        if len(stored.spec.shape) < 2 or layer_of(name) is not None:
            continue
        if is_embedding(name, stored.spec.shape):
            tables.append(name)
        elif role_of(name, stored.spec.shape) is Role.HEAD:
            heads.add(stored.spec.shape)
    alike = [name for name in tables if checkpoint.tensors[name].spec.shape in heads]
    return next(iter(alike or tables), None)


def is_embedding(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a table of tokens that go in, and not of places or patches."""
    is_tokens = not any(word in name for word in _NOT_TOKENS)
    return is_tokens and role_of(name, shape) is Role.EMBEDDING


def copies_of(checkpoint: Checkpoint, embedding: str) -> Iterator[str]:
    """Yield the other tables of a model that may be its embedding once more, by name and shape."""
    shape = checkpoint.tensors[embedding].spec.shape
    for name, stored in checkpoint.tensors.items():
        if name == embedding or stored.spec.shape != shape:
            continue
        if role_of(name, shape) in (Role.EMBEDDING, Role.HEAD):
            yield name


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether a config says that head and embedding are one table; None: it does not say."""
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, dict) else {}):
        said = section.get("tie_word_embeddings")
        if isinstance(said, bool):
            return said
    return None


def with_own(checkpoint: Checkpoint, name: str, embedding: str) -> Checkpoint:
    """Return a checkpoint that has one more table of its own: its embedding's values under a name.

    It is what a tied model computes, said in the names of an untied one; an output in its layout is
    untied. No bytes are copied.

    Args:
        checkpoint: which lacks the table.
        name: of the table, such as ``lm_head.weight``.
        embedding: which of its tensors stands for it.
    """
    return checkpoint.with_trees({**checkpoint.trees, name: checkpoint.trees[embedding]})


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose config says that head and embedding are two tables."""
    config = dict(checkpoint.config)
    inner = config.get("text_config")
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        config["text_config"] = {**inner, "tie_word_embeddings": False}
    config["tie_word_embeddings"] = False
    return checkpoint.with_trees(checkpoint.trees, config=config)
