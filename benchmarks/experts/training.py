"""Trains the models of a group one by one, and keeps their training log.

    DIR/small/base  rl-add … rl-close  sft-add … sft-close  training_log.json

A model is finished when its folder and its entry in the log exist; a finished model is not trained
again, so an interrupted run is continued by starting it anew.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen2ForCausalLM

from resmerge_stream.experts.evaluate import evaluate, load_model, load_tokenizer
from resmerge_stream.experts.tasks import LENGTHS, TASKS, answer

from .corpus import slipping_writer
from .groups import CORPUS_MIX, CORPUS_SLIPS, EXTRA, SFT_BATCH, Group
from .measure import measure_change
from .model import build_model, save_model
from .rl import reinforce
from .supervised import train_on_answers
from .tokenizer import build_tokenizer

LOG = "training_log.json"

# Of every accuracy in the log: held-out prompts per task, and their seed.
LOGGED_PROMPTS = 2000
LOGGED_SEED = 0


class MissingBaseError(FileNotFoundError):
    """An expert was asked for before its base was trained."""


class OtherSettingsError(ValueError):
    """The folder holds models that were trained with other settings."""


def model_names(kinds: Sequence[str]) -> list[str]:
    """Return the models of a group in training order.

    Args:
        kinds: of "base", "rl", "sft" and "extra", those wanted.
    """
    names = ["base"] if "base" in kinds else []
    names += [f"{kind}-{task}" for kind in ("rl", "sft") if kind in kinds for task in TASKS]
    return [*names, *(EXTRA if "extra" in kinds else ())]


def train_group(group: Group, folder: Path, *, names: Sequence[str]) -> None:
    """Train the models of a group that are not finished yet.

    Args:
        group: its settings.
        folder: where its model folders and its log go; made if missing.
        names: from `model_names`.

    Raises:
        MissingBaseError: an expert is asked for, and the base is neither there nor asked for.
        OtherSettingsError: models are there already, and not of these settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = _read_log(folder, group)
    for name in names:
        if name in log["models"] and (folder / name).is_dir():
            print(f"{group.name}/{name}: finished before, kept", file=sys.stderr)
            continue
        if name != "base" and not (folder / "base").is_dir():
            raise MissingBaseError(
                f"{folder / 'base'} does not exist, and {name!r} starts from it. "
                "Train the base first, or leave --only away."
            )
        log["models"][name] = _train_one(group, folder, name)
        _write_log(folder, log)


def _train_one(group: Group, folder: Path, name: str) -> dict[str, Any]:
    """Train, save, evaluate and measure one model; return its entry in the log."""
    label = f"{group.name}/{name}"
    start = time.monotonic()
    if name == "base":
        model = build_model(group.shape, seed=group.seed)
        steps = _pretrain(model, group, label)
    else:
        model = load_model(folder / "base")
        steps = _specialise(model, group, folder, name, label)
    seconds = time.monotonic() - start
    save_model(model, folder / name)
    accuracies = evaluate(folder / name, LOGGED_PROMPTS, LOGGED_SEED)
    entry: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "accuracy": {
            task: {key: round(value, 4) for key, value in accuracy._asdict().items()}
            for task, accuracy in accuracies.items()
        },
    }
    if name != "base":
        entry["change"] = measure_change(folder / "base", folder / name).as_json()
    shares = ", ".join(f"{task} {result.accuracy:.3f}" for task, result in accuracies.items())
    print(f"{label}: {seconds:.0f} s, held-out accuracy {shares}", file=sys.stderr, flush=True)
    return entry | {"steps": steps}


def _pretrain(model: Qwen2ForCausalLM, group: Group, label: str) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for stage, settings in enumerate(group.pretraining):
        if stage > 0:
            # As if the last stage had been saved: a base may be trained on from its checkpoint.
            model.to(torch.bfloat16).float()
        seed = group.seed + 100 * stage
        log += train_on_answers(
            model,
            build_tokenizer(model_max_length=group.shape.context),
            settings,
            prompts_per_step=CORPUS_MIX,
            write=slipping_writer(CORPUS_SLIPS, seed=seed),
            seed=seed,
            label=label,
        )
    return log


def _specialise(
    model: Qwen2ForCausalLM, group: Group, folder: Path, name: str, label: str
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(folder / "base")
    kind, task, *variant = name.split("-")
    # Not the base's seed: an expert does not begin with the prompts the base began with.
    seed = group.seed + (2000 if variant == ["again"] else 1000)
    if kind == "rl":
        breaks = variant[1] if variant[:1] == ["breaks"] else None
        return reinforce(model, tokenizer, task, group.rl, seed=seed, label=label, breaks=breaks)
    return train_on_answers(
        model,
        tokenizer,
        group.sft,
        prompts_per_step={task: SFT_BATCH},
        write=answer,
        seed=seed,
        label=label,
    )


def _read_log(folder: Path, group: Group) -> dict[str, Any]:
    """Return the log with the entries so far, or a new one."""
    settings = {
        "group": asdict(group),
        "corpus": {"mix": CORPUS_MIX, "slips": asdict(CORPUS_SLIPS), "lengths": LENGTHS},
        "sft_batch": SFT_BATCH,
        "accuracy_on": {"split": "held-out", "prompts": LOGGED_PROMPTS, "seed": LOGGED_SEED},
    }
    made_with = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    path = folder / LOG
    if not path.is_file():
        return {"settings": settings, "made_with": made_with, "models": {}}
    log = json.loads(path.read_text("utf-8"))
    # Through JSON, as the stored ones went: tuples become lists.
    if log["settings"] != json.loads(json.dumps(settings)):
        raise OtherSettingsError(
            f"{folder} holds models trained with other settings than those of group "
            f"{group.name!r} now. Name another folder, or delete this one to train anew."
        )
    return log


def _write_log(folder: Path, log: dict[str, Any]) -> None:
    staged = folder / f"{LOG}.partial"
    staged.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, folder / LOG)
