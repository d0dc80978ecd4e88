"""What a frozen model makes of a response alone, without its prompt (REAL, arXiv 2409.17169)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 16_384
"""Response tokens that run at a time, padding included, at most."""


@torch.no_grad()
def mean_hidden_states(model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The mean over each response's own tokens of the last hidden states of a model that sees nothing else.

    No prompt and no BOS stand in front, the EOS that ends a response belongs to it, as in the authors' released code,
    and padding counts nowhere.

    Args:
        model: a causal language model.
        tokens: (M, N, T) response ids on the model's device, padded on the right.
        lengths: (M, N), 1 to T.

    Returns:
        (M, N, hidden size) float32, on the model's device.
    """
    m, n, t = tokens.shape
    if lengths.shape != (m, n):
        raise ValueError(f"tokens {(m, n, t)}: expected lengths {(m, n)}, got {tuple(lengths.shape)}")
    if int(lengths.min()) < 1 or int(lengths.max()) > t:
        raise ValueError(f"lengths: expected 1 to {t}, got {int(lengths.min())} to {int(lengths.max())}")
    ids, ends = tokens.flatten(0, 1), lengths.flatten()
    body: Any = model.base_model  # without the output layer: no logits are wanted
    # Rows of like length run together, so that little of what runs is padding.
    order = torch.argsort(ends, stable=True)
    parts = []
    for chunk in order.split(max(TOKENS // t, 1)):
        width = int(ends[chunk].max())
        inside = torch.arange(width, device=ids.device) < ends[chunk, None]
        states = body(input_ids=ids[chunk, :width], attention_mask=inside, use_cache=False).last_hidden_state
        parts.append(torch.where(inside[..., None], states.float(), 0.0).sum(dim=1) / ends[chunk, None])
    return torch.cat(parts)[torch.argsort(order)].unflatten(0, (m, n))
