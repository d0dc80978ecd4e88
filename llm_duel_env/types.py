"""The nouns of a duel: what an agent proposes, shows, and learns from.

Letters in shapes: M prompts in a round, N responses per prompt, K recorded responses, D feature size, T tokens.
Arrays are NumPy: they cross between the environment and the agents, and are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Observation = Mapping[str, Any]
"""A batch of M prompts. Always ``prompt_id`` (M,) int64, and either ``prompt`` (a sequence of M str), or, on finite
tasks, ``context`` (M, C) float32 with ``candidates`` (M, K, D) float32."""

Metrics = dict[str, float]
"""Scalars to log, by name."""


def batch_size(observation: Observation) -> int:
    """M, the number of prompts in a batch observation."""
    return len(observation["prompt_id"])


def rows_of(observation: Observation, rows: np.ndarray) -> Observation:
    """The prompts at `rows` (an index or boolean array) of a batch observation."""
    rows = np.arange(batch_size(observation))[rows]
    return {
        name: value[rows] if isinstance(value, np.ndarray) else tuple(value[int(i)] for i in rows)
        for name, value in observation.items()
    }


def join(observations: Sequence[Observation]) -> Observation:
    """Several batch observations as one, in order."""
    return {
        name: np.concatenate([o[name] for o in observations])
        if isinstance(observations[0][name], np.ndarray)
        else tuple(text for o in observations for text in o[name])
        for name in observations[0]
    }


@dataclass(frozen=True)
class Candidates:
    """N responses to each of M prompts.

    The environment is shown `responses`; a language-model policy trains on `tokens`, the very ids it sampled, so that
    no text is ever tokenised again.
    """

    observation: Observation
    """The M prompts."""
    responses: np.ndarray
    """(M, N): int64 indices of recorded responses on finite tasks, str (dtype object) on text tasks."""
    tokens: np.ndarray | None = None
    """(M, N, T) int64 response ids, EOS included where one was sampled, padded on the right; None on finite tasks."""
    lengths: np.ndarray | None = None
    """(M, N) int64: how many of the T ids are the response's; None on finite tasks."""
    from_reference: np.ndarray | None = None
    """(M, N) bool: drawn from the reference policy; None means none was."""
    reference_log_prob: np.ndarray | None = None
    """(M, N) float32: log-probability of each response under the reference policy, where it was computed."""
    reference_version: int = 0
    """Which reference `reference_log_prob` belongs to (some agents move theirs)."""

    def __post_init__(self) -> None:
        m = batch_size(self.observation)
        if self.responses.ndim != 2 or len(self.responses) != m:
            raise ValueError(f"responses: expected shape ({m}, N) for {m} prompts, got {self.responses.shape}")
        for name in ("tokens", "lengths", "from_reference", "reference_log_prob"):
            value = getattr(self, name)
            if value is not None and value.shape[:2] != self.responses.shape:
                raise ValueError(f"{name}: expected leading shape {self.responses.shape}, got {value.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.responses.shape[0], self.responses.shape[1]

    def _map(self, change: Any) -> dict[str, Any]:
        names = ("responses", "tokens", "lengths", "from_reference", "reference_log_prob")
        return {name: None if getattr(self, name) is None else change(getattr(self, name)) for name in names}

    def take(self, index: np.ndarray) -> Candidates:
        """Of each prompt's responses those at `index` (M, n): a result with n responses per prompt."""
        rows = np.arange(self.shape[0])[:, None]
        return replace(self, **self._map(lambda value: value[rows, index]))

    def rows(self, rows: np.ndarray) -> Candidates:
        """The prompts at `rows` (an index or boolean array) with all their responses."""
        return replace(self, observation=rows_of(self.observation, rows), **self._map(lambda value: value[rows]))

    def duel(self, first: np.ndarray, second: np.ndarray) -> Duels:
        """Duels between each prompt's responses `first` (M,) and `second` (M,), all of them sent to the oracle."""
        return Duels(self.take(np.stack([first, second], axis=1)))

    def first_two(self) -> Duels:
        """The duel of each prompt's first response with its second, as they were sampled; all sent to the oracle."""
        first = np.zeros(self.shape[0], np.int64)
        return self.duel(first, first + 1)

    @staticmethod
    def beside(left: Candidates, right: Candidates) -> Candidates:
        """The responses of `left` (M, N) and `right` (M, N') to the same prompts, side by side: (M, N + N')."""
        return _concatenate([left, right], axis=1, observation=left.observation)

    @staticmethod
    def stack(parts: Sequence[Candidates]) -> Candidates:
        """The prompts of several batches with their responses, one after the other; N must agree."""
        return _concatenate(parts, axis=0, observation=join([part.observation for part in parts]))


def _concatenate(parts: Sequence[Candidates], axis: int, observation: Observation) -> Candidates:
    if len({part.reference_version for part in parts if part.reference_log_prob is not None}) > 1:
        raise ValueError("cannot join candidates whose reference log-probs belong to different references")
    fields: dict[str, Any] = {"responses": np.concatenate([part.responses for part in parts], axis)}
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if len(tokens) == len(parts):
        width = max(ids.shape[2] for ids in tokens)
        padded = [np.pad(ids, ((0, 0), (0, 0), (0, width - ids.shape[2]))) for ids in tokens]
        fields["tokens"] = np.concatenate(padded, axis)
        fields["lengths"] = np.concatenate([part.lengths for part in parts if part.lengths is not None], axis)
    if any(part.from_reference is not None for part in parts):
        tags = [np.zeros(p.shape, bool) if p.from_reference is None else p.from_reference for p in parts]
        fields["from_reference"] = np.concatenate(tags, axis)
    log_probs = [part.reference_log_prob for part in parts if part.reference_log_prob is not None]
    if len(log_probs) == len(parts):
        fields["reference_log_prob"] = np.concatenate(log_probs, axis)
        fields["reference_version"] = parts[0].reference_version
    return Candidates(observation=observation, **fields)


_NOT_GIVEN = np.empty(0)
"""Stands where the array to be made depends on M."""


@dataclass(frozen=True)
class Notes:
    """What an agent tells people about its M duels, for a report's sample duels. Nobody learns from it."""

    reason: tuple[str, ...]
    """(M,): why each pair was chosen."""
    belief: np.ndarray | None = None
    """(M,) in [0, 1]: the agent's own probability that the first beats the second, before it was told; NaN or None
    where it has none."""
    spread: np.ndarray | None = None
    """(M,): how far the agent's own opinions lie apart, the standard deviation of that probability over the members of
    its ensemble; None where it has but one."""


@dataclass(frozen=True)
class Duels:
    """M pairs, and for each whether the oracle is asked about it."""

    pair: Candidates
    """(M, 2): column 0 is shown first."""
    query: np.ndarray = field(default_factory=lambda: _NOT_GIVEN)
    """(M,) bool: True asks the oracle (and pays); False abstains. All True where not given."""
    synthetic: np.ndarray = field(default_factory=lambda: _NOT_GIVEN)
    """(M,) float32: for an abstained pair the agent's own label, 1 where its first response wins, 0 where its second
    does; NaN where it has none. It never leaves the agent."""
    again: np.ndarray | None = None
    """(M,) bool: True keeps the prompt for the next round, for another duel about it; None keeps none."""
    notes: Notes | None = None
    """Why these pairs, for people to read; neither the environment nor the learning sees it."""

    def __post_init__(self) -> None:
        m, n = self.pair.shape
        if n != 2:
            raise ValueError(f"a duel is between 2 responses, got {n}")
        if self.query is _NOT_GIVEN:
            object.__setattr__(self, "query", np.ones(m, bool))
        if self.synthetic is _NOT_GIVEN:
            object.__setattr__(self, "synthetic", np.full(m, np.nan, np.float32))
        if self.query.shape != (m,) or self.synthetic.shape != (m,):
            raise ValueError(f"query, synthetic: expected ({m},), got {self.query.shape}, {self.synthetic.shape}")
        if self.notes is not None:
            sizes = [len(told) for told in vars(self.notes).values() if told is not None]
            if sizes != [m] * len(sizes):
                raise ValueError(f"notes: expected {m} of each for {m} duels, got {sizes}")

    def noted(
        self, reason: str | Sequence[str], belief: np.ndarray | None = None, spread: np.ndarray | None = None
    ) -> Duels:
        """The same duels with `Notes`; one `reason` for all, or one each."""
        reasons = (reason,) * len(self.query) if isinstance(reason, str) else tuple(reason)
        return replace(self, notes=Notes(reasons, belief, spread))

    def action(self) -> dict[str, Any]:
        """What the vector environment takes: ``first`` and ``second`` (M each), ``query`` and ``again`` (M,) int64 in
        {0, 1}."""
        first, second = self.pair.responses[:, 0], self.pair.responses[:, 1]
        again = np.zeros(len(self.query), np.int64) if self.again is None else self.again.astype(np.int64)
        asked = {"query": self.query.astype(np.int64), "again": again}
        if self.pair.responses.dtype == object:
            return {"first": tuple(first), "second": tuple(second), **asked}
        return {"first": first, "second": second, **asked}

    def judged(
        self, preference: np.ndarray, reward: np.ndarray | None = None, scores: np.ndarray | None = None
    ) -> Preferences:
        """The duels with the oracle's `preference` (M,): 1 first, 0 second, 1/2 tie, NaN where it was not asked.

        `reward` (M,) is the environment's and `scores` (M, 2) are the oracle's, for the agents whose `needs` name them;
        everybody else gets none.
        """
        from_oracle = ~np.isnan(preference)
        labels = np.where(from_oracle, preference, self.synthetic).astype(np.float32)
        reward = None if reward is None else reward.astype(np.float32)
        scores = None if scores is None else scores.astype(np.float32)
        return Preferences(self.pair, labels, from_oracle, reward, scores)


@dataclass(frozen=True)
class Preferences:
    """M duels with labels. What `Agent.update` receives, and all it receives."""

    pair: Candidates
    """(M, 2)."""
    first_wins: np.ndarray
    """(M,) float32: 1 the first won, 0 the second won, 1/2 a tie, NaN no label."""
    from_oracle: np.ndarray
    """(M,) bool: labelled by the oracle (or an identical pair, a tie by definition); False: synthetic or no label."""
    reward: np.ndarray | None = None
    """(M,) float32: the environment's reward, for agents whose `needs` name it (they stand in a table of their own);
    None for everybody else."""
    scores: np.ndarray | None = None
    """(M, 2) float32: the oracle's utility of both responses as shown, NaN where it was not asked, for agents whose
    `needs` name scores; None for everybody else."""

    def __len__(self) -> int:
        return len(self.first_wins)

    def rows(self, rows: np.ndarray) -> Preferences:
        """Those at `rows` (an index or boolean array)."""
        return Preferences(
            self.pair.rows(rows),
            self.first_wins[rows],
            self.from_oracle[rows],
            None if self.reward is None else self.reward[rows],
            None if self.scores is None else self.scores[rows],
        )

    def decided(self) -> Preferences:
        """Those with a winner: no ties, no missing labels."""
        return self.rows((self.first_wins == 0) | (self.first_wins == 1))

    def ordered(self) -> Candidates:
        """(M, 2) with the winner in column 0. Every row must have a winner (`decided`)."""
        if not np.isin(self.first_wins, (0, 1)).all():
            raise ValueError("ordered: every preference must have a winner; call decided() first")
        loser = self.first_wins.astype(np.int64)
        return self.pair.take(np.stack([1 - loser, loser], axis=1))

    @staticmethod
    def stack(parts: Sequence[Preferences]) -> Preferences:
        """Several batches one after the other; of rewards and scores nothing where a batch has none."""
        rewards = [part.reward for part in parts if part.reward is not None]
        scores = [part.scores for part in parts if part.scores is not None]
        return Preferences(
            Candidates.stack([part.pair for part in parts]),
            np.concatenate([part.first_wins for part in parts]),
            np.concatenate([part.from_oracle for part in parts]),
            np.concatenate(rewards) if len(rewards) == len(parts) else None,
            np.concatenate(scores) if len(scores) == len(parts) else None,
        )
