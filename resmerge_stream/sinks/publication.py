"""Publishing, as the user asked for it: declared once for flags, data and words. No network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from ..errors import RecipeError, shown
from ..sources import REPO_ID
from ..units import parse_size

# As the Hub writes a collection's address: owner/title-id.
_COLLECTION = re.compile(
    r"(?:https?://[^/\s]+/collections/)?([\w.-]{1,96}/[\w.-]{1,200})", re.ASCII
)


class Flag(NamedTuple):
    """A field of a publication as the command line has it; without a metavar it says `value`."""

    field: str
    key: str
    help: str
    metavar: str = ""
    value: bool = True

    @property
    def word(self) -> str:
        """The command line's name."""
        return f"--{self.key.replace('_', '-')}"


# In the order of `--help`.
FLAGS = (
    Flag("repo_id", "push_to", "publish to this repository; a new one is private", "NS/NAME"),
    Flag("public", "private", "keep it private (default for a new one)", value=False),
    Flag("public", "public", "make it public when the merge is complete"),
    Flag("update", "update", "replace the model in it, the plan lists the files; or, in the "
         "output folder, this merge's result where its sources changed"),
    Flag("create_pr", "create_pr", "open a pull request on it instead; change nothing else"),
    Flag("collection", "collection", "add the model to this collection of yours", "OWNER/SLUG"),
    Flag("discuss", "discuss", "open a discussion in it when the merge is done"),
    Flag("max_disk", "max_disk", "disk space for shards not yet sent (default: two shards per "
         "process); 0: write none", "SIZE"),
)  # fmt: skip
# What plain data says in other words, and what belongs to a machine.
_NOT_IN_DATA = ("repo_id", "public", "max_disk")


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

    @classmethod
    def of_flags(cls, given: Mapping[str, Any]) -> Self:
        """Return what flags say, by key; what is empty leaves the default.

        Raises:
            RecipeError: a value is wrong.
        """
        found: dict[str, Any] = {
            flag.field: given[flag.key] if flag.metavar else flag.value
            for flag in FLAGS
            if given.get(flag.key)
        }
        if "max_disk" in found:
            found["max_disk"] = parse_size(found["max_disk"], name="max-disk")
        return cls(**found)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self | None:
        """Return how plain data asks to publish, as `said` writes it; None for files.

        Raises:
            RecipeError: something is wrong.
        """
        public, repo_id = document.get("public"), document.get("push_to") or ""
        if not isinstance(public, bool | None):
            raise RecipeError("public must be true or false.")
        found = {name: document.get(name, default) for name, default in cls.defaults().items()}
        for name, default in cls.defaults().items():
            if not isinstance(found[name], type(default)):
                wanted = "true or false" if default is False else "text"
                raise RecipeError(f"{name} must be {wanted}, not {shown(found[name])}.")
        if not isinstance(repo_id, str):
            raise RecipeError(f"push_to must be namespace/name, not {shown(repo_id)}.")
        repo_id = repo_id.strip()
        return cls(repo_id=repo_id, public=public, **found) if repo_id else None

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return what plain data says beside the repository and its visibility, by default."""
        return {one.name: one.default for one in fields(cls) if one.name not in _NOT_IN_DATA}

    def words(self) -> list[str]:
        """Return the command line's words for it, without those at their defaults."""
        return words_of({one.name: getattr(self, one.name) for one in fields(self)})

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


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Return the command line's words for a publication's values, by field."""
    words = []
    for flag in FLAGS:
        value = values.get(flag.field)
        if flag.metavar:
            words += [flag.word, str(value)] if value not in (None, "") else []
        elif value is flag.value:
            words.append(flag.word)
    return words


def said(publication: Publication | None) -> dict[str, Any]:
    """Return how to publish as plain data, for `Publication.from_dict`."""
    return {
        "push_to": publication.repo_id if publication is not None else "",
        "public": publication.public if publication is not None else None,
        **{
            name: getattr(publication, name, default)
            for name, default in Publication.defaults().items()
        },
    }
