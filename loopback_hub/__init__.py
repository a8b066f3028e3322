"""A Hugging Face Hub on this machine: real HTTP on 127.0.0.1, storage on disk, faults on demand.

    with LoopbackHub(folder) as hub:
        token = hub.add_user("alice")
        hub.add_repo("alice/base", {"config.json": b"{}", "model.safetensors": Path("m.st")})
        hub.faults.add("503", path="/resolve/", times=1)
        api = HfApi(endpoint=hub.endpoint, token=token)
        ...
        assert hub.log.find(path="/resolve/")[0].status == 503

From a shell: `python -m loopback_hub --dir FOLDER`.
"""

from .faults import (
    FAULTS,
    Answer,
    Cut,
    Delay,
    Flip,
    Hold,
    Hook,
    IgnoreRange,
    Reset,
    Trickle,
    WrongRange,
)
from .log import Entry as LogEntry
from .objects import Sparse
from .server import LoopbackHub

__all__ = [
    "FAULTS",
    "Answer",
    "Cut",
    "Delay",
    "Flip",
    "Hold",
    "Hook",
    "IgnoreRange",
    "LogEntry",
    "LoopbackHub",
    "Reset",
    "Sparse",
    "Trickle",
    "WrongRange",
]
