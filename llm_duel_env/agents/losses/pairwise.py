"""Losses on duels that look at log-probabilities alone.

Notation: Delta = log pi - log ref of a response, summed over its tokens; h = Delta(winner) - Delta(loser). Each is the
mean over B pairs. "Rests on" says where the formula was read where that is not the paper itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_duel_env.agents.losses.parts import (
    average_log_probs,
    log_ratio_margin,
    log_ratios,
    only_pairs,
    report,
    require,
)
from llm_duel_env.agents.policies.ranked import RankedLogProbs
from llm_duel_env.types import Metrics


def dpo(ranked: RankedLogProbs, *, beta: float, sft_weight: float = 0.0) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta h) [- w log pi(winner) / length]: Direct Preference Optimization (arXiv 2305.18290, eq. 7).

    sft_weight: w, of the supervised term on the winner, per token (rests on released code); 0 leaves it out.
    """
    require(sft_weight >= 0, "sft_weight", "a number of at least 0", sft_weight)
    h = log_ratio_margin(ranked)
    loss = -F.logsigmoid(beta * h)
    if sft_weight == 0:
        return report(loss, h)
    supervised = -average_log_probs(ranked)[:, 0]
    return report(loss + sft_weight * supervised, h, sft_loss=supervised)


def ipo(ranked: RankedLogProbs, *, beta: float, average: bool = False) -> tuple[Tensor, Metrics]:
    """(h - 1 / (2 beta))^2: Identity Preference Optimization (arXiv 2310.12036, eq. 17; arXiv 2411.01493, eq. 11).

    average: divides each response's Delta by its length, as many releases do; the papers sum.
    """
    h = log_ratio_margin(ranked)
    if average:
        ratio = log_ratios(ranked) / ranked.lengths
        h = ratio[:, 0] - ratio[:, 1]
    return report((h - 1.0 / (2.0 * beta)) ** 2, h)


def slic(ranked: RankedLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """max(0, 1 - beta h): the hinge that SEA (arXiv 2411.01493, eq. 12) and OAIF (arXiv 2402.04792) call SLiC."""
    h = log_ratio_margin(ranked)
    return report(torch.relu(1.0 - beta * h), h)


def simpo(ranked: RankedLogProbs, *, beta: float, gamma_ratio: float = 0.5) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta (a - gamma_ratio)), a the margin of log pi per token: SimPO (arXiv 2405.14734, eq. 6).

    No reference. The paper's gamma is gamma_ratio * beta, and its beta is 2 to 10. Rests on released code.
    """
    only_pairs(ranked)
    average = average_log_probs(ranked)
    margin = average[:, 0] - average[:, 1]
    return report(-F.logsigmoid(beta * margin - gamma_ratio * beta), margin)


def cdpo(ranked: RankedLogProbs, *, beta: float, smoothing: float = 0.1) -> tuple[Tensor, Metrics]:
    """(1 - e) (-log sigmoid(beta h)) + e (-log sigmoid(-beta h)): conservative DPO, labels wrong with probability e.

    smoothing: e in [0, 1/2]. Rests on released code (label smoothing).
    """
    require(0 <= smoothing <= 0.5, "smoothing", "a number in [0, 0.5]", smoothing)
    h = log_ratio_margin(ranked)
    return report(-(1 - smoothing) * F.logsigmoid(beta * h) - smoothing * F.logsigmoid(-beta * h), h)


def robust(ranked: RankedLogProbs, *, beta: float, smoothing: float = 0.1) -> tuple[Tensor, Metrics]:
    """[(1 - e) (-log sigmoid(beta h)) - e (-log sigmoid(-beta h))] / (1 - 2 e): robust DPO (arXiv 2403.00409).

    Unbiased where labels are flipped with probability e = smoothing < 1/2. Unlike cDPO it is not bounded below.
    """
    require(0 <= smoothing < 0.5, "smoothing", "a number in [0, 0.5)", smoothing)
    h = log_ratio_margin(ranked)
    flipped = smoothing * F.logsigmoid(-beta * h) - (1 - smoothing) * F.logsigmoid(beta * h)
    return report(flipped / (1 - 2 * smoothing), h)


def dpo_positive(ranked: RankedLogProbs, *, beta: float, penalty: float = 50.0) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta (h - lambda max(0, -Delta(winner)))): DPO-Positive (arXiv 2402.13228).

    penalty: lambda, of a winner that is less likely than under the reference; 0 is DPO. The formula rests on released
    code, and the default 50 on memory of the paper.
    """
    require(penalty >= 0, "penalty", "a number of at least 0", penalty)
    h = log_ratio_margin(ranked)
    lost = torch.relu(-log_ratios(ranked)[:, 0])
    return report(-F.logsigmoid(beta * (h - penalty * lost)), h, lost_log_ratio=lost)


def length_regularised(ranked: RankedLogProbs, *, beta: float, length_weight: float = 0.01) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta h + a (length(winner) - length(loser))): length-regularised DPO (arXiv 2403.19159).

    length_weight: a; the longer winner needs less of a margin, so length is not learnt as a virtue; 0 is DPO. Rests on
    released code, and the default is ours.
    """
    h = log_ratio_margin(ranked)
    longer = (ranked.lengths[:, 0] - ranked.lengths[:, 1]).to(h.dtype)
    return report(-F.logsigmoid(beta * h + length_weight * longer), h)


def kto(
    ranked: RankedLogProbs, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> tuple[Tensor, Metrics]:
    """[d sigmoid(-beta Delta(winner)) + u sigmoid(beta Delta(loser))] / 2: KTO-style, each response judged alone.

    Kahneman-Tversky Optimization (arXiv 2402.01306, eq. 7 and 8, recalled) with its reference point z at 0: the paper
    estimates z, the KL of policy to reference, on mismatched prompts and responses, which duels do not give. The two
    responses of a pair count as two examples; weights d, u are the paper's lambda_D, lambda_U.
    """
    require(min(desirable, undesirable) >= 0, "desirable, undesirable", "at least 0", (desirable, undesirable))
    h, ratio = log_ratio_margin(ranked), log_ratios(ranked)
    good, bad = torch.sigmoid(-beta * ratio[:, 0]), torch.sigmoid(beta * ratio[:, 1])
    return report(0.5 * (desirable * good + undesirable * bad), h)
