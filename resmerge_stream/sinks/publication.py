"""Publishing, as the user asked for it: where to, for whom, over what. No network."""

import re
from dataclasses import dataclass

from ..errors import RecipeError, shown
from ..sources import REPO_ID

# As the Hub writes a collection's address: owner/title-id.
_COLLECTION = re.compile(
    r"(?:https?://[^/\s]+/collections/)?([\w.-]{1,96}/[\w.-]{1,200})", re.ASCII
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """A repository as target of a merge.

    Attributes:
        repo_id: ``namespace/name``.
        public: what to make it at the very end; None leaves an existing repository as it is and
            a new one private.
        update: whether a model that stands there may be replaced.
        create_pr: whether to open a pull request there instead; nothing else there changes.
        collection: that the model is added to at the end, ``owner/title-id``; or nothing.
        discuss: whether to open a discussion there when everything is done.
        max_disk: bytes of weights that may be on this machine at a time; 0 sends them without
            any file, None allows two shards.
    """

    repo_id: str
    public: bool | None = None
    update: bool = False
    create_pr: bool = False
    collection: str = ""
    discuss: bool = False
    max_disk: int | None = None

    def words(self) -> list[str]:
        """Return the command line's words for it, without those at their defaults."""
        words = ["--push-to", self.repo_id]
        if self.public is not None:
            words.append("--public" if self.public else "--private")
        words += ["--update"] if self.update else []
        words += ["--create-pr"] if self.create_pr else []
        words += ["--collection", self.collection] if self.collection else []
        words += ["--discuss"] if self.discuss else []
        words += ["--max-disk", str(self.max_disk)] if self.max_disk is not None else []
        return words

    def __post_init__(self) -> None:
        if not REPO_ID.fullmatch(self.repo_id):
            raise RecipeError(
                f"{self.repo_id!r} is not a repository id. Write namespace/name.", field="push_to"
            )
        if self.create_pr and (self.public is not None or self.update):
            raise RecipeError(
                "a pull request does not change the repository. Leave out the visibility and the "
                "update.",
                field="create_pr",
            )
        if self.create_pr and (self.collection or self.discuss):
            raise RecipeError(
                "a pull request is already a discussion, and its model cannot join a collection "
                "yet. Leave both out.",
                field="create_pr",
            )
        if self.collection:
            found = _COLLECTION.fullmatch(self.collection)
            if found is None:
                raise RecipeError(
                    f"{shown(self.collection)} is not a collection. Write owner/title-id, as in "
                    "its address.",
                    field="collection",
                )
            object.__setattr__(self, "collection", found.group(1))
