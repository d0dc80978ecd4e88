"""Exploration bonuses: terms on the log-probability of one response per row, added to any loss.

A positive weight is minimised with the loss and pushes the response's log-probability *down*: responses that the
reference likes, or that the policy already gives, become less likely, which is optimism about all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_duel_env.agents.losses.parts import require
from llm_duel_env.agents.policies.ranked import DirectOptimizer, RankedLogProbs, needs_tokens
from llm_duel_env.types import Metrics


@dataclass(frozen=True)
class ExplorationBonus:
    """loss + weight * mean over the B rows of the bonus response's log pi, or log pi - log ref. A direct optimizer."""

    loss: DirectOptimizer
    """What the term is added to."""
    weight: float
    """Its coefficient; 0 is the plain loss."""
    response: Literal["reference", "bonus"]
    """Which response: reference, the row's response that was drawn from the reference policy (`from_reference`); the
    mean where several were, nothing where none was, and the row counts in the mean all the same. bonus, the row's extra
    response (`RankedLogProbs.bonus`)."""
    relative: bool
    """Whether log ref is taken off: a constant, so the value changes and the gradient does not."""

    @property
    def needs_tokens(self) -> bool:
        """The loss's."""
        return needs_tokens(self.loss)

    def __call__(self, ranked: RankedLogProbs, /) -> tuple[Tensor, Metrics]:
        """The loss with the bonus; adds the metrics ``bonus`` (the mean, without its weight) and ``bonus_rows``."""
        value, metrics = self.loss(ranked)
        if self.weight == 0:
            return value, metrics
        terms, present = self.terms(ranked)
        mean = terms.mean()
        logged = {"bonus": float(mean.detach()), "bonus_rows": float(present.float().mean())}
        return value + self.weight * mean, metrics | logged

    def terms(self, ranked: RankedLogProbs) -> tuple[Tensor, Tensor]:
        """Each row's log-probability of its bonus response, (B,) with gradient, 0 where it has none; and whether it
        has one, (B,) bool.

        Raises:
            ValueError: bonus responses are wanted and were not handed over.
        """
        if self.response == "bonus":
            if ranked.bonus is None or ranked.bonus_reference is None:
                raise ValueError("this exploration bonus needs a bonus response for every row, and got none")
            terms = ranked.bonus - ranked.bonus_reference if self.relative else ranked.bonus
            return terms, torch.ones_like(terms, dtype=torch.bool)
        values = ranked.policy - ranked.reference if self.relative else ranked.policy
        tags = ranked.from_reference
        total = torch.where(tags, values, 0.0).sum(dim=1)
        return total / tags.sum(dim=1).clamp(min=1), tags.any(dim=1)


def xpo(loss: DirectOptimizer, alpha: float) -> ExplorationBonus:
    """+ alpha * mean log pi(reference-drawn response): XPO (arXiv 2405.21046, Algorithm 1).

    The sum over tokens, whether the response won or lost; alpha is not multiplied by beta. Rests on released code of
    two libraries and on notes.
    """
    require(alpha >= 0, "alpha", "a number of at least 0", alpha)
    return ExplorationBonus(loss, alpha, "reference", relative=False)


def selm(loss: DirectOptimizer, alpha: float, beta: float) -> ExplorationBonus:
    """+ alpha beta * mean (log pi - log ref)(bonus response): SELM (arXiv 2405.19332, eq. 4.2, and its release)."""
    require(alpha >= 0 and beta > 0, "alpha, beta", "alpha >= 0 and beta > 0", (alpha, beta))
    return ExplorationBonus(loss, alpha * beta, "bonus", relative=True)


def vpo(loss: DirectOptimizer, alpha: float, beta: float, mode: Literal["online", "offline"]) -> ExplorationBonus:
    """sign alpha beta * mean (log pi - log ref)(bonus response), sign + online, - offline: VPO (arXiv 2405.19320).

    The bonus response is drawn from the calibration policy. Online lowers its log-probability (optimism), offline
    raises it (pessimism). Reconstructed: the direct loss is recalled, its principle is the abstract's.
    """
    require(alpha >= 0 and beta > 0, "alpha, beta", "alpha >= 0 and beta > 0", (alpha, beta))
    require(mode in ("online", "offline"), "mode", "online or offline", mode)
    return ExplorationBonus(loss, alpha * beta if mode == "online" else -alpha * beta, "bonus", relative=True)
