"""Trains the models of a group one by one, and keeps their training log.

    DIR/small/base  rl-add … rl-close  sft-add … sft-close  training_log.json

A model is finished when its folder and its entry in the log exist; a finished model is not trained
again, so an interrupted run is continued by starting it anew.
"""

from __future__ import annotations

import hashlib
import itertools
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

from resmerge_stream.experts.accuracy import wilson
from resmerge_stream.experts.evaluate import load_model, load_tokenizer
from resmerge_stream.experts.tasks import LENGTHS, TASKS

from .asked import right
from .groups import ADAPTER_RANK, CORPUS_SLIPS, EXTRA, Group
from .measure import measure_change
from .model import WEIGHTS, add_adapter, build_model, save_adapter, save_model
from .pretrained import write_smollm2
from .rl import reinforce
from .state import TrainingState
from .supervised import train_on_answers
from .tokenizer import build_tokenizer

LOG = "training_log.json"

# Of the held-out prompts behind every accuracy in the log.
LOGGED_SEED = 0


class MissingBaseError(FileNotFoundError):
    """An expert was asked for before its base was trained."""


class OtherSettingsError(ValueError):
    """The folder holds models that were trained with other settings."""


def model_names(kinds: Sequence[str], tasks: Sequence[str] = TASKS) -> list[str]:
    """Return the models of a group in training order.

    Args:
        kinds: of "base", "rl", "sft", "lora" and "extra", those wanted.
        tasks: of the group.
    """
    names = ["base"] if "base" in kinds else []
    names += [f"{kind}-{task}" for kind in ("rl", "sft", "lora") if kind in kinds for task in tasks]
    return [*names, *(EXTRA if "extra" in kinds else ())]


def train_group(
    group: Group, folder: Path, *, names: Sequence[str], checkpoints: bool = False
) -> None:
    """Train the models of a group that are not finished yet.

    Args:
        group: its settings.
        folder: where its model folders and its log go; made if missing.
        names: from `model_names`.
        checkpoints: whether an RL expert of a real language model is also kept as it is after each
            ten steps, as ``NAME@step_10``.

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
        entry = _train_one(group, folder, name, checkpoints=checkpoints and name.startswith("rl-"))
        # Read again: another process may train another model of the group meanwhile.
        log = _read_log(folder, group)
        log["models"][name] = entry
        _write_log(folder, log)


def _train_one(group: Group, folder: Path, name: str, *, checkpoints: bool) -> dict[str, Any]:
    """Train, save, evaluate and measure one model; return its entry in the log."""
    label = f"{group.name}/{name}"
    start = time.monotonic()

    def keep(step: int) -> None:
        save_model(model, tokenizer, folder / f"{name}@step_{step}")

    # What is trained in a minute is not worth a file of three times its weights.
    path = folder / f"{name}.state" if group.shape is None else None
    state = TrainingState(path, also=keep if checkpoints else None)
    if name != "base":
        model, tokenizer = load_model(folder / "base"), load_tokenizer(folder / "base")
        steps = _specialise(model, tokenizer, group, name, label, state)
    else:
        if group.shape is None:
            start_from = write_smollm2(folder / "start")
            model, tokenizer = load_model(start_from), load_tokenizer(start_from)
        else:
            model = build_model(group.shape, seed=group.seed)
            tokenizer = build_tokenizer(model_max_length=group.shape.context)
        steps = _pretrain(model, tokenizer, group, label, state)
    seconds = steps[-1]["seconds"] if group.shape is None else time.monotonic() - start
    if name.startswith("lora-"):
        save_adapter(model, folder / name)
    else:
        save_model(model, tokenizer, folder / name)
        model.to(torch.bfloat16).float()
    family = group.family
    # Asking the large models takes minutes: an expert is asked what it was trained on.
    tasks = [t for t in family.tasks if name == "base" or not group.words or t in name.split("-")]
    questions = {t: family.held_out(t, family.logged, seed=LOGGED_SEED) for t in tasks}
    accuracies = {
        task: wilson(sum(right(model, tokenizer, asked)), len(asked))
        for task, asked in questions.items()
    }
    entry: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "accuracy": {
            task: {key: round(value, 4) for key, value in accuracy._asdict().items()}
            for task, accuracy in accuracies.items()
        },
    }
    (weights,) = (folder / name).glob("*.safetensors")
    entry["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if weights.name == WEIGHTS and name != "base":
        entry["change"] = measure_change(folder / "base", folder / name).as_json()
    shares = ", ".join(f"{task} {result.accuracy:.3f}" for task, result in accuracies.items())
    print(f"{label}: {seconds:.0f} s, held-out accuracy {shares}", file=sys.stderr, flush=True)
    state.remove()
    return entry | {"steps": steps}


def _pretrain(
    model: Any, tokenizer: Any, group: Group, label: str, state: TrainingState
) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for stage, settings in enumerate(group.pretraining):
        if stage > 0:
            # As if the last stage had been saved: a base may be trained on from its checkpoint.
            model.to(torch.bfloat16).float()
        seed = group.seed + 100 * stage
        write = group.family.corpus(seed)
        log += train_on_answers(
            model,
            tokenizer,
            settings,
            streams=[
                (map(write, group.family.stream(task, seed=seed, split="train")), count)
                for task, count in group.family.mix.items()
            ],
            label=label,
            spare=group.shape is None,
            state=state.of_stage(stage),
        )
    return log


def _specialise(
    model: Any, tokenizer: Any, group: Group, name: str, label: str, state: TrainingState
) -> list[dict[str, Any]]:
    kind, task, *variant = name.split("-")
    # Not the base's seed: an expert does not begin with the prompts the base began with.
    seed = group.seed + (2000 if variant == ["again"] else 1000)
    questions = group.family.stream(task, seed=seed, split="train")
    spare = group.shape is None
    if kind == "sft":
        streams = [(questions, group.family.sft_batch)]
        return train_on_answers(
            model, tokenizer, group.sft, streams=streams, label=label, spare=spare, state=state
        )
    if variant[:1] == ["breaks"]:
        other = group.family.stream(variant[1], seed=seed, split="train")
        inverted = (question._replace(inverted=True) for question in other)
        questions = itertools.chain.from_iterable(zip(questions, inverted, strict=True))
    settings = group.rl
    if kind == "lora":
        if group.lora is None:
            raise ValueError(f"the group {group.name!r} says nothing of training adapters.")
        settings = group.lora
        add_adapter(model, rank=ADAPTER_RANK, seed=seed)
    return reinforce(
        model, tokenizer, questions, settings, seed=seed, label=label, spare=spare, state=state
    )


def _read_log(folder: Path, group: Group) -> dict[str, Any]:
    """Return the log with the entries so far, or a new one."""
    family = group.family
    corpus = {"mix": family.mix}
    if not group.words:
        corpus |= {"slips": asdict(CORPUS_SLIPS), "lengths": LENGTHS}
    settings = {
        "group": _said(asdict(group)),
        "corpus": corpus,
        "sft_batch": family.sft_batch,
        "accuracy_on": {"split": "held-out", "prompts": family.logged, "seed": LOGGED_SEED},
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


def _said(settings: Any) -> Any:
    """Return settings without those that are off: logs older than a setting do not have it."""
    if isinstance(settings, dict):
        return {k: _said(v) for k, v in settings.items() if v is not None and v is not False}
    return [_said(value) for value in settings] if isinstance(settings, tuple) else settings


def _write_log(folder: Path, log: dict[str, Any]) -> None:
    staged = folder / f"{LOG}.partial"
    staged.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, folder / LOG)
