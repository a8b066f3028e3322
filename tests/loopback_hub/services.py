"""Everything that the endpoints share: accounts, repositories, contents, settings."""

from dataclasses import dataclass, field
from typing import Any

from .accounts import Accounts
from .objects import Objects
from .signing import Signer
from .store import Store
from .xet import XetStores


@dataclass(slots=True, kw_only=True)
class Settings:
    """How the Hub behaves; every attribute may be changed at any time.

    Attributes:
        multipart_over: LFS files above this many bytes are uploaded in parts.
        part_bytes: the size of such a part.
        verify_uploads: hash what was uploaded and refuse it when it is not what was announced.
        url_lifetime: seconds for which a signed URL is good.
        allow_delete: whether repositories may be deleted.
    """

    multipart_over: int = 50_000_000
    part_bytes: int = 20_000_000
    verify_uploads: bool = True
    url_lifetime: float = 3600.0
    allow_delete: bool = True


@dataclass(slots=True, kw_only=True)
class Recorded:
    """Requests that the Hub only writes down: Jobs, and what was asked of Spaces.

    Attributes:
        jobs: job id → what the Hub answers about it.
        payloads: (`METHOD path`, JSON body) in the order in which they came; may hold secrets.
    """

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
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
    endpoint: str = ""
    cdn: str = ""
