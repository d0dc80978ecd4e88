"""Nash-MD's policy gradient as a loss on the duel of a sample with an opponent (arXiv 2312.00886)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llm_duel_env.agents.losses.parts import only_pairs, require, scores_of
from llm_duel_env.agents.policies.ranked import RankedLogProbs
from llm_duel_env.types import Metrics


@dataclass(frozen=True)
class NashMD:
    """-mean (z - 1/2 - beta sg[log pi(y) - log ref(y)]) log pi(y): y in column 0, its opponent y' in column 1.

    sg stops the gradient; z is the label of the duel, 1 where y won, in column 0 of the scores. Where y was drawn from
    pi at temperature 1 the gradient is unbiased for beta KL(pi || ref) - P(pi beats the opponent), the opponent held
    fixed: the mean of z is the oracle's probability, and 1/2 is a baseline. y' gets no gradient. A direct optimizer,
    but of samples in the order in which they were drawn, not of a ranking.
    """

    beta: float
    """Strength of the pull to the reference."""
    per_token: bool = False
    """The KL term token by token, sum over t of sg[log pi_t - log ref_t] log pi_t, as TRL has it: less variance, but
    not the gradient of the sequence's KL, since what a token does to those after it is left out."""

    def __post_init__(self) -> None:
        require(self.beta >= 0, "beta", "a number of at least 0", self.beta)

    @property
    def needs_tokens(self) -> bool:
        """Only the per-token form looks at tokens."""
        return self.per_token

    def __call__(self, ranked: RankedLogProbs, /) -> tuple[Tensor, Metrics]:
        """The loss, and the means ``preference`` (of z), ``log_ratio`` (an estimate of the KL)."""
        only_pairs(ranked)
        won, own = scores_of(ranked)[:, 0], ranked.policy[:, 0]
        ratio = (own - ranked.reference[:, 0]).detach()
        if self.per_token:
            if ranked.tokens is None:
                raise ValueError("the per-token form needs tokens, and got none")
            single, reference = ranked.tokens.policy[:, 0], ranked.tokens.reference[:, 0]
            pull = ((single - reference).detach() * single).sum(dim=1)
        else:
            pull = ratio * own
        loss = (self.beta * pull - (won - 0.5) * own).mean()
        return loss, {"preference": float(won.mean()), "log_ratio": float(ratio.mean())}
