"""Recipe files: YAML in mergekit's vocabulary, every key checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import RecipeError, Remedy, listed, shown
from .recipe import ModelRef, Recipe, checked_dtype

MAX_RECIPE_BYTES = 32 * 1024


_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype")


# What mergekit knows and this tool does not, with what to write instead.
_ELSEWHERE: dict[str, tuple[str, *tuple[Remedy, ...]]] = {
    "slices": ("merging whole models only: list them under 'models'",),
    "modules": ("merging whole models only: list them under 'models'",),
    "tokenizer": ("the base's tokenizer is kept", Remedy.TOKENIZER_FROM),
    "tokenizer_source": ("the base's tokenizer is kept", Remedy.TOKENIZER_FROM),
    "chat_template": ("the base's chat template is kept", Remedy.TOKENIZER_FROM),
    "out_dtype": ("write 'dtype' (the arithmetic is always float32)",),
    "name": ("the output is named elsewhere", Remedy.GIVE_TARGET),
    "merge": ("this is a mergekit multi-merge entry; write one recipe a merge",),
}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file in mergekit's vocabulary.

    Raises:
        RecipeError: the file is missing, too large, not YAML, or holds a wrong key or value.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {reason}.", Remedy.GIVE_MODELS
        ) from exc
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"the recipe {str(path)!r} is larger than {MAX_RECIPE_BYTES} bytes; is it a recipe?"
        )
    return parse_recipe(data, where=str(path))


def parse_recipe(data: bytes | str, *, where: str = "recipe") -> Recipe:
    """Return the recipe that a YAML document describes.

    Args:
        data: the document.
        where: what to call it in errors.

    Raises:
        RecipeError: the document is not YAML, or holds a wrong key or value.
    """
    import yaml

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        document = yaml.load(text, Loader=_unique_key_loader())
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as exc:
        reason = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise RecipeError(f"{where} is not a YAML document: {reason}") from exc
    try:
        return recipe_from_dict(document, where=where)
    except RecursionError as exc:
        raise RecipeError(f"{where} is nested too deeply to be a recipe.") from exc


def recipe_from_dict(document: object, *, where: str = "recipe") -> Recipe:
    """Return the recipe in a mapping of mergekit's vocabulary.

    Raises:
        RecipeError: a key is unknown or unsupported, or a value is of the wrong kind.
    """
    if not isinstance(document, Mapping):
        raise RecipeError(
            f"{where} must be a mapping with the keys base_model and models, "
            f"not {type(document).__name__}."
        )
    _check_keys(document, where)
    if document.get("base_model") is None:
        raise RecipeError(
            f"{where} has no base_model: the model that the experts were trained from."
        )
    base = ModelRef.parse(document["base_model"])
    experts = tuple(_experts(document.get("models"), base, where))
    method = document.get("merge_method", "resmerge")
    if not isinstance(method, str):
        raise RecipeError(f"merge_method must be a name, not {shown(method)}.")
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise RecipeError(
            f"parameters must be a mapping of names to values, not {shown(parameters)}."
        )
    return Recipe(base, experts, method, dict(parameters), checked_dtype(document.get("dtype")))


def _experts(models: object, base: ModelRef, where: str) -> list[ModelRef]:
    if not isinstance(models, Sequence) or isinstance(models, str) or not models:
        raise RecipeError(f"{where} needs a list under 'models', one '- model: ID' an expert.")
    experts = []
    for entry in models:
        if isinstance(entry, str):
            entry = {"model": entry}
        if not isinstance(entry, Mapping) or "model" not in entry:
            raise RecipeError(f"an entry of 'models' must be '- model: ID', not {shown(entry)}.")
        unknown = [key for key in entry if key not in ("model", "parameters")]
        if unknown:
            raise RecipeError(f"unknown key {shown(unknown[0])} in an entry of 'models'.")
        ref = ModelRef.parse(entry["model"], weight=_weight(entry.get("parameters")))
        if (ref.id, ref.revision) != (base.id, base.revision):
            experts.append(ref)
    if not experts:
        raise RecipeError(
            f"{where} lists no expert: every model under 'models' is the base itself."
        )
    return experts


def _weight(parameters: object) -> float | None:
    if parameters is None:
        return None
    if not isinstance(parameters, Mapping) or set(parameters) - {"weight"}:
        raise RecipeError(
            f"a model's parameters can only hold 'weight' here, not {shown(parameters)}; "
            "the method's own parameters go under the recipe's 'parameters'."
        )
    weight = parameters.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < 1e6:
        raise RecipeError(f"a model's weight must be one number, not {shown(weight)}.")
    return float(weight)


def _check_keys(document: Mapping[Any, Any], where: str) -> None:
    import difflib

    for key in document:
        if key in _KEYS:
            continue
        if key in _ELSEWHERE:
            instead, *remedies = _ELSEWHERE[key]
            raise RecipeError(f"{where}: {key!r} is not supported; {instead}.", *remedies)
        close = difflib.get_close_matches(str(key)[:100], _KEYS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Known keys: {listed(_KEYS)}."
        raise RecipeError(f"{where}: unknown key {shown(key)}.{hint}")


def _unique_key_loader() -> Any:
    """Return a safe YAML loader that refuses duplicate keys, merge keys and aliases."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not used in recipes")
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if getattr(event, "tag", None) is not None:
                raise yaml.YAMLError("tags (!name) are not used in recipes")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str | int | float | bool | None):
                    raise yaml.YAMLError(f"a key must be a plain word, not {type(key).__name__}")
                if key in seen:
                    raise yaml.YAMLError(f"the key {shown(key)} stands twice")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    return Loader
