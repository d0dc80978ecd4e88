"""What a policy is: something an agent samples responses from and trains on preferences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.agents.policies.ranked import DirectOptimizer, RankedLogProbs, TokenLogProbs
from llm_duel_env.types import Candidates, Metrics, Observation, Preferences

__all__ = ["DirectOptimizer", "Policy", "PolicyConfig", "RankedLogProbs", "TokenLogProbs", "learning_rate"]


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy samples and learns. Defaults are SEA's (arXiv 2411.01493, App. D); recipes adapt them to a task."""

    learning_rate: float = 5e-7
    """Peak learning rate of AdamW (paper: 5e-7, for 1 to 7 billion parameters)."""
    final_learning_rate: float = 0.1
    """The cosine schedule ends at this share of the peak (released code: 0.1)."""
    warmup: float = 0.03
    """Share of the query budget over which the learning rate rises from 0 (released code: 0.03 by default, 0.02 in its
    script of SEA)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moments (released code: 0.9, 0.95)."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay (released code: 0)."""
    grad_clip: float = 1.0
    """Largest gradient norm (released code: 1)."""
    passes: int = 1
    """Passes over each round's pairs (paper: 1)."""
    batch: int = 128
    """Pairs per optimizer step (paper: 128); a round with fewer pairs is one step."""
    microbatch: int = 64
    """Pairs per forward and backward pass; gradients accumulate over a batch. Changes memory and time, not results
    (ours)."""
    temperature: float = 0.7
    """Sampling temperature for duels (paper: 0.7)."""
    sampler: str = "torch"
    """What samples (language models): torch, in this process; or vllm, the extra `vllm`, for the policy's own responses
    (reference responses and mixtures stay with torch). The released code samples with vLLM."""
    sampler_memory: float = 0.3
    """Share of a GPU's memory for vLLM's weights and cache; given back while the policy learns (ours; released code:
    0.25)."""
    learner: str = "torch"
    """What trains (language models): torch, in this process; or deepspeed, the extra `deepspeed`, on any number of
    ranks."""
    deepspeed_config: str | None = None
    """File with an ordinary DeepSpeed JSON (stage, offloading, bf16); batch sizes, clipping and learning rate are this
    policy's and may be left out or "auto" there. None is ZeRO 2."""
    asynchronous: bool = False
    """Learn in the background: the sampler and the oracle go on with the next round meanwhile, by the policy of before
    the lesson (one round off)."""
    gradient_checkpointing: bool = False
    """Layers compute again for the gradient instead of keeping what they computed: less memory, more time."""
    lora_rank: int = 0
    """Rank of a LoRA adapter (the extra `peft`), which alone trains; 0, as in the released code, trains all weights."""
    lora_alpha: float = 16.0
    """The adapter's output is scaled by this over its rank (released code: 16)."""
    lora_targets: str = "all-linear"
    """Modules that are adapted: all-linear, all but the output layer (released code); or names with commas
    between: q_proj,v_proj."""
    offload_reference: bool = False
    """Keep reference and encoder on the CPU while they are not used."""
    encoder: str = "policy"
    """Whose frozen features `embed` gives (language models): policy, the supervised policy's own; task, the encoder
    that the task offers; or a model folder with the same tokenizer (paper: PairRM, trained to compare responses)."""

    def __post_init__(self) -> None:
        for name in ("passes", "batch", "microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip", "temperature"):
            most = float("inf") if name != "grad_clip" else None  # an infinite grad_clip clips nothing
            if not getattr(self, name) > 0 or getattr(self, name) == most:
                raise ValueError(f"policy.{name}: expected a finite positive number, got {getattr(self, name)}")
        if self.sampler not in ("torch", "vllm"):
            raise ValueError(f"policy.sampler: expected torch or vllm, got {self.sampler!r}")
        if self.sampler == "vllm" and self.temperature < 0.01:
            raise ValueError(f"policy.temperature: vLLM takes 0.01 and more, got {self.temperature}")
        if not 0 < self.sampler_memory < 1:
            raise ValueError(f"policy.sampler_memory: expected a share in (0, 1), got {self.sampler_memory}")
        if self.learner not in ("torch", "deepspeed"):
            raise ValueError(f"policy.learner: expected torch or deepspeed, got {self.learner!r}")
        if self.deepspeed_config is not None and self.learner != "deepspeed":
            raise ValueError(
                f"policy.deepspeed_config: expected policy.learner=deepspeed with it, got {self.learner!r}"
            )
        if self.lora_rank < 0 or not 0 < self.lora_alpha < float("inf"):
            got = f"{self.lora_rank} and {self.lora_alpha}"
            raise ValueError(
                f"policy.lora_rank, policy.lora_alpha: expected 0 or more, and a positive number, got {got}"
            )
        if not 0 <= self.final_learning_rate <= 1:
            share = self.final_learning_rate
            raise ValueError(f"policy.final_learning_rate: expected a share of the peak in [0, 1], got {share}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"policy.warmup: expected a share of the budget in [0, 1), got {self.warmup}")


def check_mixture(mixture: float, reference: bool) -> None:
    """ValueError where `Policy.sample` cannot mix so."""
    if not 0 <= mixture <= 1 or (mixture and reference):
        wanted = "expected a weight of the reference in [0, 1], 0 where all is drawn from the reference"
        raise ValueError(f"mixture: {wanted}, got {mixture} with reference={reference}")


class Policy(ABC):
    """A policy with a frozen reference and a frozen encoder (both the policy it started as).

    `key` names the random stream of a draw: the same policy, key and observation give the same responses.
    """

    feature_size: int
    """D, the size of `embed`'s features."""
    reference_version: int = 0
    """Counts how often the reference was moved."""
    generated_tokens: int = 0
    """Tokens sampled for duels; 0 on finite tasks."""

    @abstractmethod
    def sample(
        self,
        observation: Observation,
        n: int,
        key: tuple[int | str, ...],
        *,
        reference: bool = False,
        temperature: float | None = None,
        mixture: float = 0.0,
    ) -> Candidates:
        """Draws n responses to each of M prompts: (M, n). `temperature` None is the configured one; `reference` draws
        from the reference policy and tags the responses so; `mixture` in [0, 1] is the reference's weight in a
        geometric mixture, token by token, of policy^(1 - mixture) reference^mixture (Nash-MD)."""

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
    def embed_responses(self, candidates: Candidates) -> Tensor:
        """An embedding of each response alone, whatever its prompt: (M, N, D') float32, without gradient. The mean of
        the supervised model's last hidden states over the response's tokens; on finite tasks the candidate's own
        vector."""

    @abstractmethod
    def learn(
        self,
        loss: DirectOptimizer,
        ranked: Candidates,
        *,
        progress: float,
        key: tuple[int | str, ...],
        scores: np.ndarray | None = None,
        bonus: Candidates | None = None,
    ) -> Metrics:
        """Trains on B >= 1 ranked lists: `passes` passes in batches, shuffled by `key`.

        Args:
            loss: called on each microbatch; its mean over rows is weighted by the microbatch's share of the batch.
            ranked: (B, n), the best response of each prompt in column 0.
            progress: share of the query budget spent, in [0, 1]; sets the learning rate.
            key: names the shuffle.
            scores: (B, n) finite scalar rewards, where the method has them.
            bonus: (B, 1), one more response to each prompt, for an exploration bonus.

        Returns:
            Means of the loss's metrics, with ``loss``, ``grad_norm``, ``learning_rate``, ``gradient_steps``, ``pairs``
            (the B rows).

        Raises:
            ValueError: shapes or prompts that do not fit, or scores that are not finite.
            FloatingPointError: a gradient is not finite; the weights are left as they were before its step.
        """

    def update(
        self,
        loss: DirectOptimizer,
        preferences: Preferences,
        *,
        progress: float,
        key: tuple[int | str, ...],
        scores: np.ndarray | None = None,
        bonus: Candidates | None = None,
    ) -> Metrics:
        """`learn` on the duels that have a winner, the winner first.

        Args:
            loss: see `learn`.
            preferences: M duels; ties and unlabelled ones are left out, with their scores and bonus responses. With
                none left nothing changes and {} is returned.
            progress: see `learn`.
            key: see `learn`.
            scores: (M, 2) scalar rewards in the order in which the responses were shown.
            bonus: (M, 1), one more response to each prompt.

        Returns:
            See `learn`.
        """
        if scores is not None and scores.shape != preferences.pair.shape:
            raise ValueError(f"scores: expected {preferences.pair.shape}, got {scores.shape}")
        if bonus is not None and bonus.shape != (len(preferences), 1):
            raise ValueError(f"bonus: expected {(len(preferences), 1)}, got {bonus.shape}")
        decided = (preferences.first_wins == 0) | (preferences.first_wins == 1)
        kept = preferences.decided()
        if not len(kept):
            return {}
        if scores is not None:
            scores = np.where(kept.first_wins[:, None] == 1, scores[decided], scores[decided][:, ::-1])
        if bonus is not None:
            bonus = bonus.rows(decided)
        return self.learn(loss, kept.ordered(), progress=progress, key=key, scores=scores, bonus=bonus)

    def settle(self) -> Metrics:
        """Waits for learning in the background and takes on what was learnt. Its metrics, as of `learn`; {} where
        nothing was under way."""
        return {}

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

    def reset(self) -> None:
        """Puts weights and optimizer back to the start (APL); reference, encoder and counters stay."""
        raise ValueError(f"{type(self).__name__} cannot be reset")


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
