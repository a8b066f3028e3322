"""Random recipes by mergekit and here: ``python -m benchmarks.recipes --mergekit PYTHON``.

Each seed is one recipe in mergekit's language: models, slices or modules; values, gradients and
filters at every level; weights, dtypes and tokenizers. mergekit 0.1.5 runs in one process of its
own (PYTHON is its environment's), on the small models of ``tests/data``. A recipe counts as equal
if every tensor is, up to rounding; what differs is printed with its seed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from resmerge_stream.errors import ResMergeError
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import load_recipe
from resmerge_stream.report import card
from resmerge_stream.run.engine import run_merge

DATA = Path(__file__).parents[1] / "tests" / "data"
EXPERTS = ("expert0", "expert1", "expert2")
# Reads recipes and folders, a line each, and answers with what went wrong.
WORKER = """
import json, logging, os, shutil, sys, warnings
warnings.filterwarnings("ignore"); logging.disable(logging.CRITICAL)
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
for line in sys.stdin:
    recipe, out = json.loads(line)
    shutil.rmtree(out, ignore_errors=True)
    try:
        with open(recipe) as file:
            config = MergeConfiguration.model_validate(yaml.safe_load(file))
        run_merge(config, out, options=MergeOptions(quiet=True, write_model_card=False))
        said = ""
    except Exception as exc:
        said = f"{type(exc).__name__}: {str(exc)[:300]}"
    print(json.dumps(said), file=answers, flush=True)
