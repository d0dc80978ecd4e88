"""The classical contextual dueling bandits of finite tasks: a linear utility, its uncertainty, three ways to duel.

Each keeps one estimate of theta (`pairwise_logistic`) for utilities x . theta, where x is the policy's phi(x, a),
centred over the prompt's candidates, as preferences know nothing of what these share, and divided by sqrt(D), so that
its mean squared norm is about 1 (the papers assume norms of at most 1). The policy's network stays as it was made.
Deployed is the candidate of the highest estimated utility.

None of the papers' texts could be had: the rules are as notes and implementations by later authors have them, so all
three are registered as reconstructed. What differs on purpose: a round of M prompts is chosen by one estimate; the
regulariser stands in for the papers' first rounds of random pairs (as in arXiv 2310.00968); and no rule answers with
an identical pair, which would teach nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.special import expit, log_softmax, ndtri

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.baselines.pairwise_logistic import PairwiseLogistic, distances, norms
from llm_duel_env.randomness import uniforms, visits
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences, batch_size


def thompson_pair(features: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best candidate for one draw of theta, and the best of the others for a second draw: (M,) and (M,).

    Args:
        features: (M, K, D).
        first: (M, D) draws of theta, one per prompt.
        second: (M, D) draws independent of those.
    """
    winners = np.einsum("mkd,md->mk", features, first).argmax(axis=1)
    rivals = np.einsum("mkd,md->mk", features, second)
    return winners, _best_other(rivals, winners)


