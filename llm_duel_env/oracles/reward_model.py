"""An oracle made of a reward model: any sequence classifier with one output, with its own tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llm_duel_env import packing, ranks
from llm_duel_env.adapters import is_adapter, load_merged
from llm_duel_env.oracles import packed_scores
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.packed_scores import Piece
from llm_duel_env.oracles.scored import ScoringOracle, Text, check_template, fill, short
from llm_duel_env.pretrained import loading
from llm_duel_env.quiet import no_progress_bars


class RewardModelOracle(ScoringOracle):
    """P(first beats second) = sigmoid(scale (s(first) - s(second))) for the scores s of a reward model.

    A distinct (prompt, response) is scored once, for as long as the bounded cache remembers it. Scores do not depend on
    what else is in a batch, beyond floating-point rounding, and equal those of the model called on one text at a time.
    A causal model runs what texts of a prompt begin with alike once (`packed_scores`), where it is found to score so.
    With several devices each has a copy of the model and takes the next batch whenever it is free. With several ranks
    each has one, and scores its share.
    """

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
            model: Folder or hub name, with safetensors weights and a tokenizer; or a folder with a peft adapter (and a
                tokenizer), which names its base. No code of the model's is run.
            device: A torch device; "auto" takes a GPU where there is one (a rank its own), "all" every GPU; several,
                which share the work, with commas between: "cuda:0,cuda:1".
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
        super().__init__(scale=scale, cache_size=cache_size)
        for name, number in (("batch_tokens", batch_tokens), ("max_length", max_length)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if text_template is not None:
            check_template(text_template, "prompt", "response")
        devices = choose_devices(device)
        with loading(model, "reward model"):
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.models = [_load(model, choose_dtype(dtype, place)).to(place) for place in devices]
        rough = self.model.dtype != torch.float32
        self.packs = packed_scores.works(self.model, tolerance=0.1 if rough else 1e-3)
        """Whether texts of one prompt are scored in one row: `packed_scores.works`."""
        self._forward = ranks.together(self._forward_here)
        self.batch_tokens = batch_tokens
        self.max_length = max_length or token_limit(self.tokenizer, self.model.config.get_text_config())
        self.text_template = text_template

    @property
    def model(self) -> Any:
        """The model; of several copies the first."""
        return self.models[0]

    def score(self, texts: Sequence[Text]) -> np.ndarray:
        """The model's score of each text: float64 (R,)."""
        groups: dict[str | int, list[int]] = {}
        for number, (prompt, _) in enumerate(texts):
            groups.setdefault(prompt if self.packs else number, []).append(number)
        # Ranks share groups, so the texts of a prompt come to one of them.
        made = self._forward([[self.encode(*texts[number]) for number in group] for group in groups.values()])
        scores = np.empty(len(texts))
        for group, row in zip(groups.values(), made):
            scores[group] = row[: len(group)]
        return scores

    def encode(self, prompt: str, response: str) -> list[int]:
        """The token ids that the model scores for a response."""
        if self.text_template is None and self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them itself
        else:
            text = fill(self.text_template or "{prompt} {response}", prompt=prompt, response=response)
            ids = list(self.tokenizer(text)["input_ids"])
            end = self.tokenizer.eos_token_id
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
        if not ids:
            raise OracleError(f"no tokens in prompt {short(prompt)}, response {short(response)}")
        return ids[-self.max_length :]

    def _forward_here(self, groups: Sequence[list[list[int]]]) -> np.ndarray:
        """The score of each row of token ids of G groups: float64 (G, N), 0 behind a group's end."""
        pieces = self._cut(groups)
        made: list[Any] = [None] * len(pieces)
        free: SimpleQueue[Any] = SimpleQueue()
        for model in self.models:
            free.put(model)

        def carry_out(batch: list[int]) -> None:
            model = free.get()
            try:
                for number, scores in zip(batch, self._score(model, [pieces[number] for number in batch])):
                    made[number] = scores
            finally:
                free.put(model)

        # Apart, since what is alone may be longer than a row that packing is right for.
        alone = [number for number, piece in enumerate(pieces) if len(piece.rows) == 1]
        several = [number for number, piece in enumerate(pieces) if len(piece.rows) > 1]
        budget = self._budget(sum(piece.width for piece in pieces))
        batches = [
            [kind[place] for place in batch]
            for kind in (several, alone)
            for batch in batches_of([pieces[number].width for number in kind], budget)
        ]
        if len(self.models) == 1:
            for batch in batches:
                carry_out(batch)
        else:
            with ThreadPoolExecutor(len(self.models)) as pool:
                list(pool.map(carry_out, batches))  # the list raises what a batch raised
        scores = np.zeros((len(groups), max(map(len, groups), default=0)))
        one_by_one = (score for part in made for score in part)
        for group, row in zip(groups, scores):
            row[: len(group)] = [next(one_by_one) for _ in group]
        self.rows_scored += sum(map(len, groups))
        return scores

    def _budget(self, tokens: int) -> int:
        """The most tokens of a forward pass, where there are so many in all."""
        # No device is left without work because one batch holds it all.
        return min(self.batch_tokens, -(-tokens // len(self.models))) if len(self.models) > 1 else self.batch_tokens

    def _cut(self, groups: Sequence[list[list[int]]]) -> list[Piece]:
        """The rows of all groups in order, in pieces of one where the model does not pack."""
        config = self.model.config.get_text_config()
        widest = 0
        if self.packs:
            widest = min(packing.widest(self.model), self._budget(sum(len(row) for group in groups for row in group)))
        sizes = config.pad_token_id, getattr(config, "hidden_size", 0), widest
        return [piece for group in groups for piece in packed_scores.cut(group, *sizes)]

    def _score(self, model: Any, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """The scores of each piece's rows, float64 (N,), in one call: of pieces of one row, or of several."""
        if len(pieces[0].rows) == 1:
            return list(self._call(model, *self._pad([piece.rows[0] for piece in pieces]))[:, None])
        scores = packed_scores.scores(model, pieces)
        for number, piece in enumerate(pieces):
            # A value that is not finite spreads in a row through the mask. Alone, it stays with the text that it is of.
            if not np.isfinite(scores[number]).all():
                scores[number] = np.concatenate([self._call(model, *self._pad([row])) for row in piece.rows])
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

    @torch.inference_mode()
    def _call(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, padding: int) -> np.ndarray:
        config = model.config.get_text_config()
        own = config.pad_token_id
        config.pad_token_id = padding if len(ids) > 1 else own
        try:
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        finally:
            config.pad_token_id = own
        return logits[:, 0].float().cpu().numpy().astype(np.float64)


@no_progress_bars()
def _load(model: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    """The classifier in evaluation mode, an adapter merged into its base; refuses one whose head would be random."""
    if is_adapter(model):
        return load_merged(model, AutoModelForSequenceClassification, dtype=dtype, num_labels=1)
    classifier, loading = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(f"{model} is not a trained reward model: it lacks weights {sorted(loading['missing_keys'])}")
    if classifier.config.num_labels != 1:
        raise ValueError(f"{model}: expected a classifier with 1 output, got {classifier.config.num_labels}")
    return classifier.eval()


def token_limit(tokenizer: Any, config: Any) -> int:
    """The most tokens that tokenizer and model take."""
    # A tokenizer without a limit of its own reports a huge number.
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 2**31)


def batches_of(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows sorted from long to short, cut so that (rows x longest) stays within the budget of tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def choose_devices(device: str) -> list[torch.device]:
    """The devices that a setting names: one, several with commas between, "auto" or "all".

    >>> choose_devices("cpu")
    [device(type='cpu')]

    Raises:
        ValueError: no device has such a name, or this machine has no such GPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" or (device == "all" and ranks.world() > 1):  # each rank has its own
        device = ranks.device()
    if device == "all":
        device = ",".join(f"cuda:{number}" for number in range(gpus)) if gpus else "cpu"
    try:
        found = [torch.device(name.strip()) for name in device.split(",")]
    except RuntimeError as error:
        raise ValueError(f"device: expected devices like cpu, cuda or cuda:0,cuda:1, got {device!r}") from error
    for place in found:
        if place.type == "cuda" and (place.index or 0) >= gpus:
            raise ValueError(f"device: expected one of the {gpus} GPUs of this machine, got {str(place)!r}")
    return found


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type of weights that a setting names; "auto" is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ValueError: another name.
    """
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    return getattr(torch, dtype)
