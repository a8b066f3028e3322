"""The ready examples: the built-in expert group, also as adapters; the paper's two groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmerge_stream.experts.group import (
    PREFIX,
    built_in_folders,
    built_in_recipe,
    builtin_adapters,
)
from resmerge_stream.recipe import DEFAULT_METHOD, Recipe


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
    method: str = DEFAULT_METHOD

    @property
    def recipe(self) -> dict[str, Any]:
        """The example in mergekit's vocabulary."""
        return {
            "merge_method": self.method,
            "base_model": self.base,
            "models": list(self.experts),
        }


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
