"""PLAN: decide everything before anything big moves, from headers and configs alone. No torch."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..device import Machine, choose_device
from ..errors import (
    CheckpointError,
    Findings,
    Notice,
    RecipeError,
    Remedy,
    ResMergeError,
    StoppedError,
    listed,
    shown,
)
from ..recipe import ModelRef, Recipe
from ..roles import Role, depth_of
from ..sinks.layout import DEFAULT_SHARD_BYTES, plan_shards
from ..sinks.publication import Publication
from ..sources import NO_FOLDER, Checkpoint, open_checkpoint
from ..sources.adapter import Adapter, is_bare_adapter
from ..sources.assembly import Rounded, Stored
from ..sources.fused import fused_in
from ..sources.mapped import as_stored
from ..sources.quantised import Alike
from ..specs import DTYPES, FP8, OUTPUT_DTYPES, TensorSpec
from .adapter_output import as_adapter
from .adapters import check_named_bases, check_twins, check_whole, is_adapter, on_base
from .checkpoints import MOST_CHECKPOINTS, with_checkpoints
from .compat import (
    MATCHED,
    REMARK,
    TensorSets,
    check_configs,
    check_different,
    check_stray_files,
    match_tensors,
    readable,
)
from .costs import estimated, fit_memory
from .dtypes import check_dtypes, written_dtypes
from .matching import match
from .options import Options
from .packed import passed_through
from .planned import Draft, Plan, PlannedTensor, RefusedPlan, hash_of
from .resolve import Resolver, check_count
from .sidefiles import (
    check_modules,
    check_side_files,
    digests_of_copied,
    output_config,
)
from .speech import chosen_alone, with_speech
from .target import (
    check_cache,
    check_folder,
    check_publication,
    is_name,
    look_at_repository,
    pinned_commits,
)
from .tied import with_tables
from .vocabulary import check_rows, with_vocabulary

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
    update: bool = False,
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
        update: whether this merge's finished result may be replaced where its sources changed.

    Raises:
        StoppedError: the network or the Hub kept failing, so that nothing is known.

    Memory: the headers and configs of the checkpoints; no tensor is read, save an LM head that
    a tied config says is redundant, and rows of adapters that look alike.
    """
    draft = Draft(
        recipe=recipe,
        options=options or Options(),
        publication=publication,
        update=update or (publication is not None and publication.update),
        token=token,
        machine=machine,
    )
    found = Findings()
    folder = Path(os.path.expanduser(out)) if out is not None else None
    draft = _begun(draft, found, folder, work_dir, like)
    if not found.problems and draft.method is not None:
        try:
            draft = _planned(Plan.of(draft, draft.method), found, folder, work_dir)
        except CheckpointError as exc:  # a small file that is none
            found.problems += exc.notices
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
    _check_output(plan.options, plan.recipe.dtype, found)
    if plan.machine is None and plan.options.device not in ("auto", "cpu"):
        try:
            choose_device(plan.options.device)
        except RecipeError as exc:
            found.problems += exc.notices
    try:
        plan = replace(
            plan,
            recipe=with_checkpoints(
                plan.recipe, token=plan.token, most=plan.options.max_experts or MOST_CHECKPOINTS
            ),
        )
    except StoppedError:
        raise  # the network, not the input
    except ResMergeError as exc:
        found.problems += exc.notices
        return replace(plan, plan_hash=hash_of(plan))
    for note in plan.recipe.notes:
        found.warning(note)
    try:
        resolver = Resolver(plan.recipe)
        check_count(plan.recipe, resolver.kind)
        plan = replace(plan, method=resolver.at().method, resolver=resolver)
    except ResMergeError as exc:
        found.problems += exc.notices
    plan = replace(plan, plan_hash=hash_of(plan))
    if folder is not None and not is_name(folder):
        found.problem(f"{shown(str(folder))} cannot be a folder's name.", Remedy.ANOTHER_FOLDER)
        return plan
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
    if are_read and recipe.tokenizer is None:
        check_rows(plan, found)
    if are_read and not found.problems and plan.options.output == "model":
        plan = with_speech(plan, found)
        layout = plan.layout
    check_different(layout, others, found)
    check_twins(others, found)
    if not are_read:
        return plan  # tensor by tensor, only the same would be said again
    sets = match_tensors(layout, others, found, missing=plan.options.missing, tied=plan.left_out)
    plan = replace(plan, left_out=sets.left_out)
    if plan.base is not None:  # what was dequantised and no expert has gets the output's dtype
        dtype = OUTPUT_DTYPES.get(recipe.dtype or "", OUTPUT_DTYPES["bfloat16"])
        rounded = {
            name: Rounded(tree, dtype)
            for name, tree in plan.base.trees.items()
            if name in sets.carried
            and not isinstance(as_stored(tree), Stored | Alike)
            and tree.dtype != dtype
        }
        if rounded:
            plan = replace(plan, base=plan.base.with_trees({**plan.base.trees, **rounded}))
    if recipe.layers is not None and recipe.layers != (depth := depth_of(layout.tensors)):
        found.problem(
            f"the recipe takes layers 0 to {recipe.layers} of models that have {depth}. Dropping "
            "or stacking layers is left to mergekit."
        )
        return plan
    dtypes = written_dtypes(layout, recipe.dtype, list(sets.merged))
    check_dtypes(layout, others, recipe.dtype, dtypes, found)
    try:
        plan = replace(plan, tensors=_tensors(plan, sets, dtypes))
    except RecipeError as exc:
        found.problems += exc.notices
        return plan
    ids = plan.token_files.ids if plan.token_files else {}
    written = {name: tensor.spec.dtype for name, tensor in plan.tensors.items()}
    config = output_config(layout, recipe.dtype, ids, written)
    in_files: dict[str, list[TensorSpec]] = {}
    limit = plan.options.max_shard_bytes
    for name, tensor in plan.tensors.items():
        file = "" if limit is not None else layout.tensors[name].file
        in_files.setdefault(file, []).extend(tensor.stored)
    shards = plan_shards(list(in_files.values()), limit or DEFAULT_SHARD_BYTES)
    plan = replace(plan, shards=shards, config=config)
    if plan.options.output == "adapter":
        plan = as_adapter(plan, found)
        if found.problems:
            return plan
    else:
        origin = plan.token_files.origin if plan.token_files else plan.tokenizer or layout
        check_side_files(layout, origin, found)
        check_modules(layout, others, found)
        gives_tokens = plan.checkpoints if plan.token_files else (plan.tokenizer or layout,)
        every = (*plan.checkpoints, *plan.beside)
        plan = replace(plan, copied=digests_of_copied(every, layout, gives_tokens))
    (plan,) = fit_memory([estimated(plan, has_folder=folder is not None)], found)
    part = plan.options.part
    if not plan.own and part is not None and part.number is not None:
        found.warning(
            f"part {part.number} of {part.count} has nothing to do: the output has "
            f"{len(plan.shards)} files.",
            Remedy.SMALLER_SHARDS,
        )
    check_cache(plan, found)
    if folder is not None:
        check_folder(plan, folder, work_dir, found)
    if plan.target is not None:
        check_publication(plan, plan.target, folder, work_dir, found)
    return plan


