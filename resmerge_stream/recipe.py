"""A recipe: which base, which experts, which method with which parameters."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

from .errors import RecipeError, Remedy, listed, shown
from .specs import RECIPE_DTYPES

# What merges where nobody names a method, through every door: the best of docs/quality.md.
DEFAULT_METHOD = "head_regression"

# How the Hub's client names files of a bucket.
BUCKETS = "hf://buckets/"
_BUCKET = re.compile(r"hf://buckets/(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^\x00-\x1f]*))?")

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
# With * and ?: a pattern of several.
_REVISION = re.compile(r"[A-Za-z0-9._/*?\-]{1,200}")
_SUBFOLDER = re.compile(r"(?![./])[^\x00-\x1f\\:@]{1,200}")
_IN_REPO = re.compile(r"[\w.-]+/[\w.-]+:")
_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob)/(?P<revision>[^/?#]+)(?:/(?P<folder>[^?#]+))?)?/?(?:[?#].*)?"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A checkpoint as the user named it.

    Attributes:
        id: a folder, ``namespace/name`` on the Hub, or ``hf://buckets/namespace/name/folder``.
        revision: branch, tag or commit, or None for the default branch.
        weight: factor of this expert, for methods that declare one; None when not given.
        parameters: its other parameters, and a weight that differs between tensors, as written.
        subfolder: of the repository, where the model does not lie at its top.
        on: the base that an adapter was named with, as in ``base+adapter``.
    """

    id: str
    revision: str | None = None
    weight: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    subfolder: str | None = None
    on: str | None = None

    @property
    def place(self) -> tuple[str, str | None, str | None]:
        """Where the model is: id, revision and subfolder."""
        return self.id, self.revision, self.subfolder

    @property
    def in_bucket(self) -> tuple[str, str] | None:
        """The bucket of the Hub that the model is in, and its folder there; None for none."""
        found = _BUCKET.fullmatch(self.id)
        return None if found is None else (found["id"], (found["folder"] or "").strip("/"))

    def own(self) -> dict[str, Any]:
        """Return the model's own parameters, ready for YAML or JSON."""
        weight = {} if self.weight is None else {"weight": self.weight}
        return {**weight, **{key: _copied(value) for key, value in self.parameters.items()}}

    @classmethod
    def parse(cls, text: object, *, weight: float | None = None) -> "ModelRef":
        """Return the reference that ``ID[@revision][:subfolder]`` names, or a page of the Hub.

        ``BASE+ADAPTER`` is the adapter on that base. mergekit's mappings are read too:
        ``{path: ID, revision: …}`` and ``{model: …, lora: …}``.

        A name that exists as a folder is a folder, even with an @ or a + in it.

        Raises:
            RecipeError: the text is empty, not text, or its revision or subfolder is malformed.
        """
        if isinstance(text, Mapping):
            text = _written(text)
        if not isinstance(text, str) or not text.strip() or "\x00" in text:
            raise RecipeError(
                f"a model must be a folder or a repo id such as org/name, not {shown(text)}."
            )
        text = text.strip()
        if os.path.isdir(os.path.expanduser(text)):
            return cls(text, None, weight)
        on, plus, adapter = text.partition("+")
        if on and plus and adapter and not _PAGE.fullmatch(text):
            return replace(cls.parse(adapter, weight=weight), on=on.strip())
        if page := _PAGE.fullmatch(text):
            name, revision, subfolder = page["id"], page["revision"], page["folder"]
            revision = revision and unquote(revision)
            subfolder = (subfolder and unquote(subfolder).strip("/")) or None
        else:
            name, revision, subfolder = _taken_apart(text)
        if revision is not None and not (name and _REVISION.fullmatch(revision)):
            raise RecipeError(
                f"{shown(text)} has a malformed revision. Write org/name@branch-or-commit."
            )
        if subfolder is not None and not _is_inside(subfolder):
            raise RecipeError(
                f"{shown(text)} has a malformed subfolder. Write org/name@revision:folder."
            )
        return cls(name, revision, weight, subfolder=subfolder)

    def __str__(self) -> str:
        named = self.id if self.revision is None else f"{self.id}@{self.revision}"
        named = named if self.subfolder is None else f"{named}:{self.subfolder}"
        return named if self.on is None else f"{self.on}+{named}"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Where the row of a token comes from, for models that lack the token.

    Attributes:
        model: whose row it is; None: what mergekit's rule finds, or zeros.
        token, token_id: which of the model's rows, where it is not the token's own.
        zero: whether the row is all zeros.
        force: whether models that have the token get this row too.
    """

    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it in mergekit's vocabulary."""
        forced = {"force": True} if self.force else {}
        if self.zero:
            return {"source": {"kind": "zero"}, **forced}
        if self.model is None:
            return forced
        if self.token is None and self.token_id is None:
            return {"source": str(self.model), **forced}
        which = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
        return {"source": {"kind": "model_token", "model": str(self.model), **which}, **forced}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Which tokens a merge has, and how the models' rows are found: by token, not by number.

    Attributes:
        source: ``base``, ``union``, or the model whose tokenizer is taken.
        tokens: tokens with a say of their own; those that are new are added.
        pad_to_multiple_of: the tables get rows up to a multiple of this.
    """

    source: "str | ModelRef"
    tokens: tuple[tuple[str, TokenRow], ...] = ()
    pad_to_multiple_of: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it in mergekit's vocabulary."""
        said: dict[str, Any] = {"source": str(self.source)}
        if self.tokens:
            said["tokens"] = {token: row.to_dict() for token, row in self.tokens}
        if self.pad_to_multiple_of is not None:
            said["pad_to_multiple_of"] = self.pad_to_multiple_of
        return said


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge and how, before anything is looked up.

    Attributes:
        base: the model that every expert was trained from; None for a method that needs none, whose
            first model then gives the layout.
        experts: in the user's order, which is the order of every sum.
        method: a name that `resmerge_stream.methods` knows; left empty, it is `DEFAULT_METHOD`.
        parameters: the method's parameters, as written.
        dtype: output dtype (``bfloat16``, ``float16``, ``float32``), or None for the base's.
        base_listed: whether the base is one of the models, for methods where it may take part.
        layers: how many blocks the recipe says that the models have; None: it doesn't.
        notes: what of the recipe has no effect here.
        chosen_by: who named the method: ``recipe``, ``option`` or, where nobody did, ``default``.
        tokenizer: which tokens the merge has; None: the base's, by number.
        chat_template: ``auto``, a name or Jinja; None: that of the tokenizer.
        generation_config: the model whose generation config is taken; None: the base's.
    """

    base: ModelRef | None
    experts: tuple[ModelRef, ...]
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    base_listed: bool = False
    layers: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    generation_config: ModelRef | None = None
    chosen_by: str = field(default="recipe", compare=False)

    def __post_init__(self) -> None:
        if not self.method:
            object.__setattr__(self, "method", DEFAULT_METHOD)
            object.__setattr__(self, "chosen_by", "default")
        elif self.chosen_by == "default" and self.method != DEFAULT_METHOD:
            object.__setattr__(self, "chosen_by", "recipe")

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The base where there is one, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def named(self) -> tuple[ModelRef, ...]:
        """Every model that is named: those that are merged, then those that give tokens."""
        talks = [] if self.generation_config is None else [self.generation_config]
        if self.tokenizer is None:
            return (*self.models, *talks)
        source = self.tokenizer.source
        rows = (row.model for _, row in self.tokenizer.tokens)
        return (
            *self.models,
            *([source] if isinstance(source, ModelRef) else []),
            *(model for model in rows if model is not None),
            *talks,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe in mergekit's vocabulary, ready for YAML or JSON."""
        models = []
        # The base last, so that experts keep their places.
        for ref in (*self.experts, *([self.base] if self.base and self.base_listed else [])):
            entry: dict[str, Any] = {"model": str(ref)}
            if own := ref.own():
                entry["parameters"] = own
            models.append(entry)
        recipe: dict[str, Any] = {"merge_method": self.method}
        if self.base is not None:
            recipe["base_model"] = str(self.base)
        recipe["models"] = models
        if self.parameters:
            recipe["parameters"] = {k: _copied(value) for k, value in self.parameters.items()}
        if self.dtype:
            recipe["dtype"] = self.dtype
        if self.tokenizer is not None:
            recipe["tokenizer"] = self.tokenizer.to_dict()
        if self.chat_template is not None:
            recipe["chat_template"] = self.chat_template
        if self.generation_config is not None:
            recipe["generation_config"] = str(self.generation_config)
        return recipe

    def to_yaml(self) -> str:
        """Return the recipe as a YAML document."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _copied(value: Any) -> Any:
    """Return plain data that shares nothing: YAML writes what is shared as aliases."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """Return name and parameters of ``name``, ``name:preset`` or ``name:key=value:key=value``.

    Raises:
        RecipeError: the text is not of this form.
    """
    name, *rest = text.strip().split(":")
    parameters = {}
    for number, part in enumerate(rest):
        key, equals, value = part.partition("=")
        if not equals and number == 0 and part.strip():
            key, value = "preset", part
        elif not equals or not key:
            raise RecipeError(
                f"{text[:80]!r} must be NAME, NAME:PRESET or NAME:KEY=VALUE:KEY=VALUE."
            )
        parameters[key.strip()] = value.strip()
    return name, parameters


def override(
    recipe: Recipe | None,
    *,
    base: str | None = None,
    experts: Sequence[str] = (),
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    tokenizer_source: str | None = None,
    chat_template: str | None = None,
    generation_config: str | None = None,
) -> Recipe:
    """Return a recipe with the given options put over it; experts replace the recipe's models.

    As many experts as the recipe has take their weights and parameters, in its order.

    Raises:
        RecipeError: there is neither a recipe nor an expert.
    """
    if recipe is None:
        if not experts:
            raise RecipeError("nothing to merge.", Remedy.GIVE_MODELS)
        recipe = Recipe(None if base is None else ModelRef.parse(base), ())
    elif len(experts) in (0, len(recipe.experts)):
        recipe = relocated(recipe, base, experts)
    else:
        recipe = relocated(recipe, base, ())
        if any(ref.own() for ref in recipe.experts):
            note = "the weights and parameters of the recipe's own experts have no effect: there "
            note += f"are {len(recipe.experts)}, and {len(experts)} are named in their place"
            recipe = replace(recipe, notes=(*recipe.notes, note))
        recipe = replace(recipe, experts=())
    if recipe.base is None and base is not None:
        recipe = replace(recipe, base=ModelRef.parse(base))
    refs = recipe.experts or tuple(ModelRef.parse(text) for text in experts)
    if recipe.base is not None:
        base_place = recipe.base.place
        others = tuple(ref for ref in refs if ref.place != base_place)
        if experts and others and len(others) < len(refs):
            note = f"{recipe.base} is the base: as an expert it changes nothing, so it is left out"
            recipe = replace(recipe, notes=(*recipe.notes, note))
        refs = others
    recipe = replace(recipe, experts=refs)
    if method is not None:
        name, given = parse_method(method)
        # The parameters of another method would only be refused one by one.
        kept = recipe.parameters if method == recipe.method else given
        recipe = replace(recipe, method=name, parameters=kept, chosen_by="option")
    if parameters:
        recipe = replace(recipe, parameters={**recipe.parameters, **parameters})
    if dtype is not None:
        recipe = replace(recipe, dtype=checked_dtype(dtype))
    if tokenizer_source is not None:
        source = tokenizer_source
        is_word = source in ("base", "union")
        recipe = replace(recipe, tokenizer=Tokenizer(source if is_word else ModelRef.parse(source)))
    if chat_template is not None:
        recipe = replace(recipe, chat_template=chat_template)
    if generation_config is not None:
        recipe = replace(recipe, generation_config=ModelRef.parse(generation_config))
    if not recipe.experts:
        raise RecipeError("no expert to merge: every model named is the base itself.")
    return recipe


def relocated(recipe: Recipe, base: str | None, experts: Sequence[str]) -> Recipe:
    """Return a recipe whose models lie elsewhere; weights and parameters stay.

    Args:
        recipe: of models that may not be where it says.
        base: where the base is; None: where it was.
        experts: where the experts are, in the recipe's order; empty: where they were.

    Raises:
        RecipeError: there are more experts, or fewer, than in the recipe.
    """
    if experts and len(experts) != len(recipe.experts):
        raise RecipeError(
            f"the recipe has {len(recipe.experts)} expert(s), and {len(experts)} are named. Name "
            "all, in its order."
        )
    refs = [ModelRef.parse(text) for text in experts] or recipe.experts
    places = {str(old): new for old, new in zip(recipe.experts, refs, strict=True)}
    own = recipe.base
    if base is not None and own is not None:
        new = places[str(own)] = ModelRef.parse(base)
        own = _moved(own, new)
    # Each by its number: one model may stand there twice, and two of them here.
    moved = tuple(_moved(old, new) for old, new in zip(recipe.experts, refs, strict=True))
    return replace(placed(recipe, places), base=own, experts=moved)


def placed(recipe: Recipe, places: Mapping[str, ModelRef]) -> Recipe:
    """Return a recipe whose models lie elsewhere; weights and parameters stay.

    Args:
        recipe: of models that may not be where it says.
        places: by what the recipe calls a model, the model; the others are where they were.
    """

    def at(ref: ModelRef) -> ModelRef:
        return _moved(ref, places.get(str(ref), ref))

    tokenizer, talks = recipe.tokenizer, recipe.generation_config
    if tokenizer is not None:
        source = tokenizer.source
        rows = (
            (token, row if row.model is None else replace(row, model=at(row.model)))
            for token, row in tokenizer.tokens
        )
        tokenizer = replace(
            tokenizer,
            source=at(source) if isinstance(source, ModelRef) else source,
            tokens=tuple(rows),
        )
    return replace(
        recipe,
        base=None if recipe.base is None else at(recipe.base),
        experts=tuple(at(ref) for ref in recipe.experts),
        tokenizer=tokenizer,
        generation_config=None if talks is None else at(talks),
    )


def _moved(ref: ModelRef, to: ModelRef) -> ModelRef:
    """Return a model that lies where another does, with its own weight and parameters."""
    return replace(ref, id=to.id, revision=to.revision, subfolder=to.subfolder, on=to.on)


def checked_dtype(value: object) -> str | None:
    """Return an output dtype by its full name, None for None.

    Raises:
        RecipeError: it is none.
    """
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    name = _DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in RECIPE_DTYPES:
        raise RecipeError(
            f"dtype {shown(value)} is not an output dtype; choose {listed(RECIPE_DTYPES)}."
        )
    return name


def _written(model: Mapping[Any, Any]) -> object:
    """Return a model that mergekit wrote as a mapping as the text that it writes otherwise."""
    said = {key: value for key, value in model.items() if value is not None}
    for keys, joint in (("path", "revision"), "@"), (("model", "lora"), "+"):
        if keys[0] in said:
            if unread := [key for key in said if key not in keys]:
                raise RecipeError(
                    f"{shown(unread[0])} of the model {shown(said[keys[0]])} is not read here; "
                    f"there are: {listed(keys)}."
                )
            parts = [said[key] for key in keys if key in said]
            parts = [_written(part) if isinstance(part, Mapping) else part for part in parts]
            return joint.join(parts) if all(isinstance(part, str) for part in parts) else model
    return model


def _taken_apart(text: str) -> tuple[str, str | None, str | None]:
    """Return id, revision and subfolder of ``ID[@revision][:subfolder]``."""
    if text.startswith(BUCKETS):
        return text.rstrip("/"), None, None  # it has no revisions
    name, at, rest = text.rpartition("@")
    if at:
        revision, colon, subfolder = rest.partition(":")
        return name, revision, subfolder if colon else None
    if found := _IN_REPO.match(text):
        return found[0][:-1], None, text[found.end() :]
    return text, None, None


def _is_inside(subfolder: str) -> bool:
    """Return whether a path stays below the top of a repository."""
    parts = subfolder.split("/")
    return bool(_SUBFOLDER.fullmatch(subfolder)) and all(parts) and ".." not in parts
