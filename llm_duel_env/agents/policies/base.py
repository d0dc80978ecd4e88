"""What a policy is: something an agent samples responses from and trains on preferences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_duel_env.types import Candidates, Metrics, Observation, Preferences


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy samples and learns. Defaults are SEA's (arXiv 2411.01493, App. D); recipes adapt them to a task."""

    learning_rate: float = 5e-7
    """Peak learning rate of AdamW (paper: 5e-7, for 1 to 7 billion parameters)."""
    final_learning_rate: float = 0.1
    """The cosine schedule ends at this share of the peak (released code: 0.1)."""
    warmup: float = 0.03
    """Share of the query budget over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moments (released code)."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    passes: int = 1
    """Passes over each round's pairs (paper: 1)."""
    batch: int = 128
    """Pairs per optimizer step (paper: 128); a round with fewer pairs is one step."""
    microbatch: int = 64
    """Pairs per forward and backward pass; gradients accumulate over a batch. Changes memory and time, not results."""
    temperature: float = 0.7
    """Sampling temperature for duels (paper: 0.7)."""
    encoder: str = "policy"
    """Whose frozen features `embed` gives (language models): policy, the supervised policy's own; task, the encoder that
    the task offers; or a model folder with the same tokenizer (paper: PairRM, a model trained to compare responses)."""

    def __post_init__(self) -> None:
        for name in ("passes", "batch", "microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"policy.{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"policy.warmup: expected a share of the budget in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class PairLogProbs:
    """B pairs as a direct optimizer sees them; column 0 is the winner, column 1 the loser."""

    policy: Tensor
    """(B, 2) sequence log-probabilities under the policy, with gradient."""
    reference: Tensor
    """(B, 2) the same under the reference policy, without gradient."""
    lengths: Tensor
    """(B, 2) response tokens, EOS included; ones on finite tasks."""
    from_reference: Tensor
    """(B, 2) bool: the response was drawn from the reference policy."""

    def __post_init__(self) -> None:
        shape = self.policy.shape
        if len(shape) != 2 or shape[1] != 2:
            raise ValueError(f"policy: expected (B, 2), got {tuple(shape)}")
        for name in ("reference", "lengths", "from_reference"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(getattr(self, name).shape)}")


DirectOptimizer = Callable[[PairLogProbs], tuple[Tensor, Metrics]]
"""A loss over pairs: the mean over the B pairs (a scalar with gradient), and what to log."""


class Policy(ABC):
    """A policy with a frozen reference and a frozen encoder (both the policy it started as).

    `key` names the random stream of a draw: the same policy, key and observation give the same responses.
    """

    feature_size: int
    """D, the size of `embed`'s features."""
    reference_version: int = 0
    """Counts how often the reference was moved."""

    @abstractmethod
    def sample(
        self,
        observation: Observation,
        n: int,
        key: tuple[int | str, ...],
        *,
        reference: bool = False,
        temperature: float | None = None,
    ) -> Candidates:
        """Draws n responses to each of M prompts: (M, n). `temperature` None is the configured one; `reference` draws
        from the reference policy and tags the responses so."""

    @abstractmethod
    def greedy(self, observation: Observation) -> Candidates:
        """The deployed response to each prompt, (M, 1): greedy for text, the likeliest candidate on finite tasks."""

    @abstractmethod
    def log_prob(self, candidates: Candidates) -> Tensor:
        """Log-probability of each response, summed over tokens, at temperature 1: (M, N), without gradient."""

    @abstractmethod
    def reference_log_prob(self, candidates: Candidates) -> Tensor:
        """The same under the reference policy: (M, N), without gradient."""

    @abstractmethod
    def embed(self, candidates: Candidates) -> Tensor:
        """Features of each (prompt, response) under the frozen encoder: (M, N, D) float32, without gradient."""

    @abstractmethod
    def update(
        self, loss: DirectOptimizer, preferences: Preferences, *, progress: float, key: tuple[int | str, ...]
    ) -> Metrics:
        """Trains on the preferences that have a winner: `passes` passes in batches, shuffled by `key`.

        Args:
            loss: called on each microbatch; its mean over pairs is weighted by the microbatch's share of the batch.
            preferences: ties and unlabelled pairs are left out; with none left nothing changes and {} is returned.
            progress: share of the query budget spent, in [0, 1]; sets the learning rate.
            key: names the shuffle.

        Returns:
            Means of the loss's metrics, with ``loss``, ``grad_norm``, ``learning_rate``, ``gradient_steps``, ``pairs``.
        """

    @abstractmethod
    def diagnose(self, observation: Observation, key: tuple[int | str, ...]) -> Metrics:
        """From one sample per prompt at temperature 1: ``kl`` (to the reference, nats), ``entropy`` (of the response,
        nats), ``length`` (tokens; absent on finite tasks)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes everything `load` needs to go on exactly: weights, optimizer, counters. Safetensors and JSON."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""

    def move_reference(self) -> None:
        """Makes the present policy the reference (SELM, APL); the encoder stays."""
        raise ValueError(f"{type(self).__name__} keeps its reference")


def learning_rate(config: PolicyConfig, progress: float) -> float:
    """Linear warm-up, then a cosine from the peak to its `final_learning_rate` share, by share of the budget spent.

    >>> round(learning_rate(PolicyConfig(learning_rate=1.0, warmup=0.0), 1.0), 6)
    0.1
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        # Never exactly zero: the first round has spent nothing, and should still learn something.
        return config.learning_rate * max(progress / config.warmup, 0.1)
    angle = torch.pi * (progress - config.warmup) / max(1.0 - config.warmup, 1e-9)
    cosine = 0.5 * (1.0 + float(torch.cos(torch.tensor(angle, dtype=torch.float64))))
    return config.learning_rate * (config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine)
