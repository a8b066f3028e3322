"""Re-read a merged folder: layout, hashes, finite values; and merge a sample again."""

import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, VerificationError, listed
from ..maths.stored_bytes import as_tensor
from ..maths.task_vectors import block_rows
from ..methods import find_methods
from ..planning.plan import Options, Plan, PlannedTensor, RefusedPlan, plan_merge
from ..planning.recipe_file import load_recipe
from ..recipe import ModelRef, Recipe
from ..report.schema import MAX_REPORT_BYTES, parse_report
from ..sinks.folder import REPORT
from ..sources import Checkpoint, open_checkpoint
from ..specs import DTYPES
from .merging import Merger
from .pieces import Assembly
from .reading import reads

RECIPE = "resmerge/recipe.yml"
_READ_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what, in a few words.
        problems: what is wrong; empty when all is well.
        detail: what was looked at.
    """

    name: str
    problems: tuple[str, ...]
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Return the check as plain data."""
        return {
            "event": "check",
            "name": self.name,
            "passed": not self.problems,
            "detail": self.detail,
            "problems": list(self.problems),
        }


def verify_folder(
    folder: str | Path, *, recipe: Recipe | None = None, sample: int = 3, seed: int = 0
) -> Iterator[Check]:
    """Check a merged folder against its report, and yield each check as it is done.

    Args:
        folder: the output of a merge.
        recipe: names the sources; the folder's own recipe when None.
        sample: how many tensors to merge again when the sources are at hand.
        seed: of the sample.

    Raises:
        VerificationError: there is no report to check against.
        CheckpointError: the folder's weights cannot be read at all.
    """
    folder = Path(os.path.expanduser(folder))
    report = _read_report(folder)
    merged = open_checkpoint(ModelRef(str(folder)))
    try:
        yield check_layout(merged, report)
        yield _check_hashes(folder, merged, report)
        yield check_finite(merged, report)
        yield check_sample(merged, report, recipe or folder / RECIPE, sample, seed)
    finally:
        merged.close()


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        with (folder / REPORT).open("rb") as file:
            data = file.read(MAX_REPORT_BYTES + 1)
    except OSError as exc:
        raise VerificationError(
            f"{str(folder)!r} has no readable {REPORT}, so there is nothing to verify against: "
            f"{exc.strerror}. Give the output folder of a merge."
        ) from exc
    return parse_report(data, where=str(folder / REPORT))


def check_layout(merged: Checkpoint, report: Mapping[str, Any]) -> Check:
    """Compare names, shapes and dtypes with the report."""
    entries = {name: entry for row in report["tensors"] for name, entry in _stored(row)}
    problems = []
    if missing := sorted(set(entries) - set(merged.tensors)):
        problems.append(f"missing: {listed(missing)}")
    if extra := sorted(set(merged.tensors) - set(entries)):
        problems.append(f"not in the report: {listed(extra)}")
    for name in sorted(set(entries) & set(merged.tensors)):
        spec = merged.tensors[name].spec
        if list(spec.shape) != entries[name]["shape"]:
            problems.append(f"{name} has shape {list(spec.shape)}, not {entries[name]['shape']}")
        if entries[name].get("dtype") not in (None, spec.dtype):
            problems.append(f"{name} has dtype {spec.dtype}, not {entries[name]['dtype']}")
    return Check("layout", tuple(problems), f"{len(entries)} tensors: names, shapes, dtypes")


