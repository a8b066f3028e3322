"""The form of a merge: its fields' values to what is asked for, and back."""

import json
from collections.abc import Mapping
from typing import Any

from resmerge_stream.documents import load_json
from resmerge_stream.methods import find_methods, parameter_fields, settled
from resmerge_stream.methods.settings import is_plain
from resmerge_stream.planning.options import Options
from resmerge_stream.recipe import DEFAULT_METHOD, Recipe
from resmerge_stream.sinks.publication import Publication

# Rows of experts in the form; a pasted recipe may have more.
ROWS = 8
ADAPTER = "adapter"
# Shown only where an adapter is written.
ADAPTER_RANK = "adapter_rank"
SAME_AS_BASE = "same as the base"
AS_NEW, AS_UPDATE, AS_PULL_REQUEST = "a new repository", "an update", "a pull request"
# The field with what of a recipe no other field shows.
BEYOND = "beyond"
PRIVATE, PUBLIC, AS_IT_IS = "private", "public", "leave as it is"


def field_name(method: str, parameter: str) -> str:
    """Return the form's name of a method's parameter."""
    return f"{method}.{parameter}"


def output_options() -> list[str]:
    """Return the keys of the options that change the output; the form's fields are called so."""
    return list(Options().to_dict())


def document_of(form: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a form asks for, as `web_request` takes it.

    Args:
        form: values by field: ``base``, ``expert0`` … with ``weight0`` …, ``count``, ``method``,
            the method's parameters as ``method.parameter``, ``dtype``, the output options by
            their keys, ``namespace``, ``name``, ``publish``, ``visibility``, ``collection``,
            ``discuss``, ``questions``; ``beyond`` is what `form_of` found no field for, and goes
            over them.
    """
    method = str(form.get("method") or DEFAULT_METHOD)
    kind = find_methods().get(method)
    beyond = _beyond_of(form, method)
    models: list[Any] = []
    for number in range(min(int(form.get("count") or 0), ROWS)):
        name = _model(form.get(f"expert{number}"))
        if not name:
            continue
        weight = form.get(f"weight{number}")
        weighted = kind is not None and kind.weighted and weight not in (None, 1, 1.0)
        own = {"weight": weight} if weighted else {}
        own |= _taken(beyond["models"], name)
        models.append({"model": name, "parameters": own} if own else {"model": name})
    base = _model(form.get("base"))
    if models and base and base == beyond.get("base"):
        own = _taken(beyond["models"], base)
        models.append({"model": base, "parameters": own} if own else {"model": base})
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": base or None,
        "models": models,
    }
    parameters = {
        name: form[field_name(method, name)]
        for name in (parameter_fields(kind) if kind else [])
        if form.get(field_name(method, name)) not in (None, "")
    }
    parameters |= beyond["parameters"]
    if parameters:
        recipe["parameters"] = parameters
    recipe |= {key: beyond[key] for key in ("tokenizer", "chat_template") if key in beyond}
    if form.get("dtype") and form["dtype"] != SAME_AS_BASE:
        recipe["dtype"] = form["dtype"]
    options = {key: form[key] for key in output_options() if form.get(key) not in (None, "")}
    if options.get("as") != ADAPTER:
        options.pop(ADAPTER_RANK, None)  # not to be seen then
    goal: dict[str, Any] = {"public": None, "create_pr": True}
    if form.get("publish") != AS_PULL_REQUEST:
        given = {name: form[name] for name in Publication.defaults() if form.get(name)}
        goal = {name: v.strip() if isinstance(v, str) else v for name, v in given.items()}
        goal["public"] = {PRIVATE: False, PUBLIC: True}.get(str(form.get("visibility")))
        goal["update"] = form.get("publish") == AS_UPDATE
    return {
        "recipe": recipe,
        "chosen_by": "default" if method == DEFAULT_METHOD else "option",
        "notes": beyond["notes"],
        "options": options,
        "push_to": target_of(form),
        "questions": str(form.get("questions") or "").strip(),
        **goal,
    }


def target_of(form: Mapping[str, Any]) -> str:
    """Return the repository that a form names; empty for files to download."""
    name = str(form.get("name") or "").strip()
    if not name:
        return ""
    return name if "/" in name else f"{form.get('namespace') or 'your-name'}/{name}"


def form_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that show a recipe."""
    rows = [(str(ref), 1.0 if ref.weight is None else ref.weight) for ref in recipe.experts]
    fields = parameter_fields(find_methods()[recipe.method])
    form: dict[str, Any] = {
        "base": str(recipe.base) if recipe.base is not None else "",
        "count": max(min(len(rows), ROWS), 1),
        "method": recipe.method,
        "dtype": recipe.dtype or SAME_AS_BASE,
    }
    for number in range(ROWS):
        name, weight = rows[number] if number < len(rows) else ("", 1.0)
        form |= {f"expert{number}": name, f"weight{number}": weight}
    for name, value in _parameters(recipe).items():
        if name in fields and is_plain(value):
            form[field_name(recipe.method, name)] = value
    beyond = _beyond(recipe)
    return {**form, BEYOND: json.dumps(beyond, ensure_ascii=False) if beyond else ""}


def in_words(beyond: str) -> list[str]:
    """Return what of a recipe no field shows, in a few words each."""
    found = _read(beyond)
    words = [
        f"{key} of all models" if is_plain(value) else f"{key} by layer or module"
        for key, value in (found.get("parameters") or {}).items()
    ]
    words += [
        f"{key} of {entry['model']}"
        for entry in found.get("models") or []
        for key in entry["parameters"]
    ]
    words += ["the base as one of the models"] * ("base" in found)
    words += ["the tokenizer"] * ("tokenizer" in found)
    return words + ["the chat template"] * ("chat_template" in found)


def _beyond(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe that no field shows, in a recipe's words; the base by name."""
    kind = find_methods()[recipe.method]
    found: dict[str, Any] = {}
    document, fields = recipe.to_dict(), parameter_fields(kind)
    listed = [recipe.base] if recipe.base is not None and recipe.base_listed else []
    owns = [(str(ref), ref.own(), ref.weight) for ref in (*recipe.experts, *listed)]
    # Beside a weight of all models, a field that says 1 would say nothing.
    has_weights = kind.weighted and kind.weight_key not in recipe.parameters
    models: list[dict[str, Any]] = []
    for number, (name, own, weight) in enumerate(owns):
        has_field = has_weights and weight is not None and number < len(recipe.experts)
        rest = {key: value for key, value in own.items() if key != "weight" or not has_field}
        models += [{"model": name, "parameters": rest}] if rest else []
    parameters = {
        key: value
        for key, value in _parameters(recipe).items()
        if key not in fields or not is_plain(value)
    }
    if models:
        found["models"] = models
    if parameters:
        found["parameters"] = parameters
    if listed:
        found["base"] = str(recipe.base)
    if models or parameters or listed:
        found["merge_method"] = recipe.method
    if recipe.notes:
        found["notes"] = list(recipe.notes)
    return found | {key: document[key] for key in ("tokenizer", "chat_template") if key in document}


def _parameters(recipe: Recipe) -> dict[str, Any]:
    """Return the merge's parameters under today's names, a weight of all models among them."""
    kind = find_methods()[recipe.method]
    given = dict(recipe.parameters)
    shared = {kind.weight_key: given.pop(kind.weight_key)} if kind.weight_key in given else {}
    return settled(kind, given) | (shared if kind.weighted else {})


def _read(beyond: object) -> dict[str, Any]:
    """Return what `_beyond` found, from its text; nothing from any other."""
    try:
        found = load_json(str(beyond or "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _beyond_of(form: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return what goes over a form's fields; what belongs to another method is left out."""
    found = _read(form.get(BEYOND))
    kept: dict[str, Any] = {
        key: found[key] for key in ("tokenizer", "chat_template") if key in found
    }
    of_method = found if found.get("merge_method") == method else {}
    models, parameters = of_method.get("models"), of_method.get("parameters")
    notes = found.get("notes")
    return kept | {
        "notes": [str(note) for note in notes] if isinstance(notes, list) else [],
        "base": of_method.get("base"),
        "models": list(models) if isinstance(models, list) else [],
        "parameters": parameters if isinstance(parameters, dict) else {},
    }


def _taken(entries: list[Any], name: str) -> dict[str, Any]:
    """Return the parameters of the first entry of a model, and take it out."""
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("model") == name:
            own = entries.pop(number).get("parameters")
            return dict(own) if isinstance(own, dict) else {}
    return {}


def _model(name: object) -> str:
    return str(name or "").strip()
