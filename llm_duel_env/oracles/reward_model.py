"""An oracle made of a reward model: any sequence classifier with one output, with its own tokenizer."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llm_duel_env.oracles.base import Oracle, OracleError
from llm_duel_env.pretrained import loading
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.types import Observation

Text = tuple[str, str]
"""A prompt and a response to it."""


class RewardModelOracle(Oracle):
    """P(first beats second) = sigmoid(scale (s(first) - s(second))) for the scores s of a reward model.

    A distinct (prompt, response) is scored once, for as long as the bounded cache remembers it. Scores do not depend on
    what else is in a batch, beyond floating-point rounding, and equal those of the model called on one text at a time.
    """

    has_utility = True

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 16384,
        max_length: int | None = None,
        scale: float = 1.0,
        text_template: str | None = None,
        cache_size: int = 16384,
    ) -> None:
        """Loads a reward model.

        Args:
            model: Folder or hub name, with safetensors weights and a tokenizer. No code of the model's is run.
            device: A torch device; "auto" takes a GPU where there is one.
            dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on a GPU and float32 elsewhere.
            batch_tokens: The most tokens, padding included, of a forward pass; a longer text goes alone.
            max_length: The most tokens of a text; a longer one loses its beginning. None for the tokenizer's limit.
            scale: Inverse temperature: how many logits one unit of score is worth.
            text_template: Format string with ``{prompt}`` and ``{response}``. None takes the tokenizer's chat template,
                prompt as user and response as assistant, and where it has none ``"{prompt} {response}"``. Without a
                chat template the tokenizer's end-of-text token is added where the tokenizer does not add it itself.
            cache_size: How many scores are remembered.

        Raises:
            ValueError: there is no such model, it has not exactly one output, it lacks trained weights for it, or an
                argument is out of range.
        """
        for name, number in (("batch_tokens", batch_tokens), ("max_length", max_length), ("cache_size", cache_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if not 0 < scale < np.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        if text_template is not None and not ("{prompt}" in text_template and "{response}" in text_template):
            raise ValueError(f"text_template: expected {{prompt}} and {{response}} in it, got {text_template!r}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
        with loading(model, "reward model"):
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.model = _load(model, getattr(torch, dtype)).to(device)
        self.scale, self.batch_tokens, self.cache_size = float(scale), batch_tokens, cache_size
        self.max_length = max_length or _token_limit(self.tokenizer, self.model.config.get_text_config())
        self.text_template = text_template
        self.rows_scored = 0
        """Texts that went through the model so far."""
        self._cache: OrderedDict[Text, float] = OrderedDict()

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """scale * score of each response: float64 (M,).

        Raises:
            OracleError: a score that is not finite.
        """
        texts = [(str(p), str(r)) for p, r in zip(prompts["prompt"], responses, strict=True)]
        scores = self._scores(list(dict.fromkeys(texts)))
        return self.scale * np.array([scores[text] for text in texts], np.float64)

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,). Both responses go through the model together.

        Raises:
            OracleError: a score that is not finite.
        """
        both = {"prompt": (*prompts["prompt"], *prompts["prompt"])}
        utility = self.utility(both, np.concatenate([first, second]))
        return expit(utility[: len(first)] - utility[len(first) :])

    def _scores(self, texts: Sequence[Text]) -> dict[Text, float]:
        """The score of each of some distinct texts, from the cache or the model."""
        scores = {text: self._cache[text] for text in texts if text in self._cache}
        new = [text for text in texts if text not in scores]
        for text, score in zip(new, self._forward([self.encode(*text) for text in new])):
            if not np.isfinite(score):
                where = f"prompt {_short(text[0])}, response {_short(text[1])}"
                raise OracleError(f"the reward model: expected a finite score, got {score} for {where}")
            scores[text] = score
        for text in texts:
            self._cache[text] = scores[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return scores

    def encode(self, prompt: str, response: str) -> list[int]:
        """The token ids that the model scores for a response."""
        if self.text_template is None and self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them itself
        else:
            # Replaced, not formatted: prompt and response may hold braces; split, so that neither is searched itself.
            before, after = (self.text_template or "{prompt} {response}").split("{prompt}", 1)
            text = before.replace("{response}", response) + prompt + after.replace("{response}", response)
            ids = list(self.tokenizer(text)["input_ids"])
            end = self.tokenizer.eos_token_id
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
        if not ids:
            raise OracleError(f"no tokens in prompt {_short(prompt)}, response {_short(response)}")
        return ids[-self.max_length :]

    @torch.inference_mode()
    def _forward(self, rows: Sequence[list[int]]) -> np.ndarray:
        """The score of each row of token ids: float64 (R,)."""
        scores = np.empty(len(rows))
        for batch in _batches([len(row) for row in rows], self.batch_tokens):
            ids, mask, padding = self._pad([rows[i] for i in batch])
            scores[batch] = self._call(ids, mask, padding)
            self.rows_scored += len(batch)
        return scores

    def _pad(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Rows padded on the right: ids and mask (R, T), and the padding id.

        A classifier reads the score at the last token that is not padding, and tells padding by its id. With the
        model's own id, that is the same token in a batch and alone, even where the id is also the end of text. A model
        without one reads the last token, and takes no batches: it is given an id that occurs in none of the rows.
        """
        config = self.model.config.get_text_config()
        padding = config.pad_token_id
        if padding is None:
            used = set().union(*rows)
            padding = next((i for i in range(config.vocab_size) if i not in used), 0)
            if padding in used and len(rows) > 1:
                raise OracleError("the reward model has no padding token and its texts use up the vocabulary")
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), padding, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return ids, mask, padding

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, padding: int) -> np.ndarray:
        config = self.model.config.get_text_config()
        own = config.pad_token_id
        config.pad_token_id = padding if len(ids) > 1 else own
        try:
            logits = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        finally:
            config.pad_token_id = own
        return logits[:, 0].float().cpu().numpy().astype(np.float64)


@no_progress_bars()
def _load(model: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    """The classifier in evaluation mode; refuses one whose head would be random."""
    classifier, loading = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(f"{model} is not a trained reward model: it lacks weights {sorted(loading['missing_keys'])}")
    if classifier.config.num_labels != 1:
        raise ValueError(f"{model}: expected a classifier with 1 output, got {classifier.config.num_labels}")
    return classifier.eval()


def _token_limit(tokenizer: Any, config: Any) -> int:
    # A tokenizer without a limit of its own reports a huge number.
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 2**31)


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows sorted from long to short, cut so that (rows x longest) stays within the budget of tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")
