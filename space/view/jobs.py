"""The words of the pages about jobs and people: plain data in, HTML out. Nothing requested."""

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from resmerge_stream.methods import MergeMethod
from resmerge_stream.recipe import DEFAULT_METHOD
from resmerge_stream.units import format_size

from ..asked import models_on_hub
from ..jobs.downloads import Download
from ..jobs.records import ACTIVE, CANCELLED, CONTINUABLE, DONE, QUEUED, RUNNING, Job
from .shares import shares_html
from .words import base_of, code, duration, esc, facts, method_title, notice, sentence, table

# A test counts it in the evidence.
_WHY = "the best, or within a point of it, in 54 of 67 groups of small experts"
_STATES = {
    "queued": "Waiting", "planning": "Reading headers", "running": "Merging",
    "cancelled": "Cancelled", "failed": "Failed", "resumable": "Stopped, can go on", "done": "Done",
}  # fmt: skip


def status_html(job: Job, *, place: int) -> str:
    """Return how far a job is."""
    percent = 100 * job.progress
    parts = [
        f'<div class="rm-head"><span class="rm-badge rm-{esc(job.state)}">'
        f"{esc(_STATES[job.state])}</span> <b>{esc(title_of(job.asked))}</b></div>"
    ]
    text = job.message
    if job.state == QUEUED and place:
        text = f"{place} merge{'s' * (place != 1)} before yours."
    if job.state != CANCELLED:  # what remains says more
        parts.append(f'<p role="status">{esc(text)}</p>')
    if job.state in ACTIVE or job.state in CONTINUABLE:
        parts.append(
            f'<div class="rm-bar" role="progressbar" aria-label="Merged so far" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{percent:.0f}"><i style="width:{percent:.1f}%">'
            f"</i></div>"
        )
    if job.plan and job.state != DONE:
        parts.append(facts(_numbers(job)))
    if job.state in ACTIVE:
        parts.append('<p class="rm-soft">You may close this page: the merge goes on.</p>')
    if job.state in CONTINUABLE:
        parts.append(notice(what_remains(job), "warn"))
    return '<div class="rm">' + "".join(parts) + "</div>"


def _numbers(job: Job) -> list[tuple[str, str]]:
    plan, running = job.plan, job.state == RUNNING
    speeds = (job.read_speed, job.write_speed, job.sent_speed)
    read, written, sent = (f" · {format_size(s)}/s" if running and s else "" for s in speeds)
    made = job.bytes_kept + job.bytes_written
    if job.shards_done == plan["shards"]:
        made = plan["write_bytes"]  # the files' headers are no tensors
    pairs = [
        ("Read", f"{format_size(job.bytes_read)} of {format_size(plan['read_bytes'])}{read}"),
        ("Merged", f"{format_size(made)} of {format_size(plan['write_bytes'])}{written}"),
        *([("Sent", f"{format_size(job.bytes_sent)}{sent}")] if job.asked.get("push_to") else []),
        ("Tensors", f"{job.tensors_done:,} of {plan['tensors']:,}"),
        ("Files", f"{job.shards_done} of {plan['shards']}"),
    ]
    if running:
        most = format_size(plan["peak_memory_bytes"])
        pairs.append(("Memory", f"{format_size(job.memory_bytes)} · planned {most}"))
        pairs.insert(0, ("Time left", duration(job.seconds_left)))
    return pairs


def what_remains(job: Job) -> str:
    """Return what a stopped job left, and how it goes on."""
    done, total = job.shards_done, job.plan.get("shards", 0)
    target = job.asked.get("push_to")
    where = f"here or on a private staging branch of {target}" if target else "here"
    if not done:
        kept = "No file was finished yet, so little is lost."
    else:
        kept = f"{done} of {total} files are finished and kept {where}."
    return f"{kept} “Continue” goes on from there; the result has the same bytes."


def title_of(asked: Mapping[str, Any]) -> str:
    """Return what a job makes, in a few words."""
    recipe = asked.get("recipe") or {}
    has_base, takes_part = base_of(recipe)
    count = len(recipe.get("models") or ())
    beside = has_base and not takes_part
    merged = ("expert" if beside else "model") + "s" * (count != 1)
    merged += f" of {recipe['base_model']}" if beside else ""
    if asked.get("methods"):
        return f"{count} {merged}: {', '.join(map(method_title, asked['methods']))} compared"
    made = asked.get("push_to") or "files to download"
    made = f"a pull request on {made}" if asked.get("create_pr") else made
    return f"{count} {merged} by {_method_of(recipe)} → {made}"


def short_title(job: Job) -> str:
    """Return what a job is called in a list: what it made, how, and when."""
    made = job.asked.get("push_to") or "files"
    method = _method_of(job.asked.get("recipe") or {})
    return f"{made} · {method} · {time.strftime('%Y-%m-%d %H:%M', time.gmtime(job.created))} UTC"


def _method_of(recipe: Mapping[str, Any]) -> str:
    """Return what the form calls a recipe's method; the recipe's own name where it has no other."""
    return method_title(str(recipe.get("merge_method", DEFAULT_METHOD)))


