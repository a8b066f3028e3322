"""Which tokens a merge has, and which row of which model stands for each: matched by token.

The rules are mergekit's (0.1.5). A row that a model lacks is that of the one model that has the
token, else the base's, else the mean of those that have it; zeros where none has.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointFormatError, Findings, Remedy, listed, shown
from ..maths.lazy import np
from ..recipe import ModelRef
from ..roles import Role, role_of
from ..sources.adapter import Adapter
from ..sources.checkpoint import Checkpoint
from ..sources.format import parse_object
from ..sources.mapped import MEAN_OF_ALL, MEAN_OF_SOME, ZERO, Mapped
from ..sources.tables import is_embedding
from .planned import Plan, TokenFiles
from .sidefiles import json_file, vocabulary_files
from .tokens import (
    OTHERS,
    Tokens,
    cut_alike,
    plain_entry,
    read_tokens,
    same_vocabulary,
    with_tokens,
    without_tokens,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows of a model on the Hub that lie scattered cost a request each.
MAX_REMOTE_RUNS = 2000
# Kind of the warning that a model says nothing of its tokens.
NO_TOKENS = "no-tokens"
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class _Known:
    """A model and its tokens, those beyond its tables left out."""

    checkpoint: Checkpoint
    numbers: Mapping[str, int]
    rows: int


@dataclass(frozen=True, slots=True)
class _Said:
    """A row that the recipe names: of which model, None for zeros; whether all models get it."""

    model: int | None
    row: int
    force: bool


def with_vocabulary(plan: Plan, found: Findings) -> Plan:
    """Return a plan whose models all have the recipe's tokens, and whose files say so.

    Args:
        plan: its checkpoints in one layout.
        found: gets what was found.

    Raises:
        CheckpointFormatError: a tokenizer cannot be read.
    """
    asked = plan.recipe.tokenizer
    if asked is None:
        return plan
    if plan.options.tokenizer_from is not None:
        found.problem(
            "the recipe says which tokenizer the merge has, and an option names another one; "
            "leave one of them out."
        )
        return plan
    checkpoints = list(plan.checkpoints)
    layout, tables = checkpoints[0], list(_tables(checkpoints[0]))
    first = read_tokens(layout)
    if first is None or not tables:
        lacks = "table of tokens" if not tables else "tokenizer files that say its tokens"
        advice = "" if not tables else " Put the tokenizer.json of its tokenizer into its folder."
        found.problem(f"{layout.id} has no {lacks}, so that none can be matched.{advice}")
        return plan
    tokens = [
        first if same_vocabulary(layout, checkpoint) else read_tokens(checkpoint)
        for checkpoint in checkpoints
    ]
    _say_unknown(checkpoints, layout, found)
    known = [
        _known(checkpoint, own or first, tables, found)
        for checkpoint, own in zip(checkpoints, tokens, strict=True)
    ]
    made = _output_tokens(plan, first, [own or first for own in tokens], known, found)
    if made is None:
        return plan
    names, files = made
    multiple = asked.pad_to_multiple_of or 1
    size = -(-_last(names) // multiple) * multiple
    if size > _last(names) and any(checkpoint.is_remote for checkpoint in checkpoints):
        found.problem(
            "pad_to_multiple_of fills rows with the mean of a whole table, which is not read over "
            "the network for that. Download the models first and give their folders."
        )
    said = _rows_said(plan, known, found)
    if found.problems:
        return plan
    views: list[dict[str, Mapped]] = [{} for _ in checkpoints]
    for name in tables:
        having = [i for i, one in enumerate(checkpoints) if name in one.tensors]
        trees = [checkpoints[i].trees[name] for i in having]
        dtypes = {tree.dtype for tree in trees}
        dtype = trees[0].dtype if len(dtypes) == 1 else "F32"
        has_base = plan.base is not None and having[0] == 0
        numbers = [known[i].numbers for i in having]
        in_table = {  # by the models' numbers among those that have it
            token: one if one.model is None else replace(one, model=having.index(one.model))
            for token, one in said.items()
            if one.model is None or one.model in having
        }
        chosen = _rows_of(names, numbers, in_table, size, has_base=has_base)
        for number, tree, (which, row, means) in zip(having, trees, chosen, strict=True):
            views[number][name] = Mapped(tree, trees, which, row, means, dtype)
    for own in known:
        if lost := [token for token in own.numbers if token not in names]:
            found.warning(
                f"{len(lost)} token(s) of {own.checkpoint.id} are not in the merge: "
                f"{listed(lost, limit=5)}"
            )
    if new := [token for token in names if token not in known[0].numbers]:
        found.warning(
            f"{len(new)} token(s) of the merge are not in {layout.id}: {listed(new, limit=5)}"
        )
    for one, view in zip(checkpoints, views, strict=True):
        runs = sum(1 for mapped in view.values() for _ in mapped.runs(0, mapped.shape[0]))
        if one.is_remote and runs > MAX_REMOTE_RUNS:
            found.problem(
                f"the tokens of {one.id} are in another order than the merge's, so that its tables "
                f"would be read in {runs} requests. Download it first and give its folder."
            )
    seen: list[Checkpoint] = []
    for one, own, view in zip(checkpoints, known, views, strict=True):
        if isinstance(one, Adapter):
            moved = [n for n, base in views[0].items() if n in one.edits and not base.is_own]
            if moved:
                found.problem(
                    f"{one.id} changes {listed(moved)}, and the merge's tokens have other rows "
                    "than the base's. Merge that adapter into its base first (peft: "
                    "merge_and_unload)."
                )
            seen.append(one if found.problems else Adapter.of(one.opened, seen[0]))
            continue
        config = _config(one.config, size, own.numbers, names)
        seen.append(one.with_trees({**one.trees, **view}, config=config))
    if GENERATION in layout.small_files:  # its special tokens are where they are now
        was = parse_object(layout.read_small(GENERATION), where=f"{GENERATION} of {layout.id}")
        now = with_numbers(was, known[0].numbers, names)
        if now != was:
            files = replace(files, files={**files.files, GENERATION: json_file(now)})
    return replace(
        plan,
        base=None if plan.base is None else seen[0],
        experts=tuple(seen[plan.base is not None :]),
        token_files=replace(files, numbers=names),
    )


def check_rows(plan: Plan, found: Findings) -> None:
    """Refuse tables whose rows stand for other tokens in some model: rows go by their numbers.

    Args:
        plan: its models in one layout; its recipe matches no tokens.
        found: gets what was found.
    """
    layout = plan.layout
    having = [one for one in plan.checkpoints if vocabulary_files(one)]
    if not having:
        return
    first, kept = having[0], plan.tokenizer or layout
    _say_unknown(plan.checkpoints, first, found)
    others = [one for one in (*having[1:], kept) if not same_vocabulary(first, one)]
    if not others:
        return
    rows = min((layout.tensors[name].spec.shape[0] for name in _tables(layout)), default=0)
    rows_of: dict[str, int] = {}
    by_row: dict[int, str] = {}
    added: set[str] = set()
    read: dict[int, Tokens] = {}
    for one in dict.fromkeys((first, *others)):
        try:
            tokens = read_tokens(one)
        except CheckpointFormatError as exc:
            text = exc.notices[0].text.removesuffix(".")
            found.warning(f"{text}. Its rows are merged by number, whatever they stand for")
            continue
        if tokens is None:
            continue  # a tokenizer that is taken, without files: said elsewhere
        read[id(one)] = tokens
        added |= set(tokens.added)
        _check_same_rows(one, tokens, rows_of, by_row, added, rows, found, is_kept=one is kept)
        for token, row in tokens.numbers.items():
            if row < rows:
                rows_of.setdefault(token, row)
                by_row.setdefault(row, token)
    ours = read.get(id(kept)) or read.get(id(first))
    for one in others:
        theirs = read.get(id(one))
        if theirs is None or ours is None or one is kept:
            continue
        lost = [token for token, row in theirs.numbers.items()
                if row < rows and token not in ours.numbers]  # fmt: skip
        if lost:
            found.warning(
                f"{len(lost)} token(s) of {one.id} are not in the tokenizer of {kept.id}, which is "
                f"kept; their rows are merged: {listed(lost, limit=3)}",
                Remedy.TOKENIZER_FROM,
            )
        elif not cut_alike(ours, theirs):
            found.warning(
                f"{one.id} has the tokens of {kept.id}, whose tokenizer is kept, but cuts text "
                "otherwise (another tokenizer.json); it may rely on that",
                Remedy.TOKENIZER_FROM,
            )


def _check_same_rows(
    one: Checkpoint,
    tokens: Tokens,
    rows_of: Mapping[str, int],
    by_row: Mapping[int, str],
    added: Collection[str],
    rows: int,
    found: Findings,
    *,
    is_kept: bool,
) -> None:
    """Refuse a model whose rows stand for other tokens than in the models before it.

    Added tokens may have other names in a row: reserved ones are made for that.
    """
    elsewhere = [
        f"{token} is row {rows_of[token]} and {row}"
        for token, row in tokens.numbers.items()
        if row < rows and rows_of.get(token, row) != row
    ]
    elsewhere += [
        f"row {row} is {by_row[row]} and {token}"
        for token, row in tokens.numbers.items()
        if row in by_row and by_row[row] != token and token not in rows_of
        if token not in added and by_row[row] not in added
    ]
    beyond = [token for token, row in tokens.numbers.items() if row >= rows] if is_kept else []
    if elsewhere:
        found.problem(
            f"{len(elsewhere)} token(s) have other rows in {one.id} than in the models before it "
            f"({listed(elsewhere, limit=2)}): merged by number, tables would mix them. With "
            "tokenizer_source rows are matched by token.",
            Remedy.TOKENS_OF if is_kept else Remedy.MATCH_TOKENS,
            model=one.id,
        )
    elif beyond and rows:
        found.problem(
            f"{len(beyond)} token(s) of {one.id}, whose tokenizer is taken, have no row in tables "
            f"of {rows} rows: {listed(beyond, limit=3)}. With tokenizer_source they get one.",
            Remedy.TOKENS_OF,
            model=one.id,
        )


def _say_unknown(models: Iterable[Checkpoint], known: Checkpoint, found: Findings) -> None:
    """Say of which whole models it is not known what their rows stand for."""
    for one in models:
        if not isinstance(one, Adapter) and not vocabulary_files(one):
            found.warning(
                f"{one.id} has no tokenizer files: its rows are taken for the tokens of {known.id}",
                kind=NO_TOKENS,
            )


def _last(names: Mapping[str, int]) -> int:
    """Return how many rows the tokens need: numbers may be left free between them."""
    return max(max(names.values()) + 1, len(names))


def _rows_said(plan: Plan, known: Sequence[_Known], found: Findings) -> dict[str, _Said]:
    """Return what the recipe says of single tokens' rows, as numbers of models and rows."""
    asked = plan.recipe.tokenizer
    places = {ref.place: number for number, ref in enumerate(plan.recipe.models)}
    said: dict[str, _Said] = {}
    for token, row in asked.tokens if asked is not None else ():
        if row.model is None:
            if row.zero or row.force:
                said[token] = _Said(None, 0, row.force)
            continue
        at = places.get(row.model.place)
        number = None
        if at is not None and row.token_id is None:
            number = known[at].numbers.get(row.token if row.token is not None else token)
        elif at is not None and row.token_id is not None and row.token_id < known[at].rows:
            number = row.token_id
        if number is None:
            why = "is not merged here" if at is None else "has no such row"
            found.problem(f"token {shown(token)} takes its row from {row.model}, which {why}.")
        said[token] = _Said(at, number or 0, row.force)
    return said


