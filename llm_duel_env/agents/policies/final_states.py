"""The hidden state in which a policy ends a response: what an auxiliary head may read, with gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_duel_env.types import Candidates

if TYPE_CHECKING:  # it brings transformers with it
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy


def final_states(policy: LanguageModelPolicy, candidates: Candidates) -> Tensor:
    """The last hidden state at each response's last token (its EOS where it has one), after prompt and response.

    Args:
        policy: whose model that trains is run, once, on all of the rows.
        candidates: (M, N) with token ids.

    Returns:
        (M, N, hidden size) float32 on the policy's device, with gradient where it is enabled.
    """
    if candidates.tokens is None or candidates.lengths is None:
        raise ValueError("these candidates carry no token ids; make them with sample() or from_text()")
    m, n = candidates.shape
    rows = []
    for prompt, tokens, lengths in zip(
        policy.tokens.prompts(candidates.observation["prompt"]), candidates.tokens, candidates.lengths
    ):
        rows += [torch.tensor([*prompt, *ids[:length].tolist()]) for ids, length in zip(tokens, lengths)]
    ends = torch.tensor([len(row) - 1 for row in rows], device=policy.device)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)
    inside = torch.arange(ids.shape[1], device=policy.device) <= ends[:, None]
    body: Any = policy.models.policy.base_model  # `policy.model` may be a copy that only acts
    with policy.precision():
        states = body(input_ids=ids, attention_mask=inside, use_cache=False).last_hidden_state
    return states[torch.arange(len(rows), device=policy.device), ends].float().unflatten(0, (m, n))
