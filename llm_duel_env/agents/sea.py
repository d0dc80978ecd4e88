"""SEA: sample-efficient alignment by Thompson sampling (arXiv 2411.01493, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.agents import selection
from llm_duel_env.agents.base import Agent, AgentConfig, Provenance
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig, EnsembleRewardModel
from llm_duel_env.agents.reward_models.use import belief, beliefs_of, best_of, prompt_draws, rewards_of, winners_first
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Duels, Metrics, Observation, Preferences

RULES = {
    "bai": "Thompson winner of member {member} against the response whose comparison with it the members doubt most",
    "ee": "Thompson winner of member {member} against the first different winner of the others, asked in turn",
    "uncertainty": "the pair that the members disagree about most",
    "passive": "the first two samples, as they came",
}
CHOICES = {
    "opponent": tuple(RULES),
    "uncertainty": ("probability", "logit"),
    "synthetic_pair": ("extremes", "thompson"),
}


@dataclass(frozen=True)
class SEAConfig(AgentConfig):
    """Defaults are the paper's (App. D)."""

    candidates: int = 20
    """N, responses sampled per prompt (paper: 20)."""
    opponent: str = "bai"
    """Whom the Thompson winner meets: bai, the rival the ensemble is least sure about (best-arm identification); ee, a
    second Thompson winner (explore and exploit); uncertainty, no Thompson winner but the most uncertain pair; passive,
    the first two samples (paper: bai where the final policy counts, ee where every duel does)."""
    uncertainty: str = "probability"
    """What bai is unsure about: probability, the variance of the win probability (paper), or logit (released code). The
    rule called uncertainty always looks at the logit difference (paper)."""
    oracle_share: float = 0.7
    """gamma, the expected share of prompts labelled by the oracle after the burn-in; the ensemble labels the rest
    (paper: 0.7)."""
    burn_in: float = 0.02
    """Share of the query budget before any label is synthetic (paper: 1,000 of 50,000)."""
    synthetic_pair: str = "extremes"
    """What a synthetic label is about: extremes, one random member's best against its worst candidate (released code),
    or thompson, the duel itself (the paper is silent)."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo, ipo and slic)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (paper: DPO 0.1, SLiC 0.2, IPO 0.2 to 1)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""
    best_of_n: int = 0
    """Deploy the best of this many samples by the ensemble's mean; 0 deploys the policy itself (paper: both)."""
    reward_model: EnsembleConfig = field(default_factory=EnsembleConfig)
    """The epistemic reward model."""


