"""ResMerge: merge the residuals of RL task vectors, give the heads back as far as they agree.

Sun et al. 2026, https://arxiv.org/abs/2606.02252. Each task vector is split by SVD into a head
(the top-k directions) and a residual (Eq. 6). The residuals are merged along their spherical
consensus direction (SRC-A, Eqs. 7–12); the mean head comes back with at most ρ of that backbone's
norm, scaled by how far the heads agree (LHC, Eqs. 13–15). Public code:
sunyd0303-cpu/ResMerge-release. Paper and code differ, and the code's two versions differ: the
three variants are set side by side in docs/paper.md. The gates themselves are in `gates`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import RecipeError
from ..maths.lazy import TaskVectors, Tensor, torch
from ..memory import gram_bytes, solver_bytes
from ..roles import Role, release_role_of
from ..specs import TensorSpec
from .base import (
    OTHER_CHOICES,
    Combination,
    MergeMethod,
    Rule,
    Site,
    Update,
    default_role,
    is_matrix,
    param,
)
from .parts.elementwise import linear, other_rule, with_product
from .parts.gates import Knobs, decide
from .parts.heads import head_report, heads_of, not_unique, project_heads, residual_gram

VARIANTS = ("paper", "release-2026-06", "release-2026-07")
ABLATIONS = ("none", "head_only", "residual_only", "no_head", "ungated")
# A.2: "values 1.0, 0.25, and 0.0" for attention, FFN and other two-dimensional tensors.
_FAMILY_SCALE = {
    "paper": (1.0, 0.25, 0.0),
    "release-2026-06": (1.0, 0.25, 0.0),
    "release-2026-07": (1.0, 1.0, 0.0),  # Release (July): attention and FFN alike.
}
# With less of ‖Δ‖² than this in a residual, it is rounding noise.
_ZERO_BELOW = 1e-10


@dataclass(frozen=True, kw_only=True)
class ResMerge(MergeMethod):
    """Each expert's difference to the base is split into its strongest direction (the head) and
    the rest (the residual). The residuals are merged along the direction they agree on, the heads
    come back only as far as the experts agree."""

    name: ClassVar[str] = "resmerge"
    title: ClassVar[str] = "ResMerge"
    paper: ClassVar[str] = "Sun et al. 2026, ResMerge"
    url: ClassVar[str] = "https://arxiv.org/abs/2606.02252"
    low_rank: ClassVar[bool] = True

    variant: str = param("paper", "The paper's formulas or one of its releases", choices=VARIANTS)
    rank: int = param(1, "Directions k in the head", minimum=1, maximum=64)
    rho: float = param(0.2, "Most that the heads add, as a share ρ", minimum=0.0, maximum=10.0)
    beta_min: float = param(0.7, "Exponent at full agreement", minimum=0.0, maximum=10.0)
    beta_max: float = param(1.0, "Exponent at no agreement", minimum=0.0, maximum=10.0)
    ablation: str = param("none", "Leave a part out (paper, Table 2)", choices=ABLATIONS)
    other: str = param("mean", "Rule of tensors without SVD", choices=OTHER_CHOICES)
    solver: str = param("auto", "How the head is found", choices=("auto", "lanczos", "dense"))

    def __post_init__(self) -> None:
        if self.beta_min > self.beta_max:
            raise RecipeError(
                f"beta_min ({self.beta_min:g}) must not be above beta_max ({self.beta_max:g}): "
                "agreement would weaken what the experts agree on.",
                field="beta_min",
            )

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return ``resmerge`` for matrices and stacks of them, else the rule of `other`."""
        if self.variant == "paper":
            role = default_role(spec)
        else:
            role = release_role_of(spec.name, spec.shape)
        if is_matrix(spec, role):
            # The releases know no fused matrices.
            return Rule("resmerge", role, needs_matrix=True, as_one=self.variant != "paper")
        return Rule(self.other, role)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Merge one matrix as the variant says, with the guards of docs/paper.md."""
        if not site.rule.needs_matrix:
            return other_rule(site)
        if vectors.count == 1 and self.variant == "paper" and self.ablation == "none":
            warning = "one expert: there is no agreement to measure, its update passes unchanged"
            return linear([1.0], "resmerge", (warning,))
        return self._merge_matrix(vectors, site)

    def directions(self, m: int, n: int) -> int:
        """Return how many directions a head has, or all where LAPACK finds it."""
        return min(m, n) if self.solver == "dense" else min(self.rank, m, n)

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the Krylov basis, or of a dense SVD where the shape calls for one."""
        solvers = solver_bytes(m, n, self.rank, self.solver, experts)
        return solvers + 8 * experts**2 * self.rank * m

    def shared_scratch_bytes(self, m: int, n: int) -> int:
        """Return bytes of the solver's fallback, which threads take in turn."""
        return gram_bytes(m, n, self.rank) if self.solver == "auto" else 0

    def in_words(self) -> str:
        """Return the variant's formulas in words."""
        return _IN_WORDS[self.variant].format(
            rank=self.rank, rho=self.rho, low=self.beta_min, high=self.beta_max
        )

    def _merge_matrix(self, vectors: TaskVectors, site: Site) -> Update:
        D = vectors.gram()
        heads = heads_of(vectors, self.rank, D.diagonal().tolist(), self.solver)
        V, Y = project_heads(vectors, heads, D)
        _, Q, G = residual_gram(vectors, D, V, Y)
        report = head_report(heads, self.rank)
        scale = D.diagonal()
        has_residual = (_ZERO_BELOW * scale <= G.diagonal()) & (scale > 0)
        G = G * has_residual[:, None] * has_residual[None, :]
        rankless = not bool(has_residual.any())
        if rankless and self.variant == "paper" and self.ablation != "head_only":
            warning = f"rank ≤ {self.rank} in every expert: no residual to merge, mean used"
            update = linear([1 / vectors.count] * vectors.count, "mean", (warning,))
            return replace(update, gates=report | {"branch": "mean"})
        attention, ffn, other = _FAMILY_SCALE[self.variant]
        f = {Role.ATTENTION: attention, Role.FFN: ffn}.get(site.rule.role, other)
        head = {"no_head": "none", "ungated": "ungated"}.get(self.ablation, "gated")
        gates = decide(
            D, Q, G, Knobs(self.variant, f, self.rho, self.beta_min, self.beta_max, head)
        )
        a, b, ablated = self._ablate(gates.a, gates.b)
        warnings = not_unique(heads)
        if not any(a) and b == 0:
            warnings += (f"the rule erases this update: {gates.report['branch']}",)
        # ΔW = Σ aᵢ Δᵢ + Σ (b − aᵢ) Hᵢ
        combination = _combined(a, [b - a_i for a_i in a], V, Y)
        report |= gates.report | ablated
        total = with_product(combination)
        return Update(total.rows, "resmerge", report, warnings, combination, of_sum=total)

    def _ablate(self, a: list[float], b: float) -> tuple[list[float], float, dict[str, Any]]:
        """Return (a, b) of the paper's structural ablations (Table 2)."""
        count = len(a)
        if self.ablation == "head_only":
            return [0.0] * count, 1 / count, {"branch": "head only"}
        if self.ablation == "residual_only":
            return [1 / count] * count, 0.0, {"branch": "residual only"}
        return a, b, {}


