"""What somebody asks for: what to merge, how to write it, where to publish it. No network."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ..errors import RecipeError, shown
from ..recipe import Recipe
from ..sinks.publication import Publication, said
from .options import Options
from .recipe_file import parse_recipe, recipe_from_dict


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
        return {
            "recipe": self.recipe.to_dict(),
            "chosen_by": self.recipe.chosen_by,
            "notes": list(self.recipe.notes),
            "options": self.options.to_dict(),
            **said(self.publication),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Return what plain data asks for.

        Args:
            document: ``recipe`` in mergekit's vocabulary, as a mapping or as YAML; its notes
                and who chose its method (``notes``, ``chosen_by``), ``options`` (by their keys)
                and how to publish (`Publication.from_dict`) may be left out.

        Raises:
            RecipeError: something is wrong.
        """
        recipe, publication = document.get("recipe"), Publication.from_dict(document)
        chosen_by, notes = document.get("chosen_by"), document.get("notes") or []
        if chosen_by not in (None, "default", "recipe", "option"):
            raise RecipeError(
                f"chosen_by must be default, recipe or option, not {shown(chosen_by)}."
            )
        if not (isinstance(notes, list) and all(isinstance(note, str) for note in notes)):
            raise RecipeError(f"notes must be a list of texts, not {shown(notes)}.")
        asked = parse_recipe(recipe) if isinstance(recipe, str) else recipe_from_dict(recipe)
        return cls(
            recipe=replace(
                asked,
                chosen_by=chosen_by or asked.chosen_by,
                notes=tuple(dict.fromkeys((*notes, *asked.notes))),
            ),
            options=Options.from_dict(document.get("options") or {}),
            publication=publication,
        )
