"""Tokens per second of the torch sampler and of vLLM, in one process, on TinyTLDR's policy. `make bench-vllm`.

Every repetition has prompts that neither sampler has seen, and both draw for the same ones, in turn. Token ids only: no
text is made of them. Thread count, dtype (float32), temperature and limits are the same. vLLM counts log-probs in.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.samplers.base import Sampler, numbered
from llm_duel_env.agents.policies.samplers.vllm_sampler import versions
from llm_duel_env.tasks import make_task


def rate(sampler: Sampler, policy: LanguageModelPolicy, ids: np.ndarray, n: int) -> tuple[float, float]:
    """(tokens per second, mean length) of one draw."""
    prompts = policy.tokens.prompts(policy.task.observe(ids)["prompt"])
    start = time.perf_counter()
    sampled = sampler.sample(prompts, numbered(ids), (0, "speed", int(ids[0])), n=n, temperature=1.0)
    return sampled.lengths.sum() / (time.perf_counter() - start), float(sampled.lengths.mean())


def push_seconds(policy: LanguageModelPolicy, repeats: int) -> float:
    """Median seconds of a push, with the draw of one short response that makes it happen taken off."""
    assert policy.vllm is not None
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for stale in (True, False):
            if stale:
                policy.vllm.invalidate()
            start = time.perf_counter()
            policy.vllm.sample([(1,)], np.zeros((1, 2), np.int64), None, n=1)
            times[stale].append(time.perf_counter() - start)
    return statistics.median(times[True]) - statistics.median(times[False])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="draws of each sampler")
    parser.add_argument("--prompts", type=int, default=32, help="M")
    parser.add_argument("--samples", type=int, default=20, help="N")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = LanguageModelPolicy(make_task("tiny_tldr").view(), PolicyConfig(sampler="vllm"), seed=0, device="cpu")
    assert policy.vllm is not None
    samplers: dict[str, Sampler] = {"torch": policy._sampler(policy.reference, 0.0), "vllm": policy.vllm}
    batches = np.arange((args.repeats + 1) * args.prompts).reshape(args.repeats + 1, args.prompts)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
    for number, ids in enumerate(batches):
        for name, sampler in samplers.items():
            measured = rate(sampler, policy, ids, args.samples)
            if number:  # the first draw builds the engine
                found[name].append(measured)
    figures = {
        name: {
            "tokens_per_second": statistics.median(r for r, _ in pairs),
            "least": min(r for r, _ in pairs),
            "most": max(r for r, _ in pairs),
            "mean_length": statistics.mean(length for _, length in pairs),
        }
        for name, pairs in found.items()
    }
    push = push_seconds(policy, args.repeats)
    policy.vllm.close()
    print(f"M {args.prompts}, N {args.samples}, up to {policy.tokens.max_new_tokens} tokens, float32, one thread")
    print(f"{versions()}, {platform.machine()}")
    print(f"{'sampler':<10}{'tokens/s':>10}{'least':>10}{'most':>10}{'tokens per response':>22}")
    for name, row in figures.items():
        rates = "".join(f"{row[key]:>10,.0f}" for key in ("tokens_per_second", "least", "most"))
        print(f"{name:<10}{rates}{row['mean_length']:>22.1f}")
    print(f"torch / vllm: {figures['torch']['tokens_per_second'] / figures['vllm']['tokens_per_second']:.2f}")
    print(f"one push of the weights, with its check: {1000 * push:.0f} ms")
    if args.json:
        args.json.write_text(json.dumps({**figures, "push_seconds": push, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
