"""Which tensors transformers keeps in float32, by model type: `python -m tests.zoo.kept_dtypes`."""

import importlib
import inspect
import json
import pkgutil
from pathlib import Path

TABLE = Path(__file__).parents[2] / "resmerge_stream/planning/kept_float32.json"
# transformers keeps the first in float32 when it loads in float16, the second in any dtype.
_ATTRIBUTES = {"float16": "_keep_in_fp32_modules", "any": "_keep_in_fp32_modules_strict"}


def table() -> dict[str, dict[str, list[str]]]:
    """Return the patterns of each model type, as transformers searches them in runtime names."""
    from transformers import PreTrainedModel, models

    found: dict[str, dict[str, list[str]]] = {key: {} for key in _ATTRIBUTES}
    for module in pkgutil.iter_modules(models.__path__):
        try:
            code = importlib.import_module(
                f"transformers.models.{module.name}.modeling_{module.name}"
            )
        except ImportError:
            continue
        for kind in vars(code).values():
            if not inspect.isclass(kind) or not issubclass(kind, PreTrainedModel):
                continue
            model_type = getattr(kind.config_class, "model_type", "")
            for key, attribute in _ATTRIBUTES.items():
                patterns = {*(getattr(kind, attribute) or ()), *found[key].get(model_type, ())}
                if model_type and patterns and kind.__module__ == code.__name__:
                    found[key][model_type] = sorted(patterns)
    return {key: dict(sorted(types.items())) for key, types in found.items()}


def written(found: dict[str, dict[str, list[str]]]) -> str:
    """Return the table as its file has it, a line for each model type."""
    parts = [
        f'"{key}": {{\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(p)}" for name, p in types.items())
        + "\n}"
        for key, types in found.items()
    ]
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    TABLE.write_text(written(table()))
