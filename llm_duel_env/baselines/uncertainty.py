"""Uncertainty sampling: SEA that duels the pair its ensemble disagrees about most (arXiv 2411.01493, Fig. 7)."""

from __future__ import annotations

from dataclasses import dataclass

from llm_duel_env.agents.sea import SEA, SEAConfig


@dataclass(frozen=True)
class UncertaintyConfig(SEAConfig):
    """SEA's settings, with pure exploration."""

    opponent: str = "uncertainty"
    """The pair with the largest variance, over members, of the difference of rewards."""


class Uncertainty(SEA):
    """Pure exploration: information about the reward, whether or not either response may be the best."""

    Config = UncertaintyConfig
