"""The built-in expert group: small models really trained by reinforcement learning.

A base of a million parameters that reads single characters, and four experts, each trained from it
by reinforcement learning on one of four tasks (`tasks`). What `resmerge-stream demo` merges.
"""

from dataclasses import replace
from pathlib import Path

from ..recipe import ModelRef, Recipe, placed
from .tasks import TASKS

# What the demo sets beside its merge: the two that everybody tries first, those of the literature
# that do best here, and ResMerge.
BESIDE = ("mean", "task_arithmetic", "tsv_m", "swudi", "resmerge")

# What recipes and the web call the folders of the group; no path of a machine is in it.
PREFIX = "built-in/"

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


def built_in_folders() -> dict[str, str]:
    """Return the folders of the group by the names that recipes may use, such as built-in/base."""
    every = {**builtin_group(), **builtin_adapters()}
    return {PREFIX + name: str(folder) for name, folder in every.items()}


def name_of(place: str) -> str:
    """Return the built-in name of a folder of the group; any other place as it is."""
    return {folder: name for name, folder in built_in_folders().items()}.get(place, place)


def on_this_machine(recipe: Recipe) -> Recipe:
    """Return a recipe with the built-in names replaced by their folders; others as they are."""
    if not any(ref.id.startswith(PREFIX) for ref in recipe.models):
        return recipe
    folders = built_in_folders()

    def located(ref: ModelRef) -> ModelRef:
        on = ref.on and folders.get(ref.on, ref.on)
        return replace(ref, id=folders.get(ref.id, ref.id), on=on)

    return placed(recipe, {str(ref): located(ref) for ref in recipe.named})


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
