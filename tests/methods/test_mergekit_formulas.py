"""mergekit's methods on groups that nobody stored an output of, against formulas in float64.

Other numbers of experts, parameters, tied and untied heads, bfloat16 and float32, one file and
shards. The formulas are written from mergekit's documentation of 0.1.5, element by element, and
share no line with the library.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resmerge_stream import Options
from resmerge_stream.methods import MERGEKITS
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


def summed(base, deltas, own, shared):
    """Return W0 + λ Σ wᵢ Δᵢ, divided by Σ wᵢ where asked."""
    weights = [each["weight"] for each in own]
    total = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    divisor = sum(weights) if shared["normalize"] else 1.0
    return base + shared["lambda"] * total / divisor


def elected(base, deltas, own, shared):
    """Elect the sign with more weight, add what agrees, divided by its weights where asked."""
    weights = [each["weight"] for each in own]
    stack = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    agrees = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    total = torch.where(agrees, stack, 0.0).sum(0)
    if shared["normalize"]:
        divisor = sum(w * each for w, each in zip(weights, agrees.double(), strict=True))
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return base + shared["lambda"] * total


def enlarged(whole, kept):
    """Return what is kept, its L1 norm that of the whole; as it is where either is nothing."""
    before, after = whole.abs().sum(), kept.abs().sum()
    return kept * (before / after) if min(before, after) >= 1e-7 else kept


def sparsified(combined, thinned):
    """Return the formula that thins each change, enlarges it where asked, and combines them."""

    def formula(base, models, own, shared):
        deltas = []
        for model, each in zip(models, own, strict=True):
            delta = model - base
            kept = thinned(delta, each)
            deltas.append(enlarged(delta, kept) if shared.get("rescale") else kept)
        return combined(base, deltas, own, shared)

    return formula


def whole(delta, each):
    """Keep all of it."""
    return delta


def largest(delta, each):
    """Keep the ⌊d·n⌋ largest, one at least, and what is as large as the least of them."""
    kept = max(int(each["density"] * delta.numel()), 1)
    least = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(delta.abs() >= least, delta, 0.0)


def middle(delta, each):
    """Keep ⌊d·n⌋ below the ⌊γ·n⌋ largest, or further up where fewer are left than that."""
    n = delta.numel()
    kept = int(each["density"] * n)
    if kept == 0:
        return delta * 0
    above = min(int(each["gamma"] * n), n - kept)
    descending = delta.abs().flatten().sort(descending=True).values
    most, least = descending[above], descending[above + kept - 1]
    return torch.where((delta.abs() <= most) & (delta.abs() >= least), delta, 0.0)


def stocked(base, models):
    """Return t · mean + (1 − t) · W0 with t from the mean cosine of the changes."""
    deltas = [(model - base).flatten() for model in models]
    cosines = []
    for i, a in enumerate(deltas):
        for b in deltas[:i]:
            cosines.append(float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-6)))
    c, n = sum(cosines) / len(cosines), len(models)
    t = n * c / (1 + (n - 1) * c)
    return t * sum(models) / n + (1 - t) * base


def model_stock(base, models, own, shared):
    """Return the mean drawn to the base, in the tensor or in each row."""
    if not shared["filter_wise"] or base.dim() < 2:
        return stocked(base, models)
    rows = range(len(base))
    return torch.stack([stocked(base[i], [model[i] for model in models]) for i in rows])


def ram(base, models, own, shared):
    """Average what several changed by more than ε, add what one alone did."""
    return shared_mean(base, models, shared["epsilon"], lambda shared_share: 1.0)


def ramplus_tl(base, models, own, shared):
    """As RAM; a lone change grows with the share of its model's changes that others have too."""
    r, alpha = shared["r"], shared["alpha"]
    return shared_mean(base, models, shared["epsilon"], lambda ratio: 1 + r * min(ratio, alpha))


def shared_mean(base, models, epsilon, growth):
    """Return RAM's merge; lone changes times a function of shared ÷ lone ones of that model."""
    deltas = [model - base for model in models]
    changed = [delta.abs() > epsilon for delta in deltas]
    count = sum(each.double() for each in changed)
    total = torch.zeros_like(base)
    for delta, each in zip(deltas, changed, strict=True):
        alone, together = each & (count == 1), each & (count > 1)
        ratio = int(together.sum()) / max(int(alone.sum()), epsilon)
        total = total + torch.where(alone, growth(ratio) * delta, 0.0)
        total = total + torch.where(together, delta / count.clamp_min(1.0), 0.0)
    return base + total


