"""Makes a pool for `duel/Pool-v0` of any data with several scored responses a prompt: `llm-duel pool build`."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModel, AutoTokenizer

from llm_duel_env import ranks
from llm_duel_env.oracles.reward_model import batches_of
from llm_duel_env.pretrained import loading
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.tasks.pool_files import Columns, PoolRow, cut, read_rows, whole, write_pool
from llm_duel_env.tasks.prompt_files import load_rows

Embed = Callable[[Sequence[str]], np.ndarray]
"""(T,) texts -> (T, D)."""
BATCH_TOKENS = 8192
"""Tokens of a forward pass, padding included."""


def build_pool(
    source: str,
    out: Path,
    columns: Columns,
    *,
    encoder: str | None = None,
    embeddings: Path | None = None,
    candidates: int | None = None,
    max_tokens: int = 256,
    split: str = "train",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Reads, checks, cleans, cuts to K responses a prompt, embeds, and writes a pool; returns what pool.json tells.

    Args:
        source: a JSONL (or .jsonl.gz) or parquet file, or a data set on the hub.
        out: the folder to write. One that holds a pool of the same texts and encoder keeps its embeddings.
        columns: where what stands.
        encoder: folder or hub name of a transformers encoder; texts are the unit mean of its last hidden states.
        embeddings: a .npz file made beforehand instead, with ``prompt`` (R, D) and ``response`` (R, at least the most
            responses of a row, D) in the order of the data's R rows.
        candidates: K; None takes the K for which most responses are kept.
        max_tokens: longer texts are cut before they are embedded.
        split: of a data set on the hub.
        seed: draws which K responses of a prompt are kept.
        say: takes lines of progress.

    Raises:
        ValueError: a malformed row (which is named), neither or both of encoder and embeddings, embeddings that do not
            fit; nothing is written then.
    """
    if (encoder is None) == (embeddings is None):
        raise ValueError("expected one of encoder and embeddings")
    given = None if embeddings is None else _opened(embeddings)
    rows, left = read_rows(load_rows(source, split), columns, source)
    rows, left = cut(rows, candidates, left, seed)
    say(f"{len(rows)} prompts with {len(rows[0].responses)} responses each; left out: {_told(asdict(left))}")
    if embeddings is not None and given is not None:
        prompt, response = _given(embeddings, *given, rows)
        maker: dict[str, Any] = {"embeddings": embeddings.name}
    else:
        assert encoder is not None
        maker = {"encoder": encoder, "max_tokens": max_tokens}
        prompt, response = _embedded(out, rows, maker, say)
    facts = {"source": Path(source).name, "columns": asdict(columns), "seed": seed, "left_out": asdict(left)}
    return write_pool(out, rows, prompt, response, facts | maker | {"texts": texts_digest(rows, maker)})


def encode(encoder: str, max_tokens: int) -> Embed:
    """Embeds texts with a transformers encoder: the mean of its last hidden states over a text's tokens, unit length.

    Raises:
        ValueError: there is no such model.
    """
    device = torch.device(ranks.device())
    with loading(encoder, "encoder"), no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        model: Any = AutoModel.from_pretrained(
            encoder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    model = model.to(device).eval()
    padding = tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] or [padding] for text in texts]
        found = np.empty((len(ids), int(model.config.hidden_size)), np.float32)
        for batch in batches_of([len(row) for row in ids], BATCH_TOKENS):
            width = max(len(ids[i]) for i in batch)
            rows = torch.tensor([ids[i] + [padding] * (width - len(ids[i])) for i in batch], device=device)
            inside = torch.arange(width, device=device) < torch.tensor([[len(ids[i])] for i in batch], device=device)
            states = model(input_ids=rows, attention_mask=inside.long()).last_hidden_state.float()
            mean = (states * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
            found[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return found

    return embed


def texts_digest(rows: Sequence[PoolRow], maker: dict[str, Any]) -> str:
    """SHA-256 of what embeddings depend on: the texts, and what made them."""
    told = [maker, *([row.prompt, *row.responses] for row in rows)]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()


def _embedded(
    out: Path, rows: Sequence[PoolRow], maker: dict[str, Any], say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    if whole(out) and json.loads((out / "pool.json").read_text()).get("texts") == texts_digest(rows, maker):
        say(f"embeddings: those of {out}, whose texts are the same")
        arrays = load_file(out / "embeddings.safetensors")
        return arrays["prompt"], arrays["response"]
    embed = encode(maker["encoder"], maker["max_tokens"])
    prompt = embed([row.prompt for row in rows])
    response = np.empty((len(rows), len(rows[0].responses), prompt.shape[1]), np.float32)
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        texts = [text for row in part for text in row.responses]
        response[start : start + len(part)] = embed(texts).reshape(len(part), *response.shape[1:])
        say(f"embedded {start + len(part)} of {len(rows)} prompts")
    return prompt, response


def _opened(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a .npz file: before the data are read, which may take long."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a .npz file, got {'another' if path.exists() else 'none'}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            found = {name: arrays[name] for name in ("prompt", "response") if name in names}
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged, or no arrays of numbers: {error}") from None
    if not {"prompt", "response"} <= names:
        raise ValueError(f"{path}: expected arrays prompt and response, got {sorted(names)}")
    for name, array in found.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{path}, {name}: expected real numbers, got {array.dtype}")
    return found["prompt"], found["response"]


def _given(
    path: Path, prompt: np.ndarray, response: np.ndarray, rows: Sequence[PoolRow]
) -> tuple[np.ndarray, np.ndarray]:
    needed = (max(row.number for row in rows), max(int(row.place.max()) for row in rows) + 1)
    if prompt.ndim != 2 or response.ndim != 3 or prompt.shape[1] != response.shape[2]:
        raise ValueError(f"{path}: expected (R, D) and (R, K, D), got {prompt.shape} and {response.shape}")
    if len(prompt) < needed[0] or response.shape[0] != len(prompt) or response.shape[1] < needed[1]:
        raise ValueError(f"{path}: expected at least {needed} rows and responses, got {response.shape[:2]}")
    numbers = np.array([row.number - 1 for row in rows])
    return prompt[numbers], np.stack([response[row.number - 1, row.place] for row in rows])


def _told(left: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in left.items() if count) or "nothing"