def most_informative_pair(utilities: np.ndarray, spread: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """The two promising candidates whose comparison is known least well: (M,) and (M,).

    Promising is who may be the best: u_a - u_b + width * spread_ab >= 0 for every b. Where only one candidate is, it
    meets the one whose comparison with it is known least well. Ties go to the lowest index.

    Args:
        utilities: (M, K), u.
        spread: (M, K, K), |x_a - x_b| in the norm of the inverse design matrix.
        width: above 0.
    """
    m, k = utilities.shape
    promising = (utilities[:, :, None] - utilities[:, None, :] + width * spread >= 0).all(axis=2)  # the best one always
    different = ~np.eye(k, dtype=bool)
    both = promising[:, :, None] & promising[:, None, :] & different
    either = promising[:, :, None] & different
    allowed = np.where(both.any(axis=(1, 2))[:, None, None], both, either)
    flat = np.where(allowed, spread, -np.inf).reshape(m, -1).argmax(axis=1)
    return flat // k, flat % k


def optimistic_pair(
    utilities: np.ndarray, lengths: np.ndarray, spread: np.ndarray, perturbations: np.ndarray, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """CoLSTIM's pair: argmax_a u_a + e_a |x_a|, and its strongest rival, argmax_b u_b + width * spread_ab: (M,), (M,).

    Args:
        utilities: (M, K), u.
        lengths: (M, K), |x_a| in the norm of the inverse design matrix.
        spread: (M, K, K), |x_a - x_b| in the same norm.
        perturbations: (M, K), e.
        width: of the confidence bound.
    """
    first = (utilities + perturbations * lengths).argmax(axis=1)
    return first, _best_other(utilities + width * spread[np.arange(len(first)), first], first)


def _best_other(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The best column of each row but `first`: (M, K), (M,) -> (M,)."""
    others = scores.copy()
    others[np.arange(len(first)), first] = -np.inf
    return others.argmax(axis=1)


@dataclass(frozen=True)
class LinearConfig(AgentConfig):
    """What all linear bandits can be told."""

    regulariser: float = 1.0
    """lambda of the estimate and of the design matrix (lambda = 1 is the textbook value for norms of at most 1)."""


class LinearBandit(Agent):
    """A linear dueling bandit but for the choice of its pair."""

    Config = LinearConfig
    kinds: ClassVar[frozenset[str]] = frozenset({"finite"})
    provenance = "reconstructed"
    policy_plays = False
    config: LinearConfig
    reason: ClassVar[str]
    """Why a pair is chosen, for people to read."""

    def __init__(self, task: TaskView, config: LinearConfig, *, seed: int, budget: int) -> None:
        super().__init__(task, config, seed=seed, budget=budget)
        self.size = int(self.policy.feature_size)
        self.model = PairwiseLogistic(self.size, config.regulariser)

    @abstractmethod
    def choose(self, observation: Observation, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whom to duel, (M,) and (M,), always different candidates; features (M, K, D)."""

    def act(self, observation: Observation) -> Duels:
        """The pair of `choose` for each prompt."""
        with self.clock("select"):
            features = self.features(observation)
            first, second = self.choose(observation, features)
        rows = np.arange(len(first))
        belief = expit((features[rows, first] - features[rows, second]) @ self.model.theta)
        return Duels(Candidates(observation, np.stack([first, second], axis=1).astype(np.int64))).noted(
            self.reason, belief
        )

    def learn(self, preferences: Preferences) -> Metrics:
        """The maximum of the regularised likelihood of all labels; ``nll`` is in nats per label."""
        bought = preferences.from_oracle & (preferences.pair.responses[:, 0] != preferences.pair.responses[:, 1])
        labelled = preferences.rows(bought)
        if not len(labelled):
            return {}
        with self.clock("fit"):
            phi = self.policy.embed(labelled.pair).double().numpy() / np.sqrt(self.size)
            steps = self.model.add(phi[:, 0] - phi[:, 1], labelled.first_wins.astype(np.float64))
        theta = float(np.linalg.norm(self.model.theta))
        return {"nll": self.model.loss, "newton_steps": float(steps), "theta_norm": theta}

    def features(self, observation: Observation) -> np.ndarray:
        """x of all candidates, (M, K, D) float64."""
        shape = observation["candidates"].shape[:2]
        everybody = np.broadcast_to(np.arange(shape[1]), shape).copy()
        phi = self.policy.embed(Candidates(observation, everybody)).double().numpy()
        return (phi - phi.mean(axis=1, keepdims=True)) / np.sqrt(self.size)

    def utilities(self, observation: Observation) -> np.ndarray:
        """The estimated utility of every candidate, (M, K), in logits; each prompt's mean is 0."""
        return self.features(observation) @ self.model.theta

    def respond(self, observation: Observation) -> np.ndarray:
        """The candidate of the highest estimated utility, (M,)."""
        return self.utilities(observation).argmax(axis=1)

    def diagnose(self, observation: Observation) -> Metrics:
        """KL to the uniform policy and entropy, in nats, of the softmax of the estimated utilities."""
        log_probability = log_softmax(self.utilities(observation), axis=1)
        entropy = float(-(np.exp(log_probability) * log_probability).sum(axis=1).mean())
        return {"kl": float(np.log(log_probability.shape[1])) - entropy, "entropy": entropy}

    def draws(self, name: str, observation: Observation, count: int) -> np.ndarray:
        """Uniforms in (0, 1) keyed by (seed, name, round, prompt id and its visit in this batch): (M, count)."""
        ids = np.asarray(observation["prompt_id"], np.int64)
        numbers = (ids << 32)[:, None] + visits(ids)[:, None] * count + np.arange(count)
        return uniforms(self.seed, ("linear", name, self.round), numbers) + 2.0**-54

    @property
    def confidence(self) -> float:
        """sqrt(D log T) with T the budget: the width that CoLSTIM's authors report."""
        return float(np.sqrt(self.size * np.log(max(self.budget, 2))))

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the labels with their estimate."""
        super().save(folder)
        self.model.save(folder / "linear.safetensors")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.model.load(folder / "linear.safetensors")


@dataclass(frozen=True)
class LinearTSConfig(LinearConfig):
    """Of double Thompson sampling."""

    inflation: float = 1.0
    """The draws' standard deviation over the posterior's (1: plain posterior sampling)."""


class LinearTS(LinearBandit):
    """Double Thompson sampling (Wu and Liu 2016), linear: arXiv 2404.06013 without its feel-good term.

    theta_1, theta_2 ~ N(theta, inflation^2 H^-1), the Laplace approximation to the posterior (that paper runs Langevin
    dynamics), drawn anew for every prompt; each picks its best candidate.
    """

    Config = LinearTSConfig
    paper = "https://arxiv.org/abs/2404.06013"
    config: LinearTSConfig
    reason = "the best candidate for one draw of theta against the best of the others for a second draw"

    def choose(self, observation: Observation, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `thompson_pair`."""
        noise = ndtri(self.draws("theta", observation, 2 * self.size)).reshape(-1, self.size).T  # (D, 2M)
        factor = cholesky(self.model.curvature(), lower=True)  # H = L L^T, so L^-T noise has the covariance H^-1
        offsets = solve_triangular(factor, noise, lower=True, trans="T").T.reshape(batch_size(observation), 2, -1)
        thetas = self.model.theta + self.config.inflation * offsets
        return thompson_pair(features, thetas[:, 0], thetas[:, 1])


@dataclass(frozen=True)
class MaxInPConfig(LinearConfig):
    """Of the maximum informative pair."""

    scale: float = 1.0
    """The confidence width over sqrt(D log T), the value in use for it (experiments of arXiv 2310.00968); the theory's
    is (1 / kappa) sqrt(D / 2 log(1 + 2 t / D) + log(1 / delta)), larger still."""


class MaxInP(LinearBandit):
    """Maximum informative pair (Saha, NeurIPS 2021, "Optimal algorithms for stochastic contextual preference bandits").

    Among the candidates that may be the best, the pair with the widest |x_a - x_b| in the norm of V^-1.
    """

    Config = MaxInPConfig
    paper = "https://papers.nips.cc/paper/2021/hash/fc3cf452d3da8402bebb765225ce8c0e-Abstract.html"
    config: MaxInPConfig
    reason = "of the candidates that may be the best, the pair whose comparison is known least well"

    def choose(self, observation: Observation, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `most_informative_pair`."""
        width = self.config.scale * self.confidence
        return most_informative_pair(features @ self.model.theta, distances(features, self.model.gram), width)


@dataclass(frozen=True)
class CoLSTIMConfig(LinearConfig):
    """Of CoLSTIM."""

    scale: float = 1.0
    """Width of the rival's confidence bound and clip of the perturbations, both over sqrt(D log T) (1: as its authors
    report it)."""
    coupling: float = 1.0
    """Factor on the probability min(1, D log(D T) / sqrt(t)) that a prompt's candidates share one perturbation: at D of
    80 that is always, within any budget below 800,000 (1: as notes have it)."""


class CoLSTIM(LinearBandit):
    """CoLSTIM (Bengs, Saha, Huellermeier, ICML 2022): a champion by perturbed utility, a rival by upper confidence.

    Perturbations are Gumbel, so that the difference of two is logistic, as Bradley-Terry has it.
    """

    Config = CoLSTIMConfig
    paper = "https://arxiv.org/abs/2202.04593"
    config: CoLSTIMConfig
    reason = "the best candidate by perturbed utility against its rival of the highest upper confidence"

    def choose(self, observation: Observation, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `optimistic_pair`."""
        gram, width = self.model.gram, self.config.scale * self.confidence
        return optimistic_pair(
            features @ self.model.theta,
            norms(features, gram),
            distances(features, gram),
            self.perturbations(observation, features.shape[1]),
            width,
        )

    def perturbations(self, observation: Observation, count: int) -> np.ndarray:
        """Clipped Gumbel noise, (M, K); one value for all of a prompt's candidates with the coupling's probability."""
        draws = self.draws("gumbel", observation, count + 1)
        noise = -np.log(-np.log(draws[:, 1:]))
        coupled = self.config.coupling * self.size * np.log(self.size * self.budget) / np.sqrt(self.queries + 1)
        shared = draws[:, :1] < min(coupled, 1.0)
        clip = self.config.scale * self.confidence
        return np.clip(np.where(shared, noise[:, :1], noise), -clip, clip)
