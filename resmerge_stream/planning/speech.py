"""What makes a model talk: chat template, special tokens, generation config; whose the merge has.

The base's, unless somebody else's are asked for. A base without a chat template does not talk:
where all experts that have a tokenizer have the same template and special tokens, it is theirs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckpointFormatError, Findings, Remedy, listed, shown
from ..recipe import ModelRef
from ..sources.adapter import Adapter
from ..sources.checkpoint import Checkpoint
from ..sources.format import parse_object
from .chat_templates import TEMPLATES
from .planned import Plan, TokenFiles
from .sidefiles import json_file, vocabulary_files
from .tokens import CONFIG, chat_template, read_tokens, special_tokens, with_template
from .vocabulary import GENERATION, with_numbers

# Kind of the note that the experts' files are taken.
FROM_EXPERTS = "talks-as-experts"
# Special tokens that configs name by number.
NUMBERED = ("bos", "eos", "pad")
_BOOKKEEPING = (
    "_from_model_config", "transformers_version",
    "output_attentions", "output_hidden_states", "use_cache",  # how it is run, not what it says
)  # fmt: skip


def with_speech(plan: Plan, found: Findings) -> Plan:
    """Return a plan whose chat template, special tokens and generation config agree, and say whose.

    Args:
        plan: its tokens are known.
        found: gets what experts have and the merge has not.

    Raises:
        CheckpointFormatError: a file that says one of these is none.
    """
    layout, template = plan.layout, plan.recipe.chat_template
    # An adapter talks as its base does.
    experts = plan.experts[plan.base is None :]
    others = [one for one in experts if not isinstance(one, Adapter) and vocabulary_files(one)]
    is_asked = plan.recipe.tokenizer is not None or plan.tokenizer is not None
    leader = None if is_asked or template is not None else _leader(layout, others)
    files = plan.token_files or TokenFiles(leader or plan.tokenizer or layout)
    if template is not None:
        files = _with_template(plan, files, template, found)
    ref, places = plan.recipe.generation_config, [one.place for one in plan.recipe.models]
    chosen = None if ref is None else plan.speaker
    if ref is not None and ref.place in places:
        chosen = list(plan.checkpoints)[places.index(ref.place)]
    speaker = chosen or leader
    if (
        leader is not None
        and chosen is None
        and any(_settings(one) != _settings(leader) for one in others)
    ):
        speaker = None
    if chosen is not None and GENERATION not in chosen.small_files:
        found.problem(f"{chosen.id} has no {GENERATION}, which the recipe takes from it.")
        return plan
    if speaker is not None and GENERATION in speaker.small_files:
        data = speaker.read_small(GENERATION)
        tokens = read_tokens(speaker) if files.numbers else None
        if tokens is not None:  # they may have other numbers in the merge
            settings = parse_object(data, where=f"{GENERATION} of {speaker.id}")
            data = json_file(with_numbers(settings, tokens.numbers, files.numbers))
        files = replace(files, files={**files.files, GENERATION: data})
    if _place(files.origin) != _place(layout):
        files = _agreeing(plan, files, found, is_chosen=chosen is not None)
    if leader is not None:
        also = "" if speaker is None else " and generation config"
        found.warning(
            f"{len(others)} of {len(others)} experts have a chat template, the base has none: the "
            f"merge takes tokenizer files, chat template{also} of {leader.id}",
            Remedy.KEEP_BASE,
            kind=FROM_EXPERTS,
            model=layout.id,
        )
    _say_differences(plan, files, others, found, is_chosen=chosen is not None)
    return replace(plan, token_files=files)


def chosen_alone(recipe_ref: ModelRef | None, models: Iterable[ModelRef]) -> ModelRef | None:
    """Return the model that is opened for its generation config and nothing else."""
    places = [ref.place for ref in models]
    return None if recipe_ref is None or recipe_ref.place in places else recipe_ref


def _place(one: Checkpoint) -> tuple[str, str | None, str | None]:
    return one.id, one.revision, one.subfolder


def _leader(layout: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the first of experts that all talk alike, where the base has no chat template."""
    if not others or chat_template(layout) is not None:
        return None
    voices = [((chat_template(one) or "").strip(), special_tokens(one)) for one in others]
    is_one = voices[0][0] and all(voice == voices[0] for voice in voices)
    return others[0] if is_one else None


def _settings(one: Checkpoint) -> dict[str, Any]:
    """Return a model's generation config without bookkeeping; empty where it has none."""
    if GENERATION not in one.small_files:
        return {}
    said = parse_object(one.read_small(GENERATION), where=f"{GENERATION} of {one.id}")
    return {key: value for key, value in said.items() if key not in _BOOKKEEPING}


