"""The paper's equations and its two releases, as written: float64, full SVD, every H and R formed.

Sun et al. 2026, https://arxiv.org/abs/2606.02252; sunyd0303-cpu/ResMerge-release, commits 0d8ebbe
(June) and 2d6d805 (July). Slow, plain, and without a line of the library: what it must equal.
"""

import numpy as np
from numpy.linalg import norm

EPS = 1e-12
RELEASE_EPS = 1e-8
FAMILY = {
    "paper": {"attention": 1.0, "ffn": 0.25, "other": 0.0},
    "release-2026-06": {"attention": 1.0, "ffn": 0.25, "other": 0.0},
    "release-2026-07": {"attention": 1.0, "ffn": 1.0, "other": 0.0},
}


def resmerge(deltas, *, variant="paper", family="attention", k=1, rho=0.2, low=0.7, high=1.0):
    """Return ΔW and the gates for task vectors of shape (m, n), merged by a variant."""
    deltas = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    heads = [head(delta, k) for delta in deltas]
    residuals = [delta - H for delta, H in zip(deltas, heads, strict=True)]
    backbone = {"paper": paper, "release-2026-06": june, "release-2026-07": july}[variant]
    A, gates = backbone(residuals, FAMILY[variant][family], low, high)
    S_H = agreement(heads, variant)
    H_mean = sum(heads) / len(heads)
    C = rho * S_H * norm(A) * H_mean / (norm(H_mean) + 1e-300)
    gates |= {"S_H": S_H, "norm_A": norm(A), "norm_C": norm(C)}
    gates |= {"n_R": np.mean([norm(R) for R in residuals])}
    return A + C, gates


def head(delta, k):
    """Return the best rank-k approximation (Eq. 6)."""
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vt[:k]


def paper(residuals, f, low, high):
    """Return A by Eqs. 7 to 12."""
    count = len(residuals)
    q = [R / (norm(R) + EPS) for R in residuals]
    q_src = sum(q) / (norm(sum(q)) + EPS)
    s_R = np.mean([cos(q[i], q[j]) for i in range(count) for j in range(i)])
    c_R = np.mean([cos(q_i, q_src) for q_i in q])
    score = f * ((s_R + 1) / 2 + (c_R + 1) / 2) / 2
    beta = high - (high - low) * score
    alpha = ((c_R + 1) / 2) ** beta
    A = alpha * np.mean([norm(R) for R in residuals]) * q_src
    return A, {"s_R": s_R, "c_R": c_R, "score": score, "beta": beta, "alpha_R": alpha}


def july(residuals, f, low, high):
    """Return A by the release of 2026-07-16."""
    count, eps = len(residuals), RELEASE_EPS
    q = [R / (norm(R) + eps) for R in residuals]
    total = norm(sum(q))
    q_src = sum(q) / (total + eps)
    c = np.clip(np.mean([np.vdot(q_i, q_src) / (norm(q_i) * norm(q_src) + eps) for q_i in q]), 0, 1)
    pairs = [cos(q[i], q[j], eps) for i in range(count) for j in range(i)]
    s = np.mean(pairs) if pairs else 1.0
    score = np.clip(0.5 * (np.clip((s + 1) / 2, 0, 1) + np.clip((c + 1) / 2, 0, 1)) * f, 0, 1)
    beta = high - (high - low) * score
    gates = {"s_R": s, "c_R": c, "score": score, "beta": beta}
    if total <= eps or c <= 1 / np.sqrt(count):
        return sum(residuals) / count, gates
    return c**beta * np.mean([norm(R) for R in residuals]) * q_src, gates | {"alpha_R": c**beta}


def june(residuals, f, low, high):
    """Return A by the release of 2026-06-01."""
    count, eps = len(residuals), RELEASE_EPS
    q = [R / max(norm(R), eps) for R in residuals]
    c = norm(sum(q) / count)
    if c <= eps:
        return 0 * residuals[0], {"c_R": c}
    s = np.mean([cos(q[i], q[j], eps) for i in range(count) for j in range(i)])
    floor = 1 / np.sqrt(count)
    coherence = np.clip((c - floor) / (max(0.60, floor + eps) - floor), 0, 1)
    score = np.clip(0.5 * (np.clip((s - 0.03) / (0.05 - 0.03), 0, 1) + coherence) * f, 0, 1)
    beta = high - (high - low) * score
    A = c**beta * np.mean([norm(R) for R in residuals]) * sum(q) / norm(sum(q))
    return A, {"s_R": s, "c_R": c, "score": score, "beta": beta, "alpha_R": c**beta}


def agreement(heads, variant):
    """Return S_H (Eq. 14); the releases leave zero heads out and call a lone head agreement."""
    if variant != "paper":
        heads = [H for H in heads if norm(H) > RELEASE_EPS]
        if len(heads) < 2:
            return float(len(heads))
    pairs = [(heads[i], heads[j]) for i in range(len(heads)) for j in range(i)]
    return float(np.mean([max(cos(X, Y), 0.0) for X, Y in pairs]))


def cos(X, Y, eps=0.0):
    """Return the cosine, 0 for a zero matrix."""
    size = norm(X) * norm(Y) + eps
    return np.vdot(X, Y) / size if size > 0 else 0.0