def nearswap(base, models, own, shared):
    """Move every weight towards the model's, by t at most."""
    delta = models[0] - base
    return base + delta.clamp(-shared["t"], shared["t"])


def passthrough(base, models, own, shared):
    """Return the model times its factor."""
    return own[0]["scale"] * models[0]


def karcher(base, models, own, shared):
    """Walk to the point from which the models lie around on the sphere; the mean of lengths."""
    lengths = [model.norm() for model in models]
    units = [model / length for model, length in zip(models, lengths, strict=True)]
    point = sum(units) / sum(units).norm()
    for _ in range(shared["max_iter"]):
        away = []
        for unit in units:
            cosine = (unit * point).sum().clamp(-1, 1)
            across = unit - cosine * point
            if across.norm() > 1e-12:
                away.append(cosine.acos() * across / across.norm())
        step = sum(away) / len(units) if away else torch.zeros_like(point)
        if step.norm() < shared["tol"]:
            break
        point = step.norm().cos() * point + step.norm().sin() * step / step.norm()
    return sum(lengths) / len(lengths) * point


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
    """Return W0 plus the point between two changes, by tensor, row or column."""
    first, second = (each["weight"] for each in own)
    a, b = (model - base for model in models)

    def between(x, y):
        return on_arc(x, y, second / (first + second), lambda cosine: 1 - cosine**2 < 1e-12)

    if shared["nuslerp_flatten"] or a.dim() < 2:
        return base + between(a, b)
    if shared["nuslerp_row_wise"]:  # the name is mergekit's: it is an angle a column
        return base + torch.stack([between(*pair) for pair in zip(a.T, b.T, strict=True)]).T
    return base + torch.stack([between(*pair) for pair in zip(a, b, strict=True)])


def multislerp(base, models, own, shared):
    """Return W0 plus the mean of the changes on the sphere, by one step in the tangent space."""
    weights = [each["weight"] for each in own]
    if shared["normalize_weights"]:
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


class Case(NamedTuple):
    """What is drawn for a method, and its formula.

    Attributes:
        formula: of base, models, parameters of each model and of the merge.
        least, most: experts.
        of_model, of_merge: parameters.
        may_tie: whether experts may have changes of equal size (bfloat16), which mergekit's sorts
            order as they like.
        has_base: whether the recipe names a base; the formula gets zeros otherwise.
        is_far: whether the experts are so far from each other that arcs are no lines.
    """

    formula: Callable[..., Any]
    least: int
    most: int
    of_model: Mapping[str, Any]
    of_merge: Mapping[str, Any]
    may_tie: bool = True
    has_base: bool = True
    is_far: bool = False


WEIGHT = {"weight": WEIGHTS}
COMBINED = {"normalize": st.booleans(), "lambda": st.floats(0.2, 1.5)}
RESCALED = {**COMBINED, "rescale": st.booleans()}
TRIMMED = {**WEIGHT, "density": SHARES}
CRUMBS = {**TRIMMED, "gamma": st.floats(0.0, 0.3)}
# Random ones are drawn whole here, and below density 1 by their distribution further down.
DENSE = {**WEIGHT, "density": st.just(1.0)}
EPSILONS = {"epsilon": st.sampled_from([1e-5, 1.3e-3, 3.1e-3])}
BY_LINE = {"nuslerp_flatten": st.just(False), "nuslerp_row_wise": st.booleans()}
ON_SPHERE = {"normalize_weights": st.booleans()}

