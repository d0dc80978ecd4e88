"""Selection rules: which of a prompt's N candidates duel. Pure functions: every random draw comes in as an argument.

Shapes: rewards (E, M, N) of E ensemble members for M prompts with N candidates each; results are (M,) int64 numbers of
candidates.
`same` says which candidates are the same *response*: two samples of a language model may well be the same text, and a
duel of a text with itself teaches nothing, so no rule that chooses by variance or by Thompson sampling returns one
while a different response exists (`passive` takes what comes).
`draws` are uniform in [0, 1), one per prompt; they break ties.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Uncertainty = Literal["probability", "logit"]


def identities(responses: np.ndarray) -> np.ndarray:
    """Numbers that are equal exactly where two responses are: (M, N) str or int64 -> (M, N) int64.

    >>> identities(np.array([["b", "a", "b"]], dtype=object)).tolist()
    [[1, 0, 1]]
    """
    if responses.dtype != object:
        return responses.astype(np.int64)
    # Numbered in sorted order, so that the numbers are a function of the texts alone.
    numbers: dict[str, int] = {text: i for i, text in enumerate(sorted(set(responses.ravel())))}
    return np.array([[numbers[text] for text in row] for row in responses], dtype=np.int64).reshape(responses.shape)


def same_as(identity: Tensor, first: Tensor) -> Tensor:
    """Which candidates are the same response as candidate `first` (M,): (M, N) bool from identities (M, N)."""
    return identity == identity.gather(1, first[:, None])


def thompson(rewards: Tensor, heads: Tensor) -> Tensor:
    """The best candidate in the eyes of one ensemble member per prompt: `heads` (M,) int64 -> (M,)."""
    _, m, _ = _shape(rewards)
    _expect("heads", heads, (m,))
    return rewards[heads, torch.arange(m, device=rewards.device)].argmax(dim=-1)


def most_uncertain_rival(
    rewards: Tensor, first: Tensor, same: Tensor, draws: Tensor, uncertainty: Uncertainty = "probability"
) -> Tensor:
    """The candidate whose comparison with `first` the members disagree about most (SEA, Algorithm 1, BAI): (M,).

    Disagreement is the unbiased variance over members of sigmoid(r(first) - r(b)), or with ``uncertainty="logit"`` of
    r(first) - r(b). Equal candidates, as with one member only, are chosen among uniformly. O(E M N).
    """
    e, m, n = _shape(rewards)
    _expect("same", same, (m, n))
    difference = rewards.gather(2, first[None, :, None].expand(e, m, 1)) - rewards
    if _checked(uncertainty) == "probability":
        difference = difference.sigmoid()
    return _best_allowed(_variance(difference), ~same, first, draws)


def second_thompson(rewards: Tensor, first: Tensor, orders: Tensor, same: Tensor, draws: Tensor) -> Tensor:
    """Double Thompson sampling (SEA, Algorithm 1, E&E): the first different winner, asking members in turn: (M,).

    Args:
        orders: (M, E) int64, for each prompt the order in which the members are asked. Where every member would pick
            the first response again, one of the different responses is drawn uniformly.
    """
    e, m, n = _shape(rewards)
    _expect("orders", orders, (m, e))
    _expect("same", same, (m, n))
    picks = rewards.argmax(dim=-1).T.gather(1, orders)  # (M, E)
    different = ~same.gather(1, picks)
    earliest = picks.gather(1, different.int().argmax(dim=1, keepdim=True))[:, 0]
    anything = _best_allowed(torch.zeros_like(same, dtype=rewards.dtype), ~same, first, draws)
    return torch.where(different.any(dim=1), earliest, anything)


def widest_variance_pair(
    rewards: Tensor, identity: Tensor, draws: Tensor, uncertainty: Uncertainty = "logit"
) -> tuple[Tensor, Tensor]:
    """The pair the members disagree about most (the rule called Uncertainty in SEA, Fig. 7): (M,) and (M,).

    The variance of the logit difference comes from one covariance, (M, N, N); ``uncertainty="probability"`` must look
    at the differences themselves and does so for one prompt at a time.
    """
    e, m, n = _shape(rewards)
    _expect("identity", identity, (m, n))
    if _checked(uncertainty) == "logit":
        centred = (rewards - rewards.mean(dim=0)).transpose(0, 1)  # (M, E, N)
        covariance = centred.transpose(1, 2) @ centred / max(e - 1, 1)
        own = covariance.diagonal(dim1=1, dim2=2)
        variance = (own[:, :, None] + own[:, None, :] - 2 * covariance).clamp_min(0)
    else:
        by_prompt = [rewards[:, i, :, None] - rewards[:, i, None, :] for i in range(m)]
        variance = torch.stack([_variance(difference.sigmoid()) for difference in by_prompt])
    upper = torch.ones(n, n, dtype=torch.bool, device=rewards.device).triu(1)
    allowed = (identity[:, :, None] != identity[:, None, :]) & upper
    # Where all N are one response no pair is allowed, and the pair (0, 1), entry 1 of the table, stands in.
    flat = _best_allowed(variance.flatten(1), allowed.flatten(1), torch.zeros(m, dtype=torch.int64), draws)
    return flat // n, flat % n


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst candidate for one member's rewards (M, N): (M,) and (M,), different candidates always."""
    n = _shape(rewards[None])[2]
    best, worst = rewards.argmax(dim=1), rewards.argmin(dim=1)
    return best, torch.where(best == worst, (best + 1) % n, worst)


def passive(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The first two candidates as they were sampled, whatever the members think: (M,) and (M,)."""
    _, m, _ = _shape(rewards)
    first = torch.zeros(m, dtype=torch.int64, device=rewards.device)
    return first, first + 1


def _best_allowed(score: Tensor, allowed: Tensor, first: Tensor, draws: Tensor) -> Tensor:
    """Per row the allowed column with the highest score, ties drawn uniformly; `first` + 1 where none is allowed."""
    score = score.masked_fill(~allowed, -torch.inf)
    tied = (score == score.amax(dim=1, keepdim=True)) & allowed
    count = tied.sum(dim=1)
    # The draw picks the j-th of the tied columns; a draw just below 1 may round up to the count.
    j = torch.minimum((draws.to(score) * count).long(), (count - 1).clamp_min(0))
    chosen = (tied.cumsum(dim=1) == j[:, None] + 1).int().argmax(dim=1)
    return torch.where(count > 0, chosen, (first.to(chosen) + 1) % score.shape[1])


def _variance(values: Tensor) -> Tensor:
    """Unbiased over the leading dimension; zero, not NaN, for a single member."""
    return values.var(dim=0, correction=1) if len(values) > 1 else torch.zeros_like(values[0])


def _shape(rewards: Tensor) -> tuple[int, int, int]:
    if rewards.ndim != 3:
        raise ValueError(f"rewards: expected (members, prompts, candidates), got {tuple(rewards.shape)}")
    if rewards.shape[2] < 2:
        raise ValueError(f"a duel needs at least 2 candidates per prompt, got {rewards.shape[2]}")
    return rewards.shape[0], rewards.shape[1], rewards.shape[2]


def _expect(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def _checked(uncertainty: Uncertainty) -> Uncertainty:
    if uncertainty not in ("probability", "logit"):
        raise ValueError(f"uncertainty: expected 'probability' or 'logit', got {uncertainty!r}")
    return uncertainty
