"""One architecture adapted: LoRA adapters that PEFT makes of it, merged here and by PEFT itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import adapters
from tests.support.checkpoints import Group, merge, plan_group
from tests.zoo.architectures import small_config, small_model

KINDS = ("linear", "experts")


@dataclass(frozen=True, slots=True)
class Adapted:
    """What came of an adapter.

    Attributes:
        architecture: the base's model type.
        kind: ``linear`` (PEFT's all-linear) or ``experts`` (target_parameters: every stack).
        outcome: ``equal``, ``refused``, ``wrong``; ``none`` where there is nothing to adapt, and
            ``peft`` where PEFT cannot make, merge or save it.
        why: the refusal, what differs, or what PEFT says.
    """

    architecture: str
    kind: str
    outcome: str
    why: str = ""


def adapt(architecture: str, kind: str, folder: Path) -> Adapted:
    """Merge an adapter of a small random model, and compare every tensor with PEFT's own merge.

    Args:
        architecture: a model type of transformers.
        kind: one of `KINDS`.
        folder: where the checkpoints are written; made anew.
    """
    try:
        made = _write(architecture, kind, folder)
    except Exception as exc:  # whatever PEFT or transformers cannot do
        return Adapted(architecture, kind, "peft", f"{type(exc).__name__}: {str(exc)[:200]}")
    if not made:
        return Adapted(architecture, kind, "none")
    group = Group(folder / "base", (folder / "adapter",))
    plan = plan_group(group, method="mean")
    plan.close()
    if plan.problems:
        return Adapted(
            architecture, kind, "refused", str(plan.problems[0]).replace(str(folder), "")
        )
    merge(group, folder / "out", method="mean", dtype="float32")
    different = list(_different(folder / "out", folder / "expected", folder / "base"))
    return Adapted(architecture, kind, "wrong" if different else "equal", ", ".join(different[:3]))


def _write(architecture: str, kind: str, folder: Path) -> bool:
    """Write base, adapter and PEFT's merge; return whether there was anything to adapt."""
    import peft

    torch.manual_seed(0)
    config = small_config(architecture)
    own = small_model(architecture, config).to(torch.float32)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    own.save_pretrained(folder / "base")
    model, info = type(own).from_pretrained(
        folder / "base", dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError("transformers does not find the weights that it has written")
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if kind == "experts":
        stacks = {
            ".".join(name.rsplit(".", 2)[-2:])
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and "experts" in name.rpartition(".")[0].rpartition(".")[2]
        }
        if not stacks:
            return False
        targets = {"target_modules": [], "target_parameters": sorted(stacks)}
    with adapters.quiet():
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **targets))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        live.save_pretrained(folder / "adapter")
        live.double().merge_and_unload().save_pretrained(folder / "expected")
    return True


def _different(ours: Path, theirs: Path, base: Path) -> Iterator[str]:
    """Yield tensors that are further from PEFT's than float32 rounds."""
    found, expected, start = (_weights(folder) for folder in (ours, theirs, base))
    yield from (f"only one has {name}" for name in sorted(found.keys() ^ expected.keys()))
    for name in sorted(found.keys() & expected.keys()):
        wanted = expected[name].double()
        if not wanted.is_floating_point():
            continue
        error = (found[name].double() - wanted).norm()
        if not error <= 1e-6 * wanted.norm() + 1e-12:
            moved = (wanted - start[name].double()).norm()
            yield f"{name}: {float(error / max(float(moved), 1e-12)):.2g} of its update"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
