"""Head regression: where an expert's head looks, the merge does what that expert does.

Each task vector Δ_i (m × n) gives k directions v_ir and their strengths σ_ir = ‖Δ_i v_ir‖: the
leading ones that a fixed number of block Krylov steps finds (`maths.block_krylov`), or with
``steps: exact`` its singular ones. With
a = 1/(1 + (N−1)·s̄), s̄ the mean cosine of the pairs of Δ clipped to [0, 1], the backbone is
B = a·ΣΔ_i: the sum if the experts are orthogonal, Δ if they are copies. With q_ir = σ_ir/σ_i1,

    P = [q_ir v_ir] (n × Nk)      E = [q_ir (Δ_i v_ir − B v_ir)] (m × Nk)
    ΔW = B + E (PᵀP + μI)⁻¹ Pᵀ,

which minimises Σ_i ‖(ΔW − Δ_i) V_i diag(q_i)‖² + μ‖ΔW − B‖²: ridge regression, for the inputs that
the heads respond to, anchored at B. Merging by regression is a known family: RegMean
(https://arxiv.org/abs/2212.09849) has the inputs' own covariances, WUDI
(https://arxiv.org/abs/2503.08099) and SWUDI (https://arxiv.org/abs/2606.07289) put Δ_iᵀΔ_i in
their place. New here are only the head's inputs as constraints, the backbone scaled by
coherence, and a cost that streams. docs/quality.md has what it made of small RL experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..maths.lazy import TaskVectors, Tensor, block_krylov, spectral, torch
from ..memory import gram_bytes, krylov_bytes, solver_bytes
from ..specs import TensorSpec
from .base import Combination, Rule, Site, Update, param
from .parts.elementwise import linear, with_product
from .parts.heads import head_report, heads_of, not_unique, project_heads
from .parts.spectral_method import SpectralMethod

# An expert shorter than this share of the longest one has less of a vote: its σ_i1 would scale
# its directions up to those of any other expert, however little it changed.
NEGLIGIBLE = 0.05
EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class HeadRegression(SpectralMethod):
    """On the inputs that an expert's strongest directions (its head) respond to, the merge does
    what that expert does; elsewhere it takes the sum of the updates, shortened as far as the
    experts agree."""

    name: ClassVar[str] = "head_regression"
    title: ClassVar[str] = "Head regression"
    paper: ClassVar[str] = "this project, after RegMean, SWUDI and WUDI-Merging"
    url: ClassVar[str] = "https://arxiv.org/abs/2503.08099"
    low_rank: ClassVar[bool] = True
    earlier: ClassVar[Mapping[str, Any]] = {"steps": EXACT}

    rank: int = param(16, "Directions k in a head", minimum=1, maximum=256)
    steps: str = param(
        "3",
        "Block Krylov steps that find a head, or exact",
        choices=("1", "2", "3", "4", EXACT),
    )
    mu: float = param(0.03, "Pull μ towards the backbone", minimum=1e-6, maximum=1e3)
    solver: str = param("auto", "How exact heads are found", choices=("auto", "lanczos", "dense"))

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return B + E (PᵀP + μI)⁻¹ Pᵀ; experts that changed nothing here do not count in N."""
        D = vectors.gram()
        energies = D.diagonal().tolist()
        alive = [i for i, energy in enumerate(energies) if energy > 0]
        if len(alive) == 1:
            return linear([float(energy > 0) for energy in energies], "head_regression")
        a, agreement = _backbone(D[alive][:, alive])
        if self.steps == EXACT:
            heads = heads_of(vectors, self.rank, energies, self.solver)
            V, Y = project_heads(vectors, heads, D)
        else:
            each = block_krylov.krylov_heads(vectors, self.rank, int(self.steps))
            heads = [head if e > 0 else None for head, e in zip(each, energies, strict=True)]
            V, Y = project_heads(vectors, heads, D)
            k = V.shape[1] // len(heads)
            heads = [
                head and block_krylov.measured(head, Y[i, :, i * k : (i + 1) * k])
                for i, head in enumerate(heads)
            ]
        votes, warnings = _votes([math.sqrt(energies[i]) for i in alive], alive)
        P, E, targets = _constraints(V, Y, alive, a, votes)
        right, correction, condition = _ridge(P, E, self.mu)
        gates = head_report(heads, self.rank) | {
            "head_energy": [_share(head, e) for head, e in zip(heads, energies, strict=True)],
            "a": a,
            "agreement": agreement,
            "condition": condition,
            # What is left of E: E (I − (PᵀP + μI)⁻¹PᵀP) = μ E (PᵀP + μI)⁻¹.
            **_residuals(E, self.mu * correction, targets, alive, len(energies)),
        }
        exact = Combination((a,) * vectors.count, E, right.T)
        total = with_product(Combination(exact.coefficients, E.float(), right.T.float()))
        warnings += not_unique(heads)
        return Update(total.rows, "head_regression", gates, warnings, exact, of_sum=total)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the method's own rule for matrices, of which row blocks do, else `other`."""
        return replace(super().rule_for(spec, experts), copies=self.steps == EXACT)

    def directions(self, m: int, n: int) -> int:
        """Return how many directions a head has, or all where LAPACK finds it."""
        return min(m, n) if self.solver == "dense" else min(self.rank, m, n)

    def columns(self, m: int, n: int, experts: int) -> int:
        """Return those of the steps, there and back, of all heads, and of the sum's correction."""
        if self.steps == EXACT:
            return 0
        return (2 * int(self.steps) + experts + 1) * min(self.rank, m, n)

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the solver, of Δ_j·V for all heads, and of P, E and their products."""
        width = experts * min(self.rank, m, n)
        # In float64 where a head has most of an update.
        projected = 8 * experts * m * width
        if self.steps == EXACT:
            solvers = solver_bytes(m, n, self.rank, self.solver, experts)
        else:
            solvers = krylov_bytes(m, n, self.rank, int(self.steps), experts)
        return solvers + projected + 40 * (m + n) * width

    def shared_scratch_bytes(self, m: int, n: int) -> int:
        """Return bytes of the solver's fallback, which threads take in turn."""
        falls_back = self.steps == EXACT and self.solver == "auto"
        return gram_bytes(m, n, self.rank) if falls_back else 0

    def in_words(self) -> str:
        """Return the formulas in words."""
        how = (
            "exactly" if self.steps == EXACT else f"as {self.steps} block Krylov step(s) find them"
        )
        return _IN_WORDS.format(rank=self.rank, mu=self.mu, how=how)


