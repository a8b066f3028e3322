"""The built-in expert group: small models really trained by reinforcement learning.

A base of a million parameters that reads single characters, and four experts, each trained from it
by reinforcement learning on one of four tasks (`tasks`). What `resmerge-stream demo` merges.
"""

from collections.abc import Callable
from pathlib import Path

from ..recipe import ModelRef, Recipe
from .accuracy import Accuracy
from .tasks import TASKS

# Of the held-out prompts that the demo asks; training asked none of them.
SEED = 7

_FOLDER = Path(__file__).parent


def builtin_group() -> dict[str, Path]:
    """Return the checkpoint folders of the built-in group: "base", then "rl-TASK" by task."""
    return {name: _FOLDER / name for name in ("base", *(f"rl-{task}" for task in TASKS))}


def built_in_recipe() -> Recipe:
    """Return the recipe that merges the built-in group with every default."""
    base, *experts = builtin_group().values()
    return Recipe(ModelRef(str(base)), tuple(ModelRef(str(expert)) for expert in experts))


def demo_accuracies(
    merged: Path | str, n_prompts: int, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Accuracy]]:
    """Return the accuracy of base, experts and a merge of them, by model and task.

    Args:
        merged: the merged model's folder.
        n_prompts: held-out prompts per task.
        say: told each model's name before its prompts are asked.
    """
    # With torch, which the recipe alone does not need.
    from .evaluate import evaluate

    accuracies = {}
    for name, folder in {**builtin_group(), "merged": Path(merged)}.items():
        say(name)
        accuracies[name] = evaluate(folder, n_prompts, SEED)
    return accuracies
