"""An evaluation in a merged model's card, its report and its model-index."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .results import markdown, renamed

_NOBODY = "Nobody has evaluated this model yet. "
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
    from huggingface_hub import EvalResult, ModelCard

    root = Path(os.path.expanduser(folder))
    readme, report = root / "README.md", root / "resmerge" / "report.json"
    if not readme.is_file() or not report.is_file():
        raise RecipeError(f"{root} has no README.md and resmerge/report.json of a merge.")
    card = ModelCard.load(readme)
    names = _public_names(document["models"])
    document, name = renamed(document, names), names[name]
    shares = document["models"][name]
    card.data.model_name = root.name
    card.data.eval_results = [
        EvalResult("text-generation", task, task, "accuracy", round(share["accuracy"], 4))
        for task, share in shares.items()
        if task != "mean"
    ]
    section = f"\n## Evaluation\n\n{markdown(document)}\n"
    text = _SECTION.sub("", card.text).replace(_NOBODY, "")
    before, heading, after = text.partition("\n## Before you use it")
    card.text = f"{before.rstrip()}\n{section}{heading}{after}"
    readme.write_text(str(card), encoding="utf-8")
    stored = json.loads(report.read_text(encoding="utf-8")) | {"evaluation": document}
    report.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _public_names(models: Iterable[str]) -> dict[str, str]:
    """Return names for a card: of a folder its last part, since its path is nobody's business."""
    found: dict[str, str] = {}
    for name in models:
        path = Path(os.path.expanduser(name))
        short = path.resolve().name if path.is_dir() else name
        taken = set(found.values())
        if short in taken:
            number = next(n for n in itertools.count(2) if f"{short}-{n}" not in taken)
            short = f"{short}-{number}"
        found[name] = short
    return found
