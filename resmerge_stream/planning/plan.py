"""PLAN: decide everything before anything big moves, from headers and configs alone. No torch."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..device import Machine
from ..errors import Findings, RecipeError, Remedy, ResMergeError, StoppedError, listed, shown
from ..recipe import ModelRef, Recipe
from ..roles import Role, layer_of
from ..sinks.layout import DEFAULT_SHARD_BYTES, Shard, plan_shards
from ..sinks.publication import Publication
from ..sources import Checkpoint, open_checkpoint
from ..sources.adapter import is_bare_adapter
from ..sources.assembly import Rounded
from ..sources.fused import fused_in
from ..sources.mapped import as_stored, is_stored
from ..sources.view import View, source_of
from ..specs import OUTPUT_DTYPES, TensorSpec
from .adapter_output import as_adapter
from .adapters import check_named_bases, check_whole, on_base
from .compat import (
    MATCHED,
    TensorSets,
    check_configs,
    check_different,
    check_small_files,
    check_stray_files,
    check_tokenizers,
    match_tensors,
    readable,
)
from .estimates import estimated
from .matching import Matched, match
from .memory_fit import fit_memory
from .options import Options
from .planned import Draft, Plan, PlannedTensor, RefusedPlan
from .resolve import Resolver, check_count
from .sidefiles import output_config
from .target import check_folder, check_publication, look_at_repository, pinned_commits
from .vocabulary import with_vocabulary

_OPEN_THREADS = 4


def plan_merge(
    recipe: Recipe,
    options: Options | None = None,
    *,
    out: str | Path | None = None,
    publication: Publication | None = None,
    token: str | bool | None = None,
    work_dir: str | Path | None = None,
    machine: Machine | None = None,
    like: Draft | None = None,
) -> Plan | RefusedPlan:
    """Plan a merge. Problems are not raised but collected, in a plan that is refused.

    Args:
        recipe: what to merge.
        options: how; defaults when None.
        out: the output folder, when there is one: it is checked, and its disk.
        publication: the repository to publish to, when there is one: it is asked for.
        token: the caller's, for the Hub; None stands for HF_TOKEN or the login,
            False for nobody's.
        work_dir: where journals are kept; what an earlier start pinned is found there.
        machine: where it will run; None stands for this machine.
        like: a plan of the same models, whose open checkpoints are used again.

    Raises:
        StoppedError: the network or the Hub kept failing, so that nothing is known.

    Memory: the headers and configs of the checkpoints; no tensor is read, save an LM head that
    a tied config says is redundant.
    """
    draft = Draft(
        recipe=recipe,
        options=options or Options(),
        publication=publication,
        token=token,
        machine=machine,
    )
    found = Findings()
    folder = Path(os.path.expanduser(out)) if out is not None else None
    draft = _begun(draft, found, folder, work_dir, like)
    if not found.problems and draft.method is not None:
        draft = _planned(Plan.of(draft, draft.method), found, folder, work_dir)
    draft = replace(draft, warnings=tuple(found.warnings))
    if isinstance(draft, Plan) and not found.problems:
        return draft
    return RefusedPlan.of(draft, *found.problems)


def _begun(
    plan: Draft,
    found: Findings,
    folder: Path | None,
    work_dir: str | Path | None,
    like: Draft | None,
) -> Draft:
    """Choose the method, look at the target and open the models."""
    if folder is not None and ("\x00" in str(folder) or len(os.fsencode(folder.name)) > 255):
        found.problem(f"{shown(str(folder))} cannot be a folder's name.", Remedy.ANOTHER_FOLDER)
        return plan
    _check_output(plan.options, found)
    plan = _with_method(plan, found)
    commits: Sequence[str | None] = ()
    if plan.method is not None:
        plan = look_at_repository(plan, found)
        commits = pinned_commits(plan, folder, work_dir)
    check_named_bases(plan.recipe, found)
    return _opened(plan, found, commits, like)


def _planned(plan: Plan, found: Findings, folder: Path | None, work_dir: str | Path | None) -> Plan:
    """Return the plan with all that could be decided: up to the first step that had to give up."""
    recipe = plan.recipe
    check_whole(plan.layout, found)
    if found.problems:
        return plan
    plan = _in_one_layout(plan, found)
    if any(is_bare_adapter(source) for source in plan.checkpoints):
        return plan  # not on a base, so that nothing can be compared
    are_read = not found.problems
    if are_read:
        plan = with_vocabulary(plan, found)
    layout, others = plan.layout, plan.experts[plan.base is None :]
    for expert in others:
        check_configs(layout, expert, found)
        check_stray_files(expert, found)
        if recipe.tokenizer is None:
            check_tokenizers(layout, expert, found)
    check_different(layout, others, found)
    if not are_read:
        return plan  # tensor by tensor, only the same would be said again
    sets = match_tensors(layout, others, found, missing=plan.options.missing)
    plan = _with_carried_rounded(replace(plan, left_out=sets.left_out), sets)
    if recipe.layers is not None and recipe.layers != (depth := _depth(layout)):
        found.problem(
            f"the recipe takes layers 0 to {recipe.layers} of models that have {depth}. Dropping "
            "or stacking layers is left to mergekit."
        )
        return plan
    try:
        plan = replace(plan, tensors=_tensors(plan, sets))
    except RecipeError as exc:
        found.problems += exc.notices
        return plan
    config = output_config(layout, recipe.dtype or _unquantised_dtype(layout))
    plan = replace(plan, shards=_shards(plan), config=config)
    if plan.options.output == "adapter":
        plan = as_adapter(plan, found)
        if found.problems:
            return plan
    else:
        check_small_files(layout, plan.tokenizer or layout, found)
        _check_code(plan, found)
    plan = fit_memory(estimated(plan, has_folder=folder is not None), found)
    if folder is not None:
        check_folder(plan, folder, found)
    if plan.target is not None:
        check_publication(plan, plan.target, folder, work_dir, found)
    return plan


def _check_output(options: Options, found: Findings) -> None:
    """Refuse options that would say nothing about the kind of output that is asked for."""
    if options.output == "model":
        if options.adapter_rank is not None:
            found.problem("a rank is given, but the output is a whole model.", Remedy.AS_ADAPTER)
        return
    if options.rounding == "stochastic":
        found.problem(
            "stochastic rounding is asked for, but an adapter's factors are rounded to nearest.",
            Remedy.AS_MODEL,
        )
    if options.max_shard_bytes is not None:
        found.problem("a file size is given, but an adapter is one file.", Remedy.AS_MODEL)
    if options.tokenizer_from is not None:
        found.problem("a tokenizer is given, but an adapter has none.", Remedy.AS_MODEL)


def _with_method(plan: Draft, found: Findings) -> Draft:
    recipe = plan.recipe
    for note in recipe.notes:
        found.warning(note)
    try:
        resolver = Resolver(recipe)
        check_count(recipe, resolver.kind)
        return replace(plan, method=resolver.at().method)
    except ResMergeError as exc:
        found.problems += exc.notices
        return plan


def _opened(
    plan: Draft, found: Findings, commits: Sequence[str | None], like: Draft | None
) -> Draft:
    recipe, limit = plan.recipe, plan.options.max_header_bytes
    refs = list(recipe.models)
    other = _tokenizer_alone(plan)
    if other is not None:
        refs.append(other)
    if len(commits) != len(refs):
        commits = [None] * len(refs)

    known = {} if like is None else _opened_by(like)

    def attempt(ref: ModelRef, commit: str | None) -> Checkpoint | ResMergeError:
        there = known.get(ref.place)
        if there is not None and commit in (None, there.revision):
            return there
        try:
            return open_checkpoint(ref, token=plan.token, commit=commit, max_header_bytes=limit)
        except StoppedError:
            raise  # the network, not the input
        except ResMergeError as exc:
            return exc

    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        opened = list(pool.map(attempt, refs, commits))
    sources = [None if isinstance(source, ResMergeError) else source for source in opened]
    for failed in opened:
        if isinstance(failed, ResMergeError):
            found.problems += failed.notices
    first = len(recipe.models) - len(recipe.experts)
    experts = sources[first : first + len(recipe.experts)]
    names = [str(ref) for ref in recipe.experts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        found.warning(f"listed more than once, and counted so: {', '.join(twice)}")
    return replace(
        plan,
        base=None if recipe.base is None else sources[0],
        experts=tuple(expert for expert in experts if expert is not None),
        tokenizer=None if other is None else sources[-1],
    )


def _tokenizer_alone(plan: Draft) -> ModelRef | None:
    """Return the model that is opened for its tokenizer and nothing else."""
    if plan.options.tokenizer_from is not None:
        return ModelRef.parse(plan.options.tokenizer_from)
    asked = plan.recipe.tokenizer
    if asked is None or not isinstance(asked.source, ModelRef):
        return None
    merged = [ref.place for ref in plan.recipe.models]
    return None if asked.source.place in merged else asked.source


def _opened_by(plan: Draft) -> dict[tuple[str, str | None, str | None], Checkpoint]:
    """Return the checkpoints of a plan by id, revision and subfolder as written."""
    refs, sources = plan.recipe.models, list(plan.checkpoints)
    if len(refs) != len(sources):
        return {}  # some could not be opened
    if plan.recipe.tokenizer is not None:
        # Rows are matched by token once, from the tables as they are stored.
        sources = [_unseen(source) for source in sources]
    return {ref.place: source for ref, source in zip(refs, sources, strict=True)}


def _unseen(source: Checkpoint) -> Checkpoint:
    """Return the checkpoint behind all views of it."""
    while isinstance(source, View):
        source = source.of
    return source


def _in_one_layout(plan: Plan, found: Findings) -> Plan:
    """Have every checkpoint read as numbers, and every expert in the layout of the output."""
    layout, *others = plan.checkpoints
    layout = readable(layout, found)
    sources = [layout, *(on_base(layout, source, found) for source in others)]
    matched = [Matched(layout), *(match(layout, source) for source in sources[1:])]
    for source, one in zip(sources[1:], matched[1:], strict=True):
        if one.renamed:
            found.warning(
                f"{len(one.renamed)} tensor(s) of {source.id} have other names or another layout "
                f"than the base's, and were matched: {listed(one.in_words, limit=2)}",
                kind=MATCHED,
            )
        if one.pairs:
            shown_pairs = [f"{ours} ↔ {theirs}" for ours, theirs in one.pairs]
            found.problem(
                f"{len(one.pairs)} tensor(s) of {source.id} look like tensors of the base under "
                f"other names: {listed(shown_pairs, limit=3)}. Nothing says that they are the "
                "same; rename them in that checkpoint."
            )
    first = int(plan.base is not None)
    return replace(
        plan,
        base=matched[0].checkpoint if first else None,
        experts=tuple(one.checkpoint for one in matched[first:]),
        matched=tuple(one.renamed for one in matched[first:]),
    )


def _unquantised_dtype(layout: Checkpoint) -> str | None:
    """Return the output dtype of a layout that was quantised; None for what the layout stores."""
    made = isinstance(layout, View) and any(
        not is_stored(source) for source in layout.sources.values()
    )
    return "bfloat16" if made else None


def _with_carried_rounded(plan: Plan, sets: TensorSets) -> Plan:
    """Have dequantised tensors that no expert has written in the output's dtype."""
    base = plan.base
    if not isinstance(base, View):
        return plan
    dtype = OUTPUT_DTYPES[plan.recipe.dtype or "bfloat16"]
    sources = {
        name: Rounded(source, dtype)
        if name in sets.carried and not is_stored(source) and source.dtype != dtype
        else source
        for name, source in base.sources.items()
    }
    return replace(plan, base=View(base.of, sources, config=base.config))


