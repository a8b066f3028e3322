"""What a recipe says about tokens, in mergekit's keys: tokenizer and chat template."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, shown
from ..recipe import ModelRef, Tokenizer, TokenRow

MAX_TOKENS = 10_000
MAX_TEMPLATE = 20_000


def tokenizer_of(document: Mapping[Any, Any]) -> Tokenizer | None:
    """Return what a recipe says of the tokenizer; None where the base's is copied as it is.

    Raises:
        RecipeError: a key or a value is wrong.
    """
    source, said = document.get("tokenizer_source"), document.get("tokenizer")
    if source is not None and said is not None:
        raise RecipeError("a recipe has either 'tokenizer_source' or 'tokenizer', not both.")
    if source is not None:
        return Tokenizer(_source(source))
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise RecipeError(
            f"tokenizer must be a mapping with 'source' and 'tokens', not {shown(said)}."
        )
    known = ("source", "tokens", "pad_to_multiple_of")
    if unknown := [key for key in said if key not in known]:
        raise RecipeError(
            f"unknown key {shown(unknown[0])} in 'tokenizer'; there are: {', '.join(known)}."
        )
    multiple = said.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= 1 << 16):
        raise RecipeError(f"pad_to_multiple_of must be a whole number, not {shown(multiple)}.")
    # mergekit's default of 'tokenizer' is union, of a recipe without it the base's.
    return Tokenizer(_source(said.get("source", "union")), _tokens(said.get("tokens")), multiple)


def chat_template_of(document: Mapping[Any, Any]) -> str | None:
    """Return a recipe's chat template: ``auto`` or Jinja; None where it says nothing.

    Raises:
        RecipeError: it is neither.
    """
    template = document.get("chat_template")
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise RecipeError(f"chat_template must be 'auto' or a template, not {shown(template)}.")
    if template != "auto" and "{" not in template:
        raise RecipeError(
            f"chat_template {shown(template)} is one of mergekit's own; write the template itself "
            "instead, or 'auto' for the one that most of the models have."
        )
    return template


def _source(said: object) -> str | ModelRef:
    if said in ("base", "union"):
        return str(said)
    return ModelRef.parse(said)


def _tokens(said: object) -> tuple[tuple[str, TokenRow], ...]:
    if said is None:
        return ()
    if not isinstance(said, Mapping) or len(said) > MAX_TOKENS:
        raise RecipeError(f"tokens must map tokens to their sources, not {shown(said)}.")
    return tuple((_token(token), _row(token, row)) for token, row in said.items())


def _token(token: object) -> str:
    if not isinstance(token, str) or not token:
        raise RecipeError(f"a token must be text, not {shown(token)}; put it in quotes.")
    return token


def _row(token: object, said: object) -> TokenRow:
    if not isinstance(said, Mapping) or set(said) - {"source", "force"}:
        raise RecipeError(
            f"token {shown(token)} must have 'source' and 'force', not {shown(said)}."
        )
    force = said.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"'force' of token {shown(token)} must be true or false.")
    source = said.get("source")
    if source is None:
        if force:
            raise RecipeError(f"token {shown(token)} has 'force', but no 'source' of its row.")
        return TokenRow()
    if isinstance(source, str):
        return TokenRow(ModelRef.parse(source), force=force)
    if isinstance(source, Mapping) and source.get("kind") == "zero" and len(source) == 1:
        return TokenRow(zero=True, force=force)
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        other, number = source.get("token"), source.get("token_id")
        is_one = isinstance(other, str) != (type(number) is int and number >= 0)
        if is_one and not set(source) - {"kind", "model", "token", "token_id"}:
            model = ModelRef.parse(source.get("model"))
            return TokenRow(model, token=other, token_id=number, force=force)
    raise RecipeError(
        f"the source of token {shown(token)} must be a model, '{{kind: zero}}', or '{{kind: "
        f"model_token, model: …, token: …}}', not {shown(source)}."
    )
