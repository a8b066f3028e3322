"""The recipe of a merge as mergekit would be told it, or why mergekit could not run it."""

from collections.abc import Mapping
from typing import Any

from ..errors import listed
from ..methods import MERGEKITS, is_mergekits, parameter_fields
from ..planning.dtypes import main_dtype
from ..planning.plan import Plan
from ..sources.adapter import Adapter
from ..specs import OUTPUT_DTYPES

FILE = "mergekit_config.yml"
_OWN = ("parameters", "dtype", "generation_config")


def mergekit_config(plan: Plan, recipe: Mapping[str, Any]) -> tuple[str, str]:
    """Return the YAML document and an empty text, or an empty one and the reason.

    Args:
        plan: what was run.
        recipe: as it is published: models as they may be named, every parameter written out.
    """
    import yaml

    if plan.method is None:
        return "", "it has no method"
    if plan.recipe.method not in MERGEKITS:
        return "", f"it has no method {plan.recipe.method}"
    if any(source.subfolder for source in plan.checkpoints):
        return "", "it reads no models in folders of a repository"
    parameters, unknown = _as_mergekits(plan, recipe.get("parameters") or {})
    if unknown:
        return "", f"it does not know {listed(unknown)} of {plan.method.name}"
    document = {key: value for key, value in recipe.items() if key not in _OWN}
    models = list(recipe["models"])
    base = recipe.get("base_model") or models[0]["model"]
    for number, expert in enumerate(plan.experts):  # it knows an adapter by base+adapter alone
        if isinstance(expert, Adapter):
            models[number] = {**models[number], "model": f"{base}+{models[number]['model']}"}
    document["models"] = models
    if plan.method.base == "input" and not plan.recipe.base_listed:
        document.pop("base_model", None)  # mergekit would merge it too
    document |= {"parameters": parameters} if parameters else {}
    # The arithmetic here is float32, whatever is written.
    document |= {"dtype": "float32", "out_dtype": main_dtype(plan.layout)}
    if plan.recipe.dtype in OUTPUT_DTYPES:  # mergekit writes no FP8
        document["out_dtype"] = plan.recipe.dtype
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1_000_000)
    notes = [f"# mergekit-yaml {FILE} merged", *(f"# {note}" for note in _notes(plan))]
    return "\n".join(notes) + "\n" + text, ""


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
    if plan.recipe.generation_config is not None:
        notes.append("It takes no generation config of another model.")
    if plan.matched and any(plan.matched):
        notes.append("It does not match tensors under other names, as was done here.")
    local = [source for source in plan.checkpoints if source.revision is None]
    if local:
        notes.append("Folders of another machine: put your own paths.")
    return notes
