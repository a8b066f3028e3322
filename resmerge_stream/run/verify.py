"""Re-read a merged folder, or a repository without downloading it: layout, hashes, finite values;
and merge a sample again."""

import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..documents import load_json
from ..errors import RecipeError, VerificationError, listed
from ..maths.stored_bytes import as_tensor
from ..maths.task_vectors import block_rows
from ..methods import find_methods
from ..planning.plan import Options, Plan, RefusedPlan, plan_merge
from ..planning.recipe_file import load_recipe, parse_recipe
from ..recipe import ModelRef, Recipe, placed
from ..report.schema import MAX_REPORT_BYTES, parse_report
from ..report.statement import STATEMENT, statement_of
from ..sinks.folder import REPORT
from ..sinks.places import places_of
from ..sources import REPO_ID, Checkpoint, open_checkpoint
from ..specs import DTYPES
from .merging import Merger
from .pieces import Assembly
from .reading import reads

RECIPE = "resmerge/recipe.yml"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what, in a few words.
        problems: what is wrong; empty when all is well.
        detail: what was looked at; or why nothing was.
        skipped: whether nothing was looked at, so that nothing is known.
    """

    name: str
    problems: tuple[str, ...]
    detail: str
    skipped: bool = False

    @property
    def status(self) -> str:
        """In a word: ``ok``, ``skipped`` or ``failed``."""
        return "failed" if self.problems else "skipped" if self.skipped else "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return the check as plain data."""
        return {
            "event": "check",
            "name": self.name,
            "passed": not self.problems,
            "status": self.status,
            "detail": self.detail,
            "problems": list(self.problems),
        }


def verify_folder(
    folder: str | Path, *, recipe: Recipe | None = None, sample: int = 3, seed: int = 0
) -> Iterator[Check]:
    """Check a merged folder against its report, and yield each check as it is done.

    Args:
        folder: the output of a merge.
        recipe: names the sources; when None, the folder's own recipe, with what its names stand for
            where the merge was made on this machine.
        sample: how many tensors to merge again when the sources are at hand.
        seed: of the sample.

    Raises:
        VerificationError: there is no report to check against.
        CheckpointError: the folder's weights cannot be read at all.
    """
    folder = Path(os.path.expanduser(folder))
    try:
        with (folder / REPORT).open("rb") as file:
            data = file.read(MAX_REPORT_BYTES + 1)
    except OSError as exc:
        if not folder.is_dir():
            raise VerificationError(f"there is no folder {str(folder)!r}.") from exc
        raise VerificationError(
            f"{str(folder)!r} has no readable {REPORT}, so there is nothing to verify against: "
            f"{exc.strerror}. Give the output folder of a merge."
        ) from exc
    report = parse_report(data, where=str(folder / REPORT))
    merged = open_checkpoint(ModelRef(str(folder)))
    try:
        yield check_layout(merged, report)
        yield _check_hashes(folder, merged, report)
        yield check_finite(merged, report)
        try:
            recipe = recipe or placed(load_recipe(folder / RECIPE), places_of(folder))
        except RecipeError as exc:
            yield Check("recomputed", (), f"skipped: {exc}", skipped=True)
        else:
            yield check_sample(merged, report, recipe, sample, seed)
        if (folder / STATEMENT).is_file():  # what was merged before 1.0 has none
            yield check_statement((folder / STATEMENT).read_bytes(), report)
    finally:
        merged.close()


def verify_merge(
    merged: str | Path,
    *,
    recipe: Recipe | None = None,
    sample: int = 3,
    seed: int | None = None,
    token: str | None = None,
) -> Iterator[Check]:
    """Check a merged folder, or a repository on the Hub; see `verify_folder`, `verify_repo`.

    A name that exists as a folder is a folder.
    """
    is_folder = Path(os.path.expanduser(merged)).is_dir()
    if is_folder or not REPO_ID.fullmatch(str(merged).partition("@")[0]):
        return verify_folder(merged, recipe=recipe, sample=sample, seed=seed or 0)
    return verify_repo(str(merged), recipe=recipe, sample=sample, seed=seed, token=token)


def verify_repo(
    name: str,
    *,
    recipe: Recipe | None = None,
    sample: int = 3,
    seed: int | None = None,
    token: str | None = None,
) -> Iterator[Check]:
    """Check a repository against its report without downloading it: headers, hashes, a sample.

    Args:
        name: ``namespace/name``, perhaps with ``@revision``.
        recipe: names the sources; the repository's own recipe when None.
        sample: how many tensors to read again by range, and to merge again where possible.
        seed: of the sample; drawn anew when None.
        token: the caller's; None stands for HF_TOKEN or the login.

    Raises:
        VerificationError: there is no report to check against.
        CheckpointError: the weights cannot be read at all.
        StoppedError: the network or the Hub kept failing.
    """
    from ..hub.client import client
    from ..hub.repo import HubRepo
    from ..hub.repo import listed as files_of

    ref = ModelRef.parse(name)
    merged = open_checkpoint(ref, token=token)
    repo = HubRepo(client(token), ref.id)
    info = repo.info(merged.revision or "main")
    if info is None or repo.read_json(REPORT, info) is None:
        raise VerificationError(
            f"{name} has no {REPORT}, so there is nothing to verify against. Give the repository "
            "of a merge."
        )
    report = parse_report(repo.read(REPORT, info), where=f"{name}/{REPORT}")
    seed = random.randrange(1 << 30) if seed is None else seed
    names = random.Random(seed).sample(sorted(merged.tensors), min(sample, len(merged.tensors)))
    yield check_layout(merged, report)
    yield _check_hub_files(merged, report)
    yield check_finite(merged, report, names)
    found = recipe or parse_recipe(repo.read(RECIPE, info), where=f"{name}/{RECIPE}")
    yield check_sample(merged, report, found, sample, seed, token)
    if STATEMENT in files_of(info):
        yield check_statement(repo.read(STATEMENT, info), report)


