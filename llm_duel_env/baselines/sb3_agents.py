"""Stable-Baselines3's PPO, A2C and DQN as agents (extra ``sb3``): what general reinforcement learning makes of a duel.

They learn from the environment's reward, which no preference learner sees, and stand in a table of their own. The
problem has no future, so gamma is 0, which is also why a round needs no next observation to be learnt from.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from llm_duel_env.baselines.sb3_base import SB3Agent


class _OnPolicy(SB3Agent):
    """PPO and A2C: a rollout of `n_steps` rounds, then training on it."""

    arrays = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs")

    @property
    def _buffer(self) -> Any:
        return self.model.rollout_buffer

    def _make_buffer(self) -> None:
        old, model = self._buffer, self.model
        model.rollout_buffer = type(old)(
            model.n_steps, model.observation_space, model.action_space, device=model.device, n_envs=model.n_envs,
            gamma=model.gamma, gae_lambda=model.gae_lambda,
        )  # fmt: skip

    def _sample(self) -> np.ndarray:
        model = self.model
        model.policy.set_training_mode(False)
        if self._buffer.full:
            self._buffer.reset()
        with torch.no_grad():
            actions, self.values, self.log_probs = model.policy(torch.from_numpy(self.seen))
        return actions.numpy()

    def _store(self, rewards: np.ndarray) -> None:
        model, buffer = self.model, self._buffer
        starts = np.full(len(rewards), model.num_timesteps == len(rewards))
        buffer.add(self.seen, self.actions, rewards, starts, self.values, self.log_probs)
        if buffer.full:
            # The last values and whether the run is over are multiplied by gamma, 0.
            nothing = torch.zeros(len(rewards))
            buffer.compute_returns_and_advantage(last_values=nothing, dones=np.zeros(len(rewards)))
            self._progress()
            model.train()

    def _probabilities(self, seen: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model.policy.get_distribution(torch.from_numpy(seen)).distribution[0].probs.numpy()


class SB3PPO(_OnPolicy):
    """Proximal policy optimisation on MultiDiscrete([K, K])."""

    paper = "https://arxiv.org/abs/1707.06347"
    provenance = "paper"
    algorithm = "PPO"


class SB3A2C(_OnPolicy):
    """Advantage actor-critic on MultiDiscrete([K, K])."""

    paper = "https://arxiv.org/abs/1602.01783"
    provenance = "paper"
    algorithm = "A2C"


class SB3DQN(SB3Agent):
    """Deep Q-learning on Discrete(K), each response against a random opponent."""

    paper = "https://arxiv.org/abs/1312.5602"
    provenance = "paper"
    algorithm = "DQN"
    random_opponent = True
    defaults: ClassVar[dict[str, Any]] = {"buffer_size": 10_000}
    arrays = ("observations", "actions", "rewards")

    @property
    def _buffer(self) -> Any:
        return self.model.replay_buffer

    def _make_buffer(self) -> None:
        model = self.model
        model.replay_buffer = type(self._buffer)(
            model.buffer_size, model.observation_space, model.action_space, device=model.device, n_envs=model.n_envs
        )

    def _sample(self) -> np.ndarray:
        self.model.policy.set_training_mode(False)
        self.model._last_obs = self.seen
        return self.model._sample_action(self.model.learning_starts, None, len(self.seen))[0]

    def _store(self, rewards: np.ndarray) -> None:
        model, m = self.model, len(rewards)
        # The next observation's value is multiplied by gamma, 0.
        self._buffer.add(self.seen, np.zeros_like(self.seen), self.actions, rewards, np.zeros(m), [{}] * m)
        self._progress()
        model._on_step()
        if (self.round + 1) % self._train_freq == 0 and model.num_timesteps > model.learning_starts:
            steps = model.gradient_steps if model.gradient_steps >= 0 else self._train_freq * m
            if steps:
                model.train(gradient_steps=steps, batch_size=model.batch_size)

    @property
    def _train_freq(self) -> int:
        frequency = self.model.train_freq
        return int(getattr(frequency, "frequency", frequency))

    def _probabilities(self, seen: np.ndarray) -> np.ndarray:
        model = self.model
        exploring = 1.0 if model.num_timesteps < model.learning_starts else float(model.exploration_rate)
        best = np.asarray(model.policy.predict(seen, deterministic=True)[0], np.int64)
        return exploring / self.candidates + (1 - exploring) * np.eye(self.candidates)[best]