def _check_output(options: Options, dtype: str | None, found: Findings) -> None:
    """Refuse options that would say nothing about the kind of output that is asked for."""
    if dtype == FP8 and options.rounding == "stochastic":
        found.problem(f"stochastic rounding is asked for, but {FP8} is rounded to nearest.")
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


def _opened(
    plan: Draft, found: Findings, commits: Sequence[str | None], like: Draft | None
) -> Draft:
    recipe, limit = plan.recipe, plan.options.max_header_bytes
    refs = list(recipe.models)
    merged, asked = [ref.place for ref in refs], plan.recipe.tokenizer
    other: ModelRef | None = None  # opened for its tokenizer and nothing else
    if plan.options.tokenizer_from is not None:
        other = ModelRef.parse(plan.options.tokenizer_from)
    elif asked is not None and isinstance(asked.source, ModelRef):
        other = None if asked.source.place in merged else asked.source
    talks = chosen_alone(recipe.generation_config, recipe.models)
    refs += [ref for ref in (other, talks) if ref is not None]
    if len(commits) != len(refs):
        commits = [None] * len(refs)

    known: dict[tuple[str, str | None, str | None], Checkpoint] = {}
    there = [] if like is None else list(like.checkpoints)
    if like is not None and len(there) == len(like.recipe.models):  # else some were not opened
        if like.recipe.tokenizer is not None:
            # Rows are matched by token once, from the tables as they are stored.
            there = [one if isinstance(one, Adapter) else one.opened for one in there]
        known = {ref.place: one for ref, one in zip(like.recipe.models, there, strict=True)}

    def attempt(ref: ModelRef, commit: str | None) -> Checkpoint | ResMergeError:
        there = known.get(ref.place)
        if there is not None and commit in (None, there.revision):
            return there
        try:
            return open_checkpoint(
                ref,
                token=plan.token,
                commit=commit,
                max_header_bytes=limit,
                hashes=plan.options.check_sources == "full",
            )
        except StoppedError:
            raise  # the network, not the input
        except ResMergeError as exc:
            return exc

    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        opened = list(pool.map(attempt, refs, commits))
    sources = [None if isinstance(source, ResMergeError) else source for source in opened]
    gone: dict[str, Notice] = {}
    for ref, failed in zip(refs, opened, strict=True):
        if isinstance(failed, ResMergeError):
            if ref in recipe.models and failed.notices[0].kind == NO_FOLDER:
                gone[ref.id] = failed.notices[0]
            else:
                found.problems += failed.notices
    if len(gone) == 1:
        found.problem(next(iter(gone.values())), Remedy.SAY_WHERE)
    elif gone:  # of a merge that was made elsewhere, all are: said once
        found.problem(
            f"there are no folders {listed(gone)}, and these are not repository ids either. Give "
            "folders of models (with config.json and *.safetensors), or namespace/name on the Hub.",
            Remedy.SAY_WHERE,
            kind=NO_FOLDER,
        )
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
        numbers=tuple(n for n, expert in enumerate(experts, 1) if expert is not None),
        tokenizer=None if other is None else sources[len(recipe.models)],
        speaker=None if talks is None else sources[-1],
    )


