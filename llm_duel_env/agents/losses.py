"""Direct optimizers: losses on pairs of sequence log-probabilities. Pure functions, each the mean over B pairs.

Notation: h = (log pi - log ref)(winner) - (log pi - log ref)(loser).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_duel_env.agents.policies.base import DirectOptimizer, RankedLogProbs
from llm_duel_env.types import Metrics


def log_ratio_margin(pairs: RankedLogProbs) -> Tensor:
    """h, (B,)."""
    ratio = pairs.policy - pairs.reference
    return ratio[:, 0] - ratio[:, 1]


def _report(loss: Tensor, margin: Tensor) -> tuple[Tensor, Metrics]:
    if loss.shape != margin.shape or loss.ndim != 1:
        raise ValueError(f"expected one loss per pair, shape {tuple(margin.shape)}, got {tuple(loss.shape)}")
    margin = margin.detach()
    return loss.mean(), {"margin": float(margin.mean()), "accuracy": float((margin > 0).float().mean())}


def dpo(pairs: RankedLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta h): Direct Preference Optimization (arXiv 2305.18290, eq. 7)."""
    h = log_ratio_margin(pairs)
    return _report(-F.logsigmoid(beta * h), h)


def ipo(pairs: RankedLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """(h - 1 / (2 beta))^2: Identity Preference Optimization (arXiv 2310.12036, eq. 17), sums of log-probs as there."""
    h = log_ratio_margin(pairs)
    return _report((h - 1.0 / (2.0 * beta)) ** 2, h)


def slic(pairs: RankedLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """max(0, 1 - beta h): the hinge that SEA (arXiv 2411.01493, eq. 12) and OAIF (arXiv 2402.04792) call SLiC."""
    h = log_ratio_margin(pairs)
    return _report(torch.relu(1.0 - beta * h), h)


LOSSES = {"dpo": dpo, "ipo": ipo, "slic": slic}


def direct_optimizer(name: str, beta: float) -> DirectOptimizer:
    """The named loss with its strength fixed.

    Raises:
        ValueError: an unknown name, with the known ones, or a beta that is not positive.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {sorted(LOSSES)}, got {name!r}")
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta!r}")
    return partial(LOSSES[name], beta=beta)