def _tables(layout: Checkpoint) -> Iterator[str]:
    """Yield the tensors with a row for each token."""
    sizes = []
    for name, stored in layout.tensors.items():
        is_head = role_of(name, stored.spec.shape) is Role.HEAD
        is_table = is_embedding(name, stored.spec.shape)
        if is_table or (is_head and name.rsplit(".", 2)[-2:-1] != ["score"]):
            sizes.append(stored.spec.shape[0])
            yield name
        elif name.endswith("lm_head.bias") and stored.spec.shape[0] in sizes:
            yield name


def _known(
    checkpoint: Checkpoint, tokens: Tokens, tables: Sequence[str], found: Findings
) -> _Known:
    """Return a model's tokens that its tables have rows for."""
    sizes = [checkpoint.tensors[n].spec.shape[0] for n in tables if n in checkpoint.tensors]
    rows = min(sizes, default=0)
    beyond = [token for token, number in tokens.numbers.items() if number >= rows]
    if beyond:
        found.warning(
            f"{len(beyond)} token(s) of {checkpoint.id} lie beyond its table of {rows} rows and "
            f"are not used: {listed(beyond, limit=3)}"
        )
    numbers = {token: number for token, number in tokens.numbers.items() if number < rows}
    return _Known(checkpoint, numbers, rows)