def _tensors(plan: Plan, sets: TensorSets) -> dict[str, PlannedTensor]:
    layout = plan.layout
    first = int(plan.base is None)
    chosen = Resolver(plan.recipe).each(layout.tensors)
    named = plan.recipe.dtype
    planned = {}
    for name, stored in layout.tensors.items():
        if name in sets.merged:
            found = chosen[name]
            own = found.weights[0] if first else found.base_weight
            experts = tuple(number + first for number in sets.merged[name])
            weights = tuple(found.weights[number] for number in experts)
            merging = found.among(sets.merged[name])
            rule = merging.rule_for(stored.spec, len(experts))
            dtype = OUTPUT_DTYPES[named] if named else _stored_dtype(layout, name)
            spec = TensorSpec(name, dtype, stored.spec.shape)
            apart = rule.needs_matrix and not rule.as_one
            fused = fused_in(spec, layout.tensors, layout.config) if apart else None
            planned[name] = PlannedTensor(spec, rule, merging, experts, weights, own, fused)
        elif name in sets.carried:
            planned[name] = PlannedTensor(stored.spec, None, plan.method)
    return planned


def _stored_dtype(layout: Checkpoint, name: str) -> str:
    """Return a tensor's dtype as stored; bfloat16 where it was dequantised."""
    source = source_of(layout, name)
    return as_stored(source).dtype if is_stored(source) else OUTPUT_DTYPES["bfloat16"]


def _depth(layout: Checkpoint) -> int:
    """Return how many blocks a model has."""
    numbers = [layer_of(name) for name in layout.tensors]
    return 1 + max((number for number in numbers if number is not None), default=-1)


def _shards(plan: Plan) -> tuple[Shard, ...]:
    stored = plan.layout.tensors
    if plan.options.max_shard_bytes is not None:
        return plan_shards([[t.spec for t in plan.tensors.values()]], plan.options.max_shard_bytes)
    groups: dict[str, list[TensorSpec]] = {}
    for name, tensor in plan.tensors.items():
        groups.setdefault(stored[name].file, []).append(tensor.spec)
    return plan_shards(list(groups.values()), DEFAULT_SHARD_BYTES)


def _check_code(plan: Plan, found: Findings) -> None:
    if plan.layout.config.get("auto_map"):
        code = [name for name in plan.layout.small_files if name.endswith(".py")]
        found.warning(
            f"the base needs its own code to load (auto_map); copied: {', '.join(code) or 'none'}"
        )


__all__ = ["Options", "Plan", "PlannedTensor", "RefusedPlan", "Role", "plan_merge"]
