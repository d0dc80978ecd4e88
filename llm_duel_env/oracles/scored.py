"""What oracles that score one response at a time share: Bradley-Terry preferences, and no text scored twice."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from llm_duel_env.oracles.base import Oracle, OracleError
from llm_duel_env.types import Observation

Text = tuple[str, str]
"""A prompt and a response to it."""


class ScoringOracle(Oracle):
    """P(first beats second) = sigmoid(scale (s(first) - s(second))) for scores s that `score` gives.

    A distinct (prompt, response) is scored once, for as long as the bounded cache remembers it.
    """

    has_utility = True

    def __init__(self, *, scale: float = 1.0, cache_size: int = 16384) -> None:
        """An oracle with an empty cache.

        Args:
            scale: Inverse temperature: how many logits one unit of score is worth.
            cache_size: How many scores are remembered.

        Raises:
            ValueError: an argument out of range.
        """
        if isinstance(cache_size, bool) or not isinstance(cache_size, int) or cache_size < 1:
            raise ValueError(f"cache_size: expected at least 1, got {cache_size!r}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < np.inf:
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        self.scale, self.cache_size = float(scale), cache_size
        self.rows_scored = 0
        """Texts scored so far."""
        self._cache: OrderedDict[Text, float] = OrderedDict()

    @abstractmethod
    def score(self, texts: Sequence[Text]) -> np.ndarray:
        """The score of each of some distinct texts: float64 (R,)."""

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """scale * score of each response: float64 (M,).

        Raises:
            OracleError: a score that is not finite.
        """
        texts = [(str(p), str(r)) for p, r in zip(prompts["prompt"], responses, strict=True)]
        scores = self._scores(list(dict.fromkeys(texts)))
        return self.scale * np.array([scores[text] for text in texts], np.float64)

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,). Both responses are scored together.

        Raises:
            OracleError: a score that is not finite.
        """
        both = {"prompt": (*prompts["prompt"], *prompts["prompt"])}
        utility = self.utility(both, np.concatenate([first, second]))
        return expit(utility[: len(first)] - utility[len(first) :])

    def _scores(self, texts: Sequence[Text]) -> dict[Text, float]:
        """The score of each of some distinct texts, from the cache or made now."""
        scores = {text: self._cache[text] for text in texts if text in self._cache}
        new = [text for text in texts if text not in scores]
        for text, score in zip(new, self.score(new) if new else ()):
            scores[text] = self.remember(text, float(score))
        for text in texts:
            self.remember(text, scores[text])
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return scores

    def remember(self, text: Text, score: float) -> float:
        """Puts a score into the cache, as its youngest, and returns it.

        Raises:
            OracleError: it is not finite.
        """
        if not np.isfinite(score):
            where = f"prompt {short(text[0])}, response {short(text[1])}"
            raise OracleError(f"the reward model: expected a finite score, got {score} for {where}")
        self._cache[text] = score
        self._cache.move_to_end(text)
        return score


def short(text: str) -> str:
    """A text for an error: quoted, and cut where it is long."""
    return repr(text if len(text) <= 120 else f"{text[:117]}...")


def check_template(template: str, *names: str) -> None:
    """ValueError where a template lacks one of the fields ``{name}``."""
    missing = [f"{{{name}}}" for name in names if f"{{{name}}}" not in template]
    if missing:
        raise ValueError(f"text_template: expected {' and '.join(missing)} in it, got {template!r}")


def fill(template: str, **texts: str) -> str:
    """The template with each field ``{name}`` replaced, once; braces in the texts stay what they are.

    >>> fill("{prompt} / {response}", prompt="a {response}", response="b")
    'a {response} / b'
    """
    for name, text in texts.items():
        if f"{{{name}}}" in template:
            rest = {other: value for other, value in texts.items() if other != name}
            return text.join(fill(part, **rest) for part in template.split(f"{{{name}}}"))
    return template