def _output_tokens(
    plan: Plan,
    first: Tokens,
    tokens: Sequence[Tokens],
    known: Sequence[_Known],
    found: Findings,
) -> tuple[dict[str, int], TokenFiles] | None:
    """Return the merge's tokens and the files that say them; None with a problem found."""
    asked = plan.recipe.tokenizer
    if asked is None:
        return None
    origin, own, numbers = plan.layout, first, known[0].numbers
    if isinstance(asked.source, ModelRef):
        places = {ref.place: number for number, ref in enumerate(plan.recipe.models)}
        at = places.get(asked.source.place)
        origin = known[at].checkpoint if at is not None else plan.tokenizer or origin
        theirs = read_tokens(origin)
        if theirs is None:
            found.problem(
                f"{origin.id} has no tokenizer files that say its tokens. Put the tokenizer.json "
                "of its tokenizer into its folder."
            )
            return None
        own, numbers = theirs, theirs.numbers if at is None else known[at].numbers
    names = dict(numbers)
    cut = set(own.numbers) - set(names)
    if cut:
        shorter = without_tokens(own, cut)
        if shorter is None:
            found.problem(
                f"{origin.id} has tokens without a row, and a tokenizer that tokens cannot be "
                f"taken from: {listed(sorted(cut), limit=3)}. Resize its embeddings first "
                "(transformers: resize_token_embeddings)."
            )
            return None
        own = shorter
    extra: dict[str, dict[str, Any]] = {}
    if asked.source == "union":
        _add_others(names, extra, own, tokens, known)
    for token, _ in asked.tokens:
        if token not in names:
            names[token] = max(names.values()) + 1
            extra[token] = plain_entry(token, names[token])
    if not extra and not cut:
        return names, TokenFiles(origin)
    left_out = OTHERS if own.document else ()
    return names, TokenFiles(origin, with_tokens(own, extra.values()), left_out)


