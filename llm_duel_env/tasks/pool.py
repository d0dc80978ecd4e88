"""Real text from a fixed pool: prompts with K recorded responses of real language models, and recorded judge scores."""

from __future__ import annotations

import os

import numpy as np
from gymnasium import spaces

from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.randomness import generator, uniforms
from llm_duel_env.tasks.base import Task
from llm_duel_env.tasks.fingerprint import digest, once
from llm_duel_env.tasks.pool_files import FOLDS, WHERE, NoPoolError, read_pool
from llm_duel_env.types import Observation


class Pool(Task):
    """Contexts and candidates are the embeddings of a prompt and of its K recorded responses; utility is recorded.

    Args:
        folder: A pool, as `llm-duel pool build` makes it; None takes the one that the environment variable
            LLM_DUEL_POOL names, so that settings and results do not depend on where it lies.
        fold: Which fifth of the prompts (by default) is held out; the five together are a cross-validation. All are of
            one size: prompts that are left over are trained on in every fold.
        folds: How many parts the prompts are dealt into.
        oracle_scale: The oracle prefers with probability sigmoid(oracle_scale * utility gap).
        task_seed: Deals the prompts, shuffles each one's responses and draws its reference response.

    Raises:
        ValueError: there is no such pool, or a number is out of range.
    """

    name = "pool"
    kind = "finite"
    feedback = "threshold"

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        fold: int = 0,
        folds: int = FOLDS,
        oracle_scale: float = 1.0,
        task_seed: int = 0,
    ) -> None:
        folder = folder or os.environ.get(WHERE)
        if not folder:
            wanted = f"say its folder with task_kwargs.folder or the environment variable {WHERE}"
            raise NoPoolError(f"expected a pool, as llm-duel pool build makes it: {wanted}")
        pool = read_pool(os.fspath(folder))
        prompts, self.candidates = pool.utilities.shape
        if isinstance(fold, str) or not 2 <= folds <= prompts or not 0 <= fold < folds:
            raise ValueError(f"expected folds in 2 .. {prompts} and fold in 0 .. folds - 1, got {folds} and {fold!r}")
        if not 0 < oracle_scale < np.inf:
            raise ValueError(f"oracle_scale: expected a finite number above 0, got {oracle_scale!r}")
        self.facts, self.oracle_scale, self.task_seed = pool.facts, oracle_scale, task_seed
        dealt = generator(task_seed, "pool", "folds").permutation(prompts)
        held = np.sort(dealt[fold::folds][: prompts // folds])
        self._rows = np.concatenate([np.setdiff1d(np.arange(prompts), held), held])
        """Row of the pool by prompt id."""
        self.train_prompts, self.heldout_prompts = prompts - len(held), len(held)
        self._places = _shuffled(prompts, self.candidates, task_seed)
        self._texts, self._responses = pool.prompts, pool.responses
        places = self._places[self._rows]
        self._utilities = np.take_along_axis(pool.utilities[self._rows], places, 1)
        self._contexts = pool.prompt_embeddings[self._rows]
        self._vectors = pool.response_embeddings[self._rows[:, None], places]
        size = self._contexts.shape[1]
        self.observation_space = spaces.Dict(
            context=spaces.Box(-np.inf, np.inf, (size,), np.float32),
            candidates=spaces.Box(-np.inf, np.inf, (self.candidates, size), np.float32),
            prompt_id=spaces.Discrete(prompts),
        )
        self.response_space = spaces.Discrete(self.candidates)
        self.oracle = self.truth = UtilityOracle(self.utility, scale=oracle_scale)

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """The recorded utility of each response, float64 (M,), in logits at oracle_scale 1."""
        return self._utilities[prompts["prompt_id"], responses]

    def observe(self, prompt_ids: np.ndarray) -> Observation:
        """Embeddings of prompts (M, D) and of their candidates (M, K, D) float32, ids (M,) int64."""
        ids = np.asarray(prompt_ids, np.int64)
        return {"context": self._contexts[ids], "candidates": self._vectors[ids], "prompt_id": ids}

    def texts(self, prompt_ids: np.ndarray, responses: np.ndarray) -> list[tuple[str, str]]:
        """The prompt and the response as text, for each of M: for people to read."""
        rows = self._rows[np.asarray(prompt_ids)]
        return [(self._texts[row], str(self._responses[row, self._places[row, k]])) for row, k in zip(rows, responses)]

    def reference(self, prompt_ids: np.ndarray) -> np.ndarray:
        """One response per prompt, drawn uniformly once and for all: (M,) int64."""
        rows = self._rows[np.asarray(prompt_ids)]  # the same in every fold
        return (uniforms(self.task_seed, "reference", rows) * self.candidates).astype(np.int64)

    def optimum(self, prompt_ids: np.ndarray) -> np.ndarray:
        """The best utility of each prompt's K responses, (M,), in logits."""
        return self.oracle_scale * self._utilities[np.asarray(prompt_ids)].max(axis=1)

    @once
    def fingerprint(self) -> str:
        """Of the pool's files, and of the order that their responses are dealt in."""
        return digest(self.name, "shuffled", self.facts["digest"])


def _shuffled(prompts: int, candidates: int, seed: int) -> np.ndarray:
    """For each prompt its responses in an order of its own: (P, K) int64.

    Data list their models in one order, often the best first, and a policy that knows nothing yet takes the first
    candidate: the number of a candidate must say nothing.
    """
    numbers = np.arange(prompts * candidates).reshape(prompts, candidates)
    return uniforms(seed, ("pool", "order"), numbers).argsort(axis=1)
