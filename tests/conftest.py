"""Two small tasks that the environment's tests stand on: one finite, one of text."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.spaces import Utf8Text
from llm_duel_env.tasks.base import Task, TaskView

# Accents, CJK, emoji, a line separator, quotes and a newline: what must survive env, ledger and export.
PROMPTS = ("Was ist Größe?", "猫は好きですか", "smile 🙂\nplease", 'say "hi"\u2028now', "plain")


class _SmallTask(Task):
    feedback = "threshold"
    heldout_prompts = 3

    def view(self):
        return TaskView(
            self.name, self.kind, self.observation_space, self.response_space, self.train_prompts, self.observe_training
        )

    def reference(self, prompt_ids):
        return None if self.no_reference else self._reference(np.asarray(prompt_ids))


class FiniteTask(_SmallTask):
    """`train_prompts` + 3 prompts with utilities (P, K) drawn from a seed; the reference is candidate 0."""

    name, kind = "small_finite", "finite"

    def __init__(self, train_prompts=7, candidates=5, oracle=None, no_reference=False, feedback="threshold"):
        total = train_prompts + self.heldout_prompts
        rng = np.random.default_rng(5)
        self.utilities = rng.normal(size=(total, candidates))
        self.vectors = rng.normal(size=(total, candidates, 2)).astype(np.float32)
        self.train_prompts, self.no_reference, self.feedback = train_prompts, no_reference, feedback
        self.oracle = oracle or UtilityOracle(lambda prompts, r: self.utilities[prompts["prompt_id"], r])
        self.observation_space = spaces.Dict(
            context=spaces.Box(-1, 1, (2,), np.float32),
            candidates=spaces.Box(-9, 9, (candidates, 2), np.float32),
            prompt_id=spaces.Discrete(total),
        )
        self.response_space = spaces.Discrete(candidates)

    def observe(self, prompt_ids):
        ids = np.asarray(prompt_ids, np.int64)
        context = np.zeros((len(ids), 2), np.float32)
        return {"context": context, "candidates": self.vectors[ids], "prompt_id": ids}

    def _reference(self, prompt_ids):
        return np.zeros(len(prompt_ids), np.int64)

    def optimum(self, prompt_ids):
        return self.utilities[np.asarray(prompt_ids)].max(axis=1) if self.oracle.has_utility else None


class TextTask(_SmallTask):
    """Five training prompts; a response's utility is a tenth of its length; the reference is "référence"."""

    name, kind, train_prompts = "small_text", "text", 5

    def __init__(self, oracle=None, no_reference=False, min_length=1, feedback="threshold"):
        self.no_reference, self.feedback = no_reference, feedback
        self.oracle = oracle or UtilityOracle(lambda prompts, r: np.array([len(text) / 10 for text in r]))
        self.observation_space = spaces.Dict(prompt=Utf8Text(40), prompt_id=spaces.Discrete(8))
        self.response_space = Utf8Text(30, min_length=min_length)

    def observe(self, prompt_ids):
        ids = np.asarray(prompt_ids, np.int64)
        return {"prompt": tuple([*PROMPTS, "held 1", "held 2", "held 3"][i] for i in ids), "prompt_id": ids}

    def _reference(self, prompt_ids):
        return np.array(["référence"] * len(prompt_ids), object)


class CountingOracle(Oracle):
    """Remembers every pair it was asked about; `answer` (M -> probabilities) decides, else the first always wins."""

    def __init__(self, answer=None):
        self.asked, self.calls = [], 0
        self.answer = answer or (lambda m: np.ones(m))

    def win_probability(self, prompts, first, second):
        self.calls += 1
        self.asked += list(zip(prompts["prompt_id"].tolist(), first, second))
        return self.answer(len(first))


@pytest.fixture
def finite_task():
    """Builds a `FiniteTask`."""
    return FiniteTask


@pytest.fixture
def text_task():
    """Builds a `TextTask`."""
    return TextTask


@pytest.fixture
def counting_oracle():
    """Builds a `CountingOracle`."""
    return CountingOracle
