"""Measures what TinyTLDR's README claims: the policy's samples by utility, the reward model on held-out duels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llm_duel_env.tasks import tiny_language as language

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    count: int,
    seed: int,
    temperature: float = 1.0,
    rows: int = 1024,
) -> list[list[str]]:
    """`count` responses per prompt; greedy at temperature 0. A prompt is prefilled once, `rows` sequences at a time."""
    generator = torch.Generator().manual_seed(seed)
    ids_of = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(prompts)), key=lambda k: len(ids_of[k]))  # prompts of one length need no padding
    texts: list[list[str]] = [[] for _ in prompts]
    step = max(1, rows // count)
    at = 0
    while at < len(order):
        chunk = [k for k in order[at : at + step] if len(ids_of[k]) == len(ids_of[order[at]])]
        at += len(chunk)
        output = policy(input_ids=torch.tensor([ids_of[k] for k in chunk]), use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].repeat_interleave(count, 0)
        cache.batch_repeat_interleave(count)
        tokens: list[Tensor] = []
        done = torch.zeros(len(logits), dtype=torch.bool)
        for _ in range(language.MAX_WORDS + 1):
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            token[done] = tokenizer.pad_token_id
            tokens.append(token)
            done |= token == tokenizer.eos_token_id
            if done.all():
                break
            output = policy(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]
        decoded = tokenizer.batch_decode(torch.stack(tokens, 1), skip_special_tokens=True)
        for k, prompt in enumerate(chunk):
            texts[prompt] = decoded[k * count : (k + 1) * count]
    return texts


@torch.no_grad()
def score(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: int = 512,
) -> np.ndarray:
    """(n,) rewards of n (prompt, response) pairs: the model reads tokenizer(prompt + " " + response) and then EOS."""
    ids_of = [
        [*ids, tokenizer.eos_token_id]
        for ids in tokenizer([f"{p} {r}" for p, r in zip(prompts, responses, strict=True)])["input_ids"]
    ]
    order = sorted(range(len(ids_of)), key=lambda k: len(ids_of[k]))
    rewards = np.zeros(len(ids_of))
    for at in range(0, len(order), rows):
        chunk = order[at : at + rows]
        width = max(len(ids_of[k]) for k in chunk)
        ids = torch.tensor([ids_of[k] + [tokenizer.pad_token_id] * (width - len(ids_of[k])) for k in chunk])
        mask = (ids != tokenizer.pad_token_id).long()
        rewards[chunk] = model(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()
    return rewards


def _duels(utilities: np.ndarray, rewards: np.ndarray) -> tuple[int, int, int]:
    """(agreed, with different utility, ties) over disjoint pairs of columns of (M, 2k) arrays."""
    truth = utilities[:, ::2] - utilities[:, 1::2]
    belief = rewards[:, ::2] - rewards[:, 1::2]
    decided = np.abs(truth) > 1e-9
    return int((decided & (truth * belief > 0)).sum()), int(decided.sum()), int((~decided).sum())


def measure_policy(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int
) -> dict[str, float]:
    """The supervised policy at temperature 1, 64 samples per held-out prompt."""
    texts = sample(policy, tokenizer, prompts, 64, seed)
    utilities = np.array([[language.utility(p, t) for t in row] for p, row in zip(prompts, texts, strict=True)])
    best = np.array([language.optimum(p)[1] for p in prompts])
    distinct = np.array([len(set(row[:20])) for row in texts])
    stated = right = 0
    for prompt, row in zip(prompts, texts, strict=True):
        for text in row[:16]:
            for clause in language.read_response(prompt, text):
                stated += clause.stated is not None
                right += clause.fact is not None
    measured = {
        "stated_facts_in_post": right / max(1, stated),
        "facts_per_response": stated / (16 * len(prompts)),
        "words_per_response": float(np.mean([len(t.split()) for row in texts for t in row])),
        "mean_utility": float(utilities.mean()),
        "mean_optimum": float(best.mean()),
        "utility_std_within_prompt": float(utilities.std(1).mean()),
        "best_of_64_reaches_90_percent": float((utilities.max(1) >= 0.9 * best).mean()),
        "mean_best_of_64": float(utilities.max(1).mean()),
        "distinct_of_20": float(distinct.mean()),
        "prompts_with_10_distinct_of_20": float((distinct >= 10).mean()),
        "prompts_measured": len(prompts),
    }
    greedy = sample(policy, tokenizer, prompts, 1, seed, temperature=0.0)
    measured["greedy_utility"] = float(
        np.mean([language.utility(p, t[0]) for p, t in zip(prompts, greedy, strict=True)])
    )
    for token in ("<good>", "<bad>", "<goal_0>", "<goal_5>", "<goal_10>"):
        said = sample(policy, tokenizer, [language.with_control(p, token) for p in prompts], 4, seed + 1)
        values = [language.utility(p, t) for p, row in zip(prompts, said, strict=True) for t in row]
        measured[f"mean_utility_{token.strip('<>')}"] = float(np.mean(values))
    return measured


def measure_reward_model(
    policy: LlamaForCausalLM,
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """Agreement with the utility on held-out duels: of plain samples, of <good> ones, of the best halves of 16."""

    def both(texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        flat = [(p, t) for p, row in zip(prompts, texts, strict=True) for t in row]
        rewards = score(model, tokenizer, [p for p, _ in flat], [t for _, t in flat])
        utilities = np.array([language.utility(p, t) for p, t in flat])
        return utilities.reshape(len(prompts), -1), rewards.reshape(len(prompts), -1)

    utilities, rewards = both(sample(policy, tokenizer, prompts, 16, seed))
    agreed, decided, ties = _duels(utilities, rewards)
    measured = {
        "duel_agreement": agreed / decided,
        "duels_measured": decided,
        "ties": ties,
        "reward_utility_correlation": float(np.corrcoef(utilities.ravel(), rewards.ravel())[0, 1]),
    }
    top = np.argsort(-utilities, axis=1)[:, :8]
    top = top[:, np.random.default_rng(seed).permutation(8)]
    agreed, decided, _ = _duels(np.take_along_axis(utilities, top, 1), np.take_along_axis(rewards, top, 1))
    measured["duel_agreement_top_half"] = agreed / decided
    picked = np.take_along_axis(utilities, rewards.argmax(1)[:, None], 1)
    measured["utility_of_reward_best_of_16"] = float(picked.mean())
    measured["utility_best_of_16"] = float(utilities.max(1).mean())
    good = sample(policy, tokenizer, [language.with_control(p, "<good>") for p in prompts], 8, seed + 1)
    agreed, decided, _ = _duels(*both(good))
    measured["duel_agreement_good"] = agreed / decided
    utilities, rewards = both([[language.optimum(p)[0], row[0]] for p, row in zip(prompts, good, strict=True)])
    agreed, decided, _ = _duels(utilities, rewards)
    measured["optimum_beats_good_sample"] = agreed / decided
    return measured
