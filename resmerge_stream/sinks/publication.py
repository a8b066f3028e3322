"""Publishing, as the user asked for it: where to, for whom, over what. No network."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..sources import REPO_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """A repository as target of a merge.

    Attributes:
        repo_id: ``namespace/name``.
        public: what to make it at the very end; None leaves an existing repository as it is and
            a new one private.
        update: whether a model that stands there may be replaced.
        max_disk: bytes of weights that may be on this machine at a time; 0 sends them without
            any file, None allows two shards.
    """

    repo_id: str
    public: bool | None = None
    update: bool = False
    max_disk: int | None = None

    def words(self) -> list[str]:
        """Return the command line's words for it, without those at their defaults."""
        words = ["--push-to", self.repo_id]
        if self.public is not None:
            words.append("--public" if self.public else "--private")
        words += ["--update"] if self.update else []
        words += ["--max-disk", str(self.max_disk)] if self.max_disk is not None else []
        return words

    def __post_init__(self) -> None:
        if not REPO_ID.fullmatch(self.repo_id):
            raise RecipeError(
                f"{self.repo_id!r} is not a repository id. Write namespace/name.", field="push_to"
            )