def _add_others(
    names: dict[str, int],
    extra: dict[str, dict[str, Any]],
    own: Tokens,
    tokens: Sequence[Tokens],
    known: Sequence[_Known],
) -> None:
    """Add what other models know: first their ordinary tokens, then those added to a tokenizer."""
    last = max(names.values())
    added: dict[str, Mapping[str, Any]] = {}
    for theirs, one in zip(tokens, known, strict=True):
        for token in sorted(one.numbers, key=one.numbers.__getitem__):
            if token in theirs.added:
                added.setdefault(token, theirs.added[token])
            elif token not in names and token not in added:
                last += 1
                names[token], extra[token] = last, plain_entry(token, last)
    for token, entry in added.items():
        if token in own.added:
            continue
        if token not in names:
            last += 1
            names[token] = last
        extra[token] = {**entry, "id": names[token]}


_Chosen = tuple["NDArray[np.int64]", "NDArray[np.int64]", dict[int, list[tuple[int, int]]]]


def _rows_of(
    names: Mapping[str, int],
    models: Sequence[Mapping[str, int]],
    said: Mapping[str, _Said],
    size: int,
    *,
    has_base: bool,
) -> list[_Chosen]:
    """Return for each model that has a table which rows its table in the merge has.

    Args:
        names: the merge's tokens.
        models: their tokens.
        said: what the recipe says of single tokens.
        size: how many rows the merge has; those after the last token are the mean of the others.
        has_base: whether the first of the models is the base.
    """
    theirs = np.full((len(models), size), -1, np.int64)
    for own, numbers in zip(theirs, models, strict=True):
        for token, number in names.items():
            own[number] = numbers.get(token, -1)
    donor, donated = np.full(size, ZERO, np.int64), np.zeros(size, np.int64)
    means: dict[int, list[tuple[int, int]]] = {}
    for number in np.flatnonzero((theirs < 0).any(0) & (theirs >= 0).any(0)).tolist():
        parts = [(int(i), int(theirs[i, number])) for i in np.flatnonzero(theirs[:, number] >= 0)]
        if len(parts) == 1 or (has_base and theirs[0, number] >= 0):
            donor[number], donated[number] = parts[0]
        else:
            donor[number], means[number] = MEAN_OF_SOME, parts
    forced = np.zeros(size, bool)
    for token, one in said.items():
        number = names[token]
        forced[number] = one.force
        donor[number] = ZERO if one.model is None else one.model
        donated[number] = one.row
    lacking = (theirs < 0) | forced
    which = np.repeat(np.arange(len(models))[:, None], size, 1)
    which[lacking] = np.broadcast_to(donor, which.shape)[lacking]
    row = np.where(lacking, donated, theirs)
    which[:, _last(names) :], row[:, _last(names) :] = MEAN_OF_ALL, 0
    return [(which[i], row[i], means) for i in range(len(models))]


def _config(
    config: Mapping[str, Any], size: int, old: Mapping[str, int], new: Mapping[str, int]
) -> dict[str, Any]:
    """Return a config with the merge's number of rows, and its special tokens where they are."""
    changed = with_numbers(config, old, new)
    for section in (changed, changed.get("text_config")):
        if isinstance(section, dict) and "vocab_size" in section:
            section["vocab_size"] = size
    if "vocab_size" not in changed and not isinstance(changed.get("text_config"), dict):
        changed["vocab_size"] = size
    return changed


def with_numbers(
    config: Mapping[str, Any], old: Mapping[str, int], new: Mapping[str, int]
) -> dict[str, Any]:
    """Return a config whose ``…_token_id`` name the same tokens as before; what is gone, none.

    Args:
        config: as it is said; its part for text too.
        old: the tokens' numbers there.
        new: their numbers in the merge.
    """
    tokens = {number: token for token, number in old.items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [now for item in value if (now := moved(item)) is not None] or None
        if type(value) is not int or value not in tokens:
            return value
        return new.get(tokens[value])

    return {
        key: moved(value)
        if key.endswith("_token_id")
        else with_numbers(value, old, new)
        if key == "text_config" and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
