"""PLAN: decide everything before anything big moves, from headers and configs alone. No torch."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compat import (
    Findings,
    TensorSets,
    check_configs,
    check_quantised,
    check_tokenizers,
    match_tensors,
)
from .device import DEVICE, available_memory, free_disk
from .errors import (
    NotEnoughMemoryError,
    PlanRefusedError,
    RecipeError,
    ResMergeError,
    StoppedError,
    listed,
    shown,
)
from .layout import DEFAULT_SHARD_BYTES, Shard, index_json, plan_shards
from .memory import (
    BLOCK_ELEMENTS,
    FIXED_BYTES,
    HUB_WINDOW_BYTES,
    LEAST_HUB_WINDOW_BYTES,
    PIECE_BYTES,
    SPARE_BYTES,
    block_bytes,
    matrix_bytes,
)
from .methods import MergeMethod, Rule, build_method
from .publication import Publication, known_commits, work_folder
from .recipe import ModelRef, Recipe
from .roles import Role, layer_of
from .sidefiles import output_config, side_files
from .sinks import target_state
from .sources import Checkpoint, open_checkpoint
from .specs import DTYPES, OUTPUT_DTYPES, TensorSpec, format_size
from .version import __version__

if TYPE_CHECKING:
    from .sinks.hub_target import HubTarget

# Seconds an element and expert on two cores, measured (docs/performance.md).
_SECONDS_START = 3.0
_SECONDS_ROWS = 0.6e-9
_SECONDS_MATRIX = 4.0e-9
_OPEN_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run a merge; the recipe says what to merge.

    Attributes:
        rounding: ``nearest`` or ``stochastic``.
        seed: of stochastic rounding and of methods that draw random numbers.
        max_shard_bytes: None mirrors the base's shards, cut at 5 GB.
        tokenizer_from: where tokenizer files come from instead of the base.
        device: as ``--device``; not part of what makes a run the same run.
        memory_budget: bytes of private memory, likewise. None keeps to what the largest matrix
            calls for, and to 80 % of what is free.
    """

    rounding: str = "nearest"
    seed: int = 0
    max_shard_bytes: int | None = None
    tokenizer_from: str | None = None
    device: str = "auto"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise RecipeError(f"--rounding must be nearest or stochastic, not {self.rounding!r}.")
        if not DEVICE.fullmatch(self.device):
            raise RecipeError(
                f"--device must be auto, cpu, cuda, cuda:N or mps, not {shown(self.device)}."
            )
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise RecipeError("--max-shard-size must be more than zero, such as 5GB.")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor.

    Attributes:
        spec: as it is written.
        rule: what is done with it; None carries the base's bytes through.
        resident: whether float32 task vectors of all experts are kept at once.
    """

    spec: TensorSpec
    rule: Rule | None
    resident: bool = True


@dataclass(slots=True)
class Plan:
    """Everything that a merge will do. Made by `plan_merge`, run by `run_merge`."""

    recipe: Recipe
    options: Options
    method: MergeMethod | None = None
    base: Checkpoint | None = None
    experts: tuple[Checkpoint, ...] = ()
    tokenizer: Checkpoint | None = None
    tensors: Mapping[str, PlannedTensor] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory_budget: int = 0
    working_bytes: int = 0
    read_ahead_bytes: int = 0
    peak_memory_bytes: int = 0
    peak_disk_bytes: int = 0
    read_bytes: int = 0
    seconds_estimate: float = 0.0
    config: bytes = b"{}"
    # What the method's counting passes found; the run fills it in before it merges.
    counted: dict[str, Any] = field(default_factory=dict)
    publication: Publication | None = None
    target: "HubTarget | None" = None
    token: str | None = field(default=None, repr=False)

    @property
    def refused(self) -> bool:
        """Whether there are problems, so that the merge will not start."""
        return bool(self.problems)

    @property
    def checkpoints(self) -> Iterator[Checkpoint]:
        """The base, then the experts."""
        if self.base is not None:
            yield self.base
        yield from self.experts

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the sources from others under the same names, by number."""
        sources = [*self.checkpoints, *([self.tokenizer] if self.tokenizer else [])]
        return {str(number): source.identity for number, source in enumerate(sources)}

    @property
    def name_private(self) -> bool:
        """Whether the card may name private models: nobody else sees it, or `--public` said so."""
        if self.publication is None or self.target is None:
            return False
        return self.publication.public is True or not self.target.ends_public

    @property
    def opened(self) -> tuple[Checkpoint, MergeMethod]:
        """The base and the method, which a plan without problems has.

        Raises:
            RuntimeError: the plan was not made by `plan_merge`, or was refused.
        """
        if self.base is None or self.method is None:
            raise RuntimeError("this plan has no base or no method; plan_merge makes plans")
        return self.base, self.method

    @property
    def write_bytes(self) -> int:
        """Bytes of the output weight files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def weights(self) -> tuple[float, ...]:
        """The experts' factors, 1.0 where none was given."""
        return tuple(1.0 if ref.weight is None else ref.weight for ref in self.recipe.experts)

    @property
    def layers(self) -> int:
        """How many blocks the model has, by its tensors' names."""
        numbers = [layer_of(name) for name in self.tensors]
        return 1 + max((number for number in numbers if number is not None), default=-1)

    @property
    def plan_hash(self) -> str:
        """16 hex digits of what makes a run the same run: recipe, output options, version."""
        recipe = self.recipe.to_dict()
        for model, ref in zip(recipe["models"], self.recipe.experts, strict=True):
            model["model"] = _lasting_name(ref)
        recipe["base_model"] = _lasting_name(self.recipe.base)
        if self.method is not None:
            recipe["parameters"] = self.method.parameters()
        options = self.options
        key = [
            recipe,
            options.rounding,
            options.seed,
            options.max_shard_bytes,
            options.tokenizer_from,
            __version__,
        ]
        text = json.dumps(key, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def working_bytes_of(self, tensor: PlannedTensor) -> int:
        """Return bytes of float32 memory that are held while a tensor's piece is in work."""
        m, n = matrix_of(tensor.spec)
        count = len(self.experts)
        if tensor.rule is None or not tensor.rule.needs_matrix:
            return 4 * count * min(m * n, max(BLOCK_ELEMENTS, 16 * n))
        scratch = self.opened[1].scratch_bytes(m, n, count)
        return matrix_bytes(m, n, count, scratch, resident=tensor.resident)

    def side_files(self) -> dict[str, bytes]:
        """Return the small output files that do not depend on the merge, by name."""
        if self.base is None:
            return {}
        files = side_files(self.base, self.tokenizer or self.base)
        files["config.json"] = self.config
        if len(self.shards) > 1:
            files["model.safetensors.index.json"] = index_json(self.shards)
        return files

    def by_rule(self) -> dict[str, int]:
        """Return how many tensors each rule takes."""
        names = (t.rule.name if t.rule else "carried" for t in self.tensors.values())
        return dict(sorted(Counter(names).items()))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as ``plan --json`` prints it."""
        return {
            "refused": self.refused,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "tensors": len(self.tensors),
            "by_rule": self.by_rule(),
            "shards": [
                {"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.tensors)}
                for shard in self.shards
            ],
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_disk_bytes": self.peak_disk_bytes,
            "seconds_estimate": round(self.seconds_estimate, 1),
            "sources": [
                {
                    "id": source.id,
                    "revision": source.revision,
                    "bytes": sum(file.size for file in source.files),
                    "license": source.license,
                    "gated": source.gated,
                }
                for source in self.checkpoints
            ],
            "plan_hash": self.plan_hash,
        }

    def raise_if_refused(self) -> None:
        """Raise the plan's problems as one error.

        Raises:
            PlanRefusedError: there are problems.
        """
        if self.problems:
            raise PlanRefusedError("\n".join(self.problems))

    def close(self) -> None:
        """Close every source."""
        for source in (*self.checkpoints, *((self.tokenizer,) if self.tokenizer else ())):
            source.close()


def plan_merge(
    recipe: Recipe,
    options: Options | None = None,
    *,
    out: str | Path | None = None,
    publication: Publication | None = None,
    token: str | None = None,
    work_dir: str | Path | None = None,
) -> Plan:
    """Plan a merge. Problems are collected in the plan, not raised.

    Args:
        recipe: what to merge.
        options: how; defaults when None.
        out: the output folder, when there is one: it is checked, and its disk.
        publication: the repository to publish to, when there is one: it is asked for.
        token: the caller's, for the Hub; None stands for HF_TOKEN or the login.
        work_dir: where journals are kept; what an earlier start pinned is found there.

    Raises:
        StoppedError: the network or the Hub kept failing, so that nothing is known.

    Memory: the headers and configs of the checkpoints; no tensor is read, save an LM head that
    a tied config says is redundant.
    """
    plan = Plan(recipe, options or Options(), publication=publication, token=token)
    found = Findings(plan.problems, plan.warnings)
    folder = Path(os.path.expanduser(out)) if out is not None else None
    if folder is not None and ("\x00" in str(folder) or len(os.fsencode(folder.name)) > 255):
        found.problems.append(f"--out {shown(str(out))} is no name that a folder can have.")
        return plan
    _build_method(plan, found)
    if plan.method is not None:
        commits = _look_at_target(plan, folder, work_dir, found)
        _open_all(plan, found, commits)
    if plan.refused or plan.base is None or plan.method is None:
        return plan
    for source in plan.checkpoints:
        check_quantised(source, found)
    for expert in plan.experts:
        check_configs(plan.base, expert, found)
        check_tokenizers(plan.base, expert, found)
    sets = match_tensors(plan.base, plan.experts, found)
    plan.left_out = sets.left_out
    plan.tensors = _tensors(plan, sets)
    plan.shards = _shards(plan)
    plan.config = output_config(plan.base, recipe.dtype)
    _check_code(plan, found)
    _estimate(plan)
    _fit_memory(plan, found)
    if folder is not None:
        _check_target(plan, folder, found)
    if plan.target is not None:
        _check_publication(plan, plan.target, folder, work_dir, found)
    return plan


def _build_method(plan: Plan, found: Findings) -> None:
    recipe = plan.recipe
    try:
        plan.method = build_method(recipe.method, recipe.parameters)
    except ResMergeError as exc:
        found.problems.append(str(exc))
        return
    if not plan.method.weighted and any(ref.weight is not None for ref in recipe.experts):
        found.problems.append(
            f"{plan.method.name} takes no weight for each model: it measures how far the experts "
            "agree. Leave 'weight' out, or use task_arithmetic or mean."
        )
    elif problem := plan.method.check_weights(plan.weights):
        found.problems.append(problem)


def _look_at_target(
    plan: Plan, out: Path | None, work_dir: str | Path | None, found: Findings
) -> list[str | None]:
    """Return the commits that an earlier start pinned the sources to; those win over any branch."""
    commits: list[str | None] = []
    if plan.publication is not None:
        from .sinks.hub_target import look_at_target

        plan.target = look_at_target(plan.publication, plan.plan_hash, plan.token)
        found.problems += plan.target.problems
        if plan.target.staged is not None:
            commits = plan.target.staged.commits
    here = work_folder(plan.plan_hash, out, plan.publication, work_dir)
    return commits or known_commits(here, plan.plan_hash)


def _open_all(plan: Plan, found: Findings, commits: list[str | None]) -> None:
    recipe = plan.recipe
    refs = [recipe.base, *recipe.experts]
    if plan.options.tokenizer_from is not None:
        refs.append(ModelRef.parse(plan.options.tokenizer_from))
    if len(commits) != len(refs):
        commits = [None] * len(refs)

    def attempt(ref: ModelRef, commit: str | None) -> Checkpoint | str:
        try:
            return open_checkpoint(ref, token=plan.token, commit=commit)
        except StoppedError:
            raise  # the network, not the input
        except ResMergeError as exc:
            return str(exc)

    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        opened = list(pool.map(attempt, refs, commits))
    found.problems += [text for text in opened if isinstance(text, str)]
    sources = [None if isinstance(source, str) else source for source in opened]
    plan.base = sources[0]
    experts = sources[1 : 1 + len(recipe.experts)]
    plan.experts = tuple(expert for expert in experts if expert is not None)
    if plan.options.tokenizer_from is not None:
        plan.tokenizer = sources[-1]
    names = [str(ref) for ref in recipe.experts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        found.warnings.append(f"listed more than once, and counted so: {', '.join(twice)}")


def _tensors(plan: Plan, sets: TensorSets) -> dict[str, PlannedTensor]:
    base, method = plan.opened
    dtype = OUTPUT_DTYPES[plan.recipe.dtype] if plan.recipe.dtype else None
    merged = set(sets.merged)
    planned = {}
    for name, stored in base.tensors.items():
        if name in merged:
            rule = method.rule_for(stored.spec, len(plan.experts))
            spec = TensorSpec(name, dtype or stored.spec.dtype, stored.spec.shape)
            planned[name] = PlannedTensor(spec, rule)
        elif name in sets.carried:
            planned[name] = PlannedTensor(stored.spec, None)
    return planned


def _shards(plan: Plan) -> tuple[Shard, ...]:
    stored = plan.opened[0].tensors
    if plan.options.max_shard_bytes is not None:
        return plan_shards([[t.spec for t in plan.tensors.values()]], plan.options.max_shard_bytes)
    groups: dict[str, list[TensorSpec]] = {}
    for name, tensor in plan.tensors.items():
        groups.setdefault(stored[name].file, []).append(tensor.spec)
    return plan_shards(list(groups.values()), DEFAULT_SHARD_BYTES)


def _check_code(plan: Plan, found: Findings) -> None:
    if plan.base is not None and plan.base.config.get("auto_map"):
        code = [name for name in plan.base.small_files if name.endswith(".py")]
        found.warnings.append(
            f"the base needs its own code to load (auto_map); copied: {', '.join(code) or 'none'}"
        )


def _estimate(plan: Plan) -> None:
    count = len(plan.experts)
    seconds = _SECONDS_START
    passes = 1 + plan.opened[1].counting_passes()
    for name, tensor in plan.tensors.items():
        sources = plan.checkpoints if tensor.rule else [plan.base]
        stored = sum(s.tensors[name].spec.nbytes for s in sources if s is not None)
        plan.read_bytes += stored * (passes if tensor.rule else 1)
        seconds += tensor.spec.numel * (count + 1) * _SECONDS_ROWS * passes
        if tensor.rule and tensor.rule.needs_matrix:
            seconds += tensor.spec.numel * count * _SECONDS_MATRIX
    plan.seconds_estimate = seconds


def _fit_memory(plan: Plan, found: Findings) -> None:
    """Choose for every matrix how many float32 copies live at once; refuse what cannot fit.

    What may be in work at once (`working_bytes`) is bounded by the largest matrix, not by what the
    machine has, unless the user gave a budget.
    """
    asked = plan.options.memory_budget
    plan.memory_budget = asked if asked is not None else int(available_memory() * 0.8)
    count = len(plan.experts)
    longest = max((matrix_of(t.spec)[1] for t in plan.tensors.values()), default=1)
    room = plan.memory_budget - FIXED_BYTES - block_bytes(count, longest)
    plan.read_ahead_bytes = _read_ahead_bytes(plan, room)
    room -= plan.read_ahead_bytes
    worst, largest, fitted = (0, ""), 0, {}
    for name, tensor in plan.tensors.items():
        resident = plan.working_bytes_of(tensor) <= room
        fitted[name] = PlannedTensor(tensor.spec, tensor.rule, resident)
        worst = max(worst, (plan.working_bytes_of(fitted[name]), name))
        if tensor.rule and tensor.rule.needs_matrix:
            m, n = matrix_of(tensor.spec)
            largest = max(largest, m * n)
    plan.tensors = fitted
    ample = SPARE_BYTES + 4 * (count + 2) * largest
    plan.working_bytes = max(worst[0], min(room, ample) if asked is None else room)
    plan.peak_memory_bytes = plan.memory_budget - room + plan.working_bytes
    if worst[0] > room:
        needed = plan.memory_budget - room + worst[0]
        which = "--memory-budget allows" if asked is not None else "80 % of the free memory is"
        error = NotEnoughMemoryError(
            f"merging {worst[1]} needs {format_size(needed)} of memory, but {which} "
            f"{format_size(plan.memory_budget)}. Give --memory-budget "
            f"{-(-needed // 1_000_000)}MB or more, on a machine that has it."
        )
        found.problems.append(str(error))


def _read_ahead_bytes(plan: Plan, room: int) -> int:
    """Return bytes for what is on its way from the Hub: the largest piece, and a window ahead."""
    remote = [source for source in plan.checkpoints if source.is_remote]
    if not remote:
        return 0
    largest = 0
    for name, tensor in plan.tensors.items():
        m, n = matrix_of(tensor.spec)
        for_matrix = tensor.rule is not None and tensor.rule.needs_matrix
        rows = 1.0 if for_matrix else min(1.0, PIECE_BYTES / max(tensor.spec.nbytes, 1))
        stored = sum(
            m * n * DTYPES[source.tensors[name].spec.dtype].nbytes
            for source in remote
            if name in source.tensors
        )
        largest = max(largest, int(stored * rows))
    window = min(HUB_WINDOW_BYTES, max(LEAST_HUB_WINDOW_BYTES, (room - largest) // 3))
    return largest + window


def matrix_of(spec: TensorSpec) -> tuple[int, int]:
    """Return rows and columns of what is merged at once: of one slice for a stack [E, m, n]."""
    return (spec.shape[1], spec.shape[2]) if len(spec.shape) == 3 else spec.matrix_shape


def _check_target(plan: Plan, out: Path, found: Findings) -> None:
    state = target_state(out, plan.plan_hash)
    if state.problem:
        found.problems.append(state.problem)
        return
    plan.peak_disk_bytes = plan.write_bytes
    needed = plan.write_bytes - state.bytes_there
    free = free_disk(out)
    if needed > free:
        found.problems.append(
            f"the output takes {format_size(needed)} more, but the disk of {str(out)!r} has "
            f"{format_size(free)} free. Free some, or choose another --out."
        )


def _check_publication(
    plan: Plan,
    target: "HubTarget",
    out: Path | None,
    work_dir: str | Path | None,
    found: Findings,
) -> None:
    from .sinks import hub_target

    if target.finished or target.problems:
        return
    largest = max((shard.nbytes for shard in plan.shards), default=0)
    hub_target.check_fit(target, plan.write_bytes, largest, plan.seconds_estimate)
    private = sorted(
        {s.id for s in plan.checkpoints if s.folder is None and (s.is_private or s.gated)}
    )
    if private and target.ends_public:
        does = "will name" if plan.name_private else "will not name (give --public to name them)"
        found.warnings.append(f"the public card {does} private or gated models: {listed(private)}")
    if target.publication.update:
        written = [
            *(shard.name for shard in plan.shards),
            *hub_target.CARD_FILES,
            *plan.side_files(),
        ]
        replaced, stale = hub_target.replaced_files(target, written)
        if replaced:
            found.warnings.append(f"--update replaces in {target.repo.id}: {', '.join(replaced)}")
        if stale:
            found.warnings.append(f"--update removes from {target.repo.id}: {', '.join(stale)}")
    card = hub_target.card_problem(target, [(s.id, s.license) for s in plan.checkpoints])
    found.problems += [*target.problems, *([card] if card else [])]
    found.warnings += target.warnings
    if out is None:
        _check_work_disk(plan, target, largest, work_dir, found)


def _check_work_disk(
    plan: Plan,
    target: "HubTarget",
    largest: int,
    work_dir: str | Path | None,
    found: Findings,
) -> None:
    """Say how much disk the shards take that wait to be sent: two at most, none when streamed."""
    allowed = target.publication.max_disk
    plan.peak_disk_bytes = min(2 * largest if allowed is None else allowed, plan.write_bytes)
    folder = work_folder(plan.plan_hash, None, plan.publication, work_dir)
    free = free_disk(folder)
    needed = min(largest, plan.peak_disk_bytes)
    if needed > free:
        found.problems.append(
            f"shards of {format_size(largest)} wait on the disk of {str(folder)!r} before they are "
            f"sent, but it has {format_size(free)} free. Give a smaller --max-shard-size, another "
            "--work-dir, or --max-disk 0."
        )


def _lasting_name(ref: ModelRef) -> str:
    """Return a folder's absolute path, so that the working directory does not matter."""
    folder = Path(os.path.expanduser(ref.id))
    return str(folder.resolve()) if os.path.isdir(folder) else str(ref)


__all__ = ["Options", "Plan", "PlannedTensor", "Role", "matrix_of", "plan_merge"]