def check_statement(stored: bytes, report: Mapping[str, Any]) -> Check:
    """Compare the in-toto statement with what the report says of files, sources and recipe."""
    try:
        said, wanted = load_json(stored, max_bytes=MAX_REPORT_BYTES), statement_of(report)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        return Check("statement", (f"{STATEMENT} or the report cannot be read: {exc!r}",), "")
    problems = () if said == wanted else (f"{STATEMENT} does not say what the report says",)
    materials = len(wanted["predicate"]["buildDefinition"]["resolvedDependencies"])
    detail = f"{len(wanted['subject'])} weight files of {materials} materials, as in the report"
    return Check("statement", problems, detail)


def check_layout(merged: Checkpoint, report: Mapping[str, Any]) -> Check:
    """Compare names, shapes and dtypes with the report, and the index with the shards.

    A merge writes an index that names every tensor and the shard that holds it.
    """
    entries = {name: entry for row in report["tensors"] for name, entry in _stored(row)}
    problems = list(merged.remarks)
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
    return Check("layout", tuple(problems), f"{len(entries)} tensors: names, shapes, dtypes, index")


def _stored(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and shapes that are stored of a tensor: an adapter and FP8 have two."""
    if row.get("adapter") is None:
        yield row["name"], row
        for name, shape in row.get("scales", {}).items():
            yield name, {"shape": shape, "dtype": "F32"}
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
        else:
            with path.open("rb") as data:
                found = hashlib.file_digest(data, "sha256").hexdigest()
            if found != file["sha256"]:
                problems.append(f"{path.name} has another sha256 than the report")
    return Check("sha256", tuple(problems), f"{len(report['files'])} weight files")


def _check_hub_files(merged: Checkpoint, report: Mapping[str, Any]) -> Check:
    """Compare what the Hub says of the weight files with the report."""
    there = {file.name: file for file in merged.files}
    problems = []
    for file in report["files"]:
        found = there.get(str(file["name"]))
        if found is None:
            problems.append(f"{file['name']} is missing")
        elif found.size != file["size"]:
            problems.append(f"{found.name} has {found.size} bytes, not {file['size']}")
        elif found.sha256 != file["sha256"]:
            problems.append(f"{found.name} has another sha256 than the report")
    if extra := sorted(set(there) - {str(file["name"]) for file in report["files"]}):
        problems.append(f"not in the report: {listed(extra)}")
    return Check("files", tuple(problems), f"{len(there)} weight files: sizes and hashes")


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
            data = merged.read(name, slice(start, stop))
            values = as_tensor(data, stored.spec.dtype, (stop - start, columns))
            if not bool(torch.isfinite(values).all()):
                problems.append(f"{name} holds NaN or infinite values")
                break
    return Check("finite", tuple(problems), f"{count} merged tensors")


def check_sample(
    merged: Checkpoint,
    report: Mapping[str, Any],
    recipe: Recipe,
    sample: int,
    seed: int,
    token: str | None = None,
) -> Check:
    """Merge some tensors again from the sources, where those are at hand."""
    options = Options.from_dict(report.get("options", {}))
    plan = plan_merge(_as_it_was(recipe, report), options, token=token)
    if isinstance(plan, RefusedPlan):
        detail = f"skipped, the sources are not at hand: {plan.problems[0]}"
        return Check("recomputed", (), detail, skipped=True)
    if others := _other_sources(report, plan):
        plan.close()
        return Check("sources", tuple(others), "stale: the result is of other sources")
    names = sorted(
        name
        for name, tensor in plan.tensors.items()
        if all(spec.name in merged.tensors for spec in tensor.stored)
    )
    chosen = random.Random(seed).sample(names, min(sample, len(names)))
    try:
        merger = Merger(plan, torch.device("cpu"), report.get("counted", {}))
        problems = []
        for name in chosen:
            made = bytearray()
            assembly = Assembly(made.extend)
            for _, read in reads([plan.tensors[name]]):
                piece = read()
                merger.written(merger.prepare(piece), assembly)
                piece.close()
            if made != b"".join(merged.read(spec.name) for spec in plan.tensors[name].stored):
                problems.append(f"{name} comes out different when it is merged again")
    finally:
        plan.close()
    return Check("recomputed", tuple(problems), f"{len(chosen)} tensors: {', '.join(chosen)}")


def _other_sources(report: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return which sources are not those of the report, as far as their content tells.

    Their place and time do not count: they may have been moved.
    """
    problems = []
    rows = report.get("sources")
    for row, source in zip(rows if isinstance(rows, list) else [], plan.checkpoints, strict=False):
        files = row.get("files") if isinstance(row, dict) else None
        told = {f.get("name"): f for f in files or [] if isinstance(f, dict)}
        for file in source.files:
            before = told.get(file.name, {})
            hashes = (before.get("sha256"), file.sha256)
            if before.get("size") != file.size or (all(hashes) and hashes[0] != hashes[1]):
                problems.append(f"{source.id} is another one now: {file.name} differs")
                break
    return problems


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
