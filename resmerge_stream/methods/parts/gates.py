"""ResMerge's decisions as scalar functions of three N × N matrices (docs/paper.md, methods C2).

With D_ij = ⟨Δ_i, Δ_j⟩, P_ij = ⟨H_i, Δ_j⟩ and Q_ij = ⟨H_i, H_j⟩, every norm, cosine and gate of the
paper is a function of G = D − P − Pᵀ + Q (the residuals' Gram matrix) and Q. Then
ΔW = Σ a_i Δ_i + Σ (b − a_i) H_i, and neither H_i nor R_i is ever formed. Not a method itself.

Release: marks where a variant follows the authors' code instead of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...maths.lazy import Tensor

# ε of the paper is a symbol; relative to the norms here, so that scaling all updates scales ΔW.
EPS = 1e-12
RELEASE_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Knobs:
    """The parameters that the gates need, in the paper's symbols.

    Attributes:
        variant: ``paper``, ``release-2026-06`` or ``release-2026-07``.
        f: module-family scale of the score (A.2).
        rho, beta_min, beta_max: Eqs. 9 and 15.
        head: ``gated`` (S_H), ``ungated`` (S_H := 1) or ``none`` (C := 0).
    """

    variant: str
    f: float
    rho: float
    beta_min: float
    beta_max: float
    head: str = "gated"


@dataclass(frozen=True, slots=True)
class Gates:
    """The update's coefficients and how they came about.

    Attributes:
        a: factor of each Δ_i (and, negated, of each H_i).
        b: factor of every H_i.
        report: every gate by its key in ``report.json``.
    """

    a: list[float]
    b: float
    report: dict[str, Any]


def decide(D: Tensor, Q: Tensor, G: Tensor, knobs: Knobs) -> Gates:
    """Return the coefficients of ΔW and the gates (Eqs. 7–15).

    Args:
        D, Q, G: Gram matrices of Δ_i, H_i, R_i; float64, shape (N, N), CPU.
        knobs: the parameters.
    """
    n = _norms(G)  # ‖R_i‖
    # Eq. (10): the average residual norm is the scale of the backbone.
    n_R = float(n.mean())
    report = {"c_R_floor": 1 / math.sqrt(len(n)), "n_R": n_R, **_diagnostics(D, Q, G)}
    a, backbone = _backbone(G, n, n_R, knobs)
    report |= backbone
    norm_A = _norm_of_sum(a, G)
    S_H = _head_agreement(Q, knobs.variant)
    report |= {"norm_A": norm_A, "S_H": S_H}
    # Eq. (15): C = ρ S_H ‖A‖ H_mean / ‖H_mean‖, here as one factor b of every H_i.
    gate = {"gated": S_H, "ungated": 1.0, "none": 0.0}[knobs.head]
    norm_H_mean = _norm_of_sum([1 / len(n)] * len(n), Q)
    tiny = RELEASE_EPS if knobs.variant != "paper" else 0.0
    if norm_H_mean > tiny and norm_A > tiny:
        norm_C = knobs.rho * gate * norm_A
        b = norm_C / norm_H_mean / len(n)
    else:
        norm_C = b = 0.0
    return Gates(a, b, report | {"norm_C": norm_C})


def _backbone(G: Tensor, n: Tensor, n_R: float, knobs: Knobs) -> tuple[list[float], dict[str, Any]]:
    """Return a with A = Σ a_i R_i, and the gates that led to it (Eqs. 7–12)."""
    count = len(n)
    release = knobs.variant != "paper"
    if float(n.max()) <= (RELEASE_EPS if release else 0.0):
        return [0.0] * count, {"branch": "no residual", "alpha_R": 0.0}
    # Eq. (7): q_i = R_i / ‖R_i‖, as weights w_i; a zero residual keeps weight 0 and counts in N.
    w = _unit_weights(n, knobs.variant)
    cosines = w[:, None] * G * w[None, :]
    z = math.sqrt(max(float(cosines.sum()), 0.0))  # ‖Σ q_i‖
    # Eq. (8): pairwise agreement, and alignment with the consensus direction q_src.
    s_R, c_R = _agreement(cosines, w * n, z, knobs.variant)
    score, c, fallback = _score(s_R, c_R, z, count, knobs)
    # Eq. (9): more agreement, smaller exponent.
    beta = knobs.beta_max - (knobs.beta_max - knobs.beta_min) * score
    gates = {"s_R": s_R, "c_R": c_R, "score": score, "beta": beta}
    if fallback == "mean":
        # Release: at or below the floor of chance the plain mean of the residuals.
        return [1 / count] * count, gates | {"alpha_R": None, "branch": "mean of residuals"}
    if fallback == "zero" or z <= EPS:
        return [0.0] * count, gates | {"alpha_R": 0.0, "branch": "residuals cancel"}
    # Eq. (11): the less residuals agree, the less of their norm is kept.
    alpha_R = c**beta
    # Eq. (12): A = α_R n_R q_src.
    a = (alpha_R * n_R / z * w).tolist()
    return a, gates | {"alpha_R": alpha_R, "branch": "consensus"}


def _agreement(products: Tensor, lengths: Tensor, z: float, variant: str) -> tuple[float, float]:
    """Return s_R and c_R from the products ⟨q_i, q_j⟩, the lengths ‖q_i‖ and z = ‖Σ q_i‖."""
    count = len(lengths)
    # Release (July): its cosine divides by the lengths of q_i once more, ε and all.
    eps = RELEASE_EPS if variant == "release-2026-07" else 0.0
    scale = lengths if eps else lengths.new_ones(count)
    pairs = products / (scale[:, None] * scale[None, :] + eps)
    off_diagonal = float(pairs.sum() - pairs.diagonal().sum())
    s_R = off_diagonal / (count * (count - 1)) if count > 1 else 1.0
    if z <= EPS:
        return s_R, 0.0
    with_consensus = products.sum(dim=1) / (z + eps)
    c_R = float((with_consensus / (scale * z / (z + eps) + eps)).mean())
    # Rounding aside, unit vectors cannot disagree more than this.
    return max(s_R, -1 / (count - 1) if count > 1 else -1.0), c_R


def _score(
    s_R: float, c_R: float, z: float, count: int, knobs: Knobs
) -> tuple[float, float, str | None]:
    """Return score_R, the base of the power in Eq. (11), and the fallback taken, if any."""
    floor = 1 / math.sqrt(count)
    s_bar, c_bar = (s_R + 1) / 2, (c_R + 1) / 2
    if knobs.variant == "paper":
        # A.2: the module-family scale f multiplies the score.
        return knobs.f * (s_bar + c_bar) / 2, c_bar, None
    if knobs.variant == "release-2026-07":
        # Release: the same score, clipped; but the raw c_R is raised to the power.
        c = _clip(c_R)
        score = _clip(0.5 * (_clip(s_bar) + _clip((c + 1) / 2)) * knobs.f)
        return score, c, "mean" if c <= floor or z <= RELEASE_EPS else None
    # Release (June): ramps between fixed thresholds instead of the affine map.
    pair = _clip((s_R - 0.03) / (0.05 - 0.03))
    top = max(0.60, floor + RELEASE_EPS)
    coherence = _clip((c_R - floor) / (top - floor))
    score = _clip(0.5 * (pair + coherence) * knobs.f)
    return score, c_R, "zero" if c_R <= RELEASE_EPS else None


def _unit_weights(n: Tensor, variant: str) -> Tensor:
    """Return w with q_i = w_i R_i."""
    if variant == "release-2026-07":
        return 1 / (n + RELEASE_EPS)
    if variant == "release-2026-06":
        return 1 / n.clamp_min(RELEASE_EPS)
    floor = EPS * float(n.max())
    return (n > floor) / n.clamp_min(max(floor, 1e-300))


def _head_agreement(Q: Tensor, variant: str) -> float:
    """Return S_H (Eq. 14): mean over pairs of the positive part of cos(H_i, H_j)."""
    norms = _norms(Q)
    release = variant != "paper"
    kept = [i for i, norm in enumerate(norms.tolist()) if norm > (RELEASE_EPS if release else 0.0)]
    # Release: experts without a head are left out, and no pair left counts as agreement.
    members = kept if release else list(range(len(norms)))
    if not kept:
        return 0.0
    pairs = [(i, j) for i in members for j in members if i < j]
    if not pairs:
        return 1.0
    total = 0.0
    for i, j in pairs:
        product = float(norms[i] * norms[j])
        if product > 0:
            total += max(float(Q[i, j]) / product, 0.0)
    return total / len(pairs)


def _diagnostics(D: Tensor, Q: Tensor, G: Tensor) -> dict[str, Any]:
    """Return what the report keeps beside the gates: head energy and retentions (Eq. 17)."""
    ones = [1.0] * len(D)
    d = D.diagonal()
    energy = [
        float(1 - g / t) if t > 0 else 0.0
        for g, t in zip(G.diagonal().clamp_min(0).tolist(), d.tolist(), strict=True)
    ]
    heads, residuals = float(_norms(Q).sum()), float(_norms(G).sum())
    return {
        "head_energy": energy,
        "ret_H": _norm_of_sum(ones, Q) / heads if heads > 0 else None,
        "ret_R": _norm_of_sum(ones, G) / residuals if residuals > 0 else None,
        "pair_cosines_H": _pair_cosines(Q),
        "pair_cosines_R": _pair_cosines(G),
    }


def _pair_cosines(gram: Tensor) -> list[float]:
    """Return the cosines of all pairs i < j, row by row; 0 for a zero member."""
    norms = _norms(gram)
    scaled = gram / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
    count = len(gram)
    return [float(scaled[i, j]) for i in range(count) for j in range(i + 1, count)]


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal().clamp_min(0).sqrt()


def _norm_of_sum(coefficients: list[float], gram: Tensor) -> float:
    """Return ‖Σ x_i X_i‖ from the Gram matrix of the X_i."""
    x = gram.new_tensor(coefficients)
    return math.sqrt(max(float(x @ gram @ x), 0.0))


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