def _agreeing(plan: Plan, files: TokenFiles, found: Findings, *, is_chosen: bool) -> TokenFiles:
    """Return a borrowed tokenizer's files with configs that name its special tokens."""
    layout, origin = plan.layout, files.origin
    try:
        numbers = files.numbers or getattr(read_tokens(origin), "numbers", {})
    except CheckpointFormatError:
        return files  # its rows could not be compared either, which was said
    data = files.files.get(GENERATION)
    if data is None and GENERATION in layout.small_files:
        data = layout.read_small(GENERATION)
    generation = {} if data is None else parse_object(data, where=f"{GENERATION} of the merge")
    ids: dict[str, int] = {}
    changes: list[str] = []
    written = dict(generation)
    for kind, token in special_tokens(origin).items():
        key, number = f"{kind}_token_id", numbers.get(token)
        if kind not in NUMBERED or number is None:
            continue
        old = _number_in(layout.config, key)
        if old is not None and number not in _several(old):
            ids[key] = number
            changes.append(f"{key} {old} → {number} ({token})")
        stops = generation.get(key)
        if stops is not None and number not in _several(stops):
            written[key] = [number, *_several(stops)] if kind == "eos" else number
            if is_chosen:
                found.warning(
                    f"the generation config that is taken has {key} {shown(stops)}, the tokenizer "
                    f"of {origin.id} {number} ({token})",
                    Remedy.GENERATION_OF,
                    model=origin.id,
                )
    if changes:
        found.warning(
            f"config.json names the special tokens of {origin.id}, whose tokenizer is taken: "
            f"{', '.join(changes)}"
        )
    if is_chosen or written == generation:
        return replace(files, ids=ids)
    return replace(files, ids=ids, files={**files.files, GENERATION: json_file(written)})


def _number_in(config: Mapping[str, Any], key: str) -> Any:
    """Return what a config, or the part of it for text, says of a token's number."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, dict) else None)


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _with_template(plan: Plan, files: TokenFiles, template: str, found: Findings) -> TokenFiles:
    """Return files with the recipe's chat template."""
    if template == "auto":
        templates = [one.strip() for c in plan.checkpoints if (one := chat_template(c))]
        if not templates:
            found.warning("chat_template: auto, but no model has a chat template")
            return files
        template = max(templates, key=templates.count)
        share = f"{templates.count(template)} of {len(list(plan.checkpoints))} models"
        found.warning(f"chat_template: auto took the one that {share} have")
    template = TEMPLATES.get(template, template)
    config = files.files.get(CONFIG)
    if config is None and CONFIG in files.origin.small_files:
        config = files.origin.read_small(CONFIG)
    changed = {**files.files, **with_template(config, template)}
    return replace(files, files=changed, left_out=(*files.left_out, "chat_template.json"))


def _say_differences(
    plan: Plan, files: TokenFiles, others: Sequence[Checkpoint], found: Findings, *, is_chosen: bool
) -> None:
    """Say what experts have and the merge has not, how many of them, and how to take it."""
    origin, count = files.origin, len(others)
    tokenizer = (Remedy.TOKENS_OF if files.numbers else Remedy.TOKENIZER_FROM,)
    is_borrowed = _place(origin) != _place(plan.layout)
    if plan.recipe.chat_template is None and not is_borrowed:
        ours = (chat_template(origin) or "").strip()
        theirs = [one for one in others if (chat_template(one) or "").strip() not in ("", ours)]
        if theirs:
            what = "another chat template than" if ours else "a chat template, none is in"
            found.warning(
                f"{len(theirs)} of {count} experts have {what} {origin.id}, whose is kept",
                Remedy.CHAT_TEMPLATE,
                *tokenizer,
                model=theirs[0].id,
            )
    for kind in NUMBERED if not is_borrowed else ():
        mine, key = special_tokens(origin).get(kind), f"{kind}_token_id"
        names = {one: special_tokens(one).get(kind) for one in others}
        if differ := [one for one, token in names.items() if token not in (None, mine)]:
            shown_names = listed(dict.fromkeys(names[one] for one in differ), limit=3)
            found.warning(
                f"{len(differ)} of {count} experts have {shown_names} as their {kind} token, "
                f"{origin.id} {shown(mine)}, which is kept",
                *tokenizer,
                model=differ[0].id,
            )
        number = _number_in(plan.layout.config, key)
        ids = {one: _number_in(one.config, key) for one in others}
        if apart := [one for one, value in ids.items() if value not in (None, number)]:
            shown_ids = ", ".join(dict.fromkeys(str(ids[one]) for one in apart[:3]))
            found.warning(
                f"config: {key} is {shown_ids} in {len(apart)} of {count} experts and "
                f"{shown(number)} in {plan.layout.id}, whose is kept",
                *(tokenizer if apart[0] in differ else ()),  # its numbers follow that tokenizer
                model=apart[0].id,
            )
    data = files.files.get(GENERATION)
    if data is None and GENERATION in plan.layout.small_files:
        data = plan.layout.read_small(GENERATION)
    written = {} if data is None else parse_object(data, where=f"{GENERATION} of the merge")
    keys: dict[str, None] = {}
    differ_in = 0
    for one in others if not is_chosen else ():
        said = _settings(one)
        apart_in = [k for k, v in said.items() if written.get(k) != v]
        if files.numbers:  # by number, the same token is another number there
            apart_in = [key for key in apart_in if not key.endswith("_token_id")]
        differ_in += bool(apart_in)
        keys |= dict.fromkeys(apart_in)
    if differ_in:
        found.warning(
            f"{differ_in} of {count} experts have other settings in {GENERATION} than the merge, "
            f"which has those of {plan.layout.id}: {', '.join(list(keys)[:8])}",
            Remedy.GENERATION_CONFIG,
        )
    elif data is None:
        found.warning(f"{plan.layout.id} has no {GENERATION}; none will be written")