def _backbone(D: Tensor) -> tuple[float, float]:
    """Return a and s̄ from the Gram matrix of the task vectors that are not zero."""
    count = len(D)
    norms = D.diagonal().sqrt()
    cosines = D / (norms[:, None] * norms[None, :])
    mean = float(cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    agreement = min(max(mean, 0.0), 1.0)
    return 1 / (1 + (count - 1) * agreement), agreement


def _votes(norms: list[float], alive: list[int]) -> tuple[list[float], tuple[str, ...]]:
    """Return the factor of each expert's q_i, and a warning where one is below 1."""
    longest = max(norms)
    votes = [min(1.0, norm / (NEGLIGIBLE * longest)) for norm in norms]
    small = [str(i + 1) for i, vote in zip(alive, votes, strict=True) if vote < 1]
    if not small:
        return votes, ()
    return votes, (
        f"the update of expert {', '.join(small)} is shorter than {NEGLIGIBLE:.0%} of the longest: "
        "its head counts less, in proportion",
    )


def _constraints(
    V: Tensor, Y: Tensor, alive: list[int], a: float, votes: list[float]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return P (n × Nk), E (m × Nk) and each expert's [q_ir Δ_i v_ir] (m × k), all float64."""
    k = V.shape[1] // len(Y)
    P, E, targets = [], [], []
    for i, vote in zip(alive, votes, strict=True):
        own = slice(i * k, (i + 1) * k)
        action = Y[i, :, own].double()
        sigma = torch.linalg.vector_norm(action, dim=0)
        q = vote * sigma / sigma.max()
        backbone = a * Y[:, :, own].sum(0, dtype=torch.float64)
        P.append(V[:, own].double() * q)
        E.append((action - backbone) * q)
        targets.append(action * q)
    return torch.cat(P, dim=1), torch.cat(E, dim=1), targets


def _ridge(P: Tensor, E: Tensor, mu: float) -> tuple[Tensor, Tensor, float]:
    """Return (PᵀP + μI)⁻¹Pᵀ, E·(PᵀP + μI)⁻¹, and the condition number of PᵀP + μI."""
    values, vectors = torch.linalg.eigh((P.T @ P).cpu())
    values = values.clamp_min(0) + mu
    inverse = ((vectors / values) @ vectors.T).to(P.device)
    return inverse @ P.T, E @ inverse, float(values[-1] / values[0])


def _residuals(
    before: Tensor, after: Tensor, targets: list[Tensor], alive: list[int], count: int
) -> dict[str, list[float | None]]:
    """Return each expert's ‖(X − Δ_i) V_i q_i‖ / ‖Δ_i V_i q_i‖ for X = B and for X = ΔW.

    Args:
        before: (B − Δ_i) V_i q_i of all experts side by side, up to its sign.
        after: the same of ΔW.
        targets: Δ_i V_i q_i.
        alive: the experts that these are of.
        count: N, unchanged experts included: theirs are None.
    """
    found: dict[str, list[float | None]] = {}
    for key, side_by_side in (("residual_before", before), ("residual_after", after)):
        parts = side_by_side.chunk(len(alive), dim=1)
        values: list[float | None] = [None] * count
        for i, part, target in zip(alive, parts, targets, strict=True):
            size = torch.linalg.vector_norm(target)
            values[i] = float(torch.linalg.vector_norm(part) / size)
        found[key] = values
    return found


def _share(head: spectral.Head | None, energy: float) -> float:
    """Return the head's share of ‖Δ_i‖²."""
    return min(sum(s * s for s in head.sigma) / energy, 1.0) if head is not None else 0.0


_IN_WORDS = (
    "Each expert's update of a matrix has a **head**: its top {rank} direction(s), {how}. The "
    "merged update is the ridge regression (μ = {mu:g}) towards what each expert does with the "
    "inputs of its own head, each direction weighted by its strength; on all other inputs it is "
    "the sum of the updates, divided by 1 + (N−1)·(mean cosine of the updates)."
)

METHOD = HeadRegression
