"""Files of a finished job for a browser, put where gradio may serve them from."""

import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from .records import DONE, Job

_PREFIX = "resmerge-space-"


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
    folder = _folder() / job.id
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = []
    for path in sorted(merged.rglob("*")):
        if path.is_file():
            copy = folder / path.name
            if not copy.exists():
                shutil.copyfile(path, copy)
            found.append(copy)
    if found:
        archive = folder / "merged.zip"
        if not archive.exists():
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as whole:  # weights don't shrink
                for path in found:
                    whole.write(path, path.name)
        found.insert(0, archive)
    else:
        found = [folder / "report.json", folder / "recipe.yml"]
        found[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        found[1].write_text(pinned_recipe(report), encoding="utf-8")
    return found


def remove_downloads(*, mine: bool = False) -> None:
    """Remove the copies that servers which have ended left; with `mine`, this one's."""
    if mine:
        shutil.rmtree(_folder(), ignore_errors=True)
        return
    for folder in _folder().parent.glob(f"{_PREFIX}*"):
        number = folder.name.removeprefix(_PREFIX)
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getpid()}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


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