def jobs_html(jobs: Sequence[Job], *, signed_in: bool) -> str:
    """Return a visitor's jobs, each with a link that opens it."""
    where = (
        "Your jobs, on any device where you sign in."
        if signed_in
        else ("The jobs of this browser. Sign in to see your account's, on any device.")
    )
    soft = f'<p class="rm-soft">{where}</p>'
    if not jobs:
        return f'{soft}<p class="rm-soft">No jobs yet.</p>'
    rows = []
    for job in jobs:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(job.created))
        rows.append(
            (
                f'<a href="?job={esc(job.id)}">{esc(title_of(job.asked))}</a>',
                f'<span class="rm-badge rm-{esc(job.state)}">{esc(_STATES[job.state])}</span>',
                f"{100 * job.progress:.0f} %",
                f"{day} UTC",
            )
        )
    shown = table(("Job", "State", "Merged", "Created"), rows, "Jobs")
    return f'{soft}<div class="rm">{shown}</div>'


def result_html(job: Job) -> str:
    """Return what a finished job made, where it is, and how to try and to evaluate it."""
    if job.state != DONE:
        return ""
    if job.asked.get("methods"):
        scores = shares_html(job.accuracies, job.choice.removeprefix("best: ").partition(" (")[0])
        how = "Nothing was kept. To merge by one of them, choose it below."
        said = notice(f"{job.choice}. {how}", "good")
        return f'<div class="rm">{said}{scores}</div>'
    if job.url:
        page = esc(job.url.partition("/commit/")[0])
        what = "Opened a pull request" if job.asked.get("create_pr") else "Published"
        text = f'{what}: <a href="{page}" target="_blank" rel="noopener">{page}</a></b>'
        is_adapter = (job.asked.get("options") or {}).get("as") == "adapter"
        steps = _next_steps(job.asked, is_adapter=is_adapter)
        steps += _evaluation(job.asked, is_adapter=is_adapter)
        text += "" if job.asked.get("create_pr") else steps
    else:
        text = "Merged. The files are below, also as one archive; they stay here for a day.</b>"
    bars = shares_html(job.accuracies, "merged")
    bars += notice(f"Your questions were not asked: {job.unasked}", "plain") if job.unasked else ""
    return f'<div class="rm"><div class="rm-note rm-good"><b>{text}</div>{bars}</div>'


def files_html(files: Sequence[Download]) -> str:
    """Return a finished job's files as links."""
    if not files:
        return ""
    rows = [
        (
            f'<a href="{esc(file.path)}" download>{esc(file.name)}</a>',
            "all of them" if file.nbytes is None else format_size(file.nbytes),
        )
        for file in files
    ]
    return f'<div class="rm">{table(("File", "Size"), rows, "Files to download")}</div>'


def _next_steps(asked: Mapping[str, Any], *, is_adapter: bool) -> str:
    repo = str(asked.get("push_to"))
    gguf = "https://huggingface.co/spaces/ggml-org/gguf-my-repo"
    if is_adapter:
        base = str((asked.get("recipe") or {}).get("base_model"))
        loading = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            f'model = PeftModel.from_pretrained(base, "{repo}")'
        )
        return f"<p>Try it:</p>{code('Try it', loading)}"
    loading = (
        "from transformers import pipeline\n"
        f'ask = pipeline("text-generation", "{repo}", dtype="auto")\n'
        'print(ask("What is 12 + 30?", max_new_tokens=64)[0]["generated_text"])'
    )
    return (
        f"<p>Try it, in Python:</p>{code('Try it', loading)}"
        f'<p><a href="{gguf}" target="_blank" rel="noopener">Make a GGUF of it</a>, quantised if '
        f"you like: paste <code>{esc(repo)}</code> there.</p>"
    )


def _evaluation(asked: Mapping[str, Any], *, is_adapter: bool) -> str:
    """Return the command that asks the merge and its models, where all are on the Hub.

    Args:
        asked: what the job was asked for.
        is_adapter: whether the merge is an adapter, which is asked here and not in a Job.
    """
    models, repo = models_on_hub(asked.get("recipe") or {}), str(asked.get("push_to"))
    if not models:
        return ""
    words = " ".join(shlex.quote(name) for name in (*models, repo))
    command = f"resmerge-stream evaluate {words} --tasks gsm8k"
    if is_adapter:
        return (
            "<p>Evaluate it beside its base and experts, on a machine of yours:</p>"
            f"{code('Evaluate it', f'{command} --out answers')}"
        )
    command += f" --card {shlex.quote(repo)} --job"
    return (
        "<p>Evaluate it beside its base and experts in a Hub Job. You see the price first; results "
        f"arrive as a pull request:</p>{code('Evaluate it', command)}"
    )


def who_html(name: str, on_space: bool) -> str:
    """Return who somebody is here."""
    if name:
        return f'<p class="rm-soft">Signed in as <b>{esc(name)}</b>.</p>'
    how = "sign in" if on_space else "set HF_TOKEN before you start this"
    return (
        f'<p class="rm-soft">Without an account you can plan anything public, and merge the '
        f"built-in example. To publish a merge, {how}.</p>"
    )


def method_html(method: type[MergeMethod]) -> str:
    """Return what a method is in a sentence or two, and where it comes from."""
    summary = " ".join((method.__doc__ or "").partition("\n\n")[0].split()).rstrip(".")
    why = f"<b>Recommended</b>: {_WHY}. " if method.name == DEFAULT_METHOD else ""
    return (
        f'<p class="rm-soft">{why}{esc(summary)}. <a href="{esc(method.url)}" target="_blank" '
        f'rel="noopener">{esc(sentence(method.paper))}</a></p>'
    )


def link_html(job_id: str) -> str:
    """Return the link that opens a job elsewhere."""
    return (
        f'<p class="rm-soft"><a href="?job={esc(job_id)}">Link to this job</a>, for another tab or '
        "device.</p>"
    )
