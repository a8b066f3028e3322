"""The built-in expert group: small models really trained by reinforcement learning.

A base of a million parameters that reads single characters, and four experts, each trained from it
by reinforcement learning on one of four tasks (`tasks`). What `resmerge-stream demo` merges.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from ..recipe import ModelRef, Recipe
from .accuracy import Accuracy
from .tasks import TASKS

# Of the held-out prompts that the demo asks; training asked none of them.
SEED = 7
# What the demo sets beside its merge: the two that everybody tries first, those of the literature
# that do best here, and ResMerge.
BESIDE = ("mean", "task_arithmetic", "tsv_m", "swudi", "resmerge")

_FOLDER = Path(__file__).parent


def builtin_group() -> dict[str, Path]:
    """Return the checkpoint folders of the built-in group: "base", then "rl-TASK" by task."""
    return {name: _FOLDER / name for name in ("base", *(f"rl-{task}" for task in TASKS))}


def builtin_adapters() -> dict[str, Path]:
    """Return the folders of the experts as LoRA adapters of rank 16: "lora-TASK" by task.

    They were extracted from the experts (``resmerge-stream extract``), not trained.
    """
    return {f"lora-{task}": _FOLDER / f"lora-{task}" for task in TASKS}


def built_in_recipe(*, lora: bool = False) -> Recipe:
    """Return the recipe that merges the built-in group with every default.

    Args:
        lora: the experts as adapters rather than whole.
    """
    base, *experts = builtin_group().values()
    if lora:
        experts = list(builtin_adapters().values())
    return Recipe(ModelRef(str(base)), tuple(ModelRef(str(expert)) for expert in experts))


def merged_otherwise(folder: Path, recipe: Recipe) -> dict[str, Path]:
    """Merge the built-in group by every method of `BESIDE`, and return the folders by method."""
    # With torch, which the recipe alone does not need.
    from ..studies.compare import run_comparison
    from ..studies.compare_plan import plan_comparison

    comparison = plan_comparison(recipe, BESIDE, out=folder / "merges")
    try:
        for _ in run_comparison(comparison, work_dir=folder / "work"):
            pass
    finally:
        comparison.close()
    return {method: folder / "merges" / method for method in BESIDE}


def demo_accuracies(
    merges: Mapping[str, Path | str],
    n_prompts: int,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Accuracy]]:
    """Return the accuracy of base, experts and merges of them, by model and task.

    Args:
        merges: the merged models' folders, by what they are called.
        n_prompts: held-out prompts per task.
        say: told each model's name before its prompts are asked.
    """
    # With torch, which the recipe alone does not need.
    from .evaluate import evaluate

    accuracies = {}
    for name, folder in {**builtin_group(), **merges}.items():
        say(name)
        accuracies[name] = evaluate(Path(folder), n_prompts, SEED)
    return accuracies
