"""What somebody asks for: what to merge, how to write it, where to publish it. No network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ..errors import RecipeError, shown
from ..recipe import Recipe
from ..sinks.publication import Publication
from .options import Options
from .recipe_file import parse_recipe, recipe_from_dict

# How to publish, and what that is by default; not part of what is asked without a repository.
_EXTRAS: dict[str, Any] = {"update": False, "create_pr": False, "collection": "", "discuss": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One merge, as it was asked for.

    The command line and the page make one, a job's process and its record carry one, and an
    unfinished merge on the Hub keeps one, so that it can be continued without the recipe.

    Attributes:
        recipe: what to merge.
        options: how to write it; those of the machine are not part of the plain data.
        publication: where to publish; None for files.
    """

    recipe: Recipe
    options: Options = field(default_factory=Options)
    publication: Publication | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for `from_dict`."""
        publication = self.publication
        return {
            "recipe": self.recipe.to_dict(),
            "options": self.options.to_dict(),
            "push_to": publication.repo_id if publication is not None else "",
            "public": publication.public if publication is not None else None,
            **{name: getattr(publication, name, default) for name, default in _EXTRAS.items()},
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Return what plain data asks for.

        Args:
            document: ``recipe`` in mergekit's vocabulary, as a mapping or as YAML; ``options`` (by
                their keys), ``push_to``, ``public``, ``update``, ``create_pr``, ``collection`` and
                ``discuss`` may be left out.

        Raises:
            RecipeError: something is wrong.
        """
        recipe, repo_id = document.get("recipe"), document.get("push_to") or ""
        public = document.get("public")
        extras = {name: document.get(name, default) for name, default in _EXTRAS.items()}
        if not isinstance(public, bool | None):
            raise RecipeError("public must be true or false.")
        for name, default in _EXTRAS.items():
            if not isinstance(extras[name], type(default)):
                wanted = "true or false" if default is False else "text"
                raise RecipeError(f"{name} must be {wanted}, not {shown(extras[name])}.")
        if not isinstance(repo_id, str):
            raise RecipeError(f"push_to must be namespace/name, not {shown(repo_id)}.")
        repo_id = repo_id.strip()
        return cls(
            recipe=parse_recipe(recipe) if isinstance(recipe, str) else recipe_from_dict(recipe),
            options=Options.from_dict(document.get("options") or {}),
            publication=Publication(repo_id=repo_id, public=public, **extras) if repo_id else None,
        )