def _in_one_layout(plan: Plan, found: Findings) -> Plan:
    """Have every checkpoint read as numbers, and every expert in the layout of the output."""
    for source in plan.checkpoints:
        for remark in source.remarks:
            found.warning(f"{source.id}: {remark}", kind=REMARK)
    layout, *others = plan.checkpoints
    if not layout.config:
        found.problem(
            f"{layout.id} has no config.json, so it is not known what model it is. Put the "
            "config.json and the tokenizer of the model it was trained from beside it."
        )
        return plan
    others = [
        # A trainer's state has none of its own.
        one if one.config else one.with_trees(one.trees, config=layout.config)
        for one in others
    ]
    as_stored = passed_through(layout, others, found, as_adapter=plan.options.output == "adapter")
    if as_stored is None:
        layout = readable(layout, found)
    else:
        layout, others = as_stored
    whole = {n: source for n, source in enumerate(others) if not is_adapter(source)}
    numbers = {
        n: source if as_stored else on_base(layout, source, found) for n, source in whole.items()
    }
    if found.problems:
        return plan  # what is not read fits no other
    matched = {n: match(layout, source) for n, source in numbers.items()}
    for number, one in matched.items():
        source = others[number]
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
    tables = with_tables(layout, [one.checkpoint for one in matched.values()], found)
    apart = dict(zip(matched, tables.experts, strict=True))
    experts = [
        apart[n] if n in apart else on_base(tables.layout, source, found)
        for n, source in enumerate(others)
    ]
    renamed = [matched[n].renamed if n in matched else {} for n in range(len(others))]
    if plan.base is None:
        experts, renamed = [tables.layout, *experts], [{}, *renamed]
    return replace(
        plan,
        base=None if plan.base is None else tables.layout,
        experts=tuple(experts),
        matched=tuple(renamed),
        left_out=tables.left_out,
    )


def _tensors(plan: Plan, sets: TensorSets, dtypes: Mapping[str, str]) -> dict[str, PlannedTensor]:
    layout = plan.layout
    first = int(plan.base is None)
    chosen = {} if plan.resolver is None else plan.resolver.each(layout.tensors)
    planned: dict[str, PlannedTensor] = {}
    for name, stored in layout.tensors.items():
        if name in sets.merged:
            of_name = chosen[name]
            experts = tuple(number + first for number in sets.merged[name])
            method = of_name.among(sets.merged[name])
            rule = method.rule_for(stored.spec, len(experts))
            apart = rule.needs_matrix and not rule.as_one
            spec = TensorSpec(name, dtypes[name], stored.spec.shape)
            if apart and DTYPES[spec.dtype].nbytes == 1:
                plain = TensorSpec(name, OUTPUT_DTYPES["bfloat16"], spec.shape)
                # Matrices that are decomposed apart come one by one, and the scales first.
                spec = plain if fused_in(plain, layout.tensors, layout.config) else spec
            planned[name] = PlannedTensor(
                spec,
                rule,
                method,
                experts,
                weights=tuple(of_name.weights[number] for number in experts),
                base_weight=of_name.weights[0] if first else of_name.base_weight,
                fused=fused_in(spec, layout.tensors, layout.config) if apart else None,
                sources=(layout, *(plan.experts[number] for number in experts)),
            )
        elif name in sets.carried:
            planned[name] = PlannedTensor(stored.spec, None, plan.method, sources=(layout,))
    return planned


__all__ = ["Options", "Plan", "PlannedTensor", "RefusedPlan", "Role", "plan_merge"]