class SEA(Agent):
    """Thompson sampling over responses that the policy proposes, with a mix of bought and synthetic preferences."""

    Config = SEAConfig
    paper = "https://arxiv.org/abs/2411.01493"
    provenance: ClassVar[Provenance] = "paper"
    believes = True
    config: SEAConfig

    def __init__(self, task: TaskView, config: SEAConfig, *, seed: int, budget: int) -> None:
        for name, known in CHOICES.items():
            if getattr(config, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(config, name)!r}")
        if config.candidates < 2 or not 0 <= config.oracle_share <= 1:
            got = f"{config.candidates}, {config.oracle_share}"
            raise ValueError(f"expected candidates >= 2 and oracle_share in [0, 1], got {got}")
        if not 0 <= config.burn_in < float("inf"):
            raise ValueError(f"burn_in: expected a finite number of at least 0, got {config.burn_in}")
        if config.best_of_n < 0:
            raise ValueError(f"best_of_n: expected at least 0, got {config.best_of_n}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer(config.loss, config.beta, config.loss_options)
        self.reward_model = EnsembleRewardModel(self.policy.feature_size, config.reward_model, seed=seed)
        self._features = torch.empty(0, 2, self.policy.feature_size)  # of the pairs of the last `act`
        self._metrics: Metrics = {}

    def act(self, observation: Observation) -> Duels:
        """Proposes candidates, lets a member of the ensemble choose the first and the ensemble's doubt the second."""
        candidates = self.policy.sample(observation, self.config.candidates, ("act", self.round))
        features = self.policy.embed(candidates)  # (M, N, D)
        with self.clock("select"):
            identity = torch.from_numpy(selection.identities(candidates.responses))
            rewards = rewards_of(self.reward_model, features, identity)  # (E, M, N)
            first, second = self.choose(rewards, identity, observation)
            query = ~self.trusts_itself(observation)
            asked = torch.from_numpy(query)
            first, second, label = self.synthesise(rewards, identity, observation, first, second, asked)

        rows = torch.arange(len(first))
        self._features = features[rows[:, None], torch.stack([first, second], dim=1)]
        clash = identity[rows, first] == identity[rows, second]
        self._metrics = {"synthetic_share": float(1 - query.mean()), "clash_rate": float(clash.float().mean())}
        duels = candidates.duel(first.numpy(), second.numpy())
        duels = duels.noted(self.why(observation, query), *belief(rewards, first, second))
        return replace(duels, query=query, synthetic=np.where(query, np.nan, label.numpy()).astype(np.float32))

    def choose(self, rewards: Tensor, identity: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        """The duel of each prompt, (M,) and (M,) candidate numbers (Algorithm 1, lines 4 to 6)."""
        if self.config.opponent == "passive":
            return selection.passive(rewards)
        ties = self.draw("tie", observation)
        if self.config.opponent == "uncertainty":
            return selection.widest_variance_pair(rewards, identity, ties)
        first = selection.thompson(rewards, self.member("first", observation))
        same = selection.same_as(identity, first)
        if self.config.opponent == "ee":
            orders = self.draw("second", observation, len(rewards)).argsort(dim=1)
            return first, selection.second_thompson(rewards, first, orders, same, ties)
        uncertainty: selection.Uncertainty = "logit" if self.config.uncertainty == "logit" else "probability"
        return first, selection.most_uncertain_rival(rewards, first, same, ties, uncertainty)

    def synthesise(
        self, rewards: Tensor, identity: Tensor, observation: Observation, first: Tensor, second: Tensor, query: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where `query` is False: the pair that one random member labels; and that member's label, NaN for a response
        against itself and where the member finds both equally good."""
        rows = torch.arange(len(first))
        opinion = rewards[self.member("synthetic", observation), rows]  # (M, N)
        if self.config.synthetic_pair == "extremes":
            best, worst = selection.best_and_worst(opinion, identity, self.draw("synthetic_tie", observation))
            first, second = torch.where(query, first, best), torch.where(query, second, worst)
        margin = opinion[rows, first] - opinion[rows, second]
        undecided = (margin == 0) | (identity[rows, first] == identity[rows, second])
        return first, second, (margin > 0).float().masked_fill(undecided, torch.nan)

    def trusts_itself(self, observation: Observation) -> np.ndarray:
        """Which prompts the ensemble labels, (M,) bool: none in the burn-in, nor before it has learnt anything."""
        chosen = self.draw("synthetic_share", observation).numpy() >= self.config.oracle_share
        ready = self.reward_model.trained and self.queries >= self.config.burn_in * self.budget
        return chosen if ready else np.zeros_like(chosen)

    @property
    def rule(self) -> str:
        """How a duel for the oracle is chosen, in words."""
        return RULES[self.config.opponent]

    def why(self, observation: Observation, query: np.ndarray) -> list[str]:
        """Why each pair was chosen, (M,), for people to read: the oracle is asked where `query` (M,) is True."""
        doubt = "" if self.reward_model.trained else "; the ensemble has learnt nothing yet"
        extremes = self.config.synthetic_pair == "extremes"
        reasons = []
        for bought, first, own in zip(query, self.member("first", observation), self.member("synthetic", observation)):
            reason = self.rule.format(member=int(first))
            if not bought:
                pair = "its best candidate against its worst" if extremes else reason
                reason = f"member {int(own)} of the ensemble labels this pair itself: {pair}"
            reasons.append(reason + doubt)
        return reasons

    def learn(self, preferences: Preferences) -> Metrics:
        """The ensemble learns from the oracle's labels only; the policy from the oracle's and the synthetic ones."""
        winner_first = winners_first(self._features, preferences)
        with self.clock("erm"):
            erm = self.reward_model.update(winner_first, (self.round,))
        learnt = self.policy.update(self.optimizer, preferences, progress=self.progress, key=("update", self.round))
        return {f"erm/{name}": value for name, value in erm.items()} | self._metrics | learnt

    def respond(self, observation: Observation) -> np.ndarray:
        """The policy's response, or the best of n samples in the eyes of the whole ensemble."""
        if not self.config.best_of_n:
            return super().respond(observation)
        candidates = self.policy.sample(observation, self.config.best_of_n, ("respond", self.round))
        return best_of(candidates, self.policy, self.reward_model)

    def draw(self, name: str, observation: Observation, count: int | None = None) -> Tensor:
        """Uniform draws keyed by (seed, name, round, prompt id, visit in this batch): (M,), or (M, count); float64."""
        return prompt_draws(self.seed, f"sea/{name}/{self.round}", observation, count)

    def member(self, name: str, observation: Observation) -> Tensor:
        """One random ensemble member per prompt, (M,) int64: an approximate draw from the posterior."""
        return (self.draw(name, observation) * self.config.reward_model.members).long()

    def beliefs(self, observation: Observation, responses: np.ndarray) -> np.ndarray:
        """See `Agent.beliefs`: of the ensemble's members."""
        return beliefs_of(self.policy, self.reward_model, observation, responses)

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the ensemble with its duels."""
        super().save(folder)
        self.reward_model.save(folder / "reward_model")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.reward_model.load(folder / "reward_model")
