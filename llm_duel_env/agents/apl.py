"""APL: active preference learning for language models (arXiv 2402.08114): label what the policy is sure about.

Of a pool of prompts those with the highest predictive entropy are kept, and of those the pairs that the policy's
implicit reward beta (log pi - log ref) ranks with the most certainty: informative where it is wrong, safe where it is
right. Labels are bought in phases; at the end of each the policy goes back to the start and is trained on all of them.
Reconstructed from the authors' released code. There a phase ranks one large pool; here the pool is a round's prompts,
and those that are dropped are abstained from. There training goes on to convergence, here for a number of epochs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.reward_models.use import prompt_draws
from llm_duel_env.agents.stored import load_candidates, save_candidates
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

RULES = ("entropy+certainty", "certainty", "entropy", "uncertainty", "random")


@dataclass(frozen=True)
class APLConfig(AgentConfig):
    """Defaults are the released scripts' for TL;DR. Sampling is at `policy.temperature` (scripts: 0.7)."""

    rule: str = "entropy+certainty"
    """What is kept: prompts of high entropy, pairs of certain rank, one after the other, pairs of uncertain rank, or
    anything (scripts: all of them)."""
    entropy_kept: float = 0.25
    """Share of a round's prompts that entropy keeps (scripts: 1 of 4)."""
    entropy_samples: int = 8
    """Samples, at temperature 1, that a prompt's entropy is estimated from (scripts: 8, and 16 for entropy alone)."""
    certainty_kept: float = 0.0625
    """Share of the remaining pairs that certainty, uncertainty or chance keeps (scripts: 1 of 16). At least one prompt
    of a round is asked about, unless all pairs are of identical responses."""
    phases: int = 4
    """Acquisition phases, equal shares of the query budget (scripts: 4 of 128 labels)."""
    epochs: int = 70
    """Trainings on all data at the end of a phase, of `policy.passes` passes each (scripts: at most 70). The learning
    rate's schedule runs over them."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo)."""
    beta: float = 0.2
    """Strength of the pull to the reference policy (scripts: 0.2)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


class APL(Agent):
    """Chooses prompts by entropy and pairs by the certainty of their implicit ranking; retrains from the start."""

    Config = APLConfig
    paper = "https://arxiv.org/abs/2402.08114"
    provenance = "reconstructed"
    config: APLConfig

    def __init__(self, task: TaskView, config: APLConfig, *, seed: int, budget: int) -> None:
        if config.rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {config.rule!r}")
        for name in ("entropy_kept", "certainty_kept"):
            if not 0 < getattr(config, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {getattr(config, name)}")
        for name in ("entropy_samples", "phases", "epochs"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer(config.loss, config.beta, config.loss_options)
        self.data: list[Preferences] = []
        """All decided duels so far."""
        self.phase = 0
        """Acquisition phases behind us."""
        self._metrics: Metrics = {}

    def act(self, observation: Observation) -> Duels:
        """Two samples for each prompt; the rule says which of the M pairs are worth a query."""
        pair = self.policy.sample(observation, 2, ("act", self.round))
        margin, pair = self.margin(pair)
        different = np.asarray(pair.responses[:, 0] != pair.responses[:, 1], bool)
        draws = prompt_draws(self.seed, f"apl/{self.round}", observation, 2).numpy()
        self._metrics, query = {}, different
        if "entropy" in self.config.rule:
            entropy = self.entropy(observation)
            query = keep(entropy, query, self.config.entropy_kept, draws[:, 0])
            self._metrics["entropy_of_prompts"] = float(entropy.mean())
            if query.any():
                self._metrics["entropy_of_kept"] = float(entropy[query].mean())
        if self.config.rule != "entropy":
            certain = {"uncertainty": -np.abs(margin), "random": np.zeros_like(margin)}
            liking = certain.get(self.config.rule, np.abs(margin))
            query = keep(liking, query, self.config.certainty_kept, draws[:, 1])
        self._metrics |= {"asked": float(query.mean()), "implicit_margin": float(np.abs(margin).mean())}
        chance = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
        return replace(pair.first_two().noted(self.why(margin, query), chance), query=query)

    def why(self, margin: np.ndarray, query: np.ndarray) -> list[str]:
        """Why each prompt was asked about or left out, (M,), for people to read."""
        told = {True: "kept", False: "left out"}
        return [
            f"{told[bool(asked)]} by the rule {self.config.rule}; implicit reward margin {value:+.2f}"
            for value, asked in zip(margin, query)
        ]

    def entropy(self, observation: Observation) -> np.ndarray:
        """An estimate of the entropy, in nats, of the policy's responses to each prompt: minus the mean log-probability
        of samples at temperature 1, (M,)."""
        key, n = ("entropy", self.round), self.config.entropy_samples
        samples = self.policy.sample(observation, n, key, temperature=1.0)
        return -self.policy.log_prob(samples).double().mean(dim=1).numpy()

    def margin(self, pair: Candidates) -> tuple[np.ndarray, Candidates]:
        """The difference of the implicit rewards of each pair, (M,), and the pairs with their log-probabilities under
        the reference, which are not computed again."""
        reference = self.policy.reference_log_prob(pair)
        reward = self.config.beta * (self.policy.log_prob(pair) - reference).double().numpy()
        version = self.policy.reference_version
        known = replace(pair, reference_log_prob=reference.float().numpy(), reference_version=version)
        return reward[:, 0] - reward[:, 1], known

    def learn(self, preferences: Preferences) -> Metrics:
        """Keeps the labels; where a phase ends, trains anew on all of them."""
        decided = preferences.rows(preferences.from_oracle).decided()
        if len(decided):
            self.data.append(decided)
        share = (self.queries + self.paid(preferences)) / self.budget
        ended = min(int(share * self.config.phases + 1e-9), self.config.phases)
        if ended <= self.phase:
            return self._metrics
        self.phase = ended
        return self._metrics | self.retrain()

    def retrain(self) -> Metrics:
        """Policy and optimizer go back to the start and are trained on all data. Metrics are the last epoch's;
        ``gradient_steps`` and ``pairs`` are summed."""
        self.policy.reset()
        if not self.data:
            return {}
        ranked = Preferences.stack(self.data).ordered()
        metrics: Metrics = {}
        for epoch in range(self.config.epochs):
            key = ("retrain", self.phase, epoch)
            learnt = self.policy.learn(self.optimizer, ranked, progress=epoch / self.config.epochs, key=key)
            summed = {name: learnt.get(name, 0.0) + metrics.get(name, 0.0) for name in ("gradient_steps", "pairs")}
            metrics = learnt | summed
        return metrics | {"phase": float(self.phase), "labels": float(len(ranked.responses))}

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and all data."""
        super().save(folder)
        (folder / "phase.json").write_text(json.dumps({"phase": self.phase, "data": len(self.data)}))
        if self.data:
            data = Preferences.stack(self.data)
            save_candidates(data.pair, folder / "data", first_wins=data.first_wins)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        state = json.loads((folder / "phase.json").read_text())
        self.phase = state["phase"]
        self.data = []
        if state["data"]:
            pair, arrays = load_candidates(folder / "data", self.task.observe)
            self.data = [Preferences(pair, arrays["first_wins"], np.ones(len(pair.responses), bool))]


def keep(values: np.ndarray, among: np.ndarray, share: float, draws: np.ndarray) -> np.ndarray:
    """The prompts with the highest values: the given share, rounded up, of those in `among`; draws break ties.

    Args:
        values: (M,).
        among: (M,) bool.
        share: in (0, 1].
        draws: (M,) in [0, 1).

    Returns:
        (M,) bool.
    """
    if not values.shape == among.shape == draws.shape:
        raise ValueError(f"expected one shape, got {values.shape}, {among.shape}, {draws.shape}")
    rows = np.flatnonzero(among)
    order = rows[np.lexsort((draws[rows], -values[rows]))]
    kept = np.zeros(len(values), bool)
    kept[order[: int(np.ceil(share * len(rows) - 1e-9))]] = True
    return kept
