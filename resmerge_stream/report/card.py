"""The model card and the files under ``resmerge/``, from a plan and its report. No I/O."""

import inspect
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..planning.compat import BARELY, KEPT_AS_IN_BASE, LEFT_OUT
from ..planning.dtypes import main_dtype
from ..planning.plan import Plan
from ..planning.sidefiles import code_files
from ..recipe import ModelRef
from ..units import format_size, printable
from .build import told_of_experts
from .card_tables import LISTED, code_list, escape, gate_tables, reading, unusual_tensors
from .mergekit_config import FILE as MERGEKIT
from .mergekit_config import mergekit_config
from .panels import gates_png
from .public_names import PublicName, PublicNames
from .statement import STATEMENT, statement_of
from .words import rule_in_words

# By which the Hub finds what was merged here.
TAG = "resmerge"
# Stands where the scores will be.
NOBODY = "Nobody has evaluated this model yet. This asks it and its models the same questions:"
# Below this cosine a reader should know that the file is not quite what was computed.
KEPT_WARNING = 0.9
_REPO_ID = re.compile(r"^[\w.-]{1,96}(/[\w.-]{1,96})?$", re.ASCII)
_LICENCE = re.compile(r"^[a-z0-9][a-z0-9.+-]{0,60}$")


def render_card(
    plan: Plan, report: Mapping[str, Any], *, name_private: bool = False
) -> dict[str, bytes]:
    """Return the card, report, recipe and picture by file name.

    Args:
        plan: what was run.
        report: from `build_report`; it is not modified.
        name_private: whether private and gated models of the Hub may be named. Without their
            names the recipe cannot be run again by others.
    """
    import yaml

    names = PublicNames(plan, name_private)
    document = _recipe(plan, names)
    lines = [f"# {_command(plan, names, 'recipe.yml')}"]
    for kind, what in (
        ("local", "Local folders"),
        ("bucket", "In buckets"),
        ("private", "Models not named here"),
    ):
        hidden = dict.fromkeys(s.name for s in names.sources if s.kind == kind)
        if hidden:
            lines.append(f"# {what}; put your own paths or ids: {', '.join(hidden)}")
    # Unfolded lines: none can start with what ends a Markdown fence.
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1_000_000)
    recipe = "\n".join(lines) + "\n" + text
    theirs, reason = mergekit_config(plan, document)
    published = names.clean_report(report)
    return {
        "README.md": _readme(plan, report, names, recipe, reason).encode(),
        **({MERGEKIT: theirs.encode()} if theirs else {}),
        "resmerge/report.json": (json.dumps(published, indent=1) + "\n").encode(),
        STATEMENT: (json.dumps(statement_of(published), indent=1) + "\n").encode(),
        "resmerge/recipe.yml": recipe.encode(),
        "resmerge/gates.png": gates_png(report),
    }


def _recipe(plan: Plan, names: PublicNames) -> dict[str, Any]:
    """Return the recipe pinned to commits, with every parameter."""
    recipe = plan.recipe.to_dict()
    base, experts = names.base, names.experts
    if base is not None:
        recipe["base_model"] = base.pinned
    sources = [*experts, *([base] if base is not None and plan.recipe.base_listed else [])]
    for model, source in zip(recipe["models"], sources, strict=True):
        model["model"] = source.pinned
    parameters = plan.parameters
    recipe.pop("parameters", None)
    dtype = recipe.pop("dtype", None)
    recipe |= {"parameters": parameters} if parameters else {}
    recipe |= {"dtype": dtype} if dtype else {}
    if plan.recipe.tokenizer is not None:
        asked, tokens = plan.recipe.tokenizer.source, plan.recipe.tokenizer.tokens
        recipe["tokenizer"] = replace(
            plan.recipe.tokenizer,
            source=ModelRef(names.pinned(asked)) if isinstance(asked, ModelRef) else asked,
            tokens=tuple(
                (token, replace(row, model=row.model and ModelRef(names.pinned(row.model))))
                for token, row in tokens
            ),
        ).to_dict()
    if plan.recipe.generation_config is not None:
        recipe["generation_config"] = names.pinned(plan.recipe.generation_config)
    return recipe


def _command(plan: Plan, names: PublicNames, recipe: str) -> str:
    """Return the command that makes the same bytes."""
    options = replace(plan.options, tokenizer_from=None)  # said by the name that all may see
    said = map(shlex.quote, options.words("values", "files"))
    words = ["resmerge-stream merge", recipe, "--out merged", *said]
    if names.tokenizer is not None and plan.options.tokenizer_from is not None:
        words.append(f'--tokenizer-from "{names.tokenizer.pinned}"')
    return " ".join(words)


