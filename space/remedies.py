"""What the page says to do about an error: its own words for the library's remedies."""

from collections.abc import Mapping
from typing import Any

from resmerge_stream.errors import Notice, Remedy, ResMergeError

# Without words: what nobody can do from the page.
PAGE_WORDS: Mapping[Remedy, str] = {
    Remedy.SIGN_IN: "sign in",
    Remedy.SIGN_IN_AGAIN: "sign in again",
    Remedy.SIGN_IN_TO_SEE: "sign in with an account that may see it",
    Remedy.CHECK_FOLDER: "",
    Remedy.CONTINUE: "press “Continue” on its job",
    Remedy.FINISH_OTHER: "continue that job under “My jobs”",
    Remedy.DISCARD_STAGING: "press “Delete the partial result” on its job",
    Remedy.GIVE_MODELS: "fill in a base and at least one expert",
    Remedy.SAY_WHERE: "fill in the base and each expert by name",
    Remedy.GIVE_TARGET: "name the result",
    Remedy.ANOTHER_FOLDER: "choose another name",
    Remedy.ANOTHER_REPO: "choose another name",
    Remedy.ONLY_PUBLISH: "choose another name",
    Remedy.REPLACE: "choose “Publish as: an update” under Advanced",
    Remedy.PULL_REQUEST: "choose “Publish as: a pull request” under Advanced",
    Remedy.NAME_PRIVATE: "choose “public” as its visibility to name them",
    Remedy.MATCH_TOKENS: "write “tokenizer_source: base” (or “union”) into the recipe",
    Remedy.TOKENS_OF: "write “tokenizer_source: {model}” into the recipe, alone",
    Remedy.TOKENIZER_FROM: "fill in “Tokenizer from”",
    Remedy.KEEP_BASE: "fill in “Tokenizer from” with {model} to keep the base's",
    Remedy.CHAT_TEMPLATE: "write “chat_template: auto” into the recipe",
    Remedy.GENERATION_CONFIG: "write “generation_config:” and a model into the recipe",
    Remedy.GENERATION_OF: "write “generation_config: {model}” into the recipe",
    Remedy.SMALLER_SHARDS: "choose a smaller file size",
    Remedy.ANOTHER_WORK_DIR: "",
    Remedy.ANOTHER_CACHE: "",
    Remedy.NO_DISK: "",
    Remedy.MORE_DISK: "",
    Remedy.MORE_MEMORY: "use larger hardware, with {needed} of memory or more",
    Remedy.TRAINED_EXPERTS: "fill in experts that were trained from this base",
    Remedy.ASK_AS_JOB: "",
    Remedy.ASK_ON_CPU: "use hardware with more GPU memory",
    Remedy.FEWER_PROCESSES: "",
    Remedy.RUN_PARTS: "",
    Remedy.MERGE_UNRELATED: "choose “Experts of another base: merge” under Advanced",
    Remedy.AS_ADAPTER: "choose “as adapter” under Output",
    Remedy.AS_MODEL: "choose “whole model” under Output",
    Remedy.ADAPTER_RANK: "choose an adapter's rank",
    Remedy.MISSING_BASE: "choose “Tensors that some lack: base”",
    Remedy.WIDER_DTYPE: "choose the output type bfloat16 or float32",
    Remedy.ON_CPU: "",
}


# While planning there is no job to continue.
PLAN_WORDS: Mapping[Remedy, str] = {**PAGE_WORDS, Remedy.CONTINUE: "plan again"}


def said(error: ResMergeError | Notice, words: Mapping[Remedy, str] = PAGE_WORDS) -> str:
    """Return what the page says of an error, a problem or a warning."""
    notices = error.notices if isinstance(error, ResMergeError) else (error,)
    return "\n".join(notice.worded(words) for notice in notices)


def plan_said(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan's plain data with its problems and warnings as the page says them."""
    worded = {
        key: [said(Notice.from_dict(notice), PLAN_WORDS) for notice in notices]
        for key, notices in plan["notices"].items()
    }
    return {**plan, **worded}
