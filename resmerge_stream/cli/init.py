"""The command ``init``: a recipe to begin with, that plans, with a comment on every key."""

import argparse
import textwrap
from dataclasses import replace

import yaml

from ..errors import OutputExistsError, RecipeError
from ..experts.group import built_in_recipe
from ..methods import describe_methods, method_class
from ..recipe import Recipe, override
from ..specs import RECIPE_DTYPES
from . import console

_TEXT = """\
# What to merge, and how: in mergekit's vocabulary; docs/recipes.md lists every key.
# resmerge-stream plan {out}                  says what it takes, and what is wrong
# resmerge-stream merge {out} --out merged    merges

# {about}
# 'resmerge-stream methods' lists all.
{method}
# The model that every expert was trained from: a folder, or namespace/name[@revision] on the Hub.
{base}
# The experts, whole models or LoRA adapters.{weights}
{models}
# The method's parameters, with their defaults.
{parameters}

# The dtype of the result: {dtypes}. Left out, it is the base's.
# dtype: bfloat16

# Which tokens the result has: base, union (those of all models), or a model. Left out, rows are
# matched by number, and models with other tokens are refused.
# tokenizer: {{source: union}}

# auto takes the chat template that most models have. Left out, it is that of the tokenizer.
# chat_template: auto
"""


def init(args: argparse.Namespace) -> int:
    """Run ``init`` and return its exit code.

    Raises:
        RecipeError: the models or the method are none.
        OutputExistsError: the file is there already, or cannot be written.
    """
    begun = None if args.base or args.expert else built_in_recipe()
    recipe = override(begun, base=args.base, experts=args.expert, method=args.method)
    text = commented(recipe, args.out)
    try:
        with open(args.out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as exc:
        raise OutputExistsError(f"{args.out!r} exists already. Name another file.") from exc
    except (OSError, ValueError) as exc:
        raise RecipeError(f"{args.out!r} cannot be written: {exc}.") from exc
    console.say(f"wrote {args.out}; next: resmerge-stream plan {args.out}")
    return 0


def commented(recipe: Recipe, out: str) -> str:
    """Return a recipe as YAML with a comment on every key.

    Args:
        recipe: what it merges.
        out: what its file will be called.

    Raises:
        RecipeError: there is no such method.
    """
    method = method_class(recipe.method)
    (about,) = (one for one in describe_methods() if one["name"] == method.name)
    # Defaults would go over what a preset says.
    given, mark = recipe.parameters, "# " if recipe.parameters else ""
    rows = [f"  {yaml.safe_dump({key: value}).strip()}" for key, value in given.items()]
    for one in about["parameters"]:
        said = f"{one['label']} [{allowed}]" if (allowed := console.allowed(one)) else one["label"]
        row = yaml.safe_dump({one["name"]: one["default"]}).strip()
        rows += [] if one["name"] in given else [f"  {mark}{row}  # {said}"]
    head, _, models = replace(recipe, parameters={}).to_yaml().partition("models:\n")
    name, _, base = head.partition("\n")
    weighted = f" Each may have its own {method.weight_key}." if method.weighted else ""
    return _TEXT.format(
        out=out,
        about="\n# ".join(textwrap.wrap(" ".join(about["summary"].split()), 96)),
        method=name + "\n",
        base=base,
        weights=weighted,
        models=f"models:\n{models}",
        parameters="\n".join(["parameters:", *rows]) if rows else "# parameters: it has none.",
        dtypes=", ".join(RECIPE_DTYPES),
    )
