"""Everything that the endpoints share: accounts, repositories, contents, settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .accounts import Accounts
from .job_runner import JobRecord
from .objects import Objects
from .sign_in import SignIns
from .signing import Signer
from .store import Store
from .xet import XetStores


def machine(
    name: str, cpu: int, ram: int, disk: int, usd_minute: float, gpu: str = ""
) -> dict[str, Any]:
    """A flavour as the real Hub lists it; sizes in GB."""
    model, _, vram = gpu.partition(" ")
    accelerator = {
        "type": "gpu", "model": model, "quantity": "1", "vram": vram, "manufacturer": "Nvidia"
    }  # fmt: skip
    return {
        "name": name,
        "prettyName": name,
        "cpu": f"{cpu} vCPU",
        "ram": f"{ram} GB",
        "ephemeralStorage": f"{disk} GB",
        "accelerator": accelerator if gpu else None,
        "unitCostMicroUSD": round(usd_minute * 1e6),
        "unitCostUSD": usd_minute,
        "unitLabel": "minute",
    }


def _hardware() -> list[dict[str, Any]]:
    return [
        machine("cpu-basic", 2, 16, 50, 0.000167),
        machine("cpu-upgrade", 8, 32, 50, 0.0005),
        machine("cpu-xl", 16, 124, 1000, 0.016667),
        machine("t4-small", 4, 15, 50, 0.006667, "T4 16 GB"),
    ]


@dataclass(slots=True, kw_only=True)
class Settings:
    """How the Hub behaves; every attribute may be changed at any time.

    Attributes:
        multipart_over: LFS files above this many bytes are uploaded in parts.
        part_bytes: the size of such a part.
        verify_uploads: hash what was uploaded and refuse it when it is not what was announced.
        url_lifetime: seconds for which a signed URL is good.
        allow_delete: whether repositories may be deleted.
        hardware: the flavours of Jobs, as the Hub lists them.
        run_jobs: run the commands of Jobs, with these variables added; None records them only.
        sign_in_lifetime: seconds for which a token from the sign-in is good.
        tells_xet_hash: name the Xet hash of files that came by Xet; without it none can be copied.
    """

    multipart_over: int = 50_000_000
    part_bytes: int = 20_000_000
    verify_uploads: bool = True
    url_lifetime: float = 3600.0
    allow_delete: bool = True
    hardware: list[dict[str, Any]] = field(default_factory=_hardware)
    run_jobs: Mapping[str, str] | None = None
    sign_in_lifetime: float = 8 * 3600.0
    tells_xet_hash: bool = True


@dataclass(slots=True, kw_only=True)
class Recorded:
    """Requests that the Hub writes down: Jobs, and what was asked of Spaces.

    Attributes:
        jobs: job id → what the Hub answers about it, its log, its process.
        collections: ``owner/title-id`` → the models in it.
        payloads: (`METHOD path`, JSON body) in the order in which they came; may hold secrets.
    """

    jobs: dict[str, JobRecord] = field(default_factory=dict)
    collections: dict[str, list[str]] = field(default_factory=dict)
    payloads: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Services:
    """One Hub's parts, given to every endpoint."""

    accounts: Accounts
    objects: Objects
    store: Store
    xet: XetStores
    signer: Signer
    settings: Settings
    recorded: Recorded
    sign_ins: SignIns
    endpoint: str = ""
    cdn: str = ""