CASES = {
    "linear": Case(linear, 2, 5, WEIGHT, {"normalize": st.booleans()}, has_base=False),
    "task_arithmetic": Case(sparsified(summed, whole), 1, 5, WEIGHT, COMBINED),
    "ties": Case(sparsified(elected, largest), 1, 5, TRIMMED, RESCALED),
    "breadcrumbs": Case(sparsified(summed, middle), 1, 4, CRUMBS, RESCALED),
    "breadcrumbs_ties": Case(sparsified(elected, middle), 1, 4, CRUMBS, RESCALED),
    "dare_linear": Case(sparsified(summed, whole), 1, 4, DENSE, COMBINED),
    "dare_ties": Case(sparsified(elected, whole), 1, 4, DENSE, COMBINED),
    "della": Case(sparsified(elected, whole), 1, 4, DENSE, COMBINED),
    "della_linear": Case(sparsified(summed, whole), 1, 4, DENSE, COMBINED),
    "model_stock": Case(model_stock, 2, 5, {}, {"filter_wise": st.booleans()}),
    "sce": Case(sce, 2, 5, {}, {"select_topk": SHARES}, may_tie=False),
    "ram": Case(ram, 1, 5, {}, EPSILONS),
    "ramplus_tl": Case(
        ramplus_tl, 1, 5, {},
        {**EPSILONS, "r": st.floats(0.0, 2.0), "alpha": st.floats(0.1, 2.0)},
    ),
    "nearswap": Case(nearswap, 1, 1, {}, {"t": st.floats(1e-5, 5e-3)}),
    "passthrough": Case(
        passthrough, 1, 1, {"scale": st.sampled_from([0.9, 0.25, -1.5])}, {}, has_base=False
    ),
    "karcher": Case(
        karcher, 2, 5, {},
        {"max_iter": st.integers(1, 12), "tol": st.sampled_from([1e-5, 1e-9])},
        has_base=False, is_far=True,
    ),
    "slerp": Case(slerp, 1, 1, {}, {"t": st.floats(0.0, 1.0)}),
    "slerp far apart": Case(slerp, 1, 1, {}, {"t": st.floats(0.0, 1.0)}, is_far=True),
    "nuslerp": Case(nuslerp, 2, 2, WEIGHT, {"nuslerp_flatten": st.just(True)}),
    "nuslerp by line": Case(nuslerp, 2, 2, WEIGHT, BY_LINE),
    "nuslerp of models": Case(
        nuslerp, 2, 2, WEIGHT, {"nuslerp_flatten": st.just(True)}, has_base=False, is_far=True
    ),
    "nuslerp of models by line": Case(nuslerp, 2, 2, WEIGHT, BY_LINE, has_base=False, is_far=True),
    "multislerp": Case(multislerp, 2, 5, WEIGHT, ON_SPHERE),
    "multislerp of models": Case(multislerp, 2, 5, WEIGHT, ON_SPHERE, has_base=False, is_far=True),
}  # fmt: skip


def move(group, factor):
    """Move the experts to so many times their distance from the base."""
    base = read_tensors(group.base)
    for expert in group.experts:
        for file in expert.glob("*.safetensors"):
            tensors = load_file(file)
            farther = {key: base[key] + factor * (t - base[key]) for key, t in tensors.items()}
            save_file(farther, file, {"format": "pt"})


