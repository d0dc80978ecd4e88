"""An agent around a model of Stable-Baselines3 (extra ``sb3``): what is the same for PPO, A2C and DQN.

The networks, buffers, losses and exploration are the library's; only its outer loop is turned inside out, as here the
runner steps the environment: `act` and `learn` do what ``collect_rollouts`` does before and after its step, one
environment of the library per prompt of a round. A test shows that the weights come out as its own ``learn()`` makes
them.

The library draws from the global generators. They are seeded by (seed, purpose, round) around each call and put back
after it, so a resumed run goes on exactly. Checkpoints are safetensors and JSON; the library's zip files, which are
pickles, are neither written nor read.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.baselines.global_seed import global_seed
from llm_duel_env.baselines.sb3_features import action_space, feature_space, features, random_opponents
from llm_duel_env.extras import require
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences, batch_size

OURS = ("self", "policy", "env", "gamma", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model")
"""Arguments of the library's constructors that are not the user's to set."""


@contextlib.contextmanager
def seeded(seed: int, purpose: str, round_: int, actions: spaces.Space | None = None) -> Iterator[None]:
    """The global generators, and that of `actions`, seeded by (seed, purpose, round); put back on leaving."""
    with global_seed(seed, "sb3", purpose, round_) as number:
        if actions is not None:
            actions.seed(number)
        yield


@dataclass(frozen=True)
class SB3Config(AgentConfig):
    """What all three can be told."""

    settings: dict = field(default_factory=dict)
    """Arguments of the library's constructor by name (``settings.n_steps``); those not named keep the library's
    defaults, but for DQN's buffer of 10,000 transitions (ours). `n_steps` and `train_freq` count rounds."""


