"""One architecture tried: base and experts written by transformers, merged, and loaded again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from resmerge_stream.planning.compat import KEPT_AS_IN_BASE
from resmerge_stream.roles import MATRIX_ROLES, Role, role_of
from tests.support.checkpoints import Group, edit_config, merge, plan_group
from tests.zoo.architectures import VOCABULARY, small_config, small_model

# What the plan says of any checkpoint without a tokenizer.
_EXPECTED = ("has no tokenizer files", "has no generation_config")


@dataclass(slots=True)
class Trial:
    """What happened to an architecture.

    Attributes:
        architecture: its model type.
        problems: why the plan refuses it; or what went wrong on the way.
        warnings: of the plan, beside those of any checkpoint without a tokenizer.
        loads: whether transformers loads both merges, nothing missing and nothing unexpected.
        lacking: what transformers itself does not find in the expert that it has written.
        equal: what of the mean of two equal experts is that expert's: ``logits``, or
            ``parameters`` where a forward pass needs more than token ids; empty: neither.
        quantised: forms of the base from which the same mean comes.
        decomposed: how many tensors ResMerge's own rule takes.
        tensors: how many there are.
        parameters: how many numbers.
    """

    architecture: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    loads: bool = False
    lacking: list[str] = field(default_factory=list)
    equal: str = ""
    quantised: list[str] = field(default_factory=list)
    decomposed: int = 0
    tensors: int = 0
    parameters: int = 0


def attempt(architecture: str, folder: Path) -> Trial:
    """Try an architecture.

    Args:
        architecture: a model type of transformers.
        folder: where its checkpoints are written; made anew.
    """
    trial = Trial(architecture)
    kind, group = write_group(architecture, folder, trial)
    plan = plan_group(group, method="resmerge")
    plan.close()
    trial.problems += [str(problem) for problem in plan.problems]
    trial.warnings += [
        str(warning)
        for warning in plan.warnings
        if not any(text in warning for text in _EXPECTED)
        and not (warning.kind == KEPT_AS_IN_BASE and "not floating point" in warning)
    ]
    if trial.problems:
        return trial
    trial.decomposed, trial.tensors = plan.by_rule().get("resmerge", 0), len(plan.tensors)
    merge(group, folder / "resmerged", method="resmerge")
    twin = folder / "twin"
    shutil.copytree(group.experts[0], twin)
    merge(Group(group.base, (group.experts[0], twin)), folder / "mean", method="mean")

    expert, lacking = _loaded(kind, group.experts[0])
    trial.lacking = sorted(name for names in lacking.values() for name in names)
    for name in ("resmerged", "mean"):
        merged, found = _loaded(kind, folder / name)
        if found != lacking:
            trial.problems.append(f"{name}: {found}, not {lacking}")
    trial.loads = not trial.problems
    if trial.lacking:
        return trial  # random numbers stand for what is not found
    if different := _different(merged, expert):
        trial.problems.append(f"not the expert's: {different[:5]}")
        return trial
    trial.equal = _same_logits(merged, expert, trial)
    if quantise(group.base, folder / "fp8"):
        merge(Group(folder / "fp8", (group.experts[0], twin)), folder / "of-fp8", method="mean")
        merged, found = _loaded(kind, folder / "of-fp8")
        if found or _different(merged, expert):
            trial.problems.append(f"FP8: {found or _different(merged, expert)[:5]}")
        else:
            trial.quantised.append("FP8")
    return trial


def write_group(architecture: str, folder: Path, trial: Trial) -> tuple[Any, Group]:
    """Write a base and two experts with transformers' `save_pretrained`; return the model's class.

    The experts are the base and small noise in every parameter.
    """
    torch.manual_seed(0)
    model = small_model(architecture, small_config(architecture)).to(torch.bfloat16).eval()
    trial.parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder / "base")
    base = [parameter.detach().clone() for parameter in model.parameters()]
    folders = [folder / "expert0", folder / "expert1"]
    for where in folders:
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), base, strict=True):
                if parameter.is_floating_point():
                    parameter.copy_(start + 0.02 * torch.randn_like(start))
        model.save_pretrained(where)
    return type(model), Group(folder / "base", tuple(folders))


def quantise(folder: Path, target: Path) -> bool:
    """Write a checkpoint again with its linear maps as FP8 and a scale for each 128 × 128 block.

    Returns:
        Whether it has any: experts stored as stacks, and routers, stay as they are.
    """
    shutil.copytree(folder, target)
    count = 0
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in list(tensors.items()):
            role = role_of(name, tuple(tensor.shape))
            if tensor.ndim != 2 or role not in MATRIX_ROLES or role is Role.ROUTER:
                continue
            if not name.endswith(".weight"):
                continue
            m, n = tensor.shape
            scale = tensor.float().abs().max().clamp(min=1e-6) / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.expand(-(-m // 128), -(-n // 128)).contiguous()
            count += 1
        save_file(tensors, path, {"format": "pt"})
    edit_config(
        target, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    index = target / "model.safetensors.index.json"
    return count > 0 and not index.exists()


def _loaded(kind: Any, folder: Path) -> tuple[Any, dict[str, list[str]]]:
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    found = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys")}
    found["mismatched_keys"] = sorted(map(str, info["mismatched_keys"]))
    return model.eval(), {key: names for key, names in found.items() if names}


def _different(left: Any, right: Any) -> list[str]:
    ours, theirs = left.state_dict(), right.state_dict()
    return [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])]


def _same_logits(left: Any, right: Any, trial: Trial) -> str:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]) % VOCABULARY
    try:
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=tokens, use_cache=False).logits for model in (left, right)
            )
    except Exception:  # whatever else this architecture asks for
        return "parameters"
    if not torch.isfinite(theirs).all():
        return "parameters"
    if not torch.equal(ours, theirs):
        trial.problems.append("the mean of two equal experts has other logits")
        return ""
    return "logits"
