"""Online DPO that samples as many responses per query as SEA does: is it the ensemble, or the tokens?

SEA samples N responses to every prompt and pays for a share gamma of them, so N / gamma responses stand behind each of
its queries, and two behind each of online DPO's. This control has as many (on language models: as many generated tokens
where responses are alike in length), and no reward model to choose with: the pair to be labelled are the best and the
worst of them by the policy's own implicit reward, beta (log pi - log ref).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llm_duel_env.agents import selection
from llm_duel_env.agents.online_dpo import OnlineDPO, OnlineDPOConfig
from llm_duel_env.agents.reward_models.use import prompt_draws
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

RULES = ("implicit", "first_two")


@dataclass(frozen=True)
class EqualTokensConfig(OnlineDPOConfig):
    """Online DPO's settings, and SEA's that set its number of samples."""

    candidates: int = 20
    """N of the SEA that is matched: responses sampled per prompt (SEA's: 20)."""
    oracle_share: float = 0.7
    """gamma of the SEA that is matched: N / gamma samples for every query (SEA's: 0.7)."""
    burn_in: float = 0.02
    """Share of the query budget in which SEA, and so this agent, samples N for every query (SEA's: 0.02)."""
    rule: str = "implicit"
    """Which two of the samples duel: implicit, the best and the worst by the policy's implicit reward; first_two, the
    others are thrown away, so that this is online DPO at SEA's cost."""


class OnlineDPOEqualTokens(OnlineDPO):
    """Best against worst of many samples of the present policy, in its own eyes."""

    Config = EqualTokensConfig
    provenance = "ours"
    config: EqualTokensConfig

    def __init__(self, task: TaskView, config: EqualTokensConfig, *, seed: int, budget: int) -> None:
        if config.candidates < 2 or not 0 < config.oracle_share <= 1:
            got = f"{config.candidates}, {config.oracle_share}"
            raise ValueError(f"expected candidates >= 2 and oracle_share in (0, 1], got {got}")
        if config.rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {config.rule!r}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.owed = 0.0
        """Samples per prompt that SEA would have drawn for the queries so far, less those drawn."""
        self._drawn = 0
        self._metrics: Metrics = {}

    @property
    def samples_per_query(self) -> float:
        """What SEA samples for each query at this point of the budget."""
        burning = self.queries < self.config.burn_in * self.budget
        return self.config.candidates / (1.0 if burning else self.config.oracle_share)

    def act(self, observation: Observation) -> Duels:
        """As many samples for each prompt as are owed if every prompt is asked about, and a duel of two of them."""
        self._drawn = max(int(self.owed + self.samples_per_query), 2)
        candidates = self.policy.sample(observation, self._drawn, ("act", self.round))
        self._metrics = {"samples": float(self._drawn)}
        if self.config.rule == "first_two":
            return candidates.first_two().noted("the first two of many samples of the present policy")
        reward, candidates = self.implicit_reward(candidates)
        identity = torch.from_numpy(selection.identities(candidates.responses))
        draws = prompt_draws(self.seed, f"equal_tokens/{self.round}", observation)
        first, second = selection.best_and_worst(reward, identity, draws)
        rows = torch.arange(len(first))
        margin = reward[rows, first] - reward[rows, second]
        self._metrics["implicit_margin"] = float(margin.abs().mean())
        duels = candidates.duel(first.numpy(), second.numpy())
        return duels.noted("the best and the worst sample by the implicit reward", margin.sigmoid().numpy())

    def implicit_reward(self, candidates: Candidates) -> tuple[Tensor, Candidates]:
        """beta (log pi - log ref) of each response, (M, N) float64, and the candidates with their log-probabilities
        under the reference, which are not computed again."""
        reference = self.policy.reference_log_prob(candidates)
        reward = self.config.beta * (self.policy.log_prob(candidates) - reference).double()
        version = self.policy.reference_version
        return reward, replace(candidates, reference_log_prob=reference.float().numpy(), reference_version=version)

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of the direct optimizer over the round's labelled pairs; counts what is owed."""
        first, second = preferences.pair.responses.T
        asked = float((preferences.from_oracle & (first != second)).mean())
        self.owed += asked * self.samples_per_query - self._drawn
        return self._metrics | super().learn(preferences)

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the samples owed."""
        super().save(folder)
        (folder / "owed.json").write_text(json.dumps(self.owed))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.owed = json.loads((folder / "owed.json").read_text())
