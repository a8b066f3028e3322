"""Where the models lie that a finished merge does not name in public: kept on this machine alone.

Card, report and recipe call a folder by its last name, and a private model by its part. So that a
merge can be repeated and verified where it was made, what each such name stands for is written
into the user's cache folder, under the plan's hash; nothing of it lies in an output.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..device import default_work_dir
from ..documents import load_json
from ..recipe import ModelRef
from .durable import write_durably
from .folder import plan_hash_of

_PLAN_HASH = re.compile(r"[0-9a-f]{16}")


def keep_places(plan_hash: str, places: Mapping[str, ModelRef]) -> None:
    """Remember what a merge's public names stand for; nothing where none hides anything.

    Where the cache folder cannot be written, nothing is kept: no merge fails for it.

    Args:
        plan_hash: of the merge.
        places: by public name, the model.
    """
    if not places:
        return
    path = _file(plan_hash)
    document = {name: list(ref.place) for name, ref in places.items()}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(document).encode(), mode=0o600)


def places_of(out: Path) -> dict[str, ModelRef]:
    """Return what the public names of a merge stand for; empty where it was made elsewhere.

    Args:
        out: its folder, with its report; anybody may have written it.
    """
    plan_hash = plan_hash_of(out)
    if plan_hash is None or not _PLAN_HASH.fullmatch(plan_hash):
        return {}
    try:
        document = load_json(_file(plan_hash).read_bytes())
        return {
            name: ModelRef(id, revision, subfolder=subfolder)
            for name, (id, revision, subfolder) in document.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _file(plan_hash: str) -> Path:
    return default_work_dir() / "places" / f"{plan_hash}.json"
