"""The form of a merge: its fields' values to what is asked for, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from resmerge_stream.methods import find_methods
from resmerge_stream.planning.options import Options
from resmerge_stream.recipe import ModelRef, Recipe

# Rows of experts in the form; a pasted recipe may have more.
ROWS = 8
SAME_AS_BASE = "same as the base"
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
        form: values by field: ``base``, ``base_revision``, ``expert0`` … with ``revision0`` …
            and ``weight0`` …, ``count``, ``method``, the method's parameters as
            ``method.parameter``, ``dtype``, the output options by their keys,
            ``namespace``, ``name``, ``visibility``, ``update``.
    """
    method = str(form.get("method") or "resmerge")
    kind = find_methods().get(method)
    models: list[Any] = []
    for number in range(min(int(form.get("count") or 0), ROWS)):
        name = _model(form.get(f"expert{number}"), form.get(f"revision{number}"))
        if not name:
            continue
        weight = form.get(f"weight{number}")
        weighted = kind is not None and kind.weighted and weight not in (None, 1, 1.0)
        models.append(
            {"model": name, "parameters": {"weight": weight}} if weighted else {"model": name}
        )
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": _model(form.get("base"), form.get("base_revision")) or None,
        "models": models,
    }
    parameters = {
        name: form[field_name(method, name)]
        for name in ([field.name for field in dataclasses.fields(kind)] if kind else [])
        if form.get(field_name(method, name)) is not None
    }
    if parameters:
        recipe["parameters"] = parameters
    if form.get("dtype") and form["dtype"] != SAME_AS_BASE:
        recipe["dtype"] = form["dtype"]
    return {
        "recipe": recipe,
        "options": {key: form[key] for key in output_options() if form.get(key) not in (None, "")},
        "push_to": target_of(form),
        "public": {PRIVATE: False, PUBLIC: True}.get(str(form.get("visibility"))),
        "update": bool(form.get("update")),
    }


def target_of(form: Mapping[str, Any]) -> str:
    """Return the repository that a form names; empty for files to download."""
    name = str(form.get("name") or "").strip()
    if not name or form.get("as_files"):
        return ""
    return name if "/" in name else f"{form.get('namespace') or 'your-name'}/{name}"


def form_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that show a recipe."""
    base, revision = ("", "") if recipe.base is None else _fields(recipe.base)
    form: dict[str, Any] = {
        "base": base,
        "base_revision": revision,
        **_rows([(*_fields(ref), ref.weight or 1.0) for ref in recipe.experts]),
        "method": recipe.method,
        "dtype": recipe.dtype or SAME_AS_BASE,
    }
    for name, value in recipe.parameters.items():
        form[field_name(recipe.method, name)] = value
    return form


def without_row(form: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the expert rows after one of them is removed."""
    rows = [
        (form.get(f"expert{i}") or "", form.get(f"revision{i}") or "", form.get(f"weight{i}") or 1)
        for i in range(int(form.get("count") or 0))
        if i != number
    ]
    return _rows(rows)


def _rows(rows: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    form: dict[str, Any] = {"count": max(min(len(rows), ROWS), 1)}
    for number in range(ROWS):
        name, revision, weight = rows[number] if number < len(rows) else ("", "", 1.0)
        form |= {f"expert{number}": name, f"revision{number}": revision, f"weight{number}": weight}
    return form


def _fields(ref: ModelRef) -> tuple[str, str]:
    """Return what stands in a model's two fields: its id, and where in the repository it is."""
    where = str(ref).removeprefix(ref.id)
    return (ref.id, where[1:]) if ref.revision else (ref.id + where, "")


def _model(name: object, revision: object) -> str:
    text = str(name or "").strip()
    commit = str(revision or "").strip()
    return f"{text}@{commit}" if text and commit else text
