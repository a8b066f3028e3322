"""What PEFT's `add_weighted_adapter` makes of a weighted sum of adapters, beside this tool's.

    python -m benchmarks.peft_sums

The four built-in adapters (rank 16), each with the weight 1/4, and the same at ranks that differ.
For every way: ‖merge − Σ wᵢ Δᵢ‖ / ‖Σ wᵢ Δᵢ‖ over all modules together, and the rank of the result.
Markdown for docs/adapters.md.
"""

import shutil
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

import resmerge_stream.experts
from resmerge_stream import Options, Recipe, plan_merge, run_merge
from resmerge_stream.recipe import ModelRef

WAYS = {
    "`linear`": {"combination_type": "linear"},
    "`svd`, rank 16": {"combination_type": "svd", "svd_rank": 16},
    "`svd`, rank 64": {"combination_type": "svd", "svd_rank": 64},
    "`cat`": {"combination_type": "cat"},
    "`ties`, density 0.5": {"combination_type": "ties", "density": 0.5},
}
FOLDER = Path(resmerge_stream.experts.__file__).parent
ADAPTERS = tuple(FOLDER / f"lora-{task}" for task in ("add", "sort", "reverse", "close"))


def deltas_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's ΔW by module, float64, from its files alone."""
    config = peft.PeftConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if ".lora_A." in key:
            down, up = tensors[key].double(), tensors[key.replace(".lora_A.", ".lora_B.")].double()
            module = key.removeprefix("base_model.model.").split(".lora_A.")[0]
            scale = config.lora_alpha / config.r
            found[module] = scale * (up @ down)
    return found


def distance(made: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return ‖made − exact‖ / ‖exact‖ over all modules."""
    apart = sum(float((made[name] - exact[name]).square().sum()) for name in exact)
    return float((apart / sum(float(value.square().sum()) for value in exact.values())) ** 0.5)


def by_peft(way: dict[str, object]) -> tuple[dict[str, torch.Tensor], int]:
    """Return what PEFT makes of the adapters, and its rank."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, ADAPTERS[0], adapter_name=ADAPTERS[0].name)
    for folder in ADAPTERS[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    names = [folder.name for folder in ADAPTERS]
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", **way)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["merged"])
        return deltas_of(Path(folder) / "merged"), peft.PeftConfig.from_pretrained(
            Path(folder) / "merged"
        ).r


def by_us(rank: int | None) -> tuple[dict[str, torch.Tensor], int]:
    """Return what the mean makes of the adapters, and its rank."""
    refs = tuple(ModelRef(str(folder)) for folder in ADAPTERS)
    recipe = Recipe(ModelRef(str(FOLDER / "base")), refs, "mean")
    out = Path(tempfile.mkdtemp()) / "out"
    plan = plan_merge(recipe, Options(output="adapter", adapter_rank=rank), out=out)
    list(run_merge(plan, out=out))
    plan.close()
    made = deltas_of(out), peft.PeftConfig.from_pretrained(out).r
    shutil.rmtree(out.parent)
    return made


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    every = [deltas_of(folder) for folder in ADAPTERS]
    exact = {name: sum(one[name] for one in every) / len(every) for name in every[0]}
    print("| way | rank | ‖merge − exact sum‖ / ‖exact sum‖ |\n|---|---:|---:|")
    for name, way in WAYS.items():
        made, rank = by_peft(way)
        print(f"| PEFT, {name} | {rank} | {distance(made, exact):.1e} |")
    for rank in (None, 16):
        made, found = by_us(rank)
        print(f"| here, `mean`{f', --adapter-rank {rank}' if rank else ''} | {found} | "
              f"{distance(made, exact):.1e} |")  # fmt: skip


if __name__ == "__main__":
    main()
