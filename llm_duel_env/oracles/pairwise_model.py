"""An oracle made of a model that reads a prompt and both responses at once: PairRM, or a classifier of such a text."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

from llm_duel_env import ranks
from llm_duel_env.oracles.base import Oracle, OracleError
from llm_duel_env.oracles.pairrm import PairRM, pairrm_ids
from llm_duel_env.oracles.reward_model import batches_of, choose_devices, choose_dtype, token_limit
from llm_duel_env.oracles.scored import check_template, fill, short
from llm_duel_env.pretrained import loading
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.types import Observation

Question = tuple[str, str, str]
"""A prompt, the response shown first, and the one shown second."""


class PairwiseModelOracle(Oracle):
    """P(first beats second) of a model that sees both, asked in both orders.

    With m(a, b) the model's logit for a when it is shown first, P = sigmoid((m(a, b) - m(b, a)) / 2 * scale): the order
    of the two has no influence, and P(a beats b) + P(b beats a) = 1. No utility need explain the preferences. Each
    distinct question goes through the model once, for as long as the bounded cache remembers it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 16384,
        max_prompt_tokens: int = 1224,
        max_response_tokens: int = 412,
        max_length: int | None = None,
        scale: float = 1.0,
        text_template: str | None = None,
        cache_size: int = 16384,
    ) -> None:
        """Loads a model.

        Args:
            model: Folder or hub name, with safetensors weights and a tokenizer. A checkpoint of the architecture
                DebertaV2PairRM (such as llm-blender/PairRM-hf) is read as PairRM; everything else as a sequence
                classifier with one output (the logit of the first) or two (the logits of first and second).
            device: A torch device; "auto" takes a GPU where there is one.
            dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on a GPU and float32 elsewhere.
            batch_tokens: The most tokens, padding included, of a forward pass; a longer question goes alone.
            max_prompt_tokens: PairRM: a longer prompt is cut (its authors: 1224).
            max_response_tokens: PairRM: a longer response is cut, unless the prompt leaves room (its authors: 412).
            max_length: Classifiers: the most tokens; a longer text loses its beginning. None for the tokenizer's limit.
            scale: Inverse temperature: how many logits one unit of the model's output is worth.
            text_template: Classifiers: text with ``{prompt}``, ``{first}`` and ``{second}``; they have no default.
            cache_size: How many outputs are remembered.

        Raises:
            ValueError: there is no such model, it lacks trained weights or has other outputs, or an argument is out of
                range.
        """
        sizes = {"batch_tokens": batch_tokens, "max_prompt_tokens": max_prompt_tokens, "cache_size": cache_size}
        for name, size in {**sizes, "max_response_tokens": max_response_tokens, "max_length": max_length}.items():
            least = 4 if name in ("max_prompt_tokens", "max_response_tokens") else 1  # CLS, marker, SEP and a token
            if size is not None and size < least:
                raise ValueError(f"{name}: expected at least {least}, got {size}")
        if not 0 < scale < np.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        (place, *others) = choose_devices(device)
        if others:
            raise ValueError(f"device: expected one device, got {device!r}")
        weights = choose_dtype(dtype, place)
        with loading(model, "pairwise model"):
            is_pairrm = "DebertaV2PairRM" in (_config(model).get("architectures") or [])
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            found: Any = PairRM.load(model, weights) if is_pairrm else _classifier(model, weights)
            self.model = found.to(place)
        if is_pairrm and text_template is not None:
            raise ValueError("text_template: PairRM has a form of its own; expected none")
        if not is_pairrm:
            check_template(text_template or "", "prompt", "first", "second")
        self._forward = ranks.together(self._forward_here)
        self.scale, self.batch_tokens, self.cache_size = float(scale), batch_tokens, cache_size
        self.text_template, self._limits = text_template or "", (max_prompt_tokens, max_response_tokens)
        self.max_length = max_length or token_limit(self.tokenizer, self.model.config)
        self.encode: Callable[[Question], list[int]] = self._encode_pairrm if is_pairrm else self._encode_text
        self.rows_scored = 0
        """Questions that went through the model so far."""
        self._cache: OrderedDict[Question, float] = OrderedDict()

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,). Both orders go through the model together.

        Raises:
            OracleError: an output that is not finite.
        """
        pairs = list(zip(map(str, prompts["prompt"]), map(str, first), map(str, second), strict=True))
        turned = [(prompt, b, a) for prompt, a, b in pairs]
        known = self._logits(list(dict.fromkeys(pairs + turned)))
        gap = np.array([known[pair] - known[other] for pair, other in zip(pairs, turned)], np.float64)
        return expit(self.scale * gap / 2)

    def _logits(self, questions: Sequence[Question]) -> dict[Question, float]:
        found = {question: self._cache[question] for question in questions if question in self._cache}
        new = [question for question in questions if question not in found]
        for question, logit in zip(new, self._forward([self.encode(question) for question in new])):
            if not np.isfinite(logit):
                where = ", ".join(map(short, question))
                raise OracleError(f"the pairwise model: expected a finite output, got {logit} for {where}")
            found[question] = float(logit)
        for question in questions:
            self._cache[question] = found[question]
            self._cache.move_to_end(question)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return found

    def _encode_pairrm(self, question: Question) -> list[int]:
        return pairrm_ids(self.tokenizer, self.model.config, question, *self._limits)

    def _encode_text(self, question: Question) -> list[int]:
        prompt, first, second = question
        text = fill(self.text_template, prompt=prompt, first=first, second=second)
        ids = list(self.tokenizer(text)["input_ids"])
        if not ids:
            raise OracleError(f"no tokens in {', '.join(map(short, question))}")
        return ids[-self.max_length :]

    @torch.inference_mode()
    def _forward_here(self, rows: Sequence[list[int]]) -> np.ndarray:
        """The model's logit for the response shown first, by row of token ids: float64 (R,)."""
        logits = np.empty(len(rows))
        padding = self.model.config.pad_token_id
        # A model without padding takes one row at a time.
        for batch in batches_of([len(row) for row in rows], self.batch_tokens if padding is not None else 1):
            width = max(len(rows[i]) for i in batch)
            ids = torch.full((len(batch), width), padding or 0, dtype=torch.long)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for number, i in enumerate(batch):
                ids[number, : len(rows[i])] = torch.tensor(rows[i])
                mask[number, : len(rows[i])] = 1
            place = self.model.device
            out = self.model(input_ids=ids.to(place), attention_mask=mask.to(place)).logits.float().cpu().numpy()
            logits[batch] = out[:, 0] - out[:, 1] if out.shape[1] == 2 else out[:, 0]
            self.rows_scored += len(batch)
        return logits


def _config(model: str | os.PathLike[str]) -> dict[str, Any]:
    # As plain JSON: a configuration class of transformers may drop what it does not know.
    path = cached_file(model, "config.json")
    assert path is not None  # a file that is not there is an error of its own
    with open(path, encoding="utf-8") as file:
        return json.load(file)


@no_progress_bars()
def _classifier(model: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    found, info = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{model} is not a trained pairwise model: it lacks weights {sorted(info['missing_keys'])}")
    if found.config.num_labels not in (1, 2):
        raise ValueError(f"{model}: expected a classifier with 1 or 2 outputs, got {found.config.num_labels}")
    return found.eval()
