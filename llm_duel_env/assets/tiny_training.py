"""How TinyTLDR's policy, encoder and reward model are trained: loops and losses."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from llm_duel_env.assets.tiny_models import BOS, EOS, PAD, SPECIAL
from llm_duel_env.tasks import tiny_language as language

BATCH = 64
GROUP, GROUPS = 8, 16
"""Responses of one prompt that meet in the reward model's loss (all pairs), and prompts in its batch."""


def optimise(
    model: torch.nn.Module,
    steps: int,
    rate: float,
    loss_of_batch: Callable[[int], Tensor],
    name: str,
    final: float = 0.02,
) -> None:
    """AdamW with a short warm-up and a cosine down to `final` of the rate; prints the mean loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    began, running = time.time(), 0.0
    for step in range(steps):
        scale = min(1.0, (step + 1) / 50) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        loss = loss_of_batch(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps} loss {running / 100:.4f} {time.time() - began:.0f} s", flush=True)
            running = 0.0
    model.eval()


def train_language_model(
    model: LlamaForCausalLM,
    words: dict[str, int],
    make_row: Callable[[random.Random, str], tuple[str, str]],
    posts: Sequence[str],
    steps: int,
    rate: float,
    rng: random.Random,
    name: str,
    final: float,
    prompt_weight: float,
) -> None:
    """Next-token training on rows (prompt, response), the prompt's own tokens weighted by `prompt_weight`."""
    pool: list[list[tuple[list[int], int]]] = []
    heard: list[float] = []  # the responses' own loss

    def loss_of_batch(step: int) -> Tensor:
        if not pool:  # rows of 8 batches are sorted by length, so that little of a batch is padding
            rows = []
            for _ in range(8 * BATCH):
                prompt, response = make_row(rng, rng.choice(posts))
                start = [BOS, *(words[word] for word in prompt.split())]
                rows.append(([*start, *(words[word] for word in response.split()), EOS], len(start)))
            rows.sort(key=lambda row: len(row[0]))
            pool.extend(rows[k : k + BATCH] for k in range(0, len(rows), BATCH))
            rng.shuffle(pool)
        batch = pool.pop()
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in batch])
        weights = torch.tensor(
            [[prompt_weight] * (n - 1) + [1.0] * (len(row) - n) + [0.0] * (width - len(row)) for row, n in batch]
        )
        # Padding stands on the right of a causal model: no mask is needed, the loss ignores it.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        chosen = weights.flatten() == 1.0
        heard.append(losses.detach()[chosen].mean().item())
        if len(heard) % 100 == 0:
            print(f"{name}: nats per response token {sum(heard[-50:]) / 50:.4f}", flush=True)
        return (losses * weights.flatten()).sum() / chosen.sum()

    optimise(model, steps, rate, loss_of_batch, name, final)


@dataclass(frozen=True)
class Packed:
    """GROUPS prompts with GROUP responses each, packed so that responses share one copy of their prompt.

    Responses stand side by side in one row; each sees the prompt and itself only, and counts positions from the
    prompt's end, so that its hidden states are the ones that the response alone would get.
    """

    texts: list[tuple[str, list[str]]]
    """Each prompt with its responses."""
    ids: Tensor
    positions: Tensor
    owner: Tensor
    """0 the prompt, 1 .. GROUP a response, -1 padding; as `ids` (GROUPS, width)."""
    ends: Tensor
    """(GROUPS, GROUP): where each response's EOS stands."""

    def hidden(self, body: LlamaModel) -> Tensor:
        """Last hidden states, (GROUPS, width, H)."""
        width = self.ids.shape[1]
        same = self.owner[:, :, None] == self.owner[:, None, :]
        visible = (same | (self.owner[:, None, :] == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
        return body(input_ids=self.ids, attention_mask=mask, position_ids=self.positions, use_cache=False)[0]


def pack(
    words: dict[str, int], prompts: Sequence[str], responses: Sequence[Sequence[str]], rng: random.Random
) -> Packed:
    """GROUPS random prompts with GROUP random responses to each."""
    unknown = SPECIAL.index("<unk>")
    texts, rows = [], []
    for _ in range(GROUPS):
        k = rng.randrange(len(prompts))
        chosen = rng.sample(responses[k], min(GROUP, len(responses[k])))
        chosen += [chosen[0]] * (GROUP - len(chosen))
        texts.append((prompts[k], chosen))
        pieces = [[BOS, *(words.get(word, unknown) for word in prompts[k].split())]]
        rows.append(pieces + [[*(words.get(word, unknown) for word in text.split()), EOS] for text in chosen])
    width = max(sum(map(len, pieces)) for pieces in rows)
    ids = torch.full((GROUPS, width), PAD)
    positions = torch.zeros((GROUPS, width), dtype=torch.long)
    owner = torch.full((GROUPS, width), -1)
    ends = torch.zeros((GROUPS, GROUP), dtype=torch.long)
    for r, pieces in enumerate(rows):
        at, start = 0, len(pieces[0])
        for k, piece in enumerate(pieces):
            ids[r, at : at + len(piece)] = torch.tensor(piece)
            first = 0 if k == 0 else start
            positions[r, at : at + len(piece)] = torch.arange(first, first + len(piece))
            owner[r, at : at + len(piece)] = k
            at += len(piece)
            if k:
                ends[r, k - 1] = at - 1
    return Packed(texts, ids, positions, owner, ends)


def train_encoder(
    model: LlamaForCausalLM,
    words: dict[str, int],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    steps: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Teaches a copy of the policy to *describe* a response (`tiny_language.describe`), not to judge it.

    Squared error of a linear readout of the mean hidden state over the response's tokens. The readout is thrown away.
    """
    readout = torch.nn.Linear(model.config.hidden_size, len(language.describe(prompts[0], "")))
    model.readout = readout  # trained along

    def loss_of_batch(step: int) -> Tensor:
        batch = pack(words, prompts, responses, rng)
        hidden = batch.hidden(model.model)
        member = (
            batch.owner[:, None, :] == torch.arange(1, GROUP + 1)[None, :, None]
        ).float()  # (GROUPS, GROUP, width)
        mean = member @ hidden / member.sum(-1, keepdim=True)
        truth = torch.tensor([[language.describe(prompt, text) for text in group] for prompt, group in batch.texts])
        return (readout(mean) - truth).square().mean()

    optimise(model, steps, rate, loss_of_batch, "encoder")
    del model.readout


def train_reward_model(
    model: LlamaForSequenceClassification,
    words: dict[str, int],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    steps: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Bradley-Terry loss over all pairs of a group of responses to one prompt, against the utility's probabilities."""

    def loss_of_batch(step: int) -> Tensor:
        batch = pack(words, prompts, responses, rng)
        hidden = batch.hidden(model.model)
        at_ends = hidden.gather(1, batch.ends[:, :, None].expand(-1, -1, hidden.shape[-1]))
        scores = model.score(at_ends).squeeze(-1)  # (GROUPS, GROUP)
        truth = torch.tensor([[language.utility(prompt, text) for text in group] for prompt, group in batch.texts])
        first, second = torch.triu_indices(GROUP, GROUP, offset=1)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            scores[:, first] - scores[:, second], torch.sigmoid(truth[:, first] - truth[:, second])
        )

    optimise(model, steps, rate, loss_of_batch, "reward model")
