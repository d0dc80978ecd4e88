"""Builds TinyTLDR's embedded models from nothing: `python -m llm_duel_env.assets.build_tiny_tldr --out DIR --seed 0`.

Two cores, about half an hour. Phase 1 teaches the policy to copy facts with their binding, phase 2 to write random
summaries (the supervised policy); the reward model starts from that policy's body and learns the utility's preferences.
Then everything the README claims is measured and written to `measured.json`. The same seed, machine and thread count
give the same assets.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from llm_duel_env.assets import tiny_supervision as supervision
from llm_duel_env.assets.tiny_measure import measure_policy, measure_reward_model, sample
from llm_duel_env.assets.tiny_models import build_policy, build_tokenizer
from llm_duel_env.assets.tiny_training import train_encoder, train_language_model, train_reward_model
from llm_duel_env.tasks import tiny_language as language

HELDOUT_PROMPTS = 1024
BINDING_STEPS, ENCODER_STEPS, REWARD_STEPS = 300, 500, 900
SUPERVISED = (
    (2, 1100, 1.5e-3, supervision.ALIKE, 0.02),
    (8, 900, 1.2e-3, supervision.ALIKE, 0.02),
    (10, 700, 1.0e-3, supervision.ALIKE, 0.02),
    (11, 1000, 1.2e-3, supervision.MIXED, 0.2),
)
"""The supervised phase in parts, each with a falling rate: number of its random stream, steps, peak rate, the
writers, weight of the prompt's own tokens in the loss. The last part makes the model heed what a post is about."""
REWARD_PROMPTS = 3000


def reward_responses(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int
) -> list[list[str]]:
    """For each prompt, the responses that the reward model learns from: sampled, conditioned, edited, near the best."""
    rng = random.Random(seed)
    plain = sample(policy, tokenizer, prompts, 8, seed + 1)
    good = sample(policy, tokenizer, [language.with_control(p, "<good>") for p in prompts], 3, seed + 2)
    bad = sample(policy, tokenizer, [language.with_control(p, "<bad>") for p in prompts], 1, seed + 3)
    responses = []
    for k, prompt in enumerate(prompts):
        best = language.optimum(prompt)[0]
        made = [best, *(supervision.near_optimum(rng, prompt) for _ in range(6))]
        made += [language.edit(prompt, plain[k][0], plain[k][1]), language.degrade(prompt, best, rng.randrange(1, 5))]
        made += [language.degrade(prompt, good[k][0], rng.randrange(1, 5)), supervision.random_summary(rng, prompt)]
        responses.append(list(dict.fromkeys([*plain[k], *good[k], *bad[k], *made])))
    return responses


