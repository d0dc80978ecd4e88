"""What a policy is taught in one call of `Policy.learn`: ranked responses with all that does not change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.agents.policies.ranked import DirectOptimizer, RankedLogProbs, TokenLogProbs, needs_tokens
from llm_duel_env.types import Candidates

Score = Callable[[Candidates, bool], Tensor]
"""Log-probabilities of candidates (b, N): summed over tokens, (b, N); or, with True, per token, (b, N, T)."""


@dataclass(frozen=True)
class Lesson:
    """B ranked lists of n responses, and what stays the same while the policy trains on them."""

    responses: Candidates
    """(B, n), the best in column 0; (B, n + 1) with a bonus response in the last column."""
    reference: Tensor
    """Log-probabilities of `responses` under the reference, on the policy's device: its shape, with T where
    `per_token`."""
    scores: Tensor | None
    """(B, n) float32."""
    has_bonus: bool
    """Whether the last column is the bonus response's."""
    per_token: bool
    """Whether the loss looks at single tokens."""

    def __len__(self) -> int:
        return self.responses.shape[0]

    def sizes(self, rows: np.ndarray) -> np.ndarray | None:
        """(R,) tokens of each row's longest response; None on finite tasks, whose responses are of one size."""
        return None if self.responses.lengths is None else self.responses.lengths[rows].max(axis=1)

    def part(self, rows: np.ndarray, batch: np.ndarray, score: Score) -> RankedLogProbs:
        """The rows of a microbatch, a part of the rows `batch`, with log-probabilities by `score`."""
        responses = self.responses.rows(rows)
        index = torch.as_tensor(rows, device=self.reference.device)
        policy, reference = score(responses, self.per_token), self.reference[index]
        if policy.shape != reference.shape:
            raise ValueError(f"log-probabilities: expected {tuple(reference.shape)}, got {tuple(policy.shape)}")
        n = responses.shape[1] - self.has_bonus
        tokens = None
        if self.per_token:
            ids, mask = (value.to(policy.device)[:, :n] for value in _ids_and_mask(responses))
            tokens = TokenLogProbs(policy[:, :n], reference[:, :n], mask, ids)
            policy, reference = policy.sum(-1), reference.sum(-1)
        lengths = np.ones(responses.shape, np.float32) if responses.lengths is None else responses.lengths
        tags = np.zeros(responses.shape, bool) if responses.from_reference is None else responses.from_reference
        return RankedLogProbs(
            policy=policy[:, :n],
            reference=reference[:, :n],
            lengths=torch.as_tensor(lengths[:, :n], device=policy.device),
            from_reference=torch.as_tensor(tags[:, :n], device=policy.device),
            scores=None if self.scores is None else self.scores[index],
            batch_scores=None if self.scores is None else self.scores[torch.as_tensor(batch, device=policy.device)],
            bonus=policy[:, n] if self.has_bonus else None,
            bonus_reference=reference[:, n] if self.has_bonus else None,
            index=index,
            tokens=tokens,
        )


def prepare(
    loss: DirectOptimizer, ranked: Candidates, scores: np.ndarray | None, bonus: Candidates | None, reference: Score
) -> Lesson:
    """Checks what `Policy.learn` was given, and has the reference score it once.

    Args:
        loss: says whether it needs tokens.
        ranked: (B, n), the best in column 0.
        scores: (B, n) or None.
        bonus: (B, 1) of the same prompts, or None.
        reference: log-probabilities under the reference, on the policy's device, without gradient.

    Raises:
        ValueError: fewer than two responses or no row, shapes or prompts that do not fit, scores that are not finite.
    """
    b, n = ranked.shape
    if b < 1 or n < 2:
        raise ValueError(f"ranked: expected at least one row of at least two responses, got {(b, n)}")
    if scores is not None:
        if scores.shape != (b, n):
            raise ValueError(f"scores: expected {(b, n)}, got {scores.shape}")
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
            raise ValueError(f"scores: expected finite numbers, rows {bad[:8].tolist()} have others; leave them out")
    responses = ranked
    if bonus is not None:
        if bonus.shape != (b, 1) or (bonus.observation["prompt_id"] != ranked.observation["prompt_id"]).any():
            raise ValueError(f"bonus: expected one response to each of the {b} prompts, in order; got {bonus.shape}")
        # Their stored reference log-probabilities may belong to different references, and are looked at one by one.
        responses = Candidates.beside(replace(ranked, reference_log_prob=None), replace(bonus, reference_log_prob=None))
    per_token = needs_tokens(loss)
    if per_token or bonus is None:
        under_reference = reference(responses, per_token)
    else:
        under_reference = torch.cat([reference(ranked, False), reference(bonus, False)], dim=1)
    return Lesson(
        responses=responses,
        reference=under_reference,
        scores=None if scores is None else torch.as_tensor(scores, dtype=torch.float32, device=under_reference.device),
        has_bonus=bonus is not None,
        per_token=per_token,
    )


def _ids_and_mask(responses: Candidates) -> tuple[Tensor, Tensor]:
    """(b, N, T) ids and whether each is the response's; on finite tasks the candidate's number is the one token."""
    if responses.tokens is None or responses.lengths is None:
        ids = torch.from_numpy(responses.responses)[..., None]
        return ids, torch.ones_like(ids, dtype=torch.bool)
    inside = np.arange(responses.tokens.shape[2]) < responses.lengths[..., None]
    return torch.from_numpy(responses.tokens), torch.from_numpy(inside)