"""

SHARE, SIGNED, SWITCH = (0.1, 1.0), (-0.5, 1.5), "switch"
WEIGHT: dict[str, Any] = {"weight": SIGNED}
# For each method: models beside the base, whether it has one, parameters of a model, of the merge.
# Methods that draw random numbers are asked to keep everything, so that there is nothing to draw.
METHODS: dict[str, tuple[tuple[int, int], str, dict[str, Any], dict[str, Any]]] = {
    "linear": ((1, 3), "maybe", {"weight": SHARE}, {"normalize": SWITCH}),
    "karcher": ((2, 3), "no", {}, {"max_iter": [5, 10, "10"], "tol": [1e-5, "1e-6"]}),
    "passthrough": ((1, 1), "no", {"scale": SIGNED}, {}),
    "nuslerp": ((2, 2), "maybe", {"weight": SHARE}, {"nuslerp_row_wise": SWITCH}),
    "multislerp": ((2, 3), "maybe", {"weight": SHARE}, {"normalize_weights": SWITCH}),
    "slerp": ((1, 1), "yes", {}, {"t": (0.0, 1.0)}),
    "nearswap": ((1, 1), "yes", {}, {"t": (0.001, 0.1)}),
    "arcee_fusion": ((1, 1), "yes", {}, {}),
    "task_arithmetic": ((1, 3), "yes", WEIGHT, {"normalize": SWITCH, "lambda": SIGNED}),
    "ties": (
        (1, 3), "yes", {**WEIGHT, "density": SHARE}, {"normalize": SWITCH, "lambda": SIGNED},
    ),
    "breadcrumbs": (
        (1, 3), "yes", {**WEIGHT, "density": (0.3, 0.8), "gamma": (0.01, 0.1)}, {"lambda": SIGNED},
    ),
    "breadcrumbs_ties": (
        (1, 3), "yes", {**WEIGHT, "density": (0.3, 0.8), "gamma": (0.01, 0.1)}, {"lambda": SIGNED},
    ),
    "dare_linear": ((1, 3), "yes", {**WEIGHT, "density": [1.0, "1"]}, {"lambda": SIGNED}),
    "dare_ties": ((1, 3), "yes", {**WEIGHT, "density": [1.0, 1]}, {"normalize": SWITCH}),
    "model_stock": ((2, 3), "yes", {}, {"filter_wise": SWITCH}),
    "sce": ((2, 3), "yes", {}, {"select_topk": SHARE}),
    "ram": ((2, 3), "yes", {}, {"epsilon": [1e-5, "1e-4"]}),
    "ramplus_tl": ((2, 3), "yes", {}, {"r": SHARE, "alpha": SHARE}),
}  # fmt: skip
FILTERS = ("self_attn", "mlp", "layers.1", "q_proj", "norm", "lm_head", "*", "nothing")


class Maker:
    """Makes one random recipe.

    Args:
        seed: of all choices.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.has_tokens = self.random.random() < 0.3
        self.models = "mergekit_tokens" if self.has_tokens else "mergekit"
        self.layers = 1 if self.has_tokens else 3
        self.method = self.random.choice(list(METHODS))

    def recipe(self) -> dict[str, Any]:
        """Return the recipe."""
        chance = self.random.random
        (least, most), has_base, _, _ = METHODS[self.method]
        names = [f"{self.models}/{name}" for name in EXPERTS]
        experts = self.random.sample(names, self.random.randint(least, most))
        base = (
            f"{self.models}/base"
            if has_base == "yes" or (has_base == "maybe" and chance() < 0.4)
            else None
        )
        document: dict[str, Any] = {"merge_method": self.method}
        form = self.random.choice(("models", "models", "slices", "module", "module slices"))
        is_slice = "slices" in form
        levels: list[dict[str, Any]] = [document]
        entries = [{"model": self._model(name)} for name in experts]
        if base and (is_slice or self.method == "linear" or chance() < 0.5):
            entries.insert(self.random.randint(0, len(entries)), {"model": self._model(base)})
        place = document
        if form.startswith("module"):
            place = {}
            document["modules"] = {"default": place}
            levels.append(place)
        if is_slice:
            for entry in entries:
                entry["layer_range"] = [0, self.layers]
            piece: dict[str, Any] = {"sources": entries}
            place["slices"] = [piece]
            levels.append(piece)
        else:
            place["models"] = entries
        if base:
            has_own = is_slice and chance() < 0.3
            if has_own:
                levels[-1]["base_model"] = base
            document["base_model"] = experts[0] if has_own and chance() < 0.5 else self._model(base)
        self._parameters(levels, entries)
        self._rest(document, levels, entries)
        return document

    def _model(self, name: str) -> Any:
        return name if self.random.random() < 0.8 else {"model": {"path": name}}

    def _parameters(self, levels: list[dict[str, Any]], entries: list[dict[str, Any]]) -> None:
        """Put settings at every level; a weight at the top, so that it is nowhere missing."""
        _, _, own, shared = METHODS[self.method]
        for key, kind in {**own, **shared}.items():
            for level in [*levels, *(entries if key in own else [])]:
                if self.random.random() < 0.5:
                    level.setdefault("parameters", {})[key] = self._setting(kind)
            if key == "weight":
                levels[0].setdefault("parameters", {}).setdefault(key, self._value(kind))
                held = levels[0]["parameters"][key]
                if isinstance(held, dict) or (isinstance(held, list) and isinstance(held[0], dict)):
                    levels[0]["parameters"][key] = self._value(kind)

    def _setting(self, kind: Any) -> Any:
        form = self.random.random()
        if form < 0.4:
            return self._value(kind)
        if form < 0.6:
            return self._gradient(kind)
        conditions = [self._condition(kind) for _ in range(self.random.randint(1, 3))]
        if self.random.random() < 0.4:
            conditions.append({"value": self._value(kind)})
        return conditions[0] if len(conditions) == 1 and form > 0.9 else conditions

    def _condition(self, kind: Any) -> dict[str, Any]:
        value = self._value(kind) if self.random.random() < 0.6 else self._gradient(kind)
        return {"filter": self.random.choice(FILTERS), "value": value}

    def _gradient(self, kind: Any) -> list[Any]:
        return [self._value(kind) for _ in range(self.random.randint(1, 4))]

    def _value(self, kind: Any) -> Any:
        if kind == SWITCH:
            return self.random.choice((True, False, 1, 0, 1.0, 0.0, "true", "no"))
        if isinstance(kind, list):
            return self.random.choice(kind)
        value = round(self.random.uniform(*kind), 3)
        return self.random.choice((value, value, value, str(value), f"{value:e}"))

    def _rest(
        self, document: dict[str, Any], levels: list[dict[str, Any]], entries: list[dict[str, Any]]
    ) -> None:
        """Put dtypes, tokenizers and keys that mergekit ignores."""
        chance = self.random.random
        document |= self.random.choice((
            {}, {"dtype": "float32"}, {"dtype": "torch.float32"},
            {"dtype": "float32", "out_dtype": "bfloat16"},
            {"dtype": "float32", "out_dtype": "float16"},
        ))  # fmt: skip
        if self.has_tokens:
            has_base = document.get("base_model") is not None
            source = self.random.choice(
                (*(["base"] if has_base else []), "union", f"{self.models}/expert1")
            )
            tokens: dict[str, Any] = {"source": source}
            if chance() < 0.3:
                tokens["tokens"] = {"<x>": {"source": {"kind": "zero"}, "force": True}}
            if chance() < 0.3:
                tokens["pad_to_multiple_of"] = self.random.choice((4, 8, "8"))
            document |= {"tokenizer": tokens} if chance() < 0.6 else {"tokenizer_source": source}
        for level in (*levels[1:], *entries):
            if chance() < 0.1:
                key, value = self.random.choice((
                    ("merge_method", "linear"), ("dtype", "float16"), ("name", "part"),
                    ("tokenizer_source", "union"), ("out_dtype", "bfloat16"),
                ))  # fmt: skip
                level[key] = value
        if chance() < 0.1:
            document.setdefault("parameters", {})["int8_mask"] = self.random.choice((True, 1.0))


