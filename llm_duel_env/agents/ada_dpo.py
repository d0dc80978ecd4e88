"""Ada-DPO: adaptive preference scaling (arXiv 2406.02764): every pair has a scale tau of its own.

The method is a loss (`llm_duel_env.agents.losses.adaptive.ada_dpo`); this is online DPO with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_duel_env.agents.online_dpo import OnlineDPO, OnlineDPOConfig


@dataclass(frozen=True)
class AdaDPOConfig(OnlineDPOConfig):
    """``loss_options`` are ``tau_min`` (paper: 0.1), ``tau_max`` (1 to 10; best on TL;DR 4), ``rho0`` (0.05 to 0.5;
    best on TL;DR 0.1) and ``newton_steps`` (5 on text). tau takes the part of beta, which is not used."""

    loss: str = "ada_dpo"
    """The direct optimizer: the method itself."""


class AdaDPO(OnlineDPO):
    """Two samples of the present policy duel; ambiguous pairs are learnt with a small tau, clear ones with a large."""

    Config = AdaDPOConfig
    paper = "https://arxiv.org/abs/2406.02764"
    provenance = "paper"
    config: AdaDPOConfig
