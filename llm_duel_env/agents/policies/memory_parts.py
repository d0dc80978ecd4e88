"""What an estimate of memory is made of: the work of a run, and the parts of a rank's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

FLOAT, HALF = 4, 2
"""Bytes of a number in float32 and bfloat16."""


@dataclass(frozen=True)
class Part:
    """Bytes of one part of a rank's memory, while it does each kind of work."""

    name: str
    """What it is, with the bytes of a number."""
    begin: float = 0.0
    """On the GPU while models are loaded."""
    sample: float = 0.0
    """While it samples, evaluations included."""
    score: float = 0.0
    """While the reference scores and the encoder embeds."""
    label: float = 0.0
    """While the oracle's model labels."""
    learn: float = 0.0
    """While the policy learns."""
    cpu: float = 0.0
    """In main memory."""
    estimated: bool = False
    """False where it is the size of tensors that are known."""


@dataclass(frozen=True)
class Work:
    """What a run asks of its models, and on what."""

    ranks: int
    """Ranks that share it."""
    prompts: int
    """Prompts of a round."""
    evaluated: int
    """Prompts of an evaluation."""
    candidates: int
    """Responses sampled for each prompt of a round."""
    ranked: int
    """Responses of each prompt that the policy learns from."""
    prompt_tokens: int
    """Longest prompt."""
    new_tokens: int
    """Longest response."""
    policy: PretrainedConfig
    """Of the policy's model; the base's, where it starts from an adapter."""
    from_adapter: bool = False
    """Whether the start is an adapter's folder: its frozen start is then a model of its own."""
    encoder: PretrainedConfig | None = None
    """Of an encoder that is not the policy's start."""
    reward: PretrainedConfig | None = None
    """Of the oracle's model, where this process loads one."""
    reward_tokens: int = 16384
    """The most tokens of its pass."""
    reward_on: str = "cuda"
    """"cuda" where it is on this rank's GPU, "cpu", or "" where it is on another one."""
    gpu_bytes: float | None = None
    """Of the GPU; None where nobody says: vLLM's share is then not known."""
    bf16: bool = True
    """Whether matrix products run in bfloat16."""


@dataclass(frozen=True)
class Weights:
    """Counts of a model's numbers."""

    total: int
    """All, tied ones once."""
    trained: int
    """Those that train."""
    cast: int
    """Those that autocast copies: the matrices of linear layers that are in float32."""

    @staticmethod
    def of(model: Any, bf16_frozen: bool) -> Weights:
        """Counts a model's; `bf16_frozen` says that what does not train is in bfloat16."""
        named = list(model.parameters())
        linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
        cast = sum(w.numel() for w in linear.values() if w.requires_grad or not bf16_frozen)
        return Weights(sum(p.numel() for p in named), sum(p.numel() for p in named if p.requires_grad), cast)


def always(size: float) -> dict[str, Any]:
    """A part that is on the GPU whatever the work."""
    return dict.fromkeys(("begin", "sample", "score", "label", "learn"), float(size))


def from_first_step(size: float) -> dict[str, Any]:
    """A part that is on the GPU from the first optimizer step on."""
    return dict.fromkeys(("sample", "score", "label", "learn"), float(size))
