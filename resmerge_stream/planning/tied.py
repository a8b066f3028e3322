"""Which tables of a merge are one: tied in the output, or apart in every model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import Findings, listed
from ..roles import Role, role_of
from ..sources.checkpoint import Checkpoint, same_values
from ..sources.tables import copies_of, embedding_of, is_tied, untied, with_own

TIED = "tied"
# What loads a model with both sides ties these, whatever the file stores.
_INPUTS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@dataclass(frozen=True, slots=True)
class Tables:
    """What a merge does about tables that models store once and use twice.

    Attributes:
        layout: with every table that the output has.
        experts: each with the layout's tables.
        left_out: the layout's tensors that are another one's copies in every model, with the
            reason.
    """

    layout: Checkpoint
    experts: tuple[Checkpoint, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def with_tables(layout: Checkpoint, experts: Sequence[Checkpoint], found: Findings) -> Tables:
    """Return models that agree on which tables are apart.

    A table that equals the embedding in every model that stores it is left out: it is merged once,
    and tied when the output is loaded. Where any model has values of its own in it, the output has
    it too, and a model that ties it has its embedding there, as it computes.

    Args:
        layout: gives the output's names.
        experts: whole models under the layout's names; adapters are put on the layout afterwards.
        found: gets what was found.
    """
    embedding = _common_embedding(layout, experts)
    models = tuple(experts)
    if embedding is None:
        return Tables(layout, models)
    left_out = dict(_biases_twice(layout, models))
    heads = [
        name
        for model in models
        if embedding in model.tensors
        for name in copies_of(model, embedding)
        if _is_head(name)
    ]
    names = dict.fromkeys([*copies_of(layout, embedding), *heads])
    if not any(map(_is_head, names)) and is_tied(layout.config) is not False:
        for model in models:
            if is_tied(model.config) is False:
                found.problem(
                    f"{model.id} has no LM head, though its config says that it has one of its own "
                    f"(tie_word_embeddings is {False!r}, in {layout.id} it is "
                    f"{is_tied(layout.config)!r}). Give a complete checkpoint, or mend its config."
                )
    for name in names:
        is_there, is_head = name in layout.tensors, _is_head(name)
        ours = is_tied(layout.config) if is_head else None
        lacks_one = any(name not in model.tensors for model in models)
        ties_always = ours is True if is_head else name.endswith(_INPUTS)
        if not is_there and ours is False:
            continue  # a body without its head
        if is_there and not lacks_one and not ties_always:
            continue  # apart in all: nobody has to look at values
        own = [one.id for one in models if _has_own(one, name, embedding)]
        has_own = is_there and (ours is False or _has_own(layout, name, embedding))
        if not own and not has_own:
            left_out[name] = f"it is tied to {embedding} and equal to it"
            continue
        if has_own and ours is True:
            found.warning(
                f"the config of {layout.id} ties {name} to {embedding}, but both are there with "
                "different values; each is merged on its own, as transformers loads them",
                kind=TIED,
            )
        elif not has_own:
            found.warning(
                f"{layout.id} ties {name} to {embedding}, and {listed(own)} has them apart: so has "
                "the merge",
                kind=TIED,
            )
            made = layout if name in layout.tensors else with_own(layout, name, embedding)
            layout = untied(made) if _is_head(name) else made
        models = tuple(_with_alias(model, name, embedding, found) for model in models)
    return Tables(layout, models, left_out)


def _common_embedding(layout: Checkpoint, experts: Sequence[Checkpoint]) -> str | None:
    """Return the embedding's name in all models; where a table has several, the shared one's."""
    first = embedding_of(layout)
    if first is None:
        return None
    names = [first, *(name for name in copies_of(layout, first) if not _is_head(name))]
    names.sort(key=lambda name: not name.endswith("shared.weight"))
    everywhere = [name for name in names if all(name in one.tensors for one in experts)]
    return next(iter(everywhere), first)


def _is_head(name: str) -> bool:
    return role_of(name, (2, 2)) is Role.HEAD


def _has_own(model: Checkpoint, name: str, embedding: str) -> bool:
    """Return whether a model stores a table with other values than its embedding's."""
    both = name in model.tensors and embedding in model.tensors
    return both and not same_values(model, name, embedding)


def _with_alias(model: Checkpoint, name: str, embedding: str, found: Findings) -> Checkpoint:
    """Return a model with a table that it ties, as its embedding."""
    if name in model.tensors or embedding not in model.tensors:
        return model
    if _is_head(name) and is_tied(model.config) is False:
        return model  # it has a head by its config, and lacks it: that is said of any tensor
    found.warning(f"{model.id} ties {name} to {embedding}, which stands for both", kind=TIED)
    return with_own(model, name, embedding)


def _biases_twice(layout: Checkpoint, models: Sequence[Checkpoint]) -> Iterator[tuple[str, str]]:
    """Yield biases of tokens that an expert lacks, and that are another one's copies (BERT)."""
    embedding = embedding_of(layout)
    rows = layout.tensors[embedding].spec.shape[:1] if embedding is not None else ()
    biases = [name for name, stored in layout.tensors.items() if stored.spec.shape == rows]
    for name in biases:
        others = [one for one in biases if one != name and all(one in m.tensors for m in models)]
        if all(name in model.tensors for model in models):
            continue
        for other in others:
            if not any(_has_own(one, name, other) for one in (layout, *models)):
                yield name, f"it is tied to {other} and equal to it"
                break
