"""Prompts followed by all of their responses, one row for each prompt (`packing`), for causal language models.

Where a row is so long that its attention, mostly masked, would cost more than it saves, `shared_prefix` is better.

Letters: M prompts, N responses to each, W tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_duel_env import packing
from llm_duel_env.agents.policies.output_layer import hidden_states_only


def states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """(M, W, H): what the model's output layer is given."""
    with hidden_states_only(model) as given:
        model(**inputs, use_cache=False)  # what the layer makes of it is not looked at
    return given[0]


def pays(width: int, alone: int, hidden_size: int) -> bool:
    """Whether rows of `width` tokens are cheaper than apart, where one prompt and one response are `alone` tokens.

    Attention costs a token 4 x width x hidden operations in a layer, the layer's matrices some 24 x hidden^2: rows of up
    to 4 x hidden tokens add less than the prompts' copies would. Two responses are always packed.
    """
    return width <= max(2 * alone, 4 * hidden_size)


def fits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], lengths: Tensor) -> bool:
    """Whether packing is right and pays for these prompts and lengths (M, N), for a model for which `works` holds."""
    starts = torch.tensor([len(prompt) for prompt in prompts], device=lengths.device)
    width, alone = int((starts + lengths.sum(1)).max()), int((starts + lengths.amax(1)).max())
    return pays(width, alone, int(model.config.get_text_config().hidden_size)) and width <= packing.widest(model)


def works(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether packed rows give this model the same last hidden states as one row at a time (`packing.works`)."""
    return packing.works(model, partial(states, model), tolerance)
