"""DPO with a scale of its own for every pair."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_duel_env.agents.losses.parts import log_ratio_margin, report, require
from llm_duel_env.agents.policies.ranked import RankedLogProbs
from llm_duel_env.types import Metrics

TOLERANCE = 1e-9
"""A slope in tau at most this is a minimum."""
BISECTIONS = 60


def ada_dpo(
    ranked: RankedLogProbs, *, tau_min: float = 0.1, tau_max: float = 4.0, rho0: float = 0.1, newton_steps: int = 5
) -> tuple[Tensor, Metrics]:
    """min over tau of -tau log sigmoid(h / tau) + rho tau, rho = rho0 - log 2: Ada-DPO (arXiv 2406.02764).

    tau in [tau_min, tau_max] is solved for each pair and is a constant to the gradient (at the minimum that is the
    gradient of the whole). Ambiguous pairs get a small tau, clear ones a large one. beta is absorbed in tau.

    tau_min, tau_max, rho0: the paper's tau_0, tau_max and rho_0 (its best on TL;DR: 0.1, 4, 0.1).
    newton_steps: see `best_tau` (paper: 5 on text).
    """
    require(0 < tau_min <= tau_max < math.inf, "tau_min, tau_max", "0 < tau_min <= tau_max", (tau_min, tau_max))
    require(newton_steps >= 0, "newton_steps", "at least 0", newton_steps)
    h, rho = log_ratio_margin(ranked), rho0 - math.log(2)
    tau = best_tau(h, rho, tau_min, tau_max, newton_steps).to(h.dtype)
    return report(-tau * F.logsigmoid(h / tau) + rho * tau, h, tau=tau)


def best_tau(h: Tensor, rho: float, tau_min: float, tau_max: float, newton_steps: int = 5) -> Tensor:
    """The tau in [tau_min, tau_max] that minimises -tau log sigmoid(h / tau) + rho tau, (B,) float64, no gradient.

    The paper's Newton steps, checked: the slope flattens away from the minimum, so that with wide bounds (tau_max
    10 with rho0 0.5, say) they jump between them for ever on some pairs; where the slope says so, bisection solves it.
    """
    tau = newton_tau(h, rho, tau_min, tau_max, newton_steps)
    h = h.detach().double()
    slope = _slope(h, tau, rho)
    at_bound = ((tau == tau_min) & (slope >= 0)) | ((tau == tau_max) & (slope <= 0))
    low, high = torch.full_like(h, tau_min), torch.full_like(h, tau_max)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        rising = _slope(h, middle, rho) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return torch.where(at_bound | (slope.abs() <= TOLERANCE), tau, (low + high) / 2)


def newton_tau(h: Tensor, rho: float, tau_min: float, tau_max: float, steps: int) -> Tensor:
    """Projected Newton from tau = 1 on the problem of `best_tau`: (B,) float64, not always its solution."""
    h = h.detach().double()
    tau = torch.ones_like(h).clamp(tau_min, tau_max)
    for _ in range(steps):
        u = h / tau
        curvature = u.square() * torch.sigmoid(u) * torch.sigmoid(-u) / tau
        tau = (tau - _slope(h, tau, rho) / curvature.clamp(min=1e-12)).clamp(tau_min, tau_max)
    return tau


def _slope(h: Tensor, tau: Tensor, rho: float) -> Tensor:
    """Derivative by tau: the entropy of a coin of probability sigmoid(h / tau), plus rho; it rises with tau."""
    u = h / tau
    return F.softplus(-u) + u * torch.sigmoid(-u) + rho
