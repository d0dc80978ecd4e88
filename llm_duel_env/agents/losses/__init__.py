"""Direct optimizers: losses on log-probabilities of ranked responses. Pure functions, each the mean over B rows."""

from __future__ import annotations

from llm_duel_env.agents.losses.adaptive import ada_dpo
from llm_duel_env.agents.losses.bonus import ExplorationBonus, selm, vpo, xpo
from llm_duel_env.agents.losses.pairwise import (
    cdpo,
    dpo,
    dpo_positive,
    ipo,
    kto,
    length_regularised,
    robust,
    simpo,
    slic,
)
from llm_duel_env.agents.losses.parts import log_ratio_margin
from llm_duel_env.agents.losses.registry import LossInfo, NamedLoss, named_loss
from llm_duel_env.agents.losses.scored import dlma, optune, pro, rdo
from llm_duel_env.agents.losses.token_weighted import bmc

__all__ = [
    "ExplorationBonus", "LOSSES", "LossInfo", "NamedLoss", "ada_dpo", "bmc", "cdpo", "direct_optimizer", "dlma", "dpo",
    "dpo_positive", "ipo", "kto", "length_regularised", "log_ratio_margin", "optune", "pro", "rdo", "robust", "selm",
    "simpo", "slic", "vpo", "xpo",
]  # fmt: skip

ARXIV = "https://arxiv.org/abs/"

LOSSES: dict[str, LossInfo] = {
    "dpo": LossInfo(dpo, ARXIV + "2305.18290", {"reference"}, "paper"),
    "ipo": LossInfo(ipo, ARXIV + "2310.12036", {"reference"}, "paper"),
    "slic": LossInfo(slic, ARXIV + "2411.01493", {"reference"}, "paper"),
    "simpo": LossInfo(simpo, ARXIV + "2405.14734", set(), "reconstructed"),
    "cdpo": LossInfo(cdpo, "https://ericmitchell.ai/cdpo.pdf", {"reference"}, "reconstructed"),
    "robust": LossInfo(robust, ARXIV + "2403.00409", {"reference"}, "reconstructed"),
    "dpo_positive": LossInfo(dpo_positive, ARXIV + "2402.13228", {"reference"}, "reconstructed"),
    "length_regularised": LossInfo(length_regularised, ARXIV + "2403.19159", {"reference"}, "reconstructed"),
    "kto": LossInfo(kto, ARXIV + "2402.01306", {"reference"}, "reconstructed"),
    "rdo": LossInfo(rdo, ARXIV + "2408.09385", {"reference", "scores"}, "reconstructed"),
    "optune": LossInfo(optune, ARXIV + "2406.07657", {"reference", "scores"}, "reconstructed"),
    "dlma": LossInfo(dlma, ARXIV + "2402.11907", {"reference", "scores"}, "reconstructed"),
    "pro": LossInfo(pro, ARXIV + "2306.17492", {"ranking", "scores"}, "reconstructed"),
    "bmc": LossInfo(bmc, ARXIV + "2408.07471", {"reference", "tokens"}, "reconstructed"),
    "ada_dpo": LossInfo(ada_dpo, ARXIV + "2406.02764", {"reference"}, "paper"),
}
"""The losses by name. `llm-duel list losses` prints them."""


def direct_optimizer(
    name: str, beta: float, options: dict[str, float] | None = None, *, gives: frozenset[str] = frozenset()
) -> NamedLoss:
    """The named loss with its settings fixed, once they were tried.

    Args:
        name: one of `LOSSES`.
        beta: strength of the pull to the reference; losses that know no beta (pro, ada_dpo) leave it out.
        options: the loss's own settings, by name.
        gives: what the caller hands to the policy beyond duels, a subset of {scores, ranking}.

    Raises:
        ValueError: an unknown loss or option, with the known ones; a value the loss does not take; or a loss that needs
            more than the caller gives.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {sorted(LOSSES)}, got {name!r}")
    return named_loss(name, LOSSES[name], beta, options or {}, gives)