def _stored(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and shapes that are stored of a tensor: an adapter has two for each."""
    if row.get("adapter") is None:
        yield row["name"], row
        return
    for name, shape in row["adapter"]["tensors"].items():
        yield name, {"shape": shape}


def _check_hashes(folder: Path, merged: Checkpoint, report: Mapping[str, Any]) -> Check:
    listed_files = {str(file["name"]) for file in report["files"]}
    there = {file.name for file in merged.files}
    problems = [f"{name} is not in the report" for name in sorted(there - listed_files)]
    for file in report["files"]:
        path = folder / Path(str(file["name"])).name
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif path.stat().st_size != file["size"]:
            problems.append(f"{path.name} has {path.stat().st_size} bytes, not {file['size']}")
        elif _sha256(path) != file["sha256"]:
            problems.append(f"{path.name} has another sha256 than the report")
    return Check("sha256", tuple(problems), f"{len(report['files'])} weight files")


def check_finite(
    merged: Checkpoint, report: Mapping[str, Any], names: Sequence[str] | None = None
) -> Check:
    """Read tensors (all, or the named ones) and see that they are finite."""
    carried = {entry["name"] for entry in report["tensors"] if entry["rule"] == "carried"}
    problems, count = [], 0
    for name in merged.tensors if names is None else names:
        stored = merged.tensors[name]
        if name in carried or not DTYPES[stored.spec.dtype].is_merged:
            continue
        count += 1
        rows, columns = stored.spec.matrix_shape
        step = block_rows(rows, columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            data = merged.read(name, start, stop)
            values = as_tensor(data, stored.spec.dtype, (stop - start, columns))
            if not bool(torch.isfinite(values).all()):
                problems.append(f"{name} holds NaN or infinite values")
                break
    return Check("finite", tuple(problems), f"{count} merged tensors")


def check_sample(
    merged: Checkpoint,
    report: Mapping[str, Any],
    recipe: Recipe | Path,
    sample: int,
    seed: int,
    token: str | None = None,
) -> Check:
    """Merge some tensors again from the sources, where those are at hand."""
    if isinstance(recipe, Path):
        try:
            recipe = load_recipe(recipe)
        except RecipeError as exc:
            return Check("recomputed", (), f"skipped: {exc}")
    plan = _plan_again(report, recipe, token)
    if isinstance(plan, RefusedPlan):
        return Check("recomputed", (), f"skipped, the sources are not at hand: {plan.problems[0]}")
    names = sorted(
        name
        for name, tensor in plan.tensors.items()
        if all(spec.name in merged.tensors for spec in tensor.stored)
    )
    chosen = random.Random(seed).sample(names, min(sample, len(names)))
    try:
        merger = Merger(plan, torch.device("cpu"), report.get("counted", {}))
        problems = [
            f"{name} comes out different when it is merged again"
            for name in chosen
            if _merge_again(plan, merger, name) != _read(merged, plan.tensors[name])
        ]
    finally:
        plan.close()
    return Check("recomputed", tuple(problems), f"{len(chosen)} tensors: {', '.join(chosen)}")


def _plan_again(report: Mapping[str, Any], recipe: Recipe, token: str | None) -> Plan | RefusedPlan:
    options = Options.from_dict(report.get("options", {}))
    return plan_merge(_as_it_was(recipe, report), options, token=token)


def _as_it_was(recipe: Recipe, report: Mapping[str, Any]) -> Recipe:
    """Return a recipe with what its release took by default, where its report has other names."""
    made = report.get("method")
    kind = find_methods().get(recipe.method)
    if not isinstance(made, Mapping) or made.get("name") != recipe.method or kind is None:
        return recipe
    stored = made.get("parameters")
    if not isinstance(stored, Mapping) or set(stored) == set(kind().parameters()):
        return recipe
    return replace(recipe, parameters={**kind.earlier, **stored, **recipe.parameters})


def _merge_again(plan: Plan, merger: Merger, name: str) -> bytes:
    parts: list[bytes] = []
    assembly = Assembly(lambda data: parts.append(bytes(data)))
    for _, read in reads(plan, [plan.tensors[name]]):
        piece = read()
        merger.written(merger.prepare(piece), assembly)
        piece.close()
    return b"".join(parts)


def _read(merged: Checkpoint, tensor: PlannedTensor) -> bytes:
    return b"".join(bytes(merged.read(spec.name)) for spec in tensor.stored)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
