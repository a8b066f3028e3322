"""What a merge's models are called in what is published.

Nothing published shows where something lies on this machine, or names a private or gated model
unless that was allowed: decided here, once, for card, report, recipe and picture.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..planning.plan import Plan
from ..recipe import BUCKETS, ModelRef
from ..sources import Checkpoint
from ..units import printable


@dataclass(frozen=True, slots=True)
class PublicName:
    """How a model appears in what is published.

    Attributes:
        name: what it is called; unique among the sources of a merge.
        kind: ``hub``, ``local``, ``bucket`` or ``private``.
        revision: the commit, where it may be told.
        subfolder: of the repository, likewise.
    """

    name: str
    kind: str
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        where = {"local": " (local folder)", "bucket": " (in a bucket)"}
        return self.name + where.get(self.kind, "")

    @property
    def pinned(self) -> str:
        """As a recipe writes it."""
        return str(ModelRef(self.name, self.revision, subfolder=self.subfolder))


class PublicNames:
    """The public names of a plan's models, and the replacing of the others.

    Args:
        plan: its checkpoints are named.
        name_private: whether private and gated models of the Hub are named.

    Attributes:
        sources: one a model of the plan.
        hidden: by the public name, the model, where the name does not say where that is.
    """

    def __init__(self, plan: Plan, name_private: bool) -> None:
        self.sources: list[PublicName] = []
        self.hidden: dict[str, ModelRef] = {}
        self._replace: dict[str, str] = {}
        taken: dict[str, str] = {}
        for part, source in zip(plan.parts, plan.checkpoints, strict=True):
            public = _public_name(source, part, name_private, taken)
            self.sources.append(public)
            self._hide(source, public)
        self.experts = self.sources[-len(plan.experts) :]
        self.base = None if plan.base is None else self.sources[0]
        places = [ref.place for ref in plan.recipe.models]
        self._of_place = dict(zip(places, self.sources, strict=True))
        self.tokenizer: PublicName | None = None
        if plan.tokenizer is not None:
            self.tokenizer = _public_name(plan.tokenizer, "tokenizer", name_private, taken)
            self._hide(plan.tokenizer, self.tokenizer)
            asked = plan.recipe.tokenizer
            if asked is not None and isinstance(asked.source, ModelRef):
                self._of_place[asked.source.place] = self.tokenizer
        if plan.speaker is not None and plan.recipe.generation_config is not None:
            public = _public_name(plan.speaker, "generation config", name_private, taken)
            self._hide(plan.speaker, public)
            self._of_place[plan.recipe.generation_config.place] = public
        longest_first = sorted(self._replace, key=len, reverse=True)
        # Whole names only: org/a must not be found in org/a-b, nor a folder "." in a full stop.
        start = r"(?<![\w./~-])"
        parts = [("" if os.path.isabs(t) else start) + re.escape(t) for t in longest_first]
        self._pattern = re.compile(rf"(?:{'|'.join(parts) or '(?!)'})(?![\w-]|\.\w)")

    def pinned(self, ref: ModelRef) -> str:
        """Return a model of the recipe as a published recipe names it."""
        return self._of_place[ref.place].pinned

    def clean(self, text: str) -> str:
        """Return text with every path and hidden name replaced by the public one."""
        return self._pattern.sub(lambda found: self._replace[found.group()], text)

    def clean_all(self, value: Any) -> Any:
        """Return plain data with every text in it cleaned; keys too."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, Mapping):
            return {self.clean_all(key): self.clean_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean_all(item) for item in value]
        return value

    def clean_report(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return a report fit to be published; of its tensors only the warnings hold text."""
        if not self._replace:
            return dict(report)
        tensors = [
            {**row, "warnings": self.clean_all(row["warnings"])} if row.get("warnings") else row
            for row in report["tensors"]
        ]
        others = {key: value for key, value in report.items() if key != "tensors"}
        cleaned: dict[str, Any] = self.clean_all(others)
        recipe = cleaned["recipe"]
        experts = recipe["models"][: len(self.experts)]
        written = [[(model, "model")] for model in experts]
        if self.base is not None:
            # Listed among the models too, where it takes part itself: after the experts.
            listed = [(model, "model") for model in recipe["models"][len(experts) :]]
            written = [[(recipe, "base_model"), *listed], *written]
        for entry, places, source in zip(cleaned["sources"], written, self.sources, strict=True):
            entry["id"] = source.name
            if source.kind != "hub":
                entry["revision"] = entry["subfolder"] = None
                for place, key in places:
                    place[key] = source.name
        return {key: tensors if key == "tensors" else cleaned[key] for key in report}

    def _hide(self, source: Checkpoint, public: PublicName) -> None:
        if public.kind == "hub":
            return
        here = os.path.abspath(os.path.expanduser(source.folder or source.id))
        place = here if public.kind == "local" else source.id
        self.hidden[public.name] = ModelRef(place, source.revision, subfolder=source.subfolder)
        written = {source.id, source.folder or source.id}
        written |= {os.path.abspath(text) for text in written if public.kind == "local"}
        for text in written:
            if text != public.name:
                self._replace.setdefault(text, public.name)


def _public_name(
    source: Checkpoint, part: str, name_private: bool, taken: dict[str, str]
) -> PublicName:
    """Return what a model is called in public; `taken` maps names to the ids that have them."""
    if source.folder is not None:
        # Its last name says enough, without what is above it.
        name = os.path.basename(os.path.abspath(source.folder))
        kind, name = "local", printable(name).strip() or "folder"
    elif source.revision is None:
        below = source.id.removeprefix(BUCKETS).split("/")[2:]
        kind, name = "bucket", printable(below[-1]) if below else f"a model ({part})"
    elif name_private or not (source.is_private or source.gated):
        return PublicName(source.id, "hub", source.revision, source.subfolder)
    else:
        kind, name = "private", f"a private model ({part})"
    wanted, number = name, 2
    while taken.setdefault(name, source.id) != source.id:
        name, number = f"{wanted}-{number}", number + 1
    return PublicName(name, kind)