def merged(folder, method, group, own, shared, *, has_base=True, seed=0, out="out"):
    """Write a recipe as mergekit has it, merge it to float32, and return the tensors."""
    models = [
        {"model": str(expert), **({"parameters": each} if each else {})}
        for expert, each in zip(group.experts, own, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32"}
    if has_base:
        recipe["base_model"] = str(group.base)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    plan = plan_merge(load_recipe(path), Options(seed=seed), out=folder / out)
    list(run_merge(plan, out=folder / out, work_dir=folder / "work"))
    return read_tensors(folder / out)


def doubles(folder):
    """Return a folder's tensors in float64."""
    return {name: tensor.double() for name, tensor in read_tensors(folder).items()}


def is_close(found, wanted, base):
    """Return whether a tensor is right to 1e-5 of its update, beside float32's own rounding."""
    error = (found.double() - wanted).norm()
    return bool(error <= 2e-7 * base.norm() + 1e-5 * (wanted - base).norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],  # a failure is shown as it was drawn: each try is a whole merge
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_a_drawn_merge_is_its_formula(name, data):
    """To 1e-5 of the update, beside float32's own rounding of the weights."""
    case = CASES[name]
    count = data.draw(st.integers(case.least, case.most), label="experts")
    own = [
        {key: data.draw(values, label=key) for key, values in case.of_model.items()}
        for _ in range(count)
    ]
    shared = {key: data.draw(values, label=key) for key, values in case.of_merge.items()}
    is_narrow = case.may_tie and data.draw(st.booleans(), label="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        group = make_group(
            Path(folder),
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
        if case.is_far:
            move(group, 50)
        method = name.partition(" ")[0]

        found = merged(Path(folder), method, group, own, shared, has_base=case.has_base)

        base, *models = map(doubles, group.folders)
    assert set(found) == set(base)
    for key, W0 in base.items():
        origin = W0 if case.has_base else torch.zeros_like(W0)
        wanted = case.formula(origin, [model[key] for model in models], own, shared)
        assert is_close(found[key], wanted, W0), key


@pytest.mark.parametrize("seed", [0, 1])
def test_arcee_fusion_takes_what_matters_more_than_most(tmp_path, seed):
    """Every entry beyond 1e-3 of the threshold is the model's or the base's, as its importance
    in float64 says."""
    group = make_group(tmp_path, experts=1, hidden=12, dtype=torch.float32, seed=seed)

    move(group, 100)  # else the divergence is float32's noise, here and in mergekit

    found = merged(tmp_path, "arcee_fusion", group, [{}], {})

    base, model = map(doubles, group.folders)
    undecided = 0
    for key, W0 in base.items():
        p, q = (torch.softmax(x, -1) + 1e-8 for x in (model[key], W0))
        matters = (model[key] - W0).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
        ordered = matters.flatten().sort().values
        low, middle, high = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.25, 0.5, 0.75))
        threshold = middle + 1.5 * (high - low)
        is_clear = (matters - threshold).abs() > 1e-3 * threshold
        undecided += int((~is_clear).sum())
        wanted = torch.where(matters >= threshold, model[key], W0)
        assert torch.allclose(found[key].double()[is_clear], wanted[is_clear], atol=1e-6), key
    assert undecided <= 0.002 * sum(W0.numel() for W0 in base.values())


def odds(method, delta, density, epsilon):
    """Return each entry's chance to stay: equal, or from d − ε to d + ε by rank in its row."""
    if not method.startswith("della"):
        return torch.full_like(delta, density)
    ranks = delta.abs().argsort(-1).argsort(-1).double()
    return density - epsilon + 2 * epsilon * ranks / (delta.shape[-1] - 1)


def is_likely(count, odds):
    """Return whether so many of independent events are within five standard deviations."""
    return abs(float(count) - float(odds.sum())) <= 5 * float((odds * (1 - odds)).sum().sqrt()) + 1


@pytest.mark.parametrize(
    ("method", "combined"),
    [("dare_linear", summed), ("dare_ties", elected),
     ("della_linear", summed), ("della", elected)],
)  # fmt: skip
def test_a_random_merge_drops_by_chance_and_combines_what_is_left(tmp_path, method, combined):
    """Each expert alone shows what stays: as many entries as the density says, of mergekit's
    distribution. All together, enlarged to the whole norm, are the formula of just these."""
    group = make_group(
        tmp_path, experts=3, layers=1, hidden=32, vocab=64, dtype=torch.float32, tied=False, seed=3
    )
    densities, epsilons, weights = (0.5, 0.25, 0.8), (0.2, 0.1, 0.15), (0.5, 2.0, 1.0)
    base, *models = map(doubles, group.folders)
    deltas = [{key: model[key] - W0 for key, W0 in base.items()} for model in models]

    def parameters(weights):
        own = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
        if method.startswith("della"):
            own = [{**each, "epsilon": e} for each, e in zip(own, epsilons, strict=True)]
        return own

    def stays(i, seed=0):
        own = parameters([float(i == j) for j in range(3)])
        shared = {"normalize": False, "rescale": False, "lambda": 1.0}
        found = merged(tmp_path, method, group, own, shared, seed=seed, out=f"alone{i}-{seed}")
        kept = {}
        for key, W0 in base.items():
            update, delta = found[key].double() - W0, deltas[i][key]
            kept[key] = update.abs() > delta.abs() / 2
            assert is_close(found[key], W0 + delta * kept[key], W0), key
        return kept

    masks = [stays(i) for i in range(3)]
    others = stays(0, seed=1)
    for key in base:
        chances = [
            odds(method, delta[key], d, e)
            for delta, d, e in zip(deltas, densities, epsilons, strict=True)
        ]
        for mask, chance, delta in zip(masks, chances, deltas, strict=True):
            sizes = delta[key].abs()
            is_large = sizes > sizes.median(-1, keepdim=True).values
            for part in (is_large, ~is_large):
                assert is_likely(mask[key][part].sum(), chance[part]), key
        assert is_likely((masks[0][key] & masks[1][key]).sum(), chances[0] * chances[1]), key
        assert is_likely((masks[0][key] & others[key]).sum(), chances[0] ** 2), key
    own = parameters(weights)
    for normalize in (True, False):
        shared = {"normalize": normalize, "rescale": True, "lambda": 0.7}

        found = merged(tmp_path, method, group, own, shared, out=f"all-{normalize}")

        for key, W0 in base.items():
            thinned = [
                enlarged(delta[key], delta[key] * mask[key])
                for delta, mask in zip(deltas, masks, strict=True)
            ]
            assert is_close(found[key], combined(W0, thinned, own, shared), W0), key


def test_every_method_of_mergekits_is_held_to_a_formula():
    """A method that is added to the list gets a formula here."""
    assert {name.partition(" ")[0] for name in CASES} | {"arcee_fusion"} == MERGEKITS
