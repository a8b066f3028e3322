"""ResMerge Stream: merge RL experts of one base model, one tensor at a time.

The same three steps as the command line, for Python:

    from resmerge_stream import load_recipe, plan_merge, run_merge

    plan = plan_merge(load_recipe("recipe.yml"), out="merged")
    for problem in plan.problems:
        print(problem)
    for event in run_merge(plan, out="merged"):
        print(event.name)

Importing this package does not import torch; running a merge does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .errors import ResMergeError, StoppedError
    from .planning.parts import Part
    from .planning.plan import Options, Plan, RefusedPlan, plan_merge
    from .planning.recipe_file import load_recipe
    from .recipe import Recipe
    from .run.engine import run_merge
    from .run.verify import verify_folder

__all__ = [
    "Options",
    "Part",
    "Plan",
    "Recipe",
    "RefusedPlan",
    "ResMergeError",
    "StoppedError",
    "__version__",
    "load_recipe",
    "plan_merge",
    "run_merge",
    "verify_folder",
]


_HOMES = {
    "errors": ("ResMergeError", "StoppedError"),
    "planning.parts": ("Part",),
    "planning.plan": ("Options", "Plan", "RefusedPlan", "plan_merge"),
    "planning.recipe_file": ("load_recipe",),
    "recipe": ("Recipe",),
    "run.engine": ("run_merge",),
    "run.verify": ("verify_folder",),
}


def __getattr__(name: str) -> Any:
    # Torch takes a second to import, and `--help` needs none of the library.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
