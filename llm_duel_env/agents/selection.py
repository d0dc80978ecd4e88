"""Selection rules: which of a prompt's N candidates duel. Pure functions: every random draw comes in as an argument.

Shapes: rewards (E, M, N) of E ensemble members for M prompts with N candidates each; results are (M,) int64 numbers of
candidates.
`identity` (M, N) is equal where two candidates are the same *response*, and `same` says which are that of another: two
samples of a language model may well be the same text. A duel of a text with itself teaches nothing, so no rule returns
one while a different response exists (`passive` alone takes what comes).
`draws` are uniform in [0, 1), one per prompt; they break ties.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Uncertainty = Literal["probability", "logit"]
MOST_CLUSTERED = 12
"""Candidates that `two_means_medoids` takes at most."""


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
    return best_pair(variance, identity, draws)


def best_pair(score: Tensor, identity: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of different responses with the highest score (M, N, N), which is symmetric: (M,) and (M,).

    The lower candidate number comes first. Where all N are one response the pair is (0, 1).
    """
    m, n = identity.shape
    _expect("score", score, (m, n, n))
    upper = torch.ones(n, n, dtype=torch.bool, device=score.device).triu(1)
    allowed = (identity[:, :, None] != identity[:, None, :]) & upper
    # Where no pair is allowed, (0, 1) stands in: entry 1 of the table.
    flat = _best_allowed(score.flatten(1), allowed.flatten(1), torch.zeros(m, dtype=torch.int64), draws)
    return flat // n, flat % n


def best_and_worst(rewards: Tensor, identity: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst candidate by one reward each, (M, N): (M,) and (M,), different candidates always."""
    m, n = _shape(rewards[None])[1:]
    _expect("identity", identity, (m, n))
    best = rewards.argmax(dim=1)
    return best, _best_allowed(-rewards, ~same_as(identity, best), best, draws)


def cosines(features: Tensor) -> Tensor:
    """Cosine similarity of a prompt's candidates to each other: (M, N, D) -> (M, N, N) float64; 0 with a zero vector.

    In float64: mean hidden states point much the same way, and their cosines differ in the last digits.
    """
    if features.ndim != 3:
        raise ValueError(f"features: expected (prompts, candidates, size), got {tuple(features.shape)}")
    unit = torch.nn.functional.normalize(features.double(), dim=2)
    return unit @ unit.transpose(1, 2)


def two_means_medoids(features: Tensor, identity: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The responses nearest to the two centres of 2-means on features (M, N, D): (M,) and (M,) (REAL, centroid).

    The clusters with the least sum of squares among all 2^(N - 1) - 1 ways to make two, equal responses together; of
    each the member nearest to the centre. Both members of a cluster of two are equally near, so ties matter. Where all
    N are one response the pair is (0, 1).

    Args:
        draws: (M, 3), to break ties between clusterings and within each of the two clusters.

    Raises:
        ValueError: N is more than `MOST_CLUSTERED`.
    """
    m, n = identity.shape
    _expect("features", features, (m, n, features.shape[-1]))
    _expect("draws", draws, (m, 3))
    if not 2 <= n <= MOST_CLUSTERED:
        raise ValueError(f"2-means tries all splits: expected 2 to {MOST_CLUSTERED} candidates, got {n}")
    centred = features.double() - features.double().mean(dim=1, keepdim=True)
    gram = centred @ centred.transpose(1, 2)  # (M, N, N)
    number = torch.arange(1, 2 ** (n - 1), device=features.device)
    split = (number[:, None] >> torch.arange(n, device=features.device) & 1).bool()  # (P, N); N - 1 is in the rest
    first_same = (identity[:, :, None] == identity[:, None, :]).int().argmax(dim=2)
    together = (split[:, first_same] == split[:, None]).all(dim=2).T  # (M, P)
    members = torch.stack([split, ~split], dim=1).to(gram)  # (P, 2, N)
    # A cluster's sum of squares is its own squares less the squared sum over its size; the former add up to all.
    explained = torch.einsum("pcn,mnk,pck->mpc", members, gram, members) / members.sum(dim=2)
    size = gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(1e-300)
    chosen = _best_allowed(_rounded(explained.sum(dim=2) / size[:, None]), together, torch.zeros(m).long(), draws[:, 0])
    weights = members[chosen] / members[chosen].sum(dim=2, keepdim=True)  # (M, 2, N)
    cross = weights @ gram
    distance = gram.diagonal(dim1=1, dim2=2)[:, None] - 2 * cross + (cross * weights).sum(dim=2, keepdim=True)
    near = -_rounded(distance / size[:, None, None])
    medoids = [_best_allowed(near[:, c], members[chosen, c].bool(), chosen, draws[:, 1 + c]) for c in (0, 1)]
    found, none = together.any(dim=1), torch.zeros_like(chosen)
    return torch.where(found, medoids[0], none), torch.where(found, medoids[1], none + 1)


def passive(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The first two candidates as they were sampled, whatever the members think: (M,) and (M,)."""
    _, m, _ = _shape(rewards)
    first = torch.zeros(m, dtype=torch.int64, device=rewards.device)
    return first, first + 1


def _rounded(score: Tensor) -> Tensor:
    """So that what is equal in the mathematics is equal in the numbers."""
    return score.round(decimals=9)


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
