"""REAL: response embedding-based alignment (arXiv 2409.17169): label the pair of responses that are least alike.

The similarity of two responses is the cosine of their embeddings: the mean of the supervised model's last hidden states
over the response's tokens, the response run alone, without its prompt. The rules were read from the paper's abstract
and its authors' released code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.agents import selection
from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.reward_models.use import prompt_draws
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

if TYPE_CHECKING:  # it brings transformers with it
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy

RULES = ("dissimilar", "centroid", "similar", "random")


@dataclass(frozen=True)
class REALConfig(AgentConfig):
    """Defaults are the paper's, as far as abstract and released code tell it."""

    rule: str = "dissimilar"
    """Which pair is labelled: dissimilar, the least cosine (the paper's recommendation; "easy" in the released code);
    centroid, the responses nearest to the two centres of 2-means; similar, the greatest cosine ("hard"); random."""
    candidates: int = 4
    """N, responses to choose the pair from (released code: up to 4 for SHP-2, 2 for HH-RLHF)."""
    kept: float = 1.0
    """Share of a round's prompts that are labelled: of their chosen pairs, those that the rule likes best (released
    code: 1 for SHP-2; 0.5 for HH-RLHF, where every prompt has one pair and the choice is among prompts)."""
    offline: bool = True
    """Pairs are of responses of the supervised policy, as in the paper, which selects before it trains; False samples
    them from the present policy."""
    given: bool = False
    """Pairs are of the first `candidates` responses that the data record, as with the paper's data sets, where the task
    has such (offline_pairs); goes with `offline`."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (released code: 0.1)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


class REAL(Agent):
    """Chooses what is labelled by how alike responses are, whatever the policy or a reward model thinks of them."""

    Config = REALConfig
    paper = "https://arxiv.org/abs/2409.17169"
    provenance = "reconstructed"
    config: REALConfig

    def __init__(self, task: TaskView, config: REALConfig, *, seed: int, budget: int) -> None:
        if config.rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {config.rule!r}")
        if config.candidates < 2 or not 0 < config.kept <= 1:
            raise ValueError(f"expected candidates >= 2 and kept in (0, 1], got {config.candidates}, {config.kept}")
        if config.rule == "centroid" and config.candidates > selection.MOST_CLUSTERED:
            raise ValueError(
                f"centroid: expected at most {selection.MOST_CLUSTERED} candidates, got {config.candidates}"
            )
        if config.given and not config.offline:
            raise ValueError("given: recorded responses do not follow the policy; expected offline=True with it")
        if config.given and task.given is None:
            raise ValueError("given: expected a task with recorded responses (offline_pairs), this one has none")
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer(config.loss, config.beta, config.loss_options)
        self._metrics: Metrics = {}

    def act(self, observation: Observation) -> Duels:
        """Takes candidates, embeds them without their prompts, and lets the rule choose pairs and prompts."""
        candidates = self.recorded(observation) if self.config.given else self.sampled(observation)
        features = self.policy.embed_responses(candidates)  # (M, N, D')
        with self.clock("select"):
            identity = torch.from_numpy(selection.identities(candidates.responses))
            draws = prompt_draws(self.seed, f"real/{self.round}", observation, 4)
            cosines = selection.cosines(features)
            if self.config.rule == "centroid":
                first, second = selection.two_means_medoids(features, identity, draws[:, :3])
            else:
                first, second = selection.best_pair(self.liking(cosines), identity, draws[:, 0])
            rows = torch.arange(len(first))
            chosen = cosines[rows, first, second]
            query = self.keep(chosen, identity[rows, first] == identity[rows, second], draws[:, 3])
        self._metrics = {"cosine": float(chosen.mean()), "cosine_of_candidates": _mean_off_diagonal(cosines)}
        reasons = [
            f"rule {self.config.rule}: the pair of {candidates.shape[1]} candidates has cosine {value:.3f}"
            for value in chosen.tolist()
        ]
        return replace(candidates.duel(first.numpy(), second.numpy()).noted(reasons), query=query.numpy())

    def sampled(self, observation: Observation) -> Candidates:
        """N responses to each prompt, of the supervised policy or the present one: (M, N)."""
        key = ("act", self.round)
        return self.policy.sample(observation, self.config.candidates, key, reference=self.config.offline)

    def recorded(self, observation: Observation) -> Candidates:
        """The responses that the data record for each prompt, N at most: (M, 2 to N)."""
        assert self.task.given is not None
        policy = cast("LanguageModelPolicy", self.policy)  # recorded responses are texts
        return policy.from_text(observation, self.task.given(observation)[:, : self.config.candidates])

    def liking(self, cosines: Tensor) -> Tensor:
        """What the rule would have high, of cosines of any shape; all equal, so that ties decide, for random."""
        return {"dissimilar": -cosines, "centroid": -cosines, "similar": cosines}.get(
            self.config.rule, torch.zeros_like(cosines)
        )

    def keep(self, chosen: Tensor, clash: Tensor, draws: Tensor) -> Tensor:
        """Which prompts are labelled, (M,) bool: the share `kept` whose chosen pairs, with cosines (M,), the rule likes
        best; a response against itself comes last, and draws (M,) break ties."""
        liking = self.liking(chosen).masked_fill(clash, -torch.inf)
        order = np.lexsort((draws.numpy(), -liking.numpy()))
        query = torch.zeros(len(chosen), dtype=torch.bool)
        query[order[: int(np.ceil(self.config.kept * len(chosen) - 1e-9))].tolist()] = True
        return query

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of the direct optimizer over the round's labelled pairs."""
        learnt = self.policy.update(self.optimizer, preferences, progress=self.progress, key=("update", self.round))
        return self._metrics | learnt


def _mean_off_diagonal(cosines: Tensor) -> float:
    n = cosines.shape[1]
    return float((cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)).mean() / (n * (n - 1)))
