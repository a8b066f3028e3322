"""Recipe files: YAML in mergekit's vocabulary, every key checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError, Remedy, listed, shown
from ..methods import MergeMethod, find_methods, is_idle, method_class
from ..methods.settings import check_setting, is_plain
from ..recipe import ModelRef, Recipe, checked_dtype, parse_method
from .tokenizer_keys import chat_template_of, tokenizer_of

MAX_RECIPE_BYTES = 32 * 1024


_KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
    "name", "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip
# Parameters of mergekit's that have no effect here, with the reason.
_IDLE = {"int8_mask": "masks are not stored here"}


# What mergekit knows and this tool does not, with what to write instead.
_ELSEWHERE: dict[str, tuple[str, *tuple[Remedy, ...]]] = {
    "merge": ("this is a mergekit multi-merge entry; write one recipe a merge",),
    "stages": ("this is a list of merges; run its recipes one after the other",),
    "out_path": ("this is one of several merges in a file; write one recipe a merge",),
    "experts": ("building mixtures of experts is left to mergekit-moe",),
    "gate_mode": ("building mixtures of experts is left to mergekit-moe",),
    "genome": ("searching for a recipe is left to mergekit-evolve",),
    "residual_weight": ("stacking layers is left to mergekit",),
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
    except yaml.composer.ComposerError as exc:
        if "single document" not in str(exc):
            raise RecipeError(f"{where} is not a YAML document: {_in_a_line(exc)}") from exc
        raise RecipeError(
            f"{where} holds several recipes, one after the other. Save each in a file of its own "
            "and run them in order; a later one names the folder of an earlier one."
        ) from exc
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as exc:
        raise RecipeError(f"{where} is not a YAML document: {_in_a_line(exc)}") from exc
    try:
        return recipe_from_dict(document, where=where)
    except RecursionError as exc:
        raise RecipeError(f"{where} is nested too deeply to be a recipe.") from exc


def _in_a_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__


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
    document, layers = _unsliced(document, where)
    method, preset = _method(document.get("merge_method", "resmerge"))
    found = find_methods().get(method)
    base = None
    if document.get("base_model") is not None:
        base = ModelRef.parse(document["base_model"])
    elif method_class(method).base == "required":
        raise RecipeError(
            f"{where} has no base_model: the model that the experts were trained from."
        )
    notes = [f"name has no effect: {shown(document['name'])}"] if document.get("name") else []
    models = list(_models(document.get("models"), where, found, notes))
    experts = tuple(ref for ref in models if not _is_base(ref, base))
    if not experts:
        raise RecipeError(
            f"{where} lists no expert: every model under 'models' is the base itself."
        )
    listed_base = next((ref for ref in models if _is_base(ref, base)), None)
    takes_part = listed_base is not None and found is not None and found.base == "input"
    if listed_base is not None and not takes_part and listed_base.own():
        notes.append(f"the base's own {listed(listed_base.own())} has no effect in {method}")
    dtype = document.get("out_dtype") or document.get("dtype")
    return Recipe(
        listed_base if takes_part else base,
        experts,
        method,
        preset | _settings(document.get("parameters"), found, notes, of_model=False),
        checked_dtype(dtype),
        base_listed=takes_part,
        layers=layers,
        notes=tuple(dict.fromkeys(notes)),
        tokenizer=tokenizer_of(document),
        chat_template=chat_template_of(document),
    )


def _method(name: object) -> tuple[str, dict[str, str]]:
    """Return name and preset of a method."""
    if not isinstance(name, str):
        raise RecipeError(f"merge_method must be a name, not {shown(name)}.")
    return parse_method(name)


def _is_base(ref: ModelRef, base: ModelRef | None) -> bool:
    return base is not None and ref.place == base.place


def _unsliced(document: Mapping[Any, Any], where: str) -> tuple[Mapping[Any, Any], int | None]:
    """Return a recipe with its one slice over the whole depth as models, and that depth."""
    modules = document.get("modules")
    if modules is not None:
        only = next(iter(modules.values())) if isinstance(modules, Mapping) and modules else None
        if (
            not isinstance(only, Mapping)
            or len(modules) != 1
            or not set(only) & {"slices", "models"}
        ):
            raise RecipeError(f"{where}: 'modules' must name one module with its slices or models.")
        document = {**{k: v for k, v in document.items() if k != "modules"}, **only}
    slices = document.get("slices")
    if slices is None:
        return document, None
    one = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    sources = one.get("sources") if isinstance(one, Mapping) else None
    if not isinstance(one, Mapping) or not isinstance(sources, list) or document.get("models"):
        raise RecipeError(
            f"{where}: 'slices' must be one slice over the whole depth; list the models under "
            "'models' otherwise. Stacking layers is left to mergekit."
        )
    ranges = [source.get("layer_range") for source in sources if isinstance(source, Mapping)]
    whole = ranges[0] if ranges else None
    if (
        len(ranges) != len(sources)
        or not isinstance(whole, list)
        or [type(number) for number in whole] != [int, int]
        or whole[0] != 0
        or any(other != whole for other in ranges)
    ):
        raise RecipeError(
            f"{where}: every source of 'slices' must have the same layer_range [0, LAYERS]. "
            "Stacking layers is left to mergekit."
        )
    models = [{k: v for k, v in source.items() if k != "layer_range"} for source in sources]
    shared = {**(document.get("parameters") or {}), **(one.get("parameters") or {})}
    rest = {k: v for k, v in document.items() if k != "slices"}
    return {**rest, "models": models, "parameters": shared}, whole[1]


def _models(
    models: object, where: str, method: type[MergeMethod] | None, notes: list[str]
) -> Iterator[ModelRef]:
    if not isinstance(models, Sequence) or isinstance(models, str) or not models:
        raise RecipeError(f"{where} needs a list under 'models', one '- model: ID' an expert.")
    for entry in models:
        if isinstance(entry, str):
            entry = {"model": entry}
        if not isinstance(entry, Mapping) or "model" not in entry:
            raise RecipeError(f"an entry of 'models' must be '- model: ID', not {shown(entry)}.")
        unknown = [key for key in entry if key not in ("model", "parameters")]
        if unknown:
            raise RecipeError(f"unknown key {shown(unknown[0])} in an entry of 'models'.")
        own = _settings(entry.get("parameters"), method, notes, of_model=True)
        weight = _weight(own.pop("weight")) if _is_number(own) else None
        yield replace(ModelRef.parse(_plain(entry["model"]), weight=weight), parameters=own)


def _plain(model: object) -> object:
    """Return a model that mergekit wrote as a mapping as the text that it writes otherwise."""
    while isinstance(model, Mapping) and set(model) == {"model"}:
        model = model["model"]
    if isinstance(model, Mapping) and isinstance(model.get("path"), str):
        revision = model.get("revision")
        if not set(model) - {"path", "revision"}:
            return model["path"] if revision is None else f"{model['path']}@{revision}"
    return model


def _settings(
    parameters: object, method: type[MergeMethod] | None, notes: list[str], *, of_model: bool
) -> dict[str, Any]:
    """Return parameters whose form is right; their values are the method's business."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise RecipeError(
            f"parameters must be a mapping of names to values, not {shown(parameters)}."
        )
    idle = {key: _IDLE[key] for key in parameters if key in _IDLE}
    if method is not None:
        where = "of a single model" if of_model else "of its own"
        idle = {
            key: f"{method.name} has no such parameter {where}, here as in mergekit"
            for key in parameters
            if key not in _IDLE and is_idle(method, key, of_model=of_model)
        } | idle
    notes += [f"{key} has no effect: {why}" for key, why in idle.items()]
    kept = {key: value for key, value in parameters.items() if key not in idle}
    for key, value in kept.items():
        check_setting(key, value)
    return kept


def _is_number(own: Mapping[str, Any]) -> bool:
    return "weight" in own and is_plain(own["weight"])


def _weight(weight: object) -> float:
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
