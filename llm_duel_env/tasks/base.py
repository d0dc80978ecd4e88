"""What a task is: prompts, reference responses, an oracle, and, where known, the optimum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from gymnasium import spaces

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.tasks.fingerprint import digest, once
from llm_duel_env.types import Observation


@dataclass(frozen=True)
class TaskView:
    """What an agent may know of a task: spaces, training prompts, the supervised policy; no oracle, no optimum."""

    name: str
    kind: Literal["finite", "text"]
    observation_space: spaces.Dict
    """Space of one prompt."""
    response_space: spaces.Space
    """Space of one response: Discrete(K) or Utf8Text."""
    train_prompts: int
    """Training prompts have ids 0 .. train_prompts - 1."""
    observe: Callable[[np.ndarray], Observation]
    """Training prompts by id, (M,) int64 -> a batch observation; refuses an id that is not a training prompt's."""
    model: str | None = None
    """Folder or hub name of the supervised policy (text tasks)."""
    encoder: str | None = None
    """Folder of a frozen encoder that the task offers to reward models: same tokenizer as `model`, not the oracle's."""
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    provides: frozenset[str] = frozenset()
    """What methods may ask for beyond duels: a subset of {scores, ranking, editor, degrader, contrast_prompts,
    goal_prompts, offline_pairs}."""
    given: Callable[[Observation], np.ndarray] | None = None
    """given(prompts): G >= 2 recorded responses to each of M training prompts, (M, G) str in dtype object, in the order
    of the data; where the task has any (offline_pairs)."""
    edit: Callable[[str, str, str], str] | None = None
    """edit(prompt, loser, winner): the loser minimally edited towards the winner, where the task offers an editor."""
    degrade: Callable[[str, str, int], str] | None = None
    """degrade(prompt, response, level): the response with part of its key content gone, the more the higher the level,
    0 (nothing) to 4; where the task offers a degrader."""
    condition: Callable[[Observation, Sequence[str]], Observation] | None = None
    """condition(prompts, names): each of M prompts with the condition that is named for it, where the task has any:
    good and bad (contrast_prompts), goal_0 to goal_10 (goal_prompts). Ids stay. ValueError for an unknown name."""


class Task(ABC):
    """Prompts (training ids 0 .. train_prompts - 1, held-out ids after them), reference responses, and an oracle."""

    name: str
    kind: Literal["finite", "text"]
    observation_space: spaces.Dict
    response_space: spaces.Space
    train_prompts: int
    heldout_prompts: int
    oracle: Oracle
    """Whom labels are bought from, and who judges win rates."""
    truth: Oracle | None = None
    """The true utility, where it is known and may differ from the oracle's (a learned proxy)."""
    feedback: Literal["bernoulli", "threshold"]
    """How a probability becomes a label unless the user says otherwise."""

    @property
    def heldout_ids(self) -> np.ndarray:
        """Ids of the held-out prompts, (heldout_prompts,) int64."""
        return np.arange(self.train_prompts, self.train_prompts + self.heldout_prompts)

    @abstractmethod
    def observe(self, prompt_ids: np.ndarray) -> Observation:
        """The prompts with these ids, (M,) int64, as a batch observation."""

    @abstractmethod
    def reference(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """One stored response per prompt, (M,), that win rates are measured against.

        On text an entry is None where this prompt has none; the whole is None where none of these prompts has one.
        """

    def texts(self, prompt_ids: np.ndarray, responses: np.ndarray) -> list[tuple[str, str]] | None:
        """Prompt and response as text for people to read, for each of M, on finite tasks whose vectors stand for texts.
        None where there are none."""
        return None

    def optimum(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """The true utility of the best response to each prompt, float64 (M,); None where it is not known."""
        return None

    @once
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what results on this task depend on beyond its arguments: weights and stored responses.

        By default of its name alone. A run is only resumed, and a result only taken for one's own, where it agrees.
        """
        return digest(self.name)

    @property
    def oracle_tells(self) -> frozenset[str]:
        """What the oracle can say beyond labels of duels: scores, where it has a utility."""
        return frozenset({"scores"}) if self.oracle.has_utility else frozenset()

    def view(self) -> TaskView:
        """What an agent may know: here spaces and training prompts; no utility."""
        return TaskView(
            name=self.name,
            kind=self.kind,
            observation_space=self.observation_space,
            response_space=self.response_space,
            train_prompts=self.train_prompts,
            observe=self.observe_training,
            provides=self.oracle_tells,
        )

    def observe_training(self, prompt_ids: np.ndarray) -> Observation:
        """`observe`, for training prompts only: what a `TaskView` hands to agents.

        Raises:
            ValueError: an id that is not a training prompt's.
        """
        ids = np.asarray(prompt_ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.train_prompts):
            wanted = f"expected training prompt ids in [0, {self.train_prompts})"
            raise ValueError(f"{wanted}, got {ids.min()} .. {ids.max()}")
        return self.observe(ids)
