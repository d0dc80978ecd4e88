"""Frozen features of (prompt, response), standardised; and how models are loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_duel_env.adapters import is_adapter, load_merged
from llm_duel_env.agents.policies.scoring import Prompts, features
from llm_duel_env.agents.policies.ways import Ways
from llm_duel_env.pretrained import loading
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.tasks.base import TaskView

FILE = "features.safetensors"


@no_progress_bars()
def load_model(name: str, device: torch.device) -> PreTrainedModel:
    """A causal language model in float32 and eval mode (no dropout, ever), from a folder or the hub; no remote code.

    A folder with a peft adapter gives its base with the adapter merged.

    Raises:
        ValueError: there is no such model.
    """
    if is_adapter(name):
        merged = load_merged(name, AutoModelForCausalLM, dtype=torch.float32)
        return merged.to(device).requires_grad_(True)  # peft froze the base
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # Only eager attention knows Gemma 2's cap of the attention scores.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model.to(device).eval()


def load_encoder(
    name: str, task: TaskView, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """The model that `PolicyConfig.encoder` names, unless that is the policy.

    Raises:
        ValueError: the task offers none, there is no such model, or its vocabulary is not the policy's tokenizer's.
    """
    folder = task.encoder if name == "task" else name
    if folder is None:
        raise ValueError(f"policy.encoder: task {task.name} offers no encoder; take 'policy' or a model folder")
    with loading(folder, "policy.encoder"):
        vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(f"policy.encoder: {folder} has another vocabulary than the policy, {task.model}")
    return load_model(folder, device)


class FrozenEncoder:
    """Features of responses under a frozen model, standardised on statistics that are measured once.

    Args:
        model: the frozen model.
        precision: makes the context in which its matrix products run.
        ways: how it may be run.
    """

    def __init__(self, model: PreTrainedModel, precision: Callable[[], AbstractContextManager], ways: Ways) -> None:
        self.model, self.precision, self.ways = model, precision, ways
        self.feature_size = int(model.config.get_text_config().hidden_size) + 4
        self.statistics: Tensor | None = None
        """(2, D): mean and standard deviation of the features; None until `measure`."""

    def raw(self, prompts: Prompts, tokens: Tensor, lengths: Tensor) -> Tensor:
        """`scoring.features` (M, N, D) on the CPU, not standardised."""
        with self.precision():
            return features(self.model, prompts, tokens, lengths, **asdict(self.ways)).cpu()

    def measure(self, prompts: Prompts, tokens: Tensor, lengths: Tensor) -> None:
        """Takes the statistics from samples."""
        flat = self.raw(prompts, tokens, lengths).flatten(0, 1)
        self.statistics = torch.stack([flat.mean(0), flat.std(0).clamp(min=1e-4)])

    def __call__(self, prompts: Prompts, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Standardised features (M, N, D) on the CPU, without gradient."""
        if self.statistics is None:
            raise ValueError("the encoder's statistics were not measured yet")
        mean, scale = self.statistics
        return (self.raw(prompts, tokens, lengths) - mean) / scale

    def save(self, folder: Path) -> None:
        """Writes the statistics, where they were measured."""
        if self.statistics is not None:
            save_file({"mean_and_scale": self.statistics.contiguous()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        self.statistics = load_file(folder / FILE)["mean_and_scale"] if (folder / FILE).exists() else None
