"""What whoever runs the Space may set, by environment variables; docs/space.md lists them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resmerge_stream.device import default_work_dir
from resmerge_stream.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and places of one Space.

    Attributes:
        folder: where records, journals and results are kept.
        running: merges at a time.
        jobs_per_user: queued and running at a time, of one account.
        anonymous_jobs: queued and running at a time, of everybody without an account together; of
            one address, one.
        max_experts: of one plan.
        max_header_bytes: read of one repository.
        anonymous_plans: a minute, of an address without an account.
        plan_seconds: that one plan may take.
        anonymous_plan_seconds: that one plan of somebody without an account may take.
        merge_seconds: that one run of a merge may take; what is finished by then is kept.
        anonymous_merge_seconds: that one of somebody without an account may take.
        keep_seconds: how long the files of a finished job stay.
        result_bytes: of all finished jobs' files together; beyond, the oldest go.
        ask_seconds: that a visitor's own questions may take after a merge, as it is estimated.
        prompts: held-out prompts a task that the built-in models are asked after a merge; 0: none.
    """

    folder: Path
    running: int = 1
    jobs_per_user: int = 3
    anonymous_jobs: int = 20
    max_experts: int = 16
    max_header_bytes: int = 32_000_000
    anonymous_plans: int = 30
    plan_seconds: float = 45.0
    anonymous_plan_seconds: float = 15.0
    merge_seconds: float = 43_200.0
    anonymous_merge_seconds: float = 600.0
    keep_seconds: float = 86_400.0
    result_bytes: int = 2_000_000_000
    ask_seconds: float = 300.0
    prompts: int = 32


# Variable, field, least value.
_NUMBERS = (
    ("RESMERGE_SPACE_RUNNING", "running", 1),
    ("RESMERGE_SPACE_JOBS_PER_USER", "jobs_per_user", 1),
    ("RESMERGE_SPACE_ANONYMOUS_JOBS", "anonymous_jobs", 0),
    ("RESMERGE_SPACE_MAX_EXPERTS", "max_experts", 1),
    ("RESMERGE_SPACE_MAX_HEADER_BYTES", "max_header_bytes", 1),
    ("RESMERGE_SPACE_ANONYMOUS_PLANS", "anonymous_plans", 0),
    ("RESMERGE_SPACE_PLAN_SECONDS", "plan_seconds", 1),
    ("RESMERGE_SPACE_ANONYMOUS_PLAN_SECONDS", "anonymous_plan_seconds", 1),
    ("RESMERGE_SPACE_MERGE_SECONDS", "merge_seconds", 1),
    ("RESMERGE_SPACE_ANONYMOUS_MERGE_SECONDS", "anonymous_merge_seconds", 1),
    ("RESMERGE_SPACE_KEEP_SECONDS", "keep_seconds", 0),
    ("RESMERGE_SPACE_RESULT_BYTES", "result_bytes", 0),
    ("RESMERGE_SPACE_ASK_SECONDS", "ask_seconds", 0),
    ("RESMERGE_SPACE_PROMPTS", "prompts", 0),
)


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of an environment.

    Args:
        environment: of the process when None.

    Raises:
        RecipeError: a number is none, or too small.
    """
    env = os.environ if environment is None else environment
    numbers: dict[str, int] = {}
    for variable, field, least in _NUMBERS:
        text = env.get(variable, "").strip()
        if not text:
            continue
        if not text.isdigit() or int(text) < least:
            raise RecipeError(f"{variable} must be a whole number from {least}, not {text[:40]!r}.")
        numbers[field] = int(text)
    folder = env.get("RESMERGE_SPACE_DIR") or str(default_work_dir() / "space")
    return Settings(
        folder=Path(folder).expanduser().absolute(),
        **numbers,
    )
