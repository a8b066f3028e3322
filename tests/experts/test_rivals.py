"""The closed forms that head regression is compared with, against what defines them."""

import pytest
import torch

from benchmarks.quality.rivals import RIVALS, Rival, regression


def of(*shape: int, seed: int) -> torch.Tensor:
    """Numbers that are the same in every run."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(experts: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Updates, Gram matrices of inputs, and an anchor."""
    updates = [of(5, 4, seed=i) for i in range(experts)]
    inputs = [of(30, 4, seed=10 + i) for i in range(experts)]
    return updates, [x.T @ x for x in inputs], of(5, 4, seed=20)


@pytest.mark.parametrize("label", RIVALS)
def test_a_rival_is_where_its_sum_of_squares_is_least(label: str) -> None:
    """No step away from it makes the regression's sum of squares smaller: its gradient is 0."""
    rival = RIVALS[label]
    updates, grams, anchor = parts()
    if rival.inputs == "update":
        grams = [d.T @ d for d in updates]

    update = regression(updates, grams, anchor, rival).requires_grad_()
    weights = [c / c.trace() if rival.normalised else c for c in grams]
    mu = rival.ridge * sum(c.diagonal().sum() for c in weights) / 4
    lost = sum(
        ((update - d) @ c * (update - d)).sum() for d, c in zip(updates, weights, strict=True)
    )
    (lost + mu * (update - anchor).square().sum()).backward()

    assert update.grad.abs().max() < 1e-9


def test_one_expert_comes_back() -> None:
    """A regression on one expert alone, without a ridge, is that expert's update."""
    updates, grams, anchor = parts(1)

    update = regression(updates, grams, anchor, Rival(inputs=16))

    torch.testing.assert_close(update, updates[0])


def test_an_expert_that_changed_nothing_counts_for_nothing() -> None:
    """Gram matrices of an unchanged expert are 0, with or without being normalised."""
    updates, grams, anchor = parts(2)
    updates.append(torch.zeros(5, 4, dtype=torch.float64))
    grams.append(torch.zeros(4, 4, dtype=torch.float64))

    with_it = regression(updates, grams, anchor, Rival(inputs="update", ridge=0.3))
    without = regression(updates[:2], grams[:2], anchor, Rival(inputs="update", ridge=0.3))

    torch.testing.assert_close(with_it, without)
