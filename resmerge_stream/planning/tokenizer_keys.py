"""What a recipe says about tokens and talk: tokenizer, chat template, generation config."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, listed, shown
from ..methods.settings import switch, whole_number
from ..recipe import ModelRef, Tokenizer, TokenRow
from .chat_templates import TEMPLATES

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
    if multiple is not None and not 1 <= (whole_number(multiple) or 0) <= 1 << 16:
        raise RecipeError(f"pad_to_multiple_of must be a whole number, not {shown(multiple)}.")
    # mergekit's default of 'tokenizer' is union, of a recipe without it the base's.
    source = _source(said.get("source", "union"))
    return Tokenizer(source, _tokens(said.get("tokens")), whole_number(multiple))


def chat_template_of(document: Mapping[Any, Any]) -> str | None:
    """Return a recipe's chat template: ``auto``, a name or Jinja; None where it says nothing.

    Raises:
        RecipeError: it is none of these.
    """
    template = document.get("chat_template")
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise RecipeError(f"chat_template must be 'auto' or a template, not {shown(template)}.")
    if template != "auto" and template not in TEMPLATES and "{" not in template:
        raise RecipeError(
            f"chat_template {shown(template)} is neither a template nor the name of one. There are "
            f"{listed(TEMPLATES)}, and 'auto' for the one that most of the models have."
        )
    return template


def generation_config_of(document: Mapping[Any, Any]) -> ModelRef | None:
    """Return the model whose generation config a recipe takes; None where it says none.

    Raises:
        RecipeError: it is no model.
    """
    said = document.get("generation_config")
    return None if said is None else ModelRef.parse(said)


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
    force = switch(said.get("force", False))
    if force is None:
        raise RecipeError(f"'force' of token {shown(token)} must be true or false.")
    source = said.get("source")
    if source is None:
        if force:
            raise RecipeError(f"token {shown(token)} has 'force', but no 'source' of its row.")
        return TokenRow()
    if isinstance(source, str) or (isinstance(source, Mapping) and "kind" not in source):
        return TokenRow(ModelRef.parse(source), force=force)
    if isinstance(source, Mapping) and source.get("kind") == "zero" and len(source) == 1:
        return TokenRow(zero=True, force=force)
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        other, number = source.get("token"), whole_number(source.get("token_id"))
        is_one = (
            isinstance(other, str)
            if source.get("token_id") is None
            else other is None and number is not None and number >= 0
        )
        if is_one and not set(source) - {"kind", "model", "token", "token_id"}:
            model = ModelRef.parse(source.get("model"))
            return TokenRow(model, token=other, token_id=number, force=force)
    raise RecipeError(
        f"the source of token {shown(token)} must be a model, '{{kind: zero}}', or '{{kind: "
        f"model_token, model: …, token: …}}', not {shown(source)}."
    )
