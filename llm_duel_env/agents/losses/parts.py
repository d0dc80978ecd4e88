"""What the losses share: log-ratios, checks, and the usual metrics."""

from __future__ import annotations

from torch import Tensor

from llm_duel_env.agents.policies.ranked import RankedLogProbs
from llm_duel_env.types import Metrics


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """ValueError naming the setting `name` where a condition does not hold."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def only_pairs(ranked: RankedLogProbs) -> None:
    """ValueError where there are more than two responses per row."""
    if ranked.policy.shape[1] != 2:
        raise ValueError(f"this loss compares 2 responses, got {ranked.policy.shape[1]}; take two of the ranking")


def scores_of(ranked: RankedLogProbs) -> Tensor:
    """The scores (B, n). ValueError where there are none."""
    if ranked.scores is None:
        raise ValueError("this loss needs scores, and got none")
    return ranked.scores.detach()


def log_ratios(ranked: RankedLogProbs) -> Tensor:
    """Delta = log pi - log ref, (B, n), sums over tokens."""
    return ranked.policy - ranked.reference


def log_ratio_margin(ranked: RankedLogProbs) -> Tensor:
    """h = Delta(winner) - Delta(loser), (B,). ValueError where there are more than two responses per row."""
    only_pairs(ranked)
    ratio = ranked.policy - ranked.reference
    return ratio[:, 0] - ratio[:, 1]


def average_log_probs(ranked: RankedLogProbs) -> Tensor:
    """Log-probability per token, (B, n)."""
    return ranked.policy / ranked.lengths


def report(loss: Tensor, margin: Tensor, **means: Tensor) -> tuple[Tensor, Metrics]:
    """The mean of losses (B,), with ``margin`` and ``accuracy`` of margins (B,) and the means of the rest."""
    if loss.shape != margin.shape or loss.ndim != 1:
        raise ValueError(f"expected one loss per row, shape {tuple(margin.shape)}, got {tuple(loss.shape)}")
    margin = margin.detach()
    metrics = {"margin": float(margin.mean()), "accuracy": float((margin > 0).float().mean())}
    return loss.mean(), metrics | {name: float(value.detach().float().mean()) for name, value in means.items()}
