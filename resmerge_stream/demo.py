"""The built-in expert group: what `resmerge-stream demo` merges."""

from .device import default_work_dir
from .recipe import ModelRef, Recipe
from .synthetic import Shape, Updates, write_group

EXPERTS = 3
_VERSION = "v2"


def built_in_recipe() -> Recipe:
    """Return the recipe of the built-in group, after making the group if it is not there.

    It is made in the user's cache folder: a base and three experts with Qwen2 names, 1.2 MB each,
    in two shards, tied embeddings.
    """
    folder = default_work_dir() / f"built-in-group-{_VERSION}"
    done = folder / "complete"
    if not done.exists():
        write_group(
            folder,
            Shape(hidden_size=128, intermediate_size=320, num_hidden_layers=4, vocab_size=512),
            experts=EXPERTS,
            updates=Updates(gap=2.0, unchanged=0.5),
            max_shard_bytes=800_000,
        )
        done.touch()
    experts = tuple(ModelRef(str(folder / f"expert{i}")) for i in range(EXPERTS))
    return Recipe(ModelRef(str(folder / "base")), experts)
