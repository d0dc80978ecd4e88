"""PairRM (LLM-Blender, arXiv 2306.02561): a DeBERTa that reads a prompt and two responses, and a head that compares.

Its checkpoints bring code of their own; here the few lines that they need stand in the open, and only weights are read.
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from llm_duel_env.quiet import no_progress_bars

MARKERS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
"""Fields of the configuration: ids of the tokens before the prompt and the two responses."""


class PairRM(DebertaV2PreTrainedModel):
    """The states of three markers, before the prompt, the first and the second response, decide.

    A response's score is a head's output on (prompt marker, its marker); the logit is the first's score less the
    second's, mean over the head's outputs.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        width, drop = config.hidden_size, getattr(config, "drop_out", 0.0)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(drop),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(drop),
            nn.Linear(width, getattr(config, "n_tasks", 1)),
        )
        self.post_init()

    @classmethod
    @no_progress_bars()
    def load(cls, model: str | os.PathLike[str], dtype: torch.dtype) -> PairRM:
        """The trained model. ValueError where weights or markers are missing."""
        found: PairRM
        info: dict[str, Any]
        found, info = cast(Any, cls).from_pretrained(model, dtype=dtype, use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{model} is not a trained PairRM: it lacks weights {sorted(info['missing_keys'])}")
        missing = [name for name in MARKERS if not isinstance(getattr(found.config, name, None), int)]
        if missing:
            raise ValueError(f"{model}: expected PairRM's markers in its configuration, {missing} are missing")
        return found.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Logits (R, 1) of the response shown first, for token ids and mask (R, T) with each marker once in a row."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = (self._at(states, input_ids, getattr(self.config, name)) for name in MARKERS)
        gap = self.head_layer(torch.cat([source, first], -1)) - self.head_layer(torch.cat([source, second], -1))
        return SequenceClassifierOutput(logits=gap.mean(dim=-1, keepdim=True))

    def _at(self, states: torch.Tensor, ids: torch.Tensor, marker: int) -> torch.Tensor:
        """The states (R, D) where each row has the marker."""
        found = ids == marker
        if not (found.sum(dim=1) == 1).all():
            raise ValueError(f"expected the marker {marker} once in every row")
        return states[found]


def pairrm_ids(
    tokenizer: Any, config: Any, question: tuple[str, str, str], max_prompt_tokens: int, max_response_tokens: int
) -> list[int]:
    """[CLS] marker prompt [SEP] [CLS] marker first [SEP] [CLS] marker second [SEP], as token ids.

    As its authors do it, both responses share evenly what the prompt leaves of the whole length, max_prompt_tokens + 2
    max_response_tokens. The tokenizer cuts what is longer. What a text says itself is never a marker.
    """
    left = max_prompt_tokens + 2 * max_response_tokens
    ids = _part(tokenizer, config, MARKERS[0], question[0], max_prompt_tokens)
    share = (left - len(ids)) // 2
    for marker, response in zip(MARKERS[1:], question[1:]):
        ids = ids + _part(tokenizer, config, marker, response, share)
    return ids


def _part(tokenizer: Any, config: Any, marker: str, text: str, limit: int) -> list[int]:
    own, markers = getattr(config, marker), {getattr(config, name) for name in MARKERS}
    for said in tokenizer.convert_ids_to_tokens(sorted(markers)):
        text = text.replace(said, " ")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = limit - 3
    ids = ids[-room:] if tokenizer.truncation_side == "left" else ids[:room]
    return [tokenizer.cls_token_id, own, *ids, tokenizer.sep_token_id]
