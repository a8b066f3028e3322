"""Files of a finished job for a browser, put where gradio may serve them from."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .records import DONE, Job


def downloads(job: Job, merged: Path, report: dict[str, Any]) -> list[Path]:
    """Return copies of a job's files below the system's temporary folder.

    Gradio hands out files of that folder only; `allowed_paths` stays empty.

    Args:
        job: a finished one.
        merged: the folder of its output, where it published nothing.
        report: its report.
    """
    if job.state != DONE:
        return []
    folder = Path(tempfile.gettempdir()) / f"resmerge-space-{os.getpid()}" / job.id
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = []
    for path in sorted(merged.rglob("*")):
        if path.is_file():
            copy = folder / path.name
            if not copy.exists():
                shutil.copyfile(path, copy)
            found.append(copy)
    if not found:
        found = [folder / "report.json", folder / "recipe.yml"]
        found[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        found[1].write_text(pinned_recipe(report), encoding="utf-8")
    return found


def pinned_recipe(report: dict[str, Any]) -> str:
    """Return the recipe of a report with the commits that were read, as YAML."""
    import yaml

    names = [
        f"{source['id']}@{source['revision']}" if source.get("revision") else str(source["id"])
        for source in report["sources"]
    ]
    recipe = dict(report["recipe"])
    if recipe.get("base_model") is not None:
        recipe["base_model"], *names = [*names, names[0]]  # last where it is listed as well
    recipe["models"] = [
        {**model, "model": name} for model, name in zip(recipe["models"], names, strict=False)
    ]
    text: str = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return text