def _combined(a: list[float], e: list[float], V: Tensor, Y: Tensor) -> Combination:
    """Return ΔW = Σ a_i Δ_i + Σ e_i H_i, H_i = Y_ii V_iᵀ."""
    k = V.shape[1] // len(a)
    left = torch.cat([Y[i, :, i * k : (i + 1) * k] * e_i for i, e_i in enumerate(e)], dim=1)
    return Combination(tuple(a), left, V)


_BACKBONE = (
    "Each expert's update of a matrix is split by SVD into a **head** (its top {rank} "
    "direction(s)) and a **residual**. The residuals are normalised and added up to a consensus "
    "direction; "
)
_IN_WORDS = {
    "paper": _BACKBONE
    + "the merged residual has that direction and the norm α·(mean residual norm), with "
    "α = ((c_R + 1)/2)^β, c_R the mean cosine of the residuals with the consensus, and β between "
    "{low:g} (full agreement) and {high:g} (none), scaled by module family (attention 1, FFN "
    "0.25, other 0). The mean head is added with {rho:g}·S_H of that norm, S_H being the mean "
    "positive cosine between heads.",
    "release-2026-07": _BACKBONE
    + "its norm is c_R^β·(mean residual norm) with β in [{low:g}, {high:g}]; where c_R is at or "
    "below 1/√N the plain mean of the residuals is taken. The mean head is added with {rho:g}·S_H "
    "of that norm. This follows the authors' code of July 2026, which differs from the paper.",
    "release-2026-06": _BACKBONE
    + "its norm is c_R^β·(mean residual norm) with β in [{low:g}, {high:g}] from thresholds of the "
    "code (pair cosine 0.03–0.05, c_R 1/√N–0.60). The mean head is added with {rho:g}·S_H of that "
    "norm. This follows the authors' code of June 2026, which differs from the paper.",
}

METHOD = ResMerge
