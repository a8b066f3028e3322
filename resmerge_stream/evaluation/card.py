"""An evaluation in a merged model's card, its report and its model-index."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..documents import load_json
from ..errors import RecipeError
from .results import markdown, renamed

# The card and the report, in this order.
CARD_FILES = ("README.md", "resmerge/report.json")
_SECTION = re.compile(r"\n## Evaluation\n.*?(?=\n## |\Z)", re.DOTALL)


def into_card(folder: str | Path, name: str, document: Mapping[str, Any]) -> None:
    """Put an evaluation into a merged model's card and report, and into its model-index.

    Args:
        folder: of the merge, with README.md and resmerge/report.json.
        name: of the merge in the evaluation.
        document: from `evaluation`.

    Raises:
        RecipeError: the folder has no card and report of a merge.
    """
    root = Path(os.path.expanduser(folder))
    paths = {file: root / file for file in CARD_FILES}
    if not all(path.is_file() for path in paths.values()):
        raise RecipeError(f"{root} has no {' and '.join(CARD_FILES)} of a merge.")
    stored = {file: path.read_bytes() for file, path in paths.items()}
    for file, data in with_evaluation(stored, name, document, title=root.name).items():
        paths[file].write_bytes(data)


def with_evaluation(
    stored: Mapping[str, bytes], name: str, document: Mapping[str, Any], *, title: str
) -> dict[str, bytes]:
    """Return a merge's card and report with an evaluation in them, in place of an earlier one.

    Args:
        stored: the content of `CARD_FILES`.
        name: of the merge in the evaluation.
        document: from `evaluation`.
        title: what the card calls the model in its model-index.

    Raises:
        RecipeError: they are no card and report.
    """
    import yaml
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    readme, report = (stored[file] for file in CARD_FILES)
    try:
        card = ModelCard(readme.decode())
        told: dict[str, Any] = dict(load_json(report))
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise RecipeError(f"{title} has no {' and '.join(CARD_FILES)} of a merge: {exc}.") from exc
    data: ModelCardData = card.data  # type: ignore[assignment]  # of a model's card it is one
    names: dict[str, str] = {}
    for model in (*document["models"], *document.get("unasked", {})):
        # Of a folder its last part, since its path is nobody's business.
        path = Path(os.path.expanduser(model))
        short = path.resolve().name if path.is_dir() else model
        if short in names.values():
            taken = (f"{short}-{number}" for number in itertools.count(2))
            short = next(it for it in taken if it not in names.values())
        names[model] = short
    document, name = renamed(document, names), names[name]
    shares = document["models"][name]
    data.model_name = title
    data.eval_results = [
        EvalResult("text-generation", task, task, "accuracy", round(share["accuracy"], 4))
        for task, share in shares.items()
        if task != "mean"
    ]
    section = f"\n## Evaluation\n\n{markdown(document)}\n"
    # Cards of earlier versions have none before they are evaluated.
    place = _SECTION.search(card.text) or re.search(r"(?=\n## Load it)|\Z", card.text)
    start, end = place.span() if place is not None else (0, 0)
    card.text = card.text[:start] + section + card.text[end:]
    found = (str(card), json.dumps(told | {"evaluation": document}, indent=1) + "\n")
    return {file: text.encode() for file, text in zip(CARD_FILES, found, strict=True)}
