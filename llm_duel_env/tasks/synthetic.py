"""A finite world: contexts and candidates are vectors, and the true utility is a known function of both."""

from __future__ import annotations

from typing import Literal

import numpy as np
from gymnasium import spaces
from scipy.special import expit

from llm_duel_env.oracles.matrix import MatrixOracle
from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.randomness import generator, uniforms
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Observation

HIDDEN = 32
CHUNK = 256  # prompts whose utilities are computed at once
STYLE_LENGTH = np.float32(4.0)  # the length of a style; substance has about 2
ARC = np.float32(0.6)  # radians along the arc per standard deviation of utility
FAR = np.float32(1.0)  # standard deviations of utility beyond which a candidate is an extreme
MEASURED_PROMPTS, MEASURED_CANDIDATES = 512, 64  # what the geometry is fitted to the asked correlation on


class Synthetic(Task):
    """Prompts are Gaussian contexts (C,), each with K candidates (D,); utility is bilinear plus a random network.

    Within a prompt, utilities have mean 0 and standard deviation `utility_std`, so a uniform policy's utility is 0.

    Args:
        candidates: K.
        context_dim: C.
        candidate_dim: D, at least 4. A candidate is [substance, style], halves of D: utility sees the substance,
            and the style only turns the vector.
        train_prompts: training prompts.
        heldout_prompts: held-out prompts.
        utility_std: standard deviation of utility over a prompt's candidates, in logits.
        oracle_scale: the oracle prefers with probability sigmoid(oracle_scale * utility gap); small is noisy.
        task_seed: fixes network, prompts, candidates and reference responses; runs with different seeds share them.
        dissimilarity_correlation: the correlation wanted, over random pairs of a prompt's candidates, between
            dissimilarity (1 - cosine of the candidate vectors) and the absolute utility gap. Candidates are laid out to
            meet it; where it is out of reach (beyond about -0.15 and 0.9) the nearest layout is taken, and the
            attribute of the same name holds what was measured.
        preferences: utility (Bradley-Terry on utility), or intransitive: every candidate also has an angle, and has
            utility_std * sin(difference of the angles) logits more against another than their utilities say.
    """

    name = "synthetic"
    kind = "finite"
    feedback = "bernoulli"

    def __init__(
        self,
        candidates: int = 64,
        context_dim: int = 8,
        candidate_dim: int = 8,
        train_prompts: int = 4096,
        heldout_prompts: int = 512,
        utility_std: float = 2.0,
        oracle_scale: float = 1.0,
        task_seed: int = 0,
        dissimilarity_correlation: float = 0.0,
        preferences: Literal["utility", "intransitive"] = "utility",
    ) -> None:
        counts = {"candidates": candidates, "context_dim": context_dim, "candidate_dim": candidate_dim}
        for name, value in {**counts, "train_prompts": train_prompts, "heldout_prompts": heldout_prompts}.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
        if min(candidates, candidate_dim // 2) < 2 or min(context_dim, train_prompts, heldout_prompts) < 1:
            raise ValueError(
                "expected candidates >= 2, candidate_dim >= 4, and context_dim and both counts of prompts >= 1, got "
                f"{candidates}, {candidate_dim}, {context_dim}, {train_prompts}, {heldout_prompts}"
            )
        if not (0 < utility_std < np.inf and oracle_scale > 0 and -1 <= dissimilarity_correlation <= 1):
            raise ValueError(
                "expected finite utility_std > 0, oracle_scale > 0 and dissimilarity_correlation in [-1, 1], got "
                f"{utility_std}, {oracle_scale}, {dissimilarity_correlation}"
            )
        if preferences not in ("utility", "intransitive"):
            raise ValueError(f"preferences: expected 'utility' or 'intransitive', got {preferences!r}")
        c, total = context_dim, train_prompts + heldout_prompts
        self.train_prompts, self.heldout_prompts, self.task_seed = train_prompts, heldout_prompts, task_seed
        self.candidates, self.utility_std, self.oracle_scale = candidates, utility_std, oracle_scale
        substance_dim = candidate_dim // 2

        draw = generator(task_seed, "synthetic", "network")
        self._bilinear = draw.standard_normal((c, substance_dim), np.float32) / np.float32(np.sqrt(c * substance_dim))
        self._into = draw.standard_normal((c + substance_dim, HIDDEN), np.float32) * np.float32(
            2 / np.sqrt(c + substance_dim)
        )
        self._out = draw.standard_normal(HIDDEN, np.float32) * np.float32(1.5 / np.sqrt(HIDDEN))

        self._contexts = generator(task_seed, "synthetic", "contexts").standard_normal((total, c), np.float32)
        draw = generator(task_seed, "synthetic", "candidates")
        substance = draw.standard_normal((total, candidates, substance_dim), np.float32)
        style_dim = candidate_dim - substance_dim
        loose = draw.standard_normal((total, candidates, style_dim), np.float32)
        frames = draw.standard_normal((total, 2, style_dim), np.float32)
        self._utilities = np.empty((total, candidates))
        for rows in (slice(start, start + CHUNK) for start in range(0, total, CHUNK)):
            self._utilities[rows] = self._utility(self._contexts[rows], substance[rows])
        layout = self._fit_layout(substance, loose, frames, dissimilarity_correlation)
        style = lay_out(loose, frames, self._utilities / utility_std, layout)
        self._vectors = np.concatenate([substance, style], axis=2)
        few = slice(0, min(MEASURED_PROMPTS, train_prompts))
        self.dissimilarity_correlation = dissimilarity_correlation_of(self._vectors[few], self._utilities[few])

        self.observation_space = spaces.Dict(
            context=spaces.Box(-np.inf, np.inf, (c,), np.float32),
            candidates=spaces.Box(-np.inf, np.inf, (candidates, candidate_dim), np.float32),
            prompt_id=spaces.Discrete(total),
        )
        self.response_space = spaces.Discrete(candidates)
        self.truth = UtilityOracle(self.utility, scale=oracle_scale)
        self.oracle = self.truth
        if preferences == "intransitive":
            self._angles = generator(task_seed, "synthetic", "angles").uniform(0, 2 * np.pi, (total, candidates))
            self.oracle, self.truth = MatrixOracle(self._matrix), None

    def _utility(self, context: np.ndarray, substance: np.ndarray) -> np.ndarray:
        """Utilities (M, K) of candidates with substance (M, K, S), standardised over each prompt's candidates."""
        c = context.shape[1]
        bilinear = (substance @ (context @ self._bilinear)[:, :, None])[:, :, 0]
        hidden = np.tanh((context @ self._into[:c])[:, None] + substance @ self._into[c:])
        raw = (bilinear + hidden @ self._out).astype(np.float64)
        return self.utility_std * (raw - raw.mean(axis=1, keepdims=True)) / raw.std(axis=1, keepdims=True)

    def _fit_layout(self, substance: np.ndarray, loose: np.ndarray, frames: np.ndarray, wanted: float) -> float:
        """The layout whose measured correlation is the one wanted, by bisection: correlation grows with the layout."""
        few = (slice(0, min(MEASURED_PROMPTS, self.train_prompts)), slice(0, MEASURED_CANDIDATES))
        utilities = self._utilities[few]

        def correlation(layout: float) -> float:
            style = lay_out(loose[few], frames[few[0]], utilities / self.utility_std, layout)
            return dissimilarity_correlation_of(np.concatenate([substance[few], style], axis=2), utilities)

        low, high = -1.0, 1.0
        if wanted <= correlation(low):
            return low
        if wanted >= correlation(high):
            return high
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if correlation(middle) < wanted else (low, middle)
        return (low + high) / 2

    def _matrix(self, prompt_id: int) -> np.ndarray:
        """Intransitive preferences: P(candidate i beats candidate j), (K, K)."""
        utility, angle = self._utilities[prompt_id], self._angles[prompt_id]
        turn = self.utility_std * np.sin(angle[:, None] - angle[None])
        return expit(self.oracle_scale * (utility[:, None] - utility[None] + turn))

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """The true utility of each response, float64 (M,), in logits at oracle_scale 1."""
        return self._utilities[prompts["prompt_id"], responses]

    def observe(self, prompt_ids: np.ndarray) -> Observation:
        """Contexts (M, C) and candidates (M, K, D) float32, ids (M,) int64."""
        ids = np.asarray(prompt_ids, np.int64)
        return {"context": self._contexts[ids], "candidates": self._vectors[ids], "prompt_id": ids}

    def reference(self, prompt_ids: np.ndarray) -> np.ndarray:
        """One candidate per prompt, drawn uniformly once and for all: (M,) int64."""
        return (uniforms(self.task_seed, "reference", np.asarray(prompt_ids)) * self.candidates).astype(np.int64)

    def optimum(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """The best utility of each prompt's K candidates, (M,), in logits; None where preferences are intransitive."""
        best = self.oracle_scale * self._utilities[np.asarray(prompt_ids)].max(axis=1)
        return None if self.truth is None else best


def lay_out(loose: np.ndarray, frames: np.ndarray, standing: np.ndarray, layout: float) -> np.ndarray:
    """Styles: vectors of one length whose angles to each other follow utility gaps, or go against them.

    With layout 0 directions are random. Towards 1 they turn onto an arc on which the better candidate stands further
    along, so that angles grow with gaps. Towards -1 the candidates far from the average, on either side, turn to one
    direction while middling ones stay scattered, so that pairs with large gaps are alike. Arc and direction are drawn
    anew for every prompt: a style says how two candidates of a prompt relate, and nothing about how good one is.

    Args:
        loose: (M, K, S) random directions.
        frames: (M, 2, S) random directions that span each prompt's arc.
        standing: (M, K) utilities in standard deviations.
        layout: in [-1, 1].
    """
    loose, ahead = _unit(loose), _unit(frames[:, :1])
    across = _unit(frames[:, 1:] - (frames[:, 1:] * ahead).sum(axis=2, keepdims=True) * ahead)
    standing = standing[:, :, None].astype(np.float32)
    if layout >= 0:
        target, weight = np.cos(ARC * standing) * ahead + np.sin(ARC * standing) * across, np.float32(layout)
    else:
        target, weight = ahead, np.float32(-layout) * np.minimum(np.abs(standing) / FAR, 1)
    return STYLE_LENGTH * _unit(weight * target + (1 - weight) * loose)


def dissimilarity_correlation_of(vectors: np.ndarray, utilities: np.ndarray) -> float:
    """Pearson correlation of 1 - cosine and |utility gap| over all pairs of each prompt's first candidates, pooled.

    Args:
        vectors: (M, K, D).
        utilities: (M, K).
    """
    unit, utilities = _unit(vectors[:, :MEASURED_CANDIDATES]), utilities[:, :MEASURED_CANDIDATES]
    i, j = np.triu_indices(unit.shape[1], 1)
    cosine = (unit @ unit.transpose(0, 2, 1))[:, i, j]
    gap = np.abs(utilities[:, i] - utilities[:, j])
    return float(np.corrcoef(1 - cosine.ravel(), gap.ravel())[0, 1])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
