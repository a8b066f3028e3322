"""The Hub as one object: it serves two ports, and tests set it up and look into it from inside."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from . import api, buckets, cdn, commits, community, jobs, lfs, oidc, tree
from .accounts import Accounts, Role
from .faults import Faults
from .gate import Gate
from .limits import Limits
from .log import RequestLog
from .objects import Objects
from .repo import Entry, Repo
from .services import Recorded, Services, Settings
from .serving import Serving
from .sign_in import SignIns
from .signing import Signer
from .store import Content, Store, folder_files
from .web import Route, Router
from .xet import XetStores

ROUTES: Mapping[str, tuple[Route, ...]] = {
    "api": (
        *lfs.API_ROUTES,
        *cdn.API_ROUTES,
        *api.ROUTES,
        *jobs.ROUTES,
        *oidc.ROUTES,
        *commits.ROUTES,
        *community.ROUTES,
        *tree.ROUTES,
        *buckets.ROUTES,
    ),
    "cdn": (*lfs.CDN_ROUTES, *cdn.CDN_ROUTES),
}
Files = Mapping[str, Content] | Path
"""A repository's files: path → content, or a folder whose files are linked, not copied."""


class LoopbackHub:
    """A Hub on this machine.

    Accounts, repositories and contents live in `folder`: a new Hub on the same folder goes on where
    the old one stopped. The log, the faults, the limits and the recorded payloads do not last.

    Attributes:
        log: what was asked and answered; see `RequestLog`.
        faults: what goes wrong; see `Faults`.
        limits: latency and bandwidth; see `Limits`.
        settings: how the Hub behaves; see `Settings`.
        recorded: Jobs and requests to Spaces; see `Recorded`.
    """

    def __init__(
        self, folder: Path, *, port: int = 0, cdn_port: int = 0, log_file: Path | None = None
    ) -> None:
        self.log = RequestLog(log_file)
        self.faults = Faults()
        self.limits = Limits()
        self.settings = Settings()
        self.recorded = Recorded()
        objects = Objects(folder / "objects")
        self._services = Services(
            accounts=Accounts(folder / "accounts.json"),
            objects=objects,
            store=Store(folder / "repos", objects),
            xet=XetStores(folder / "xet", objects),
            signer=Signer(folder / "signing.key"),
            settings=self.settings,
            recorded=self.recorded,
            sign_ins=SignIns(folder / "sign-in.pem"),
        )
        gates = {name: self._gate(name, routes) for name, routes in ROUTES.items()}
        self._serving = Serving(gates, {"api": port, "cdn": cdn_port})

    def _gate(self, name: str, routes: tuple[Route, ...]) -> Gate:
        return Gate(
            name,
            Router(self._services, routes),
            log=self.log,
            limits=self.limits,
            faults=self.faults,
            user_of=self._user_of,
        )

    def _user_of(self, header: str) -> str | None:
        identity = self._services.accounts.identify(header.removeprefix("Bearer "))
        return identity.user if identity else None

    @property
    def endpoint(self) -> str:
        """The URL of the API, for `HF_ENDPOINT` or `HfApi(endpoint=...)`."""
        return self._services.endpoint

    @property
    def cdn(self) -> str:
        """The URL of the storage, where downloads and uploads are sent to."""
        return self._services.cdn

    def start(self) -> None:
        """Serve; a stopped Hub comes back on the same ports."""
        sockets = self._serving.listen()
        self._services.endpoint = self._serving.url("api")
        self._services.cdn = self._serving.url("cdn")
        self._serving.start(sockets)

    def stop(self) -> None:
        """Stop serving; connections in use are dropped, Jobs that run are killed."""
        for job in self.recorded.jobs.values():
            job.end("ERROR", "the Hub stopped")
        self._serving.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # What a test sets up.

    def add_user(
        self, name: str, token: str | None = None, *, role: Role = "write", pro: bool = False
    ) -> str:
        """Add a user and return a token for them, made up if none is given."""
        self._services.accounts.add_user(name, pro=pro)
        return self._services.accounts.add_token(name, role, token)

    def add_token(self, user: str, role: Role, token: str | None = None) -> str:
        """Give a user one more token, and return it."""
        return self._services.accounts.add_token(user, role, token)

    def add_app_token(
        self, user: str, scopes: str = oidc.SCOPES, *, lifetime: float = 8 * 3600.0
    ) -> str:
        """Return a token as a sign-in gives it to an app, good for `lifetime` seconds."""
        accounts = self._services.accounts
        return accounts.add_app_token(user, oidc.CLIENT_ID, scopes.split(), lifetime=lifetime)

    def revoke_token(self, token: str) -> None:
        """Make a token invalid from now on."""
        self._services.accounts.revoke(token)

    def add_org(self, name: str, members: Mapping[str, str]) -> None:
        """Add an organisation; members map user → `read`, `write` or `admin`."""
        self._services.accounts.add_org(name, members)

    def set_quota(self, namespace: str, limit_bytes: int | None) -> None:
        """Limit a namespace's private storage; None lifts the limit."""
        self._services.accounts.set_quota(namespace, limit_bytes)

    def add_repo(
        self,
        repo_id: str,
        files: Files | None = None,
        *,
        private: bool = False,
        gated: bool | str = False,
        kind: str = "models",
        fake_above: int | None = None,
        xet: bool = False,
    ) -> str:
        """Create a repository and return the commit of its main branch.

        `gated` is False, `auto` or `manual`, `kind` is `models`, `datasets`, `spaces` or `buckets`;
        for the other arguments see `push`.
        """
        repo = self._services.store.create(kind, repo_id, private=private, gated=gated)
        if files is None:
            return repo.at("main").id
        return self.push(repo_id, files, kind=kind, fake_above=fake_above, xet=xet)

    def push(
        self,
        repo_id: str,
        files: Files,
        *,
        branch: str = "main",
        kind: str = "models",
        fake_above: int | None = None,
        xet: bool = False,
    ) -> str:
        """Commit files from inside, without HTTP, and return the commit id.

        With `fake_above`, files of more bytes are not read and get a name that is no real SHA-256.
        With `xet`, large files are also copied into Xet storage, for clients to read there.
        """
        contents = folder_files(files) if isinstance(files, Path) else files
        entries = {
            path: self._services.store.entry(path, content, fake_above=fake_above)
            for path, content in contents.items()
        }
        for entry in entries.values():
            if xet and entry.lfs and self._services.xet.find(entry.sha256) is None:
                self._services.xet.ingest(entry.sha256)
        return self.repo(repo_id, kind).commit(f"refs/heads/{branch}", entries, title="Push").id

    def remove(self, repo_id: str, path: str, *, kind: str = "models") -> None:
        """Commit from inside, without HTTP, that a file is gone."""
        self.repo(repo_id, kind).commit("refs/heads/main", {path: None}, title="Remove")

    def grant(self, repo_id: str, user: str) -> None:
        """Let a user at the files of a gated repository."""
        repo = self.repo(repo_id)
        repo.update_settings(granted=[*repo.settings["granted"], user])

    def expire_urls(self) -> None:
        """Make every signed URL that was given out so far expire now."""
        self._services.signer.expire_all()

    # What a test looks at.

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        """A repository as it is on disk: settings, refs, commits; KeyError if there is none."""
        repo = self._services.store.repo(kind, repo_id)
        if repo is None:
            raise KeyError(repo_id)
        return repo

    def has_repo(self, repo_id: str, kind: str = "models") -> bool:
        """Whether a repository exists."""
        return self._services.store.repo(kind, repo_id) is not None

    def files(self, repo_id: str, revision: str = "main") -> Mapping[str, Entry]:
        """The files of a revision: path → size, hashes."""
        return self.repo(repo_id).at(revision).files

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The content of a file, whichever way it was uploaded."""
        sha256 = self.files(repo_id, revision)[path].sha256
        if sha256 not in self._services.objects:
            self._services.xet.materialise(sha256)
        return self._services.objects.path(sha256).read_bytes()

    def env(
        self, token: str | None = None, *, xet: bool = True, home: Path | None = None
    ) -> dict[str, str]:
        """Environment variables that point a client process here.

        huggingface_hub reads them when it is imported: they are for subprocesses.
        """
        quiet = ("DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS")
        env = {"HF_ENDPOINT": self.endpoint} | {f"HF_HUB_{name}": "1" for name in quiet}
        if token is not None:
            env["HF_TOKEN"] = token
        if not xet:
            env["HF_HUB_DISABLE_XET"] = "1"
        if home is not None:
            env["HF_HOME"] = str(home)
        return env

    def space_env(self, space_id: str, *, scopes: str = oidc.SCOPES) -> dict[str, str]:
        """Environment variables that make a gradio app a Space whose visitors sign in here.

        Together with `env()`; there must be no `SPACE_HOST`.
        """
        return oidc.space_env(self.endpoint, space_id, scopes)