def main() -> None:
    """Make recipes, run each by both, and print the counts and what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", required=True, metavar="PYTHON", help="sees mergekit 0.1.5")
    parser.add_argument("--seed", type=int, default=0, help="of the first recipe")
    parser.add_argument("--count", type=int, default=500, help="how many recipes mergekit must run")
    parser.add_argument("--show", action="store_true", help="print every recipe that differs")
    args = parser.parse_args()
    os.chdir(DATA)
    card.gates_png = lambda report: b""  # drawing takes twenty times as long as these merges
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        worker = subprocess.Popen(
            [args.mergekit, "-c", WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )  # fmt: skip
        seed = args.seed
        while sum(n for said, n in counts.items() if not said.startswith("mergekit")) < args.count:
            maker = Maker(seed)
            document = maker.recipe()
            said, details = outcome(maker, document, Path(folder), worker)
            counts[said] += 1
            if said not in ("equal", "mergekit refuses it"):
                print(f"seed {seed}: {maker.method}: {said}: {details}", flush=True)
                if args.show:
                    print(yaml.safe_dump(document, sort_keys=False), flush=True)
            seed += 1
        if worker.stdin:
            worker.stdin.close()
        worker.wait()
    print(f"seeds {args.seed} to {seed - 1}:")
    for said, number in counts.most_common():
        print(f"{number:5} {said}")
    sys.exit(counts["differs"] > 0)


def outcome(
    maker: Maker, document: dict[str, Any], folder: Path, worker: "subprocess.Popen[str]"
) -> tuple[str, str]:
    """Return what came of a recipe, and details.

    Args:
        maker: of the recipe.
        document: the recipe; its models are named from `DATA` on.
        folder: for the recipe and both results.
        worker: mergekit's process.
    """
    recipe, theirs, ours = folder / "recipe.yml", folder / "theirs", folder / "ours"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    if not worker.stdin or not worker.stdout:
        raise RuntimeError("mergekit's process has no pipes")
    worker.stdin.write(json.dumps([str(recipe), str(theirs)]) + "\n")
    worker.stdin.flush()
    refused = json.loads(worker.stdout.readline())
    shutil.rmtree(ours, ignore_errors=True)
    try:
        plan = plan_merge(load_recipe(recipe), out=ours)
        for _ in run_merge(plan, out=ours):
            pass
    except ResMergeError as exc:
        return ("mergekit refuses it" if refused else "refused here"), str(exc)[:300]
    if refused:
        return "mergekit refuses it", refused
    found = _tensors(ours)
    if maker.has_tokens:
        # mergekit numbers the tokens that models added in no fixed order.
        numbers, own = _tokens(theirs), _tokens(ours)
        if set(numbers) != set(own):
            return "differs", f"other tokens: {sorted(set(numbers) ^ set(own))[:5]}"
        order = [own[token] for token in sorted(numbers, key=numbers.__getitem__)]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found[name] = torch.cat([found[name][order], found[name][len(order) :]])
    worst = _difference(_tensors(theirs), found, _tensors(DATA / maker.models / "base"))
    return ("differs", worst) if worst else ("equal", "")


def _tokens(folder: Path) -> dict[str, int]:
    """Return the number of every token of a model."""
    said = json.loads((folder / "tokenizer.json").read_text())
    return said["model"]["vocab"] | {
        token["content"]: token["id"] for token in said["added_tokens"]
    }


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _difference(theirs: dict[str, Tensor], ours: dict[str, Tensor], base: dict[str, Tensor]) -> str:
    """Return the worst difference beyond rounding, in words; empty where there is none."""
    if set(theirs) != set(ours):
        return f"other tensors: {sorted(set(theirs) ^ set(ours))[:3]}"
    worst = (0.0, "")
    for name, a in theirs.items():
        b = ours[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}: {list(a.shape)} {a.dtype}, here {list(b.shape)} {b.dtype}"
        apart = (a.double() - b.double()).norm().item()
        changed = a.double() - base[name].double() if base[name].shape == a.shape else a.double()
        rounding = 2e-6 if a.dtype == torch.float32 else 2e-3
        allowed = 1e-4 * changed.norm().item() + rounding * a.double().norm().item() + 1e-9
        worst = max(worst, (apart / allowed, name))
    return f"{worst[0]:.3g} times what rounding explains in {worst[1]}" if worst[0] > 1 else ""


if __name__ == "__main__":
    main()
