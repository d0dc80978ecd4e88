"""TinyTLDR: summaries in a miniature language, written by an embedded language model, with a known true utility."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from gymnasium import spaces

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.spaces import Utf8Text
from llm_duel_env.tasks import tiny_language as language
from llm_duel_env.tasks.base import Task, TaskView
from llm_duel_env.tasks.fingerprint import digest, once
from llm_duel_env.tasks.prompt_files import json_lines
from llm_duel_env.tasks.text import some_texts
from llm_duel_env.types import Observation

ASSETS = Path(__file__).parents[1] / "assets" / "tiny_tldr"
MAX_PROMPT_TOKENS = 96
"""BOS, a control token and the longest post are less."""
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 1024, 512


class TinyTLDR(Task):
    """Posts of `tiny_language`, summarised under 28 tokens.

    The true utility is a program, and its optimum is computed exactly, so regret is exact even where labels come from
    the learned proxy.

    Args:
        oracle: whom labels are bought from: ``utility`` (the truth) or ``reward_model`` (the embedded one, learned).
        oracle_scale: inverse temperature of the utility oracle: truth, optimum and regret are in its logits. The
            learned oracle has its own, and there the truth is not scaled.
        assets: folder with ``policy/``, ``reward_model/``, ``heldout.jsonl`` and, where there is one,
            ``references_train.jsonl``; None is the one in the package.

    Raises:
        FileNotFoundError: the folder lacks something.
        ValueError: an unknown oracle, or stored prompts that are not this language's.
    """

    name = "tiny_tldr"
    kind = "text"
    feedback: Literal["bernoulli", "threshold"] = "threshold"

    def __init__(
        self,
        oracle: Literal["utility", "reward_model"] = "utility",
        oracle_scale: float = 1.0,
        assets: str | None = None,
    ) -> None:
        if oracle not in ("utility", "reward_model"):
            raise ValueError(f"oracle: expected 'utility' or 'reward_model', got {oracle!r}")
        self.assets = Path(assets).expanduser() if assets else ASSETS
        for part in ("policy", "encoder", "heldout.jsonl"):
            if not (self.assets / part).exists():
                raise FileNotFoundError(f"{self.assets}: expected TinyTLDR's assets, {part} is missing")
        self.train_prompts = language.TRAIN_PROMPTS
        self._heldout = _stored(self.assets / "heldout.jsonl", language.heldout_prompt)
        self.heldout_prompts = len(self._heldout)
        if sorted(self._heldout) != list(range(self.heldout_prompts)):
            raise ValueError(f"{self.assets / 'heldout.jsonl'}: expected prompt_id 0, 1, 2, ... without a gap")
        training = self.assets / "references_train.jsonl"
        self._training = _stored(training, language.train_prompt) if training.exists() else {}
        self.observation_space = spaces.Dict(
            prompt=Utf8Text(PROMPT_CHARACTERS),
            prompt_id=spaces.Discrete(self.train_prompts + self.heldout_prompts),
        )
        self.response_space = Utf8Text(RESPONSE_CHARACTERS, min_length=0)
        self.learned_oracle = oracle == "reward_model"
        scaled = UtilityOracle(utility_of, scale=oracle_scale)
        self.truth: UtilityOracle = UtilityOracle(utility_of) if self.learned_oracle else scaled
        self.oracle: Oracle = self.truth
        if self.learned_oracle:
            from llm_duel_env.oracles.reward_model import RewardModelOracle

            self.oracle = RewardModelOracle(str(self.assets / "reward_model"))

    def _prompt(self, prompt_id: int) -> str:
        if not 0 <= prompt_id < self.train_prompts + self.heldout_prompts:
            limit = self.train_prompts + self.heldout_prompts
            raise IndexError(f"prompt_id: expected 0 to {limit - 1}, got {prompt_id}")
        return _post(prompt_id, self.train_prompts)

    def observe(self, prompt_ids: np.ndarray) -> Observation:
        """Posts, M str, and ids (M,) int64. IndexError for an id that does not exist."""
        ids = np.asarray(prompt_ids, np.int64)
        return {"prompt": tuple(self._prompt(int(i)) for i in ids), "prompt_id": ids}

    def reference(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """A stored sample of the supervised policy for each prompt, (M,): str, or None for a prompt without one; None
        where all are without."""
        texts = [
            self._training.get(int(i)) if i < self.train_prompts else self._heldout.get(int(i) - self.train_prompts)
            for i in np.asarray(prompt_ids)
        ]
        return some_texts(texts)

    def optimum(self, prompt_ids: np.ndarray) -> np.ndarray:
        """The best utility that any response reaches: float64 (M,), in logits."""
        best = [language.optimum(self._prompt(int(i)))[1] for i in np.asarray(prompt_ids)]
        return self.truth.scale * np.array(best, np.float64)

    @once
    def fingerprint(self) -> str:
        """Of the policy, the encoder, the stored references, and the reward model where it is the oracle."""
        models = ("policy", "encoder", "reward_model") if self.learned_oracle else ("policy", "encoder")
        return digest(self.name, *(self.assets / part for part in (*models, "heldout.jsonl", "references_train.jsonl")))

    def view(self) -> TaskView:
        """Spaces, training posts, the supervised policy, the editor, the degrader, the control tokens."""
        return TaskView(
            name=self.name,
            kind="text",
            observation_space=self.observation_space,
            response_space=self.response_space,
            train_prompts=self.train_prompts,
            observe=self.observe_training,
            model=str(self.assets / "policy"),
            encoder=str(self.assets / "encoder"),
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_new_tokens=language.MAX_WORDS + 1,
            provides=self.oracle_tells | {"editor", "degrader", "contrast_prompts", "goal_prompts"},
            edit=language.edit,
            degrade=language.degrade,
            condition=conditioned,
        )


def conditioned(prompts: Observation, names: Sequence[str]) -> Observation:
    """The posts, each under the control token of its name: good, bad, goal_0 to goal_10. ValueError for others."""
    posts = [language.with_control(post, f"<{name}>") for post, name in zip(prompts["prompt"], names, strict=True)]
    return {**prompts, "prompt": tuple(posts)}


def utility_of(prompts: Observation, responses: np.ndarray) -> np.ndarray:
    """The true utility of each response, float64 (M,), in logits."""
    pairs = zip(prompts["prompt"], responses, strict=True)
    return np.array([language.utility(prompt, response) for prompt, response in pairs], np.float64)


@lru_cache(maxsize=32_768)
def _post(prompt_id: int, train_prompts: int) -> str:
    if prompt_id < train_prompts:
        return language.train_prompt(prompt_id)
    return language.heldout_prompt(prompt_id - train_prompts)


def _stored(path: Path, prompt_of: Callable[[int], str]) -> dict[int, str]:
    """References by prompt id. ValueError where a row is malformed or its prompt is not the language's."""
    found: dict[int, str] = {}
    for number, row in enumerate(json_lines(path), 1):
        index, text = row.get("prompt_id"), row.get("reference")
        if not isinstance(index, int) or not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: expected prompt_id (int) and reference (text), got {row!r}")
        if "prompt" in row and row["prompt"] != prompt_of(index):
            raise ValueError(f"{path}, row {number}: its prompt is not number {index} of this version of the language")
        found[index] = text
    return found