def _readme(
    plan: Plan, report: Mapping[str, Any], names: PublicNames, recipe: str, obstacle: str
) -> str:
    licences = {(source.license or "").strip().lower() for source in plan.checkpoints}
    licence = licences.pop() if len(licences) == 1 else ""
    same = bool(_LICENCE.match(licence)) and licence not in ("other", "unknown")
    licence = licence if same else "other"
    terms = f"{escape(licence)}, as all of its sources."
    if not same:
        terms = (
            "> [!WARNING]\n> The sources' licences differ, or some are unknown. A merge is made of "
            "all of them: check that their terms allow it, and your use, before sharing."
        )
    cited = ""
    if plan.method is not None:
        cited = f"## Citation\n\n{escape(plan.method.paper)}, {plan.method.url}"
        if plan.method.name == "resmerge":
            cited = f"## Citation\n\n```bibtex\n{_CITATION}```"
    sections = [
        _metadata(plan, names, licence),
        _introduction(plan, report, names),
        _unevaluated(plan, names),
        _usage(plan, names),
        _recipe_and_sources(plan, report, names, recipe, obstacle),
        f"## Licence\n\n{terms}",
        _RISKS,
        cited,
        reading(report),
        _folded("Numbers by family and module", gate_tables(report)),
        _folded("The adapter", _factors(plan, report)),
        _folded("What the cast kept", _kept(plan, report)),
        _folded("Unusual tensors", unusual_tensors(plan, report, names)),
        _folded("Tensors and files", _tensors(plan, report, names)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def _metadata(plan: Plan, names: PublicNames, licence: str) -> str:
    from huggingface_hub import ModelCardData

    is_adapter = plan.options.output == "adapter"
    # An adapter is one of its base; the experts stand under the sources.
    shown = names.sources[:1] if is_adapter else names.sources
    models = [s.name for s in shown if s.kind == "hub" and _REPO_ID.match(s.name)]
    data = ModelCardData(
        base_model=list(dict.fromkeys(models)) or None,
        library_name="peft" if is_adapter else "transformers",
        license=licence,
        tags=["merge", TAG, *(["lora"] if is_adapter else [])],
        base_model_relation="adapter" if is_adapter else "merge",
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(plan: Plan, report: Mapping[str, Any], names: PublicNames) -> str:
    base, experts = names.base, names.experts
    title, words = escape(str((report.get("method") or {}).get("name") or "merge")), ""
    if plan.method is not None:
        title, words = plan.method.title, inspect.cleandoc(plan.method.in_words())
    variant = (report["method"].get("parameters") or {}).get("variant")
    exactly = f" (variant `{variant}`)" if variant else ""
    short = escape(names.sources[0].name.rsplit("/", 1)[-1])
    count = f"{len(experts)} expert{'s' * (len(experts) != 1)}"
    version = escape(str((report.get("environment") or {}).get("resmerge_stream")))
    heading = f"# {short}: {count} merged with {title}"
    what = "An adapter that merges" if report.get("adapter") else "A merge of"
    of_one = " of one base" if base is not None else ""
    models = f"{len(experts)} fine-tuned model{'s' * (len(experts) != 1)}{of_one}"
    made = f"{what} {models} by **{title}**{exactly}"
    is_adapter = plan.options.output == "adapter"
    if is_adapter and len(experts) == 1 and plan.recipe.method == "mean":  # an extracted adapter
        heading = f"# {escape(experts[0].name.rsplit('/', 1)[-1])} as a LoRA adapter of {short}"
        made, words = "What sets a model apart from its base, as a LoRA adapter", ""
    # Why this may be no merge at all, or not the one that was meant.
    barely = [warning.text for warning in plan.warnings if warning.kind == BARELY]
    doubts = [escape(names.clean(text)) + "." for text in barely]
    cosine, dtype = report["summary"].get("kept_cosine"), _dtype_of(plan)
    if not report.get("adapter") and cosine is not None and cosine < KEPT_WARNING:
        doubts.append(
            f"Rounding to {dtype} changed this update's direction (cosine {cosine:.2f}). "
            f"{_advice(plan, dtype)}"
        )
    lines = [
        heading,
        f"{made}, made with ResMerge Stream {version}. No training or data was used.",
        *(f"> [!WARNING]\n> {text[0].upper()}{text[1:]}" for text in doubts),
        "\n".join(
            ([f"- Base: {_link(base)}"] if base is not None else [])
            + [f"- Expert {i}: {_link(source)}" for i, source in enumerate(experts, 1)]
        ),
        f"**How it decides.** {words}" if words else "",
    ]
    return "\n\n".join(line for line in lines if line)


def _dtype_of(plan: Plan) -> str:
    if plan.recipe.dtype:
        return plan.recipe.dtype
    return "float32" if plan.options.output == "adapter" else main_dtype(plan.layout)


def _unevaluated(plan: Plan, names: PublicNames) -> str:
    """Return that nobody has asked this model anything yet, and the command that does."""
    this = plan.publication.repo_id if plan.publication is not None else "merged"
    models = dict.fromkeys([*(printable(source.name) for source in names.sources), this])
    words = " ".join(map(shlex.quote, models))
    command = f"resmerge-stream evaluate {words} --tasks gsm8k --card {shlex.quote(this)}"
    return f"## Evaluation\n\n{NOBODY}\n\n```sh\n{command}\n```"


def _kept(plan: Plan, report: Mapping[str, Any]) -> str:
    summary = report["summary"]
    norm, cosine = summary.get("kept_norm"), summary.get("kept_cosine")
    dtype = _dtype_of(plan)
    rounding = "stochastically" if plan.options.rounding == "stochastic" else "to nearest"
    text = f"Computed in float32 and rounded once, {rounding}, to {dtype}. "
    if dtype == "float32":
        text = "Computed and stored in float32. "
    if norm is None or cosine is None:
        return text + "There was no update to keep: no tensor differs from the base."
    if report.get("adapter"):
        return text + (
            f"The update that the stored factors make has **{norm:.3f}** of the computed length "
            f"and a cosine of **{cosine:.6f}** with it. Added to the base in its own dtype it is "
            "rounded once more."
        )
    total = changed = 0.0
    for row in report["tensors"]:
        size = math.prod(row.get("shape") or ())
        total += size
        changed += size * (row.get("changed_fraction") or 0.0)
    share = changed / total if total else 0.0
    return text + (
        f"Over the whole model the update that is left has **{norm:.3f}** of the computed length "
        f"and a cosine of **{cosine:.3f}** with it; {share:.1%} of the weights differ "
        "from the base's. RL experts move a weight by a step or so of the format, and a merged "
        "step smaller than half of one is rounded away."
    )


def _advice(plan: Plan, dtype: str) -> str:
    if dtype == "float32":
        return "The update is close to the resolution of float32 itself."
    if plan.options.rounding == "stochastic":
        return "It was stochastic, so the loss is noise without bias; `--dtype float32` keeps all."
    return (
        "Merge again with `--dtype float32`, which keeps all of it in twice the bytes, or with "
        "`--rounding stochastic`, which keeps it on average, before judging the method by "
        "these weights."
    )


def _factors(plan: Plan, report: Mapping[str, Any]) -> str:
    """Return what kind of adapter this is, and how much of the merge it holds."""
    adapter = report.get("adapter")
    if not adapter:
        return ""
    text = (
        f"{adapter['modules']} modules, rank {adapter['rank']} at most, with "
        f"α = r, so that the update is B·A itself. It holds **{adapter['kept']:.4%}** of the "
        "merged update's squared length"
    )
    if plan.options.adapter_rank is None:
        text += "; the rest is rounding. The rank is the sum of the experts' ranks."
        if 0 < adapter["needed"] < adapter["rank"]:
            text += (
                f" No module needs more than {adapter['needed']} of it: `--adapter-rank "
                f"{adapter['needed']}` writes the same update in a smaller file."
            )
    else:
        text += f" there, the most that rank {plan.options.adapter_rank} can."
    if plan.method is not None and plan.method.name == "iso_c":
        text += (
            " Published ISO-C gives its level to every direction of the matrix; here it ends with "
            "the directions that the experts have. The level is Σσ/min(m, n) all the same."
        )
    if plan.options.adapter_rank is not None:
        rows = [f"| {rank} | {share:.2%} |" for rank, share in adapter["by_rank"].items()]
        text += "\n\n| rank | share |\n|---:|---:|\n" + "\n".join(rows)
    return text


def _tensors(plan: Plan, report: Mapping[str, Any], names: PublicNames) -> str:
    """Return what became of the tensors: counts by rule, carried, left out, copied code."""
    counts = report["summary"]["by_rule"]
    lines = ["| rule | tensors | meaning |\n|---|---:|---|"]
    for rule, count in counts.items():
        lines[-1] += f"\n| {escape(rule)} | {count} | {rule_in_words(rule)} |"
    carried = [row["name"] for row in report["tensors"] if row["rule"] == "carried"]
    if carried:
        lines.append(f"Carried over from the base: {code_list(carried)}.")
    left_out: dict[str, list[str]] = {}
    for name, reason in (report["summary"].get("left_out") or {}).items():
        left_out.setdefault(reason, []).append(name)
    for reason, found in left_out.items():
        lines.append(f"Left out, since {escape(names.clean(reason))}: {code_list(found)}.")
    if code := code_files(plan.side_files()):
        lines.append(f"It loads with code of its own, copied unread: {code_list(code)}.")
    if plan.options.output == "model":
        lines.append(f"Config from the base; {_tokens_in_words(plan, names)}.")
    notes = [w.text for w in plan.warnings if w.kind not in (KEPT_AS_IN_BASE, LEFT_OUT, BARELY)]
    notes += told_of_experts(report["summary"])
    if notes:
        lines.append("The plan warned:")
        lines.append("\n".join(f"- {escape(names.clean(text))}" for text in notes[:LISTED]))
    return "\n\n".join(lines)


def _tokens_in_words(plan: Plan, names: PublicNames) -> str:
    asked = plan.recipe.tokenizer
    if asked is None:
        origin = names.tokenizer or names.sources[0]
        return f"tokenizer and chat template from {escape(str(origin))}"
    if isinstance(asked.source, ModelRef):
        which = f"those of {escape(names.pinned(asked.source))}"
    else:
        which = "the base's" if asked.source == "base" else "those of all models"
    return f"the tokens are {which}, and the models' rows were matched by token"


def _recipe_and_sources(
    plan: Plan, report: Mapping[str, Any], names: PublicNames, recipe: str, obstacle: str
) -> str:
    lines = ["| | model | commit | size | licence |", "|---|---|---|---:|---|"]
    rows = zip(plan.parts, plan.checkpoints, names.sources, strict=True)
    for part, source, public in rows:
        commit = f"`{public.revision}`" if public.revision else "–"
        commit += f", {escape(public.subfolder)}" if public.subfolder else ""
        size = format_size(sum(file.size for file in source.files))
        licence = escape(source.license or "unknown")
        lines.append(f"| {part} | {_link(public)} | {commit} | {size} | {licence} |")
    again = _command(plan, names, "resmerge/recipe.yml")
    hidden = any(source.kind != "hub" for source in names.sources)
    note = " after putting your own paths in the recipe" if hidden else ""
    theirs = f"[{MERGEKIT}]({MERGEKIT}) is the same recipe for mergekit."
    if report.get("adapter"):
        theirs = ""
    elif obstacle:
        theirs = f"mergekit cannot run it: {escape(obstacle)}."
    parts = [
        f"## Recipe and sources\n\n```yaml\n{recipe}```",
        "\n".join(lines),
        f"This makes the same bytes{note}, on the same kind of device:",
        f"```sh\n{again}\n```",
        theirs,
        f"[{STATEMENT}]({STATEMENT}) says the same for supply-chain tools: files and sources by "
        "hash, as an in-toto statement of SLSA provenance.",
    ]
    return "\n\n".join(part for part in parts if part)


def _usage(plan: Plan, names: PublicNames) -> str:
    if plan.options.output == "adapter":
        base = names.sources[0].name
        return (
            "## Load it\n\n```python\nfrom peft import PeftModel\nfrom transformers import "
            "AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "…")  # this repository, or the folder\n```'
        )
    architectures = plan.layout.config.get("architectures") or [""]
    causal = str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    code = ", trust_remote_code=True" if plan.layout.config.get("auto_map") else ""
    return (
        f"## Load it\n\n```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        'name = "…"  # this repository, or the folder\n'
        f'model = {auto}.from_pretrained(name, dtype="auto"{code})\n'
        f"tokenizer = AutoTokenizer.from_pretrained(name{code})\n```"
    )


def _link(source: PublicName) -> str:
    if source.kind != "hub" or not _REPO_ID.match(source.name):
        return escape(str(source))
    return f"[{source.name}](https://huggingface.co/{source.name})"


_RISKS = (
    "## Before you use it\n\nA merged model may inherit undesirable behaviours, biases or safety "
    "risks from any of its experts, and can behave in ways that none of them does. Evaluate it for "
    "your task, safety included, before deploying it."
)
_CITATION = """@misc{sun2026resmerge,
  title = {ResMerge: Residual-based Spectral Merging of Large Language Models},
  author = {Sun, Yandu and Hou, Zhiyan and Ma, Haokai and Jia, Yuheng and Fang, Junfeng and
            Guo, Haiyun and An, Hongyan and Wang, Weizhen and Wang, Jinqiao},
  year = {2026},
  eprint = {2606.02252},
  archivePrefix = {arXiv},
}
"""
