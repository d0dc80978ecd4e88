"""Passive: all of SEA but its choice of duels, which are the first two samples (arXiv 2411.01493)."""

from __future__ import annotations

from dataclasses import dataclass

from llm_duel_env.agents.sea import SEA, SEAConfig


@dataclass(frozen=True)
class PassiveConfig(SEAConfig):
    """SEA's settings, with nothing chosen."""

    opponent: str = "passive"
    """The first two samples duel, whatever the ensemble thinks."""


class Passive(SEA):
    """What SEA gains without exploring: the ensemble labels its share of prompts, but chooses no duel."""

    Config = PassiveConfig
