"""What a direct optimizer sees: log-probabilities of ranked responses. A duel is a ranking of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llm_duel_env.types import Metrics


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities of the single tokens of B ranked lists of n responses; T is 1 on finite tasks."""

    policy: Tensor
    """(B, n, T) under the policy, with gradient; 0 outside the mask."""
    reference: Tensor
    """(B, n, T) under the reference policy, without gradient; 0 outside the mask."""
    mask: Tensor
    """(B, n, T) bool: the token is the response's (EOS included), not padding."""
    ids: Tensor
    """(B, n, T) int64 token ids; the candidate's number on finite tasks."""

    def __post_init__(self) -> None:
        for name in ("reference", "mask", "ids"):
            if getattr(self, name).shape != self.policy.shape:
                raise ValueError(f"{name}: expected {tuple(self.policy.shape)}, got {tuple(getattr(self, name).shape)}")


@dataclass(frozen=True)
class RankedLogProbs:
    """B ranked lists of n >= 2 responses as a direct optimizer sees them, the best in column 0.

    What stands here may be a microbatch: a part of the batch that one optimizer step takes.
    """

    policy: Tensor
    """(B, n) sequence log-probabilities under the policy, with gradient."""
    reference: Tensor
    """(B, n) the same under the reference policy, without gradient."""
    lengths: Tensor
    """(B, n) response tokens, EOS included; ones on finite tasks."""
    from_reference: Tensor
    """(B, n) bool: the response was drawn from the reference policy."""
    scores: Tensor | None = None
    """(B, n) float32 scalar rewards without gradient; None where the method has none."""
    batch_scores: Tensor | None = None
    """(B', n) the scores of the whole batch that these B rows are part of, for losses that normalise over a batch: so
    they do not depend on the microbatch. None: `scores` are the batch's."""
    bonus: Tensor | None = None
    """(B,) policy log-probability, with gradient, of one extra response per row (an exploration bonus looks at it)."""
    bonus_reference: Tensor | None = None
    """(B,) the same under the reference policy, without gradient."""
    index: Tensor | None = None
    """(B,) int64: which rows of what `Policy.learn` was given these are, for losses with terms of their own."""
    tokens: TokenLogProbs | None = None
    """The tokens of the B x n responses, where the loss says `needs_tokens`."""

    def __post_init__(self) -> None:
        shape = self.policy.shape
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(f"policy: expected (B, n) with n >= 2, got {tuple(shape)}")
        expected = {"reference": shape, "lengths": shape, "from_reference": shape, "scores": shape}
        for name, size in (expected | {"bonus": shape[:1], "bonus_reference": shape[:1], "index": shape[:1]}).items():
            value = getattr(self, name)
            if value is not None and value.shape != size:
                raise ValueError(f"{name}: expected {tuple(size)}, got {tuple(value.shape)}")
        if self.tokens is not None and self.tokens.policy.shape[:2] != shape:
            raise ValueError(f"tokens: expected {tuple(shape)} before T, got {tuple(self.tokens.policy.shape)}")
        if (self.bonus is None) != (self.bonus_reference is None):
            raise ValueError("bonus and bonus_reference: expected both or neither")


class DirectOptimizer(Protocol):
    """A loss on ranked responses: the mean over the B rows (a scalar with gradient), and what to log.

    May have an attribute ``needs_tokens``: True asks for `RankedLogProbs.tokens` (absent is False).
    """

    def __call__(self, ranked: RankedLogProbs, /) -> tuple[Tensor, Metrics]:
        """The loss and its metrics, each a mean over the B rows."""


def needs_tokens(loss: DirectOptimizer) -> bool:
    """Whether a loss asks for the log-probabilities of single tokens."""
    return bool(getattr(loss, "needs_tokens", False))
