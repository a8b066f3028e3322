"""mergekit's methods on groups that nobody stored an output of, against formulas in float64.

Other numbers of experts, parameters, tied and untied heads, bfloat16 and float32, one file and
shards. The formulas are written from mergekit's documentation of 0.1.5, element by element, and
share no line with the library.
"""

import math
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import load_recipe
from resmerge_stream.run.engine import run_merge
from tests.support.checkpoints import make_group, read_tensors

pytestmark = pytest.mark.usefixtures("without_picture")
# Powers of two: products are exact, so that no sign and no threshold hangs on rounding.
WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 2.0])
SHARES = st.floats(0.2, 0.9)


def linear(base, models, own, shared):
    """Return Σ wᵢ Wᵢ, divided by Σ wᵢ."""
    weights = [each["weight"] for each in own]
    total = sum(w * model for w, model in zip(weights, models, strict=True))
    return total / sum(weights) if shared["normalize"] else total


def task_arithmetic(base, models, own, shared):
    """Return W0 + λ Σ wᵢ Δᵢ, divided by Σ wᵢ where asked."""
    weights = [each["weight"] for each in own]
    total = sum(w * (model - base) for w, model in zip(weights, models, strict=True))
    divisor = sum(weights) if shared["normalize"] else 1.0
    return base + shared["lambda"] * total / divisor


def ties(base, models, own, shared):
    """Keep each expert's largest ⌊d·n⌋ changes, elect signs, average what agrees."""
    weighted, weights = [], []
    for model, each in zip(models, own, strict=True):
        delta = (model - base).flatten()
        kept = max(int(each["density"] * delta.numel()), 1)
        least = delta.abs().sort(descending=True).values[kept - 1]
        weighted.append(each["weight"] * torch.where(delta.abs() >= least, delta, 0.0))
        weights.append(each["weight"])
    stack = torch.stack(weighted)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agrees = (stack.sign() == sign).double()
    total = (stack * agrees).sum(0)
    if shared["normalize"]:
        divisor = (agrees * torch.tensor(weights).double()[:, None]).sum(0)
        total = total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return base + shared["lambda"] * total.view_as(base)


def model_stock(base, models, own, shared):
    """Return t · mean + (1 − t) · W0 with t from the mean cosine of the changes."""
    deltas = [(model - base).flatten() for model in models]
    cosines = []
    for i, a in enumerate(deltas):
        for b in deltas[:i]:
            cosines.append(float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-6)))
    c, n = sum(cosines) / len(cosines), len(models)
    t = n * c / (1 + (n - 1) * c)
    return t * sum(models) / n + (1 - t) * base


def sce(base, models, own, shared):
    """Select the entries that vary most, weight by energy, drop the minority's sign."""
    stack = torch.stack([(model - base).flatten() for model in models])
    spread = stack.var(0, unbiased=False)
    count = int(torch.count_nonzero(spread) * shared["select_topk"])
    chosen = torch.zeros_like(spread)
    chosen[spread.sort(descending=True).indices[:count]] = 1
    stack = stack * chosen
    energies = stack.square().mean(1)
    if not energies.any():
        return base  # nothing is selected
    weights = energies / energies.sum()
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agrees = (stack.sign() == sign).double() * weights[:, None]
    total = (stack * agrees).sum(0) / agrees.sum(0).clamp_min(1e-6)
    return base + total.view_as(base)


def on_arc(a, b, t, parallel):
    """Return the point between two tensors along their arc; on the line where nearly parallel."""
    lengths = a.norm().clamp_min(1e-8) * b.norm().clamp_min(1e-8)
    cosine = float((a.flatten() @ b.flatten()) / lengths)
    if parallel(cosine):
        return (1 - t) * a + t * b
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def slerp(base, models, own, shared):
    """Return the point t between base and model."""
    return on_arc(base, models[0], shared["t"], lambda cosine: abs(cosine) > 0.9995)


def nuslerp(base, models, own, shared):
    """Return W0 plus the point between two changes, at their share of the weights."""
    first, second = (each["weight"] for each in own)
    deltas = [model - base for model in models]
    share = second / (first + second)
    return base + on_arc(*deltas, share, lambda cosine: 1 - cosine**2 < 1e-12)


