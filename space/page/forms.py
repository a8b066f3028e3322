"""The form of a merge: its fields' values to what is asked for, and back."""

from collections.abc import Mapping
from typing import Any

from resmerge_stream.methods import find_methods, parameter_fields
from resmerge_stream.planning.options import Options
from resmerge_stream.recipe import Recipe

# Rows of experts in the form; a pasted recipe may have more.
ROWS = 8
ADAPTER = "adapter"
SAME_AS_BASE = "same as the base"
AS_NEW, AS_UPDATE, AS_PULL_REQUEST = "a new repository", "an update", "a pull request"
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
            ``discuss``.
    """
    method = str(form.get("method") or "resmerge")
    kind = find_methods().get(method)
    models: list[Any] = []
    for number in range(min(int(form.get("count") or 0), ROWS)):
        name = _model(form.get(f"expert{number}"))
        if not name:
            continue
        weight = form.get(f"weight{number}")
        weighted = kind is not None and kind.weighted and weight not in (None, 1, 1.0)
        models.append(
            {"model": name, "parameters": {"weight": weight}} if weighted else {"model": name}
        )
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": _model(form.get("base")) or None,
        "models": models,
    }
    parameters = {
        name: form[field_name(method, name)]
        for name in (parameter_fields(kind) if kind else [])
        if form.get(field_name(method, name)) not in (None, "")
    }
    if parameters:
        recipe["parameters"] = parameters
    if form.get("dtype") and form["dtype"] != SAME_AS_BASE:
        recipe["dtype"] = form["dtype"]
    options = {key: form[key] for key in output_options() if form.get(key) not in (None, "")}
    if options.get("as") != ADAPTER:
        options.pop("adapter_rank", None)  # not to be seen then
    return {
        "recipe": recipe,
        "options": options,
        "push_to": target_of(form),
        **_publishing(form),
    }


def _publishing(form: Mapping[str, Any]) -> dict[str, Any]:
    publish = form.get("publish")
    if publish == AS_PULL_REQUEST:
        return {"public": None, "create_pr": True}
    return {
        "public": {PRIVATE: False, PUBLIC: True}.get(str(form.get("visibility"))),
        "update": publish == AS_UPDATE,
        "collection": str(form.get("collection") or "").strip(),
        "discuss": bool(form.get("discuss")),
    }


def target_of(form: Mapping[str, Any]) -> str:
    """Return the repository that a form names; empty for files to download."""
    name = str(form.get("name") or "").strip()
    if not name:
        return ""
    return name if "/" in name else f"{form.get('namespace') or 'your-name'}/{name}"


def form_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that show a recipe."""
    rows = [(str(ref), ref.weight or 1.0) for ref in recipe.experts]
    form: dict[str, Any] = {
        "base": str(recipe.base) if recipe.base is not None else "",
        "count": max(min(len(rows), ROWS), 1),
        "method": recipe.method,
        "dtype": recipe.dtype or SAME_AS_BASE,
    }
    for number in range(ROWS):
        name, weight = rows[number] if number < len(rows) else ("", 1.0)
        form |= {f"expert{number}": name, f"weight{number}": weight}
    for name, value in recipe.parameters.items():
        form[field_name(recipe.method, name)] = value
    return form


def _model(name: object) -> str:
    return str(name or "").strip()
