"""DPO whose tokens weigh differently."""

from __future__ import annotations

from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_duel_env.agents.losses.parts import only_pairs, report, require
from llm_duel_env.agents.policies.ranked import RankedLogProbs, TokenLogProbs
from llm_duel_env.types import Metrics


def bmc(ranked: RankedLogProbs, *, beta: float, delta: float = 3.0) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta (sum_t l_t d_t(winner) - sum_t l_t d_t(loser))): BMC's token weights (arXiv 2408.07471).

    d_t is a token's log pi - log ref, and l_t = 1 + min(1 / pi(y_t), delta) on tokens in which the two responses
    differ, 1 elsewhere; no gradient through l. Rests on released code, with two differences: the policy's own l weighs
    both passes (the release weighs the reference's pass by the reference's), and no stop words are spared.

    delta: bounds the weights (release: 3.0 with beta 0.05, 1.5 with beta 0.01); 0 is DPO.
    """
    require(delta >= 0, "delta", "a number of at least 0", delta)
    only_pairs(ranked)
    if ranked.tokens is None:
        raise ValueError("bmc needs log-probabilities of tokens, and got none")
    tokens, differs = ranked.tokens, differing_tokens(ranked.tokens)
    surprise = torch.exp(-tokens.policy.detach()).clamp(max=delta)
    weight = torch.where(differs, 1.0 + surprise, 1.0)
    ratio = torch.where(tokens.mask, weight * (tokens.policy - tokens.reference), 0.0).sum(dim=2)
    h = ratio[:, 0] - ratio[:, 1]
    count = tokens.mask.sum(dim=(1, 2))
    mean_weight = (weight * tokens.mask).sum(dim=(1, 2)) / count
    return report(-F.logsigmoid(beta * h), h, token_weight=mean_weight, differing=differs.sum(dim=(1, 2)) / count)


def differing_tokens(tokens: TokenLogProbs) -> Tensor:
    """(B, 2, T) bool: the tokens of each response that an alignment of the two (difflib's) replaces or leaves out."""
    differs = torch.zeros_like(tokens.mask)
    lengths = tokens.mask.sum(dim=2).tolist()
    for row, (ids, (left, right)) in enumerate(zip(tokens.ids.tolist(), lengths)):
        match = SequenceMatcher(None, ids[0][:left], ids[1][:right], autojunk=False)
        for tag, i, i_end, j, j_end in match.get_opcodes():
            if tag != "equal":
                differs[row, 0, i:i_end] = True
                differs[row, 1, j:j_end] = True
    return differs