def multislerp(base, models, own, shared):
    """Return W0 plus the mean of the changes on the sphere, by one step in the tangent space."""
    weights = [each["weight"] for each in own]
    weights = [w / sum(weights) for w in weights]
    deltas = [model - base for model in models]
    units = [delta / (delta.norm() + 1e-8) for delta in deltas]
    mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(
        w * (unit - float(unit.flatten() @ mean.flatten()) * mean)
        for w, unit in zip(weights, units, strict=True)
    )
    turn = tangent.norm() + 1e-8
    point = turn.cos() * mean + turn.sin() / turn * tangent
    return base + sum(w * d.norm() for w, d in zip(weights, deltas, strict=True)) * point


# Formula; least and most experts; parameters of each model; of the merge; whether experts may
# have changes of equal size (bfloat16), which mergekit's sorts order as they like.
METHODS = {
    "linear": (linear, 2, 5, {"weight": WEIGHTS}, {"normalize": st.booleans()}, True),
    "task_arithmetic": (
        task_arithmetic, 1, 5, {"weight": WEIGHTS},
        {"normalize": st.booleans(), "lambda": st.floats(0.2, 1.5)}, True,
    ),
    "ties": (
        ties, 1, 5, {"weight": WEIGHTS, "density": SHARES},
        {"normalize": st.booleans(), "lambda": st.floats(0.2, 1.5)}, True,
    ),
    "model_stock": (model_stock, 2, 5, {}, {}, True),
    "sce": (sce, 2, 5, {}, {"select_topk": SHARES}, False),
    "slerp": (slerp, 1, 1, {}, {"t": st.floats(0.0, 1.0)}, True),
    "nuslerp": (nuslerp, 2, 2, {"weight": WEIGHTS}, {}, True),
    "multislerp": (multislerp, 2, 5, {"weight": WEIGHTS}, {}, True),
}  # fmt: skip


def merged(folder, method, group, own, shared):
    """Write a recipe as mergekit has it, merge it to float32, and return the tensors."""
    models = [
        {"model": str(expert), **({"parameters": each} if each else {})}
        for expert, each in zip(group.experts, own, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32"}
    if method != "linear":
        recipe["base_model"] = str(group.base)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    plan = plan_merge(load_recipe(path), out=folder / "out")
    list(run_merge(plan, out=folder / "out", work_dir=folder / "work"))
    return read_tensors(folder / "out")


@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],  # a failure is shown as it was drawn: each try is a whole merge
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_a_drawn_merge_is_its_formula(method, data):
    """To 1e-5 of the update, beside float32's own rounding of the weights."""
    formula, least, most, of_model, of_merge, may_tie = METHODS[method]
    count = data.draw(st.integers(least, most), label="experts")
    own = [
        {key: data.draw(values, label=key) for key, values in of_model.items()}
        for _ in range(count)
    ]
    shared = {key: data.draw(values, label=key) for key, values in of_merge.items()}
    is_narrow = may_tie and data.draw(st.booleans(), label="bfloat16")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        group = make_group(
            folder,
            experts=count,
            layers=data.draw(st.integers(1, 2), label="layers"),
            hidden=8,
            vocab=24,
            dtype=torch.bfloat16 if is_narrow else torch.float32,
            sharded=data.draw(st.booleans(), label="sharded"),
            tied=data.draw(st.booleans(), label="tied"),
            sparse=data.draw(st.sampled_from([0.0, 0.4]), label="unchanged"),
            seed=data.draw(st.integers(0, 99), label="seed"),
        )

        found = merged(folder, method, group, own, shared)

        base, *models = ({k: t.double() for k, t in read_tensors(f).items()} for f in group.folders)
    assert set(found) == set(base)
    for key, W0 in base.items():
        wanted = formula(W0, [model[key] for model in models], own, shared)
        error = (found[key].double() - wanted).norm()
        assert error <= 2e-7 * W0.norm() + 1e-5 * (wanted - W0).norm(), key
