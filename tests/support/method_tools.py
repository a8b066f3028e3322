"""One matrix through one method, without a checkpoint: for the tests of the methods."""

import torch

from resmerge_stream.maths.task_vectors import TaskVectors, Workspace
from resmerge_stream.methods import Site, build_method
from resmerge_stream.specs import TensorSpec

MATRIX = "model.layers.0.self_attn.q_proj.weight"


def experts_of(base, deltas):
    """Return stored experts with these differences to a float32 base."""
    return [base + delta for delta in deltas]


def made_up(m, n, count, *, seed=0, share=0.0, scale=1e-3):
    """Return a base and deltas with a common direction, an own one and noise; float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    base = 0.02 * normal(m, n)
    common = torch.outer(normal(m), normal(n))
    deltas = []
    for _ in range(count):
        delta = scale * (normal(m, n) + common + torch.outer(normal(m), normal(n)))
        delta[torch.rand(m, n, generator=generator) < share] = 0
        # Dense weights are rounded; keep what is really the difference between them.
        deltas.append((base + delta) - base)
    return base, deltas


def run_method(method, base, experts, *, name=MATRIX, weights=None, seed=7, resident=True):
    """Return ΔW of one tensor and the update, counting passes over that tensor included.

    Args:
        method: a method object, or a name with its defaults.
        base, experts: as stored.
    """
    if isinstance(method, str):
        method = build_method(method, {})
    shape = tuple(base.shape)
    spec = TensorSpec(name, "F32", shape)
    rule = method.rule_for(spec, len(experts))
    matrices = [x.reshape(shape[0], -1) for x in (base, *experts)]
    workspace = Workspace(torch.device("cpu"))
    vectors = TaskVectors(
        matrices[0], matrices[1:], workspace, resident=resident and rule.needs_matrix
    )
    weights = weights or (1.0,) * len(experts)
    counted = {}
    for number in range(method.counting_passes()):
        counter = method.counter(number, counted, len(experts))
        counter.add(vectors, Site(rule, weights, seed, spec=spec, layers=2, counted=counted))
        counted |= counter.result()
    site = Site(rule, weights, seed, spec=spec, layers=2, counted=counted)
    update = method.merge(vectors, site)
    rows = [update.rows(block, vectors.stack(block)) for block in vectors.blocks()]
    return torch.cat(rows).reshape(shape), update


def relative(got, expected):
    """Return ‖got − expected‖ / ‖expected‖ in float64."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))


def vectors_of(base, deltas):
    """Return the task vectors of float32 experts."""
    workspace = Workspace(torch.device("cpu"))
    return TaskVectors(base, experts_of(base, deltas), workspace, resident=False)


def ties64(deltas, thresholds):
    """Return elected and averaged entries, float64."""
    kept = [
        torch.where((d.abs() >= t) & (d != 0), d.double(), 0.0)
        for d, t in zip(deltas, thresholds, strict=True)
    ]
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [(k * sign > 0).double() for k in kept]
    total = sum(k * a for k, a in zip(kept, agree, strict=True))
    return total / sum(agree).clamp_min(1)
