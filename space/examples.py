"""The ready examples: the built-in expert group, also as adapters; the paper's two groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmerge_stream.experts.group import built_in_recipe, builtin_adapters
from resmerge_stream.recipe import ModelRef, Recipe

# What the web calls the folders of the built-in group; no path of this machine is ever shown.
PREFIX = "built-in/"


@dataclass(frozen=True, slots=True)
class Example:
    """A group of models to start from.

    Attributes:
        label: on the button.
        base: its id.
        experts: their ids.
        name: a name for the result; empty for files.
        method: what to start with; for the built-in group, what ``plan --advice`` says of it.
    """

    label: str
    base: str
    experts: tuple[str, ...]
    name: str
    method: str = "resmerge"

    @property
    def recipe(self) -> dict[str, Any]:
        """The example in mergekit's vocabulary."""
        return {
            "merge_method": self.method,
            "base_model": self.base,
            "models": list(self.experts),
        }


def built_in_folders() -> dict[str, str]:
    """Return the folders of the built-in group by the names that the web knows."""
    group = {Path(ref.id).name: ref.id for ref in built_in_recipe().models}
    adapters = {name: str(folder) for name, folder in builtin_adapters().items()}
    return {PREFIX + name: folder for name, folder in (group | adapters).items()}


def examples() -> tuple[Example, ...]:
    """Return the examples, the one that needs nothing first."""
    base, *experts = (PREFIX + Path(ref.id).name for ref in built_in_recipe().models)
    adapters = tuple(PREFIX + name for name in builtin_adapters())
    return (
        Example(
            "Built-in experts",
            base,
            tuple(experts),
            "",
            "head_regression",
        ),
        Example(
            "Qwen2.5-7B base, 3 experts",
            "Qwen/Qwen2.5-7B",
            (
                "hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo",
                "Open-Reasoner-Zero/Open-Reasoner-Zero-7B",
                "TIGER-Lab/General-Reasoner-Qwen2.5-7B",
            ),
            "qwen2.5-7b-resmerge",
        ),
        Example(
            "Qwen2.5-7B-Instruct, 3 experts",
            "Qwen/Qwen2.5-7B-Instruct",
            (
                "SII-Enigma/Qwen2.5-7B-Ins-AMPO",
                "BytedTsinghua-SIA/RL-MemoryAgent-7B",
                "emrecanacikgoz/Qwen2.5-7B-Instruct-ToolRL-grpo-cold",
            ),
            "qwen2.5-7b-instruct-resmerge",
        ),
        Example(
            "Built-in experts as LoRA adapters",
            base,
            adapters,
            "",
            "head_regression",
        ),
    )


def is_built_in(recipe: Recipe) -> bool:
    """Whether every model of a recipe comes with the app, so that no account is needed."""
    return all(ref.id.startswith(PREFIX) for ref in recipe.models)


def web_names(text: str) -> str:
    """Return text with the folders of the built-in group replaced by the names for the web."""
    for name, folder in built_in_folders().items():
        text = text.replace(folder, name)
    return text


def on_this_machine(recipe: Recipe) -> Recipe:
    """Return a recipe with the built-in names replaced by their folders; others as they are."""
    if not any(ref.id.startswith(PREFIX) for ref in recipe.models):
        return recipe
    folders = built_in_folders()

    def located(ref: ModelRef) -> ModelRef:
        return ModelRef(folders.get(ref.id, ref.id), ref.revision, ref.weight)

    return Recipe(
        located(recipe.base) if recipe.base is not None else None,
        tuple(located(ref) for ref in recipe.experts),
        recipe.method,
        recipe.parameters,
        recipe.dtype,
    )
