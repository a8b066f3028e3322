"""The groups that are merged: bundled models where they are, the others trained by the script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experts.groups import GROUPS, KNOWN, Group
from benchmarks.experts.training import LOG, model_names
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import TASKS

RL = tuple(f"rl-{task}" for task in TASKS)
SFT = tuple(f"sft-{task}" for task in TASKS)


def ensure_groups(
    folder: Path, names: Sequence[str] = KNOWN, kinds: Sequence[str] = ("base", "rl", "sft")
) -> dict[str, Path]:
    """Return the folders of the groups, after training what is missing: one process a group.

    Args:
        folder: gets one folder a group; finished models in it are kept.
        names: of the groups.
        kinds: which models of a group are needed.

    Raises:
        RuntimeError: a training failed.
    """
    small = folder / "small"
    if not small.exists():
        bundled = builtin_group()
        for name, source in bundled.items():
            shutil.copytree(source, small / name)
        shutil.copy(bundled["base"].parent / LOG, small / LOG)
    running = [
        (name, _train(folder, name, *_only(kinds)))
        for name in names
        if not all(
            (folder / name / model).is_dir()
            for model in model_names(kinds, GROUPS[name].family.tasks)
        )
    ]
    for name, process in running:
        if process.wait() != 0:
            raise RuntimeError(f"training the group {name!r} failed; its messages are above.")
    return {name: folder / name for name in names}


def rl_experts(folder: Path, group: Group) -> tuple[Path, dict[str, Path]]:
    """Return a group's base and its RL experts by task, after training the small ones.

    Args:
        folder: has one folder a group. Experts of a real language model take hours: those that are
            there are taken.
        group: whose they are.

    Raises:
        RuntimeError: a training failed.
    """
    if not group.words:
        ensure_groups(folder, (group.name,), ("base", "rl"))
    models = {task: folder / group.name / f"rl-{task}" for task in group.family.tasks}
    trained = {task: expert for task, expert in models.items() if expert.is_dir()}
    return folder / group.name / "base", trained


def retrain(folder: Path, group: Path, name: str) -> Path:
    """Train one expert of a group again from its base, and return its folder.

    Raises:
        RuntimeError: the training failed.
    """
    again = folder / group.name
    if not (again / name).is_dir():
        shutil.copytree(group / "base", again / "base", dirs_exist_ok=True)
        if _train(folder, group.name, "--only", name).wait() != 0:
            raise RuntimeError(f"training {name!r} again failed; its messages are above.")
    return again / name


def training_log(group: Path) -> dict[str, Any]:
    """Return a group's training log."""
    found: dict[str, Any] = json.loads((group / LOG).read_text("utf-8"))
    return found


def _only(kinds: Sequence[str]) -> list[str]:
    return [word for kind in kinds for word in ("--only", kind)]


def _train(folder: Path, group: str, *options: str) -> subprocess.Popen[bytes]:
    # One thread: the same weights come out only with the same number of threads.
    command = [sys.executable, "-m", "benchmarks.experts", "--out", str(folder), "--group", group]
    return subprocess.Popen([*command, "--threads", "1", *options])
