"""Losses that also look at scalar scores of the responses: weighted DPO, DPO with target margins, list-wise ranking.

Scores are constants: no gradient flows through them. Notation as in `pairwise`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_duel_env.agents.losses.parts import (
    average_log_probs,
    log_ratio_margin,
    log_ratios,
    report,
    require,
    scores_of,
)
from llm_duel_env.agents.policies.ranked import RankedLogProbs
from llm_duel_env.types import Metrics


def rdo(ranked: RankedLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """Sum over i < j of w_ij (-log sigmoid(beta h_ij)), w_ij from score gaps: Reward Difference Optimization.

    arXiv 2408.09385, reconstructed from its abstract and notes; with the difference of point-wise scores as R_ij and
    DPO as the loss that it weights. w_ij = max(0, r_i - r_j) / mean over the batch, so a batch's weights have mean 1
    and the coefficient is no second learning rate (a choice of ours, as the paper's normalisation is unconfirmed). The
    mean is over the optimizer step's whole batch (`RankedLogProbs.batch_scores`), not the microbatch. Where scores
    contradict the ranking the pair weighs nothing; where no pair of the batch has a gap all weigh 1.
    """
    ratio = log_ratios(ranked)
    better, worse = torch.triu_indices(ratio.shape[1], ratio.shape[1], offset=1, device=ratio.device)
    scores = scores_of(ranked)
    batch = scores if ranked.batch_scores is None else ranked.batch_scores.detach()
    mean = torch.relu(batch[:, better] - batch[:, worse]).mean()
    weight = torch.relu(scores[:, better] - scores[:, worse]) / mean if mean > 0 else torch.ones_like(ratio[:, better])
    h = ratio[:, better] - ratio[:, worse]
    loss = -(weight.to(h.dtype) * F.logsigmoid(beta * h)).sum(1)
    return report(loss, ratio[:, 0] - ratio[:, -1], zero_weight=(weight == 0).float().mean(1))


def optune(ranked: RankedLogProbs, *, beta: float, beta2: float = 1.0) -> tuple[Tensor, Metrics]:
    """sigmoid(beta2 (r_w - r_l)) (-log sigmoid(beta h)): OPTune's weighted DPO (arXiv 2406.07657).

    Reconstructed: that the weight multiplies and grows with the reward gap rests on notes, its sigmoid on memory, and
    the default beta2 is ours. beta2 = 0 is half of DPO. The weight is not normalised, so microbatches do not matter.
    """
    require(beta2 >= 0, "beta2", "a number of at least 0", beta2)
    h, scores = log_ratio_margin(ranked), scores_of(ranked)
    weight = torch.sigmoid(beta2 * (scores[:, 0] - scores[:, 1])).to(h.dtype)
    return report(-weight * F.logsigmoid(beta * h), h, weight=weight)


def dlma(
    ranked: RankedLogProbs, *, beta: float, margin_weight: float = 0.2, clip: float = 40.0
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta (h - w clamp(R, -clip, clip))), R = r_w - r_l: DLMA (arXiv 2402.11907).

    The scores r are DLMA's self-rewards: log pi(y | good system prompt) - log pi(y | bad one), sums, by the agent. A
    larger R asks for a larger margin; R < 0 asks for less and flips no label. Rests on released code, constants too.
    margin_weight: w; 0 is DPO.
    """
    require(clip >= 0, "clip", "a number of at least 0", clip)
    h, scores = log_ratio_margin(ranked), scores_of(ranked)
    target = (scores[:, 0] - scores[:, 1]).clamp(-clip, clip).to(h.dtype)
    return report(-F.logsigmoid(beta * (h - margin_weight * target)), h, self_reward_margin=target)


def pro(ranked: RankedLogProbs, *, sft_weight: float = 0.05) -> tuple[Tensor, Metrics]:
    """Sum over k < n of -log softmax of s_k t_kk among {s_k t_kk, s_i t_ki}: Preference Ranking Optimization.

    arXiv 2306.17492, resting on released code. s = log pi per token; for i > k, t_ki = r_k - r_i (an inverse
    temperature) and t_kk = max_i t_ki; plus w (n - 1)^2 (-log pi(best)), a sum over tokens. No reference, no beta. A
    gap of zero makes its term constant; a negative gap (scores against the ranking) counts as zero, our choice.

    sft_weight: w (release: 0.05). margin and accuracy are those of s, best against last.
    """
    require(sft_weight >= 0, "sft_weight", "a number of at least 0", sft_weight)
    scores, average = scores_of(ranked), average_log_probs(ranked)
    n = average.shape[1]
    ranking = torch.zeros_like(average[:, 0])
    for k in range(n - 1):
        gap = torch.relu(scores[:, k : k + 1] - scores[:, k + 1 :]).to(average.dtype)
        own = average[:, k] * gap.amax(dim=1)
        rivals = average[:, k + 1 :] * gap
        ranking = ranking + torch.cat([own[:, None], rivals], dim=1).logsumexp(dim=1) - own
    supervised = -ranked.policy[:, 0]
    loss = ranking + sft_weight * (n - 1) ** 2 * supervised
    return report(loss, average[:, 0] - average[:, -1], ranking_loss=ranking, sft_loss=supervised)
