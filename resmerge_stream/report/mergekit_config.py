"""The recipe of a merge as mergekit would be told it, or why mergekit could not run it."""

from collections.abc import Mapping
from typing import Any

from ..errors import listed
from ..methods import MERGEKITS, is_mergekits, parameter_fields
from ..planning.plan import Plan
from ..planning.sidefiles import main_dtype
from ..sources.adapter import AdapterCheckpoint

FILE = "mergekit_config.yml"


def mergekit_config(plan: Plan, recipe: Mapping[str, Any]) -> tuple[str, str]:
    """Return the YAML document and an empty text, or an empty one and the reason.

    Args:
        plan: what was run.
        recipe: as it is published: models as they may be named, every parameter written out.
    """
    import yaml

    if plan.method is None or (reason := _obstacle(plan)):
        return "", reason if plan.method is not None else "it has no method"
    parameters, unknown = _as_mergekits(plan, recipe.get("parameters") or {})
    if unknown:
        return "", f"it does not know {listed(unknown)} of {plan.method.name}"
    document = {key: value for key, value in recipe.items() if key not in ("parameters", "dtype")}
    document["models"] = _models(plan, recipe)
    document |= {"parameters": parameters} if parameters else {}
    # The arithmetic here is float32, whatever is written.
    document |= {"dtype": "float32", "out_dtype": plan.recipe.dtype or main_dtype(plan.layout)}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1_000_000)
    notes = [f"# mergekit-yaml {FILE} merged", *(f"# {note}" for note in _notes(plan))]
    return "\n".join(notes) + "\n" + text, ""


def _models(plan: Plan, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the models, each adapter on the base: mergekit knows one by ``base+adapter`` alone."""
    models = list(recipe["models"])
    base = recipe.get("base_model") or models[0]["model"]
    for number, expert in enumerate(plan.experts):
        if isinstance(expert, AdapterCheckpoint):
            models[number] = {**models[number], "model": f"{base}+{models[number]['model']}"}
    return models


def _obstacle(plan: Plan) -> str:
    """Return why mergekit cannot run a recipe at all; empty where it can."""
    method = plan.recipe.method
    if method not in MERGEKITS:
        return f"it has no method {method}"
    if any(source.subfolder for source in plan.checkpoints):
        return "it reads no models in folders of a repository"
    return ""


def _as_mergekits(plan: Plan, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return parameters in mergekit's words, and those it has none for."""
    if plan.method is None:
        return {}, []
    fields = parameter_fields(type(plan.method))
    found: dict[str, Any] = {}
    unknown = []
    for key, value in parameters.items():
        field = fields.get(key)
        words = {} if field is None else {v: k for k, v in field.metadata["words"].items()}
        if isinstance(value, str) and value in words:
            found[key] = words[value]
        elif is_mergekits(plan.method.name, key) and not isinstance(value, str):
            found[key] = value
        elif field is None or value != field.default:
            unknown.append(f"{key}: {value}")
    return found, unknown


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.recipe.method.startswith(("dare", "della")):
        notes.append("Its random numbers are others, of the same distribution.")
    if plan.options.rounding == "stochastic":
        notes.append("It rounds to nearest; this merge was rounded stochastically.")
    if plan.options.output == "adapter":
        notes.append("It writes the whole model; this merge was written as an adapter.")
    if plan.matched and any(plan.matched):
        notes.append("It does not match tensors under other names, as was done here.")
    local = [source for source in plan.checkpoints if source.revision is None]
    if local:
        notes.append("Folders of another machine: put your own paths.")
    return notes
