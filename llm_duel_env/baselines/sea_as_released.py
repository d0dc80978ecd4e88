"""SEA as its released code behaves (oat 0.2.3), which is not as its paper says: what are its differences worth?

Pairs that the paper has labelled by the ensemble for free ("model data") do get the oracle's label here: the release
asks the oracle about them, trains policy and reward model on the answer, and leaves them out of its count of queries.
Here they are charged like any other, and `claimed_queries` counts what the release would have counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig, EnsembleRewardModel
from llm_duel_env.agents.reward_models.replay import PairBuffer
from llm_duel_env.agents.sea import SEA, SEAConfig
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Duels, Metrics, Observation, Preferences

WEIGHT_DECAY = 5e-5
"""Of the reward model's Adam, towards 0 (released code)."""


@dataclass(frozen=True)
class SEAAsReleasedConfig(SEAConfig):
    """SEA's settings where the released code differs from the paper."""

    uncertainty: str = "logit"
    """The rival is the one with the largest variance of the reward difference, without a sigmoid (released code)."""
    oracle_share: float = 0.7
    """Of M prompts exactly int((1 - oracle_share) M), drawn at random, are model data (released code: 9 of 32)."""
    burn_in: float = 5.0
    """Rounds, not a share of the budget, before there is model data (released code: 5)."""


class ReleasedEnsemble(EnsembleRewardModel):
    """The ensemble with the released code's objective. Its duels have one more feature: the release's loss mask."""

    def __init__(self, feature_size: int, config: EnsembleConfig, *, seed: int) -> None:
        super().__init__(feature_size, config, seed=seed)
        self.feature_size = feature_size
        self.buffer = PairBuffer(config.capacity, feature_size + 1)
        self.optimizer.param_groups[0]["weight_decay"] = WEIGHT_DECAY

    def forward(self, features: Tensor) -> Tensor:
        """Rewards of all members, (..., D) or (..., D + 1) -> (E, ...): the mask is not looked at."""
        return super().forward(features[..., : self.feature_size])

    def nll(self, pairs: Tensor) -> Tensor:
        """Terms (E,) that sum to mean NLL * mean mask.

        Both means are over the whole batch, since the release broadcasts (E, B, 1) against (1, B): masked pairs train the
        members as all others do, and only the scale falls.
        """
        return super().nll(pairs) / self.config.members * pairs[:, 0, -1].mean()

    def pull(self, labelled: int) -> float:
        """lambda (batch / n) of the mean, over all parameters of all members, of the squared distance from the start.

        n counts all stored duels: whether the release leaves model data out of it could not be made out.
        """
        return self.config.anchor * self.config.batch / labelled / sum(w.numel() for w in self.weights.values())


class SEAAsReleased(SEA):
    """SEA whose model data carry the oracle's labels."""

    Config = SEAAsReleasedConfig
    provenance = "reconstructed"  # from the code, knowingly not as the paper has it
    config: SEAAsReleasedConfig

    def __init__(self, task: TaskView, config: SEAAsReleasedConfig, *, seed: int, budget: int) -> None:
        super().__init__(task, config, seed=seed, budget=budget)
        self.reward_model = ReleasedEnsemble(self.policy.feature_size, config.reward_model, seed=seed)
        self.claimed_queries = 0
        """Queries as the released code counts them: without model data."""
        self._model_data = np.zeros(0, bool)

    def trusts_itself(self, observation: Observation) -> np.ndarray:
        """The model data, (M,) bool: none in the first rounds, then exactly int((1 - oracle_share) M) of M."""
        draws = self.draw("synthetic_share", observation)
        chosen = np.zeros(len(draws), bool)
        if self.round >= self.config.burn_in:
            share = round(1 - self.config.oracle_share, 9)  # 1 - 0.7 is a little more than 0.3
            chosen[draws.argsort(stable=True)[: int(share * len(draws))]] = True
        return chosen

    def why(self, observation: Observation, query: np.ndarray) -> list[str]:
        """Why each pair was chosen, for people to read; all are labelled by the oracle."""
        reasons = super().why(observation, query)
        return [reason if own else reason.replace("labels this pair itself", "chose this pair (model data)")
                for reason, own in zip(reasons, query)]  # fmt: skip

    def act(self, observation: Observation) -> Duels:
        """SEA's duels, but that all of them are sent to the oracle."""
        duels = super().act(observation)
        self._model_data = ~duels.query
        m = len(duels.query)
        return replace(duels, query=np.ones(m, bool), synthetic=np.full(m, np.nan, np.float32))

    def learn(self, preferences: Preferences) -> Metrics:
        """Ensemble and policy learn from every label; in a tie between different responses the second wins."""
        if len(preferences) != len(self._features):
            raise ValueError(f"expected the {len(self._features)} duels of the last act, got {len(preferences)}")
        labelled = preferences.from_oracle
        same = preferences.pair.responses[:, 0] == preferences.pair.responses[:, 1]
        wins = np.where(labelled & ~same, preferences.first_wins == 1, preferences.first_wins).astype(np.float32)
        preferences = replace(preferences, first_wins=wins)
        mask = torch.from_numpy(~(same | self._model_data)).float()
        features = torch.cat([self._features, mask[:, None, None].expand(-1, 2, 1)], dim=2)
        pairs = torch.where(torch.from_numpy(wins == 1)[:, None, None], features, features.flip(1))
        with self.clock("erm"):
            erm = self.reward_model.update(pairs[torch.from_numpy(labelled)], (self.round,))
        learnt = self.policy.update(self.optimizer, preferences, progress=self.progress, key=("update", self.round))
        self.claimed_queries += int((labelled & ~same & ~self._model_data).sum())
        claimed = {"claimed_queries": float(self.claimed_queries)}
        return {f"erm/{name}": value for name, value in erm.items()} | self._metrics | learnt | claimed

    def diagnose(self, observation: Observation) -> Metrics:
        """What `Agent.diagnose` measures, and the queries as claimed: the second axis of a report."""
        return super().diagnose(observation) | {"claimed_queries": float(self.claimed_queries)}

    def save(self, folder: Path) -> None:
        """Everything `SEA.save` writes, and the count of claimed queries."""
        super().save(folder)
        (folder / "claimed.json").write_text(json.dumps({"claimed_queries": self.claimed_queries}))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.claimed_queries = json.loads((folder / "claimed.json").read_text())["claimed_queries"]
