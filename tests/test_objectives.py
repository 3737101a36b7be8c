"""Objectives against their formulas in float64."""

import numpy as np
import pytest
import torch

from rmsweep import component


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def bt(a, b, p):
    return -p * torch.log(sigma(a - b)) - (1 - p) * torch.log(sigma(b - a))


def clf(a, b, p):
    def bce(r, y):
        return -y * torch.log(sigma(r)) - (1 - y) * torch.log(sigma(-r))

    return (bce(a, p) + bce(b, 1 - p)) / 2


FORMULAS = {"bradley_terry": bt, "classification": clf}


def rewards(n=64):
    rng = np.random.default_rng(0)
    a, b = (torch.tensor(rng.normal(0, 2, n), requires_grad=True) for _ in range(2))
    return a, b, torch.tensor(rng.random(n))


@pytest.mark.parametrize("kind", FORMULAS)
def test_loss_and_gradient_equal_the_formula(kind):
    """Value and gradient in float64, hard and soft labels."""
    a, b, p = rewards()
    ours = component.build("objective", kind)(a, b, p)
    torch.testing.assert_close(ours, FORMULAS[kind](a, b, p), rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss.sum(), (a, b)) for loss in (ours, FORMULAS[kind](a, b, p))]
    for g, h in zip(*grads, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", FORMULAS)
def test_swapping_the_sides_leaves_the_loss(kind):
    """(a, b, p) and (b, a, 1 - p) are the same statement."""
    a, b, p = rewards()
    loss = component.build("objective", kind)
    torch.testing.assert_close(loss(a, b, p), loss(b, a, 1 - p))


@pytest.mark.parametrize("kind", FORMULAS)
def test_extreme_rewards_stay_finite_in_float32(kind):
    """Catches log(sigma) computed naively: inf or NaN at |reward| = 1e4."""
    a = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    b = torch.tensor([-1e4, 1e4, 1e4], requires_grad=True)
    loss = component.build("objective", kind)(a, b, torch.tensor([0.0, 1.0, 0.5]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