def write_references(
    out: Path,
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    posts: Sequence[str],
    heldout: Sequence[str],
    seed: int,
) -> None:
    """Stores one sample of the supervised policy for each held-out and each training prompt."""
    references = [texts[0] for texts in sample(policy, tokenizer, heldout, 1, seed + 3)]
    with (out / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for k, (prompt, reference) in enumerate(zip(heldout, references, strict=True)):
            file.write(json.dumps({"prompt_id": k, "prompt": prompt, "reference": reference}) + "\n")
    references = [texts[0] for texts in sample(policy, tokenizer, posts, 1, seed + 9)]
    with (out / "references_train.jsonl").open("w", encoding="utf-8") as file:
        for k, reference in enumerate(references):  # the prompts themselves are generated from their numbers
            file.write(json.dumps({"prompt_id": k, "reference": reference}) + "\n")


def train_policy(out: Path, seed: int, effort: float) -> None:
    """Trains the supervised policy and stores it with its reference responses."""
    torch.manual_seed(seed)  # the initial weights; everything else draws from its own generator
    tokenizer = build_tokenizer()
    words = tokenizer.get_vocab()
    posts, heldout = prompts_of_both_splits()
    policy = build_policy(len(tokenizer))
    train_language_model(
        policy, words, lambda rng, prompt: (prompt, supervision.all_facts(rng, prompt)), posts,
        int(effort * BINDING_STEPS), 1.5e-3, random.Random(seed + 1), "binding", 0.5, 0.02,
    )  # fmt: skip
    bound = measure_policy(policy, tokenizer, heldout[:16], seed)["stated_facts_in_post"]
    print(f"after the binding phase {bound:.3f} of the facts stated are in the post", flush=True)
    for part, steps, rate, writers, prompt_weight in SUPERVISED:
        train_language_model(
            policy, words, functools.partial(supervision.supervised_row, writers=writers), posts,
            int(effort * steps), rate, random.Random(seed + part), "supervised", 0.02, prompt_weight,
        )  # fmt: skip
    policy.save_pretrained(out / "policy")
    tokenizer.save_pretrained(out / "policy")
    write_references(out, policy, tokenizer, posts, heldout, seed)


def train_encoder_and_reward_model(out: Path, seed: int, effort: float) -> None:
    """Trains both from the stored policy's body, on the same responses, and stores them."""
    policy, tokenizer = LlamaForCausalLM.from_pretrained(out / "policy").eval(), build_tokenizer()
    words = tokenizer.get_vocab()
    prompts = prompts_of_both_splits()[0][: int(min(1.0, 4 * effort) * REWARD_PROMPTS)]
    responses = reward_responses(policy, tokenizer, prompts, seed + 5)
    torch.manual_seed(seed + 8)  # the readout's and the score's initial weights
    encoder = copy.deepcopy(policy)
    train_encoder(encoder, words, prompts, responses, int(effort * ENCODER_STEPS), 1e-3, random.Random(seed + 12))
    encoder.save_pretrained(out / "encoder")
    tokenizer.save_pretrained(out / "encoder")
    reward_config = LlamaConfig(**policy.config.to_dict())
    reward_config.num_labels = 1
    reward_model = LlamaForSequenceClassification(reward_config)
    reward_model.model.load_state_dict(policy.model.state_dict())
    train_reward_model(
        reward_model, words, prompts, responses, int(effort * REWARD_STEPS), 1e-3, random.Random(seed + 6)
    )
    reward_model.save_pretrained(out / "reward_model")
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(out / "reward_model")


def prompts_of_both_splits() -> tuple[list[str], list[str]]:
    """Training and held-out prompts, which share none."""
    posts = [language.train_prompt(k) for k in range(language.TRAIN_PROMPTS)]
    heldout = [language.heldout_prompt(k) for k in range(HELDOUT_PROMPTS)]
    if set(posts) & set(heldout):
        raise RuntimeError("expected held-out prompts that are not training prompts, got a shared one")
    return posts, heldout


def measure(out: Path, seed: int) -> dict[str, float]:
    """Measures what the assets' README claims, and writes `measured.json`."""
    policy, tokenizer = LlamaForCausalLM.from_pretrained(out / "policy").eval(), build_tokenizer()
    reward_model = LlamaForSequenceClassification.from_pretrained(out / "reward_model").eval()
    heldout = prompts_of_both_splits()[1]
    measured = measure_policy(policy, tokenizer, heldout[:256], seed + 4)
    measured |= measure_reward_model(policy, reward_model, tokenizer, heldout[:256], seed + 7)
    measured |= {
        "policy_parameters": sum(p.numel() for p in policy.parameters()),
        "reward_model_parameters": sum(p.numel() for p in reward_model.parameters()),
        "vocabulary": len(tokenizer),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
    (out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1), flush=True)
    return measured


def build(out: Path, seed: int, effort: float = 1.0, keep_policy: bool = False) -> dict[str, float]:
    """Builds and measures all assets in `out`.

    Args:
        out: folder for them.
        seed: the same seed, machine and thread count give the same assets.
        effort: scales the training steps (below 1 for a trial).
        keep_policy: go on from the policy and the references that are there.
    """
    began = time.time()
    out.mkdir(parents=True, exist_ok=True)
    if not keep_policy:
        train_policy(out, seed, effort)
        print(f"policy saved after {time.time() - began:.0f} s", flush=True)
    train_encoder_and_reward_model(out, seed, effort)
    measured = measure(out, seed)
    print(f"built in {time.time() - began:.0f} s", flush=True)
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build TinyTLDR's embedded models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", type=float, default=1.0, help="scales the training steps, below 1 for a trial")
    parser.add_argument("--keep-policy", action="store_true", help="go on from the policy that is in the folder")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    build(options.out, options.seed, options.effort, options.keep_policy)


if __name__ == "__main__":
    main()
