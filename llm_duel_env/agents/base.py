"""What an agent is: it acts, it learns from preferences, and in the end it responds."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import Policy, PolicyConfig
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.timing import Stopwatch
from llm_duel_env.types import Duels, Metrics, Observation, Preferences

Provenance = Literal["paper", "reconstructed", "ours"]

FROM_ENVIRONMENT = frozenset({"reward"})
"""Needs that every environment can meet, whatever the task."""


@dataclass(frozen=True)
class AgentConfig:
    """What every agent can be told."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """How the policy samples and learns."""


class Agent(ABC):
    """Acts on observations and learns from preferences, and from nothing else: no reward, no probability, no regret."""

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    paper: ClassVar[str] = ""
    """Where the method was published."""
    provenance: ClassVar[Provenance] = "ours"
    """Whether the file follows a paper's text, was rebuilt from notes or code, or is this project's own control."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the method requires beyond duels: of the task a subset of {scores, ranking, editor, degrader,
    contrast_prompts, goal_prompts, offline_pairs}; "reward" asks the environment for its reward
    (`Preferences.reward`)."""
    kinds: ClassVar[frozenset[str]] = frozenset({"finite", "text"})
    """The kinds of task it plays."""
    policy_plays: ClassVar[bool] = True
    """Whether `policy` chooses, answers or learns; False: another model does, and no setting of `policy` plays a part."""
    policy_fixed: ClassVar[tuple[str, ...]] = ()
    """Settings of `policy` that are refused where they are not the default."""
    believes: ClassVar[bool] = False
    """Whether it has reward models, so that `beliefs` may be asked for."""

    def __init__(self, task: TaskView, config: AgentConfig, *, seed: int, budget: int) -> None:
        if task.kind not in self.kinds:
            plays = " and ".join(sorted(self.kinds))
            raise ValueError(f"{type(self).__name__} plays {plays} tasks only, and {task.name} is a {task.kind} task")
        if budget < 1:
            raise ValueError(f"budget: expected at least 1 query, got {budget}")
        missing = self.needs - task.provides - FROM_ENVIRONMENT
        if missing:
            raise ValueError(f"{type(self).__name__} needs {sorted(missing)}, which task {task.name} does not provide")
        self.task, self.config, self.seed, self.budget = task, config, seed, budget
        self.policy: Policy = make_policy(task, config.policy, seed=seed)
        self.clock = Stopwatch()
        """Times an agent's own stages, as in ``with self.clock("select")``; a language-model policy times its own."""
        self.round = 0
        self.queries = 0

    @classmethod
    def configure(cls, overrides: dict) -> AgentConfig:
        """The agent's Config with `overrides` (see `config_from`) laid over its defaults."""
        return config_from(cls.Config, overrides)

    @classmethod
    def told(cls, reward: np.ndarray, info: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Of a step's reward and info what the agent's `needs` name beyond labels: arguments of `Duels.judged`.

        Raises:
            ValueError: it needs scores, and the environment was made without ``scores=True``.
        """
        if "scores" in cls.needs and "scores" not in info:
            raise ValueError(f"{cls.__name__} needs scores: make the environment with scores=True")
        told = {"reward": reward} if "reward" in cls.needs else {}
        return told | {"scores": info["scores"]} if "scores" in cls.needs else told

    @classmethod
    def footprint(cls, config: AgentConfig, **work: Any) -> list[Any]:
        """What each rank of a run would hold, estimated, without a model: see `policies.memory.estimate`; `work` are
        the fields of its `Work`."""
        from llm_duel_env.agents.policies.memory import estimate  # brings transformers
        from llm_duel_env.agents.policies.memory_parts import Work

        return estimate(config.policy, Work(**work))

    def prepare(self, task: TaskView) -> None:  # noqa: B027 (most agents have nothing to prepare)
        """Called once, before the first round of a fresh run and not when one is resumed. May read all training
        prompts, never labels; what it finds belongs into `save`."""

    @property
    def progress(self) -> float:
        """Share of the query budget spent, in [0, 1]."""
        return min(self.queries / self.budget, 1.0)

    @abstractmethod
    def act(self, observation: Observation) -> Duels:
        """One duel for each of the M prompts."""

    @abstractmethod
    def learn(self, preferences: Preferences) -> Metrics:
        """What the method does with a round's labels."""

    def update(self, preferences: Preferences) -> Metrics:
        """Learns from a round's labels and counts them: the duels of the last `act`, in its order."""
        metrics = self.learn(preferences)
        self.round += 1
        self.queries += self.paid(preferences)
        return metrics

    @staticmethod
    def paid(preferences: Preferences) -> int:
        """Queries that these labels cost: none for synthetic ones and for a response against itself."""
        first, second = preferences.pair.responses.T
        return int((preferences.from_oracle & (first != second)).sum())

    def respond(self, observation: Observation) -> np.ndarray:
        """The deployed policy's response to each prompt, (M,)."""
        return self.policy.greedy(observation).responses[:, 0]

    def diagnose(self, observation: Observation) -> Metrics:
        """KL to the reference, entropy, length: for the evaluator's log."""
        return self.policy.diagnose(observation, ("diagnose",))

    def beliefs(self, observation: Observation, responses: np.ndarray) -> np.ndarray:
        """The reward that each of E reward models gives to responses (M, N) to M prompts: float64 (E, M, N). For the
        evaluator, who holds them against the truth and tells the agent nothing of it."""
        raise NotImplementedError(f"{type(self).__name__} has no reward model")

    def save(self, folder: Path) -> None:
        """Writes everything `load` needs for the run to go on exactly."""
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder / "policy")
        state = {"round": self.round, "queries": self.queries, "seconds": self.clock.seconds}
        (folder / "agent.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        self.policy.load(folder / "policy")
        state = json.loads((folder / "agent.json").read_text())
        self.round, self.queries = state["round"], state["queries"]
        self.clock.seconds = dict(state.get("seconds", {}))  # checkpoints of earlier versions keep none


def config_from(config_class: type, overrides: dict, defaults: Any = None) -> AgentConfig:
    """A config dataclass with `overrides` (nested by dict, or by dots in the keys) laid over its defaults, or over
    `defaults`, one of them.

    Raises:
        ValueError: an unknown field, with the known ones named, or a value of the wrong type.
    """
    nested: dict = {}
    for name, value in overrides.items():
        head, _, rest = name.partition(".")
        if not rest and not isinstance(value, dict):
            nested[head] = value
        elif isinstance(nested.setdefault(head, {}), dict):
            nested[head].update({rest: value} if rest else value)
    known = {f.name: f for f in dataclasses.fields(config_class)}
    defaults = config_class() if defaults is None else defaults
    values: dict[str, Any] = {}
    for name, value in nested.items():
        if name not in known:
            raise ValueError(f"{config_class.__name__} has no field {name!r}; it has {sorted(known)}")
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ValueError(f"{config_class.__name__}.{name}: expected settings by name, got {value!r}")
            values[name] = config_from(type(default), value, default)
        else:
            values[name] = _coerce(f"{config_class.__name__}.{name}", value, default)
    return dataclasses.replace(defaults, **values)


def _coerce(name: str, value: object, default: object) -> object:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value
    if isinstance(default, int) and isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(default, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-7 as a string
        except ValueError:
            pass
    if isinstance(default, str) and isinstance(value, str):
        return value
    if isinstance(default, tuple) and isinstance(value, (list, tuple)) and len(value) == len(default):
        return tuple(_coerce(name, item, of) for item, of in zip(value, default))
    if isinstance(default, dict) and isinstance(value, dict):
        return dict(value)
    if default is None:
        return value
    raise ValueError(f"{name}: expected something like {default!r} ({type(default).__name__}), got {value!r}")
