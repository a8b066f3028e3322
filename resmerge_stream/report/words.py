"""The report's vocabulary: what its numbers and rules are called wherever they are shown."""

from collections.abc import Mapping
from dataclasses import dataclass

# Short names of the numbers, for the heads of tables.
NAMES: Mapping[str, str] = {
    "S_H": "S_H",
    "c_R": "c_R",
    "c_R_floor": "floor 1/√N",
    "alpha_R": "α_R",
    "head_share": "‖C‖/‖A‖",
    "head_energy": "head energy",
    "update_norm": "‖ΔW‖",
    "changed_fraction": "changed",
    "kept_norm": "kept norm",
    "kept_cosine": "kept cosine",
}
# Columns of the card's tables and the page's.
COLUMNS = (
    "S_H", "c_R", "c_R_floor", "alpha_R", "head_share", "head_energy", "changed_fraction",
    "kept_norm", "kept_cosine",
)  # fmt: skip
# What fits a terminal.
TERMINAL_COLUMNS = ("S_H", "c_R", "alpha_R", "update_norm", "kept_norm", "kept_cosine")

_RULES: Mapping[str, str] = {
    "mean": "base + mean of the experts' updates",
    "sum": "base + sum of the experts' updates",
    "base": "the base's values",
    "copy": "no expert differs from the base: the base's values",
    "carried": "not merged: the base's bytes",
}


def rule_in_words(rule: str) -> str:
    """Return what a rule does; rules that no other method has are the method's own."""
    return _RULES.get(rule, "the method's own rule")


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that pictures show for every module and layer.

    Attributes:
        key: as `value_of` takes it.
        title, symbols: in plain words, and in the paper's.
        scale: ``zero`` starts colours at 0, ``range`` at the least value, ``centre`` puts 0 in
            the middle.
    """

    key: str
    title: str
    symbols: str
    scale: str = "zero"


GATES = (
    Measure("S_H", "How far the heads agree", "S_H: 0 unrelated or opposed, 1 the same direction"),
    Measure(
        "above_floor",
        "Residuals aligned beyond chance",
        "c_R − 1/√N: 0 (white) is what unrelated residuals have",
        "centre",
    ),
    Measure(
        "alpha_R",
        "Length given to the merged residual",
        "α_R, as a share of the mean residual's",
        "range",
    ),
    Measure(
        "head_energy",
        "Share of the update in its head",
        "‖head‖² / ‖update‖², mean over experts",
    ),
)
CHANGES = (
    Measure("update_rms", "Size of the merged update", "root mean square over a tensor's weights"),
    Measure("changed_fraction", "Weights that changed", "share that differs from the base"),
)
KEPT = (
    Measure("kept_cosine", "Direction kept by the cast", "cosine of kept and intended", "range"),
    Measure("kept_norm", "Length kept by the cast", "‖kept‖ / ‖intended‖", "range"),
)
