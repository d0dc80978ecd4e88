"""How agents use an ensemble of reward models: draws by prompt, what the oracle's labels teach, the best of n."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.agents.policies.base import Policy
from llm_duel_env.agents.reward_models.ensemble import EnsembleRewardModel
from llm_duel_env.randomness import uniforms, visits
from llm_duel_env.types import Candidates, Observation, Preferences


def prompt_draws(seed: int, name: str, observation: Observation, count: int | None = None) -> Tensor:
    """Uniform draws keyed by (seed, name, prompt id and its visit in this batch), whatever else is in the batch: (M,),
    or (M, count); float64."""
    ids = np.asarray(observation["prompt_id"], np.int64)
    prompts = ids + (visits(ids) << 40)  # a prompt that comes twice in a round has draws of its own
    numbers = prompts if count is None else prompts[:, None] * count + np.arange(count)
    return torch.from_numpy(uniforms(seed, name, numbers.ravel()).reshape(numbers.shape))


def rewards_of(reward_model: EnsembleRewardModel, features: Tensor, identity: Tensor) -> Tensor:
    """What each member gives to each response, on the CPU: (E, M, N); a response that a prompt has twice is looked at once.

    Args:
        reward_model: of E members.
        features: (M, N, D) of the responses.
        identity: (M, N) of `selection.identities`.
    """
    m, n = identity.shape
    foremost = (identity[:, :, None] == identity[:, None]).int().argmax(dim=2)  # (M, N): the first that is the same
    distinct = foremost == torch.arange(n)
    number = (distinct.flatten().cumsum(0) - 1).view(m, n).gather(1, foremost)  # which of the distinct ones
    return reward_model(features[distinct]).cpu()[:, number]


def winners_first(features: Tensor, preferences: Preferences) -> Tensor:
    """The duels that the oracle decided, (B, 2, D) winner first: no tie, no synthetic label.

    Args:
        features: (M, 2, D) of the duels' responses, in the order in which they were shown.
        preferences: the M duels.
    """
    if len(preferences) != len(features):
        raise ValueError(f"expected the {len(features)} duels of the last act, got {len(preferences)}")
    decided = np.isin(preferences.first_wins, (0, 1)) & preferences.from_oracle
    pairs = features[torch.from_numpy(decided)]
    swapped = torch.from_numpy(preferences.first_wins[decided] == 0)
    return torch.where(swapped[:, None, None], pairs.flip(1), pairs)


def belief(rewards: Tensor, first: Tensor, second: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the members think of each prompt's pair: P(first beats second), the mean over members, and its standard
    deviation over them: (M,) and (M,), of rewards (E, M, N) and candidate numbers (M,). For people to read."""
    rows = torch.arange(len(first))
    chance = (rewards[:, rows, first] - rewards[:, rows, second]).sigmoid()
    return chance.mean(dim=0).numpy(), chance.std(dim=0, correction=0).numpy()


def best_of(candidates: Candidates, policy: Policy, reward_model: EnsembleRewardModel) -> np.ndarray:
    """Of each prompt's responses the best in the eyes of the whole ensemble, by its mean: (M,)."""
    best = reward_model(policy.embed(candidates)).mean(dim=0).argmax(dim=1)
    return candidates.take(best.cpu().numpy()[:, None]).responses[:, 0]


def beliefs_of(
    policy: Policy, reward_model: EnsembleRewardModel, observation: Observation, responses: np.ndarray
) -> np.ndarray:
    """What each member gives to responses (M, N) that may come from elsewhere: float64 (E, M, N)."""
    candidates = getattr(policy, "from_text", Candidates)(observation, responses)  # a language model's have tokens
    return reward_model(policy.embed(candidates)).double().cpu().numpy()
