"""In which dtype each tensor is written: the one that is asked for, or a wider one that the model
keeps it in.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Findings, Remedy, listed
from ..roles import MATRIX_ROLES, OTHER_TOWER, Role, layer_of, role_of
from ..sources.adapter_layout import CONV1D
from ..sources.assembly import Stored
from ..sources.checkpoint import Checkpoint
from ..sources.mapped import as_stored
from ..sources.quantised import quantised_by
from ..specs import DTYPES, FP8, FP8_BLOCK, OUTPUT_DTYPES, DType

KEPT_DTYPE = "kept-dtype"
ROUNDED_BASE = "rounded-base"
WRITTEN_FP8 = "written-fp8"
_FP8 = "F8_E4M3"
_FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_merged}
_TABLE = "kept_float32.json"  # of transformers: tests/zoo/kept_dtypes.py writes it


def stored_dtype(layout: Checkpoint, name: str) -> str:
    """Return a tensor's dtype as stored; bfloat16 where it was dequantised."""
    tree = as_stored(layout.trees[name])
    return tree.dtype if isinstance(tree, Stored) else OUTPUT_DTYPES["bfloat16"]


def main_dtype(layout: Checkpoint) -> str:
    """Return the torch name of the output dtype that holds most bytes of a layout."""
    most = _most(layout, OUTPUT_DTYPES.values())
    return "float32" if most is None else most.torch_name


def _most(layout: Checkpoint, among: Collection[str]) -> DType | None:
    """Return which of some dtypes holds most bytes of a layout; None where none holds any."""
    totals: Counter[str] = Counter()
    for name, tensor in layout.tensors.items():
        dtype = stored_dtype(layout, name)
        if dtype in among:
            totals[dtype] += tensor.spec.numel * DTYPES[dtype].nbytes
    return DTYPES[totals.most_common(1)[0][0]] if totals else None


def written_dtypes(layout: Checkpoint, asked: str | None, names: Sequence[str]) -> dict[str, str]:
    """Return the dtype of each tensor in the output.

    A tensor that is stored wider than most of its model, such as a router's bias in float32 among
    bfloat16, is meant to be: it stays so in any narrower dtype. So does one that transformers
    keeps in float32 when it loads the model.

    Args:
        layout: whose names the output has.
        asked: ``bfloat16`` and so on; None for what is stored.
        names: of the tensors.
    """
    stored = {name: stored_dtype(layout, name) for name in names}
    if asked is None:
        return stored
    if asked == FP8:
        rest = written_dtypes(layout, "bfloat16", names)
        return {name: _FP8 if _is_for_fp8(layout, name) else rest[name] for name in names}
    wanted, main = DTYPES[OUTPUT_DTYPES[asked]], _most(layout, _FLOATS)
    listed_there = _kept_by_transformers(layout.config, asked)
    found = {}
    for name, dtype in stored.items():
        size = DTYPES[dtype].nbytes
        stays = (main is not None and size > main.nbytes) or (
            listed_there is not None and listed_there.search(name)
        )
        found[name] = dtype if stays and size > wanted.nbytes else wanted.name
    return found


def check_dtypes(
    layout: Checkpoint,
    experts: Sequence[Checkpoint],
    asked: str | None,
    written: Mapping[str, str],
    found: Findings,
) -> None:
    """Say which tensors keep a wider dtype than the one asked for, and whose rounding is merged."""
    if asked == FP8:
        count = sum(dtype == _FP8 for dtype in written.values())
        if not count:
            found.problem(
                f"{layout.id} has no linear map that is written in {FP8}: those of a text model's "
                "layers are, in tensors of two axes.",
                Remedy.WIDER_DTYPE,
            )
        elif quantised_by(layout.config):
            found.problem(
                f"{FP8} is asked for, but {layout.id} keeps the packed tensors that it has. Leave "
                "the dtype out."
            )
        else:
            found.warning(
                f"{count} of {len(written)} tensors are written in FP8, with a scale for each "
                f"block of {FP8_BLOCK} × {FP8_BLOCK}, the rest in bfloat16; how much of the update "
                "is left is measured for each while merging: kept norm and kept cosine, between "
                "base and merge both in FP8",
                kind=WRITTEN_FP8,
            )
    asked = "bfloat16" if asked == FP8 else asked
    as_asked = {_FP8, OUTPUT_DTYPES.get(asked or "", "")}
    wide = [name for name, dtype in written.items() if asked and dtype not in as_asked]
    if wide:
        found.warning(
            f"{len(wide)} tensor(s) stay in the wider dtype that {layout.id} keeps them in, though "
            f"the output is {asked}: {listed(wide)}",
            kind=KEPT_DTYPE,
        )
    ours = _most(layout, _FLOATS)
    for expert in experts:
        theirs = _most(expert, _FLOATS)
        if ours is not None and theirs is not None and theirs.nbytes < ours.nbytes:
            narrow = theirs.torch_name
            found.warning(
                f"{layout.id} is stored in {ours.torch_name} and {expert.id} in {narrow}: what "
                "rounding did to each weight counts as its training. If it was trained from the "
                f"base as rounded to {narrow}, merge on that; passthrough of {layout.id} alone, "
                f"with dtype {narrow}, writes it",
                kind=ROUNDED_BASE,
            )


def fp8_config(layout: Checkpoint, written: Mapping[str, str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model in FP8, as DeepSeek and Qwen publish theirs.

    Args:
        layout: whose names the output has.
        written: the dtype of each tensor.
    """
    linear = [
        name.removesuffix(".weight")
        for name, stored in layout.tensors.items()
        if name.endswith(".weight")
        and len(stored.spec.shape) == 2
        and role_of(name, stored.spec.shape) in (*MATRIX_ROLES, Role.HEAD)
        and written.get(name) != _FP8
    ]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted({*linear, "lm_head"}),
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def _is_for_fp8(layout: Checkpoint, name: str) -> bool:
    """Return whether a tensor is a linear map of a text model's layer, other than a router."""
    spec = layout.tensors[name].spec
    return (
        name.endswith(".weight")
        and len(spec.shape) == 2
        and spec.numel % 4 == 0  # so that the scales behind it lie at multiples of four
        and layer_of(name) is not None
        and role_of(name, spec.shape) in MATRIX_ROLES - {Role.ROUTER}
        and not OTHER_TOWER.search(name)
        and layout.config.get("model_type") not in CONV1D
    )


def _kept_by_transformers(config: Mapping[str, Any], asked: str) -> re.Pattern[str] | None:
    """Return what transformers searches for in the names of tensors that it keeps in float32."""
    if asked == "float32":
        return None
    table = json.loads(Path(__file__).with_name(_TABLE).read_text("utf-8"))
    kinds = [table["any"], *([table["float16"]] if asked == "float16" else [])]
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    patterns = [
        pattern.replace("*", ".*")
        for section in sections
        for kind in kinds
        if isinstance(section.get("model_type"), str)
        for pattern in kind.get(section["model_type"], ())
    ]
    return re.compile("|".join(patterns)) if patterns else None