class SB3Agent(Agent):
    """What the three share: model, features, checkpoints."""

    Config = SB3Config
    kinds: ClassVar[frozenset[str]] = frozenset({"finite"})
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    policy_plays = False
    config: SB3Config
    algorithm: ClassVar[str]
    """Name of the library's class."""
    random_opponent: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}
    """Where this project's default is not the library's."""
    arrays: ClassVar[tuple[str, ...]]
    """The buffer's arrays that matter, (steps, M, ...) each."""

    def __init__(self, task: TaskView, config: SB3Config, *, seed: int, budget: int) -> None:
        super().__init__(task, config, seed=seed, budget=budget)
        library = require("stable_baselines3", f"agent {type(self).__name__}")
        maker = getattr(library, self.algorithm)
        known = [name for name in inspect.signature(maker).parameters if name not in OURS]
        unknown = sorted(set(config.settings) - set(known))
        if unknown:
            raise ValueError(f"settings: {self.algorithm} takes {known}, got {unknown}")
        assert isinstance(task.response_space, spaces.Discrete)  # as on every finite task
        self.candidates = int(task.response_space.n)
        shape = _Shape(feature_space(task.observation_space), action_space(self.candidates, self.random_opponent))
        with seeded(seed, "model", 0), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on batch sizes: the number of environments comes with `act`
            chosen = self.defaults | config.settings
            try:
                self.model = maker("MlpPolicy", shape, gamma=0.0, seed=seed, device="cpu", **chosen)
            except AssertionError as error:  # the library's way of refusing a value
                raise ValueError(f"settings: {error}") from None
        self.model.set_logger(library.common.logger.Logger(None, []))
        self.model._total_timesteps = budget
        self.gradient_steps = 0
        """Optimizer steps since this object was made."""
        self.model.policy.optimizer.register_step_post_hook(self._count)

    def act(self, observation: Observation) -> Duels:
        """Both responses from the model, or one from the model and a random opponent."""
        self._take_batch(batch_size(observation))
        self.seen = features(observation)
        with seeded(self.seed, "act", self.round, self.model.action_space):
            self.actions = self._sample()
        if self.random_opponent:
            first = self.actions.astype(np.int64)
            second = random_opponents(self.seed, self.round, observation["prompt_id"], first, self.candidates)
            return Duels(Candidates(observation, np.stack([first, second], axis=1)))
        return Duels(Candidates(observation, self.actions.astype(np.int64)))

    def learn(self, preferences: Preferences) -> Metrics:
        """Stores the round, and trains where the library would; a round that the budget's end cuts is left out."""
        if preferences.reward is None:
            raise ValueError(f"{type(self).__name__} learns from the reward: expected preferences with one, got none")
        if not preferences.from_oracle.all():
            return {}
        before = self.gradient_steps
        self.model.num_timesteps += len(preferences)
        with seeded(self.seed, "learn", self.round, self.model.action_space):
            self._store(preferences.reward)
        return {"gradient_steps": self.gradient_steps - before, "reward": float(preferences.reward.mean())}

    def respond(self, observation: Observation) -> np.ndarray:
        """The model's deterministic action, of a pair its first, (M,)."""
        actions = np.asarray(self.model.policy.predict(features(observation), deterministic=True)[0])
        return actions.astype(np.int64).reshape(len(actions), -1)[:, 0]

    def diagnose(self, observation: Observation) -> Metrics:
        """KL to the uniform policy and entropy, in nats, of the first response as it is drawn in training."""
        probability = self._probabilities(features(observation))
        logs = np.log(np.where(probability > 0, probability, 1.0))
        entropy = float(-(probability * logs).sum(axis=1).mean())
        return {"kl": float(np.log(self.candidates)) - entropy, "entropy": entropy}

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and weights, optimizer, buffer and counters of the model."""
        super().save(folder)
        model, buffer = self.model, self._buffer
        tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
        for number, state in model.policy.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        filled = buffer.buffer_size if buffer.full else buffer.pos
        tensors |= {f"buffer.{name}": torch.from_numpy(getattr(buffer, name)[:filled]) for name in self.arrays}
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, folder / "sb3.safetensors")
        counters = {name: getattr(model, name) for name in self._counters}
        buffer_state = {"pos": buffer.pos, "full": buffer.full}
        (folder / "sb3.json").write_text(json.dumps({"batch": model.n_envs, "model": counters, "buffer": buffer_state}))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        state, tensors = json.loads((folder / "sb3.json").read_text()), load_file(folder / "sb3.safetensors")
        model = self.model
        self._take_batch(state["batch"])
        model.policy.load_state_dict(_under(tensors, "policy."))
        optimizer = model.policy.optimizer
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under(tensors, "optimizer.").items():
            number, _, slot = name.partition(".")
            slots.setdefault(int(number), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, value in _under(tensors, "buffer.").items():
            getattr(self._buffer, name)[: len(value)] = value.numpy()
        self._buffer.pos, self._buffer.full = state["buffer"]["pos"], state["buffer"]["full"]
        for name, value in state["model"].items():
            setattr(model, name, value)

    @property
    def _counters(self) -> list[str]:
        names = ("num_timesteps", "_n_updates", "_current_progress_remaining", "_n_calls", "exploration_rate")
        return [name for name in names if hasattr(self.model, name)]

    @property
    @abstractmethod
    def _buffer(self) -> Any:
        """The library's own, which keeps the duels."""

    def _take_batch(self, batch: int) -> None:
        """Makes the buffer that of `batch` environments; rounds of one run are all of one size."""
        if self.model.n_envs != batch:
            if self.model.num_timesteps:
                raise ValueError(f"expected rounds of {self.model.n_envs} prompts as before, got one of {batch}")
            self.model.n_envs = batch
            self._make_buffer()

    @abstractmethod
    def _make_buffer(self) -> None:
        """An empty one, for `model.n_envs` environments."""

    @abstractmethod
    def _sample(self) -> np.ndarray:
        """Actions for `seen`: (M, 2), or (M,) with a random opponent."""

    @abstractmethod
    def _store(self, rewards: np.ndarray) -> None:
        """Takes the round in, and trains where it is time."""

    @abstractmethod
    def _probabilities(self, seen: np.ndarray) -> np.ndarray:
        """Of each candidate as first response in training, (M, K)."""

    def _progress(self) -> None:
        self.model._current_progress_remaining = max(1 - self.model.num_timesteps / self.budget, 0.0)

    def _count(self, *_: object) -> None:
        self.gradient_steps += 1


class _Shape(gymnasium.Env):
    """Spaces for the library's constructor; it is never stepped."""

    def __init__(self, observations: spaces.Box, actions: spaces.Space) -> None:
        self.observation_space, self.action_space = observations, actions


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
