"""Seconds per stage of a SEA round, beside two things measured in the same process. `make bench-speed`.

The arithmetic floor: the round's floating-point operations over this machine's own float32 matmul rate. The plain
implementation: what one writes first, Hugging Face `generate(num_return_sequences=N)`, one-row embedding, features
repeated for every head, the variance of all pairs. Both sides get the same prompts, model, limits and threads; each
stage is timed in turn, plain and ours alternating, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from llm_duel_env.agents.sea import SEA
from llm_duel_env.tasks import make_task
from llm_duel_env.types import Candidates, Preferences


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(repeats: int, **sides: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each side, the sides taking turns so that a slow minute hits all of them."""
    for work in sides.values():
        work()  # warm up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            times[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate() -> float:
    """This machine's float32 matmul rate, FLOP/s: the best of several square products."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    return 2 * 1024**3 / min(seconds(lambda: a @ b) for _ in range(20))


def shaped_rate(batch: int, rows: int, inner: int, columns: int) -> float:
    """The rate of a batch of small products, FLOP/s: what the ensemble's shapes allow, whoever multiplies them."""
    a, b = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
    a @ b
    return 2 * a.numel() * columns / statistics.median(seconds(lambda: a @ b) for _ in range(20))


def show_profile(work: Callable[[], object]) -> None:
    """Where the time of one call goes, by operator: torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in one call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# --- the plain implementation ---------------------------------------------------------------------------------------


@torch.no_grad()
def plain_sample(model, tokenizer, prompts: list[str], n: int, new_tokens: int) -> torch.Tensor:
    """`generate` with N returned sequences per prompt."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
        num_return_sequences=n, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


@torch.no_grad()
def plain_embed(model, tokenizer, candidates: Candidates) -> torch.Tensor:
    """One row at a time: prompt and response through the model, the mean of the response's last hidden states."""
    rows = []
    for m, prompt in enumerate(candidates.observation["prompt"]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
        for n in range(candidates.shape[1]):
            response = torch.from_numpy(candidates.tokens[m, n, : candidates.lengths[m, n]])
            hidden = model.model(torch.cat([ids, response])[None]).last_hidden_state[0, len(ids) :]
            rows.append(torch.cat([hidden.mean(0), hidden[-1]]))
    return torch.stack(rows).view(*candidates.shape, -1)


def plain_learn(model, reference, optimizer, tokenizer, pair: Candidates, beta: float = 0.1) -> None:
    """One DPO step: every row is its prompt and response, padded to the longest, logits everywhere."""
    prompt_ids = [tokenizer(p).input_ids for p in pair.observation["prompt"] for _ in range(2)]
    tokens, lengths = pair.tokens.reshape(-1, pair.tokens.shape[-1]), pair.lengths.ravel()
    rows = [p + t[:n].tolist() for p, t, n in zip(prompt_ids, tokens, lengths)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    starts = torch.tensor([len(p) for p in prompt_ids])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    at = torch.arange(width)
    mask, response = (at < ends).long(), ((at >= starts) & (at < ends))[:, 1:]

    def score(net):
        logits = net(input_ids=ids, attention_mask=mask).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (picked * response).sum(1)

    with torch.no_grad():
        ratio = -score(reference)
    ratio = ratio + score(model)
    loss = -torch.nn.functional.logsigmoid(beta * (ratio[0::2] - ratio[1::2])).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class PlainEnsemble:
    """E heads as one stacked computation whose input is the features copied E times, as released code does it."""

    def __init__(self, size: int, heads: int, hidden: int, learning_rate: float) -> None:
        shapes = [(size, hidden), (hidden, hidden), (hidden, 1)]
        self.weights = [torch.randn(heads, i, o).div_(2 * i**0.5).requires_grad_() for i, o in shapes]
        self.biases = [torch.zeros(heads, 1, o, requires_grad=True) for _, o in shapes]
        self.initial = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=learning_rate)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (E, B)."""
        x = features.unsqueeze(0).repeat(len(self.weights[0]), 1, 1)
        for layer, (w, b) in enumerate(zip(self.weights, self.biases)):
            x = torch.bmm(x, w) + b
            x = torch.relu(x) if layer < 2 else x
        return x.squeeze(-1)

    @torch.no_grad()
    def select(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Thompson's first and the most uncertain rival from all (E, M, N, N) differences."""
        m, n, d = features.shape
        rewards = self(features.view(m * n, d)).view(-1, m, n)
        first = rewards[torch.randint(len(rewards), (m,)), torch.arange(m)].argmax(-1)
        variance = torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).var(0)
        return first, variance[torch.arange(m), first].argmax(-1)

    def learn(self, pairs: torch.Tensor, steps: int) -> None:
        """`steps` Adam steps on (B, 2, D) winner-loser features."""
        for _ in range(steps):
            margin = self(pairs[:, 0]) - self(pairs[:, 1])
            anchor = sum((w - i).square().sum() for w, i in zip(self.weights, self.initial))
            loss = -torch.nn.functional.logsigmoid(margin).mean(1).sum() + 0.5 / len(pairs) * anchor
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


# --- the two worlds ---------------------------------------------------------------------------------------------------


def agent_on(task, overrides: dict, warm_rounds: int, prompts: int) -> tuple[SEA, dict]:
    """A SEA agent after some rounds on a task (so that its ensemble has duels to learn from), and the next prompts."""
    agent = SEA(task.view(), SEA.configure(overrides), seed=0, budget=10_000)
    for number in range(warm_rounds):
        play_round(agent, task, task.observe(np.arange(number * prompts, (number + 1) * prompts)))
    return agent, task.observe(np.arange(warm_rounds * prompts, (warm_rounds + 1) * prompts))


def play_round(agent: SEA, task, observation) -> None:
    """One whole round: act, the oracle's answer, update."""
    duels = agent.act(observation)
    first, second = duels.pair.responses.T
    wins = task.oracle.win_probability(observation, first, second)
    preference = np.where(wins > 0.5, 1.0, np.where(wins < 0.5, 0.0, 0.5))
    agent.update(duels.judged(np.where(duels.query, preference, np.nan)))


def tiny_tldr(repeats: int, profile: bool = False) -> tuple[list[dict], dict]:
    """TinyTLDR, M = 32 prompts, N = 20 candidates, up to 28 new tokens."""
    m, n = 32, 20
    task = make_task("tiny_tldr")
    overrides = {"candidates": n, "policy.learning_rate": 1e-4, "policy.temperature": 1.0, "reward_model.start": 32}
    agent, observation = agent_on(task, overrides, warm_rounds=6, prompts=m)
    policy, tokenizer = agent.policy, agent.policy.tokenizer
    model = transformers.AutoModelForCausalLM.from_pretrained(task.view().model, dtype=torch.float32).eval()
    trained = transformers.AutoModelForCausalLM.from_pretrained(task.view().model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    prompts, limit = list(observation["prompt"]), task.view().max_new_tokens
    candidates = policy.sample(observation, n, ("speed",))
    features = policy.embed(candidates)
    pair = candidates.take(np.tile([0, 1], (m, 1)))
    labels = Preferences(pair, np.ones(m, np.float32), np.ones(m, bool))
    plain_ensemble = PlainEnsemble(features.shape[-1], 20, 128, 1e-3)
    pairs = features[:, :2].repeat(4, 1, 1)  # 128 duels: a minibatch
    counted = {"ours": 0, "plain": 0, "calls": 0}

    def sample() -> None:
        counted["calls"] += 1
        drawn = policy.sample(observation, n, ("speed", counted["calls"]))
        counted["ours"] += int(drawn.lengths.sum())

    def sample_plain() -> None:
        out = plain_sample(model, tokenizer, prompts, n, limit)
        width = out.shape[1] - tokenizer(prompts, padding=True, return_tensors="pt").input_ids.shape[1]
        counted["plain"] += int((out[:, -width:] != tokenizer.pad_token_id).sum())

    def erm() -> None:
        rewards = agent.reward_model(features)
        agent.choose(rewards, torch.arange(n).expand(m, n), observation)
        agent.reward_model.update(features[:, :2], ("speed",))

    def erm_plain() -> None:
        plain_ensemble.select(features)
        plain_ensemble.learn(pairs, agent.config.reward_model.steps)

    def learn() -> None:
        policy.update(agent.optimizer, labels, progress=0.5, key=("speed",))

    def learn_plain() -> None:
        plain_learn(trained, model, optimizer, tokenizer, pair)

    def whole_plain() -> None:
        sample_plain()
        plain_embed(model, tokenizer, candidates)
        erm_plain()
        learn_plain()

    rate = matmul_rate()
    if profile:
        for name, work in (("sampling", sample), ("the ensemble, select and learn", erm)):
            print(f"TinyTLDR, {name}:")
            show_profile(work)
    rows = []
    for name, ours, plain in (
        ("sample", sample, sample_plain),
        ("embed", lambda: policy.embed(candidates), lambda: plain_embed(model, tokenizer, candidates)),
        ("ERM select + learn", erm, erm_plain),
        ("policy learn", learn, learn_plain),
        ("whole round", lambda: play_round(agent, task, observation), whole_plain),
    ):
        counted.update(ours=0, plain=0)
        times = alternate(repeats, ours=ours, plain=plain)
        row = {"stage": name, **times, "floor": flops(ours) / rate, "ratio": times["plain"] / times["ours"]}
        if name == "sample":
            calls = repeats + 1  # and one more that counts operations
            row["tokens_per_second"] = counted["ours"] / (calls + 1) / times["ours"]
            row["plain_tokens_per_second"] = counted["plain"] / calls / times["plain"]
            row["ratio"] = row["tokens_per_second"] / row["plain_tokens_per_second"]
        rows.append(row)
    parameters = sum(p.numel() for p in policy.model.parameters())
    return rows, {
        "task": "TinyTLDR",
        "M": m,
        "N": n,
        "E": 20,
        "T": limit,
        "policy_parameters": parameters,
        "rate": rate,
        "ensemble_rate": shaped_rate(20, 256, 128, 128),
    }


def synthetic(repeats: int, profile: bool = False) -> tuple[list[dict], dict]:
    """Synthetic, M = 64 prompts, N = 20 candidates of K = 512, E = 20 members."""
    m, n, k = 64, 20, 512
    task = make_task("synthetic", candidates=k, train_prompts=1024)
    overrides = {"candidates": n, "policy.learning_rate": 1e-3, "policy.temperature": 1.0}
    agent, observation = agent_on(task, overrides, warm_rounds=6, prompts=m)
    policy = agent.policy
    candidates = policy.sample(observation, n, ("speed",))
    features = policy.embed(candidates)
    labels = Preferences(candidates.take(np.tile([0, 1], (m, 1))), np.ones(m, np.float32), np.ones(m, bool))
    rate = matmul_rate()
    if profile:
        print("Synthetic, five steps of the ensemble:")
        show_profile(lambda: agent.reward_model.update(features[:, :2], ("speed",)))
    rows = []
    for name, ours in (
        ("sample", lambda: policy.sample(observation, n, ("speed",))),
        ("embed", lambda: policy.embed(candidates)),
        ("ERM select", lambda: agent.choose(agent.reward_model(features), torch.arange(n).expand(m, n), observation)),
        ("ERM learn", lambda: agent.reward_model.update(features[:, :2], ("speed",))),
        ("policy learn", lambda: policy.update(agent.optimizer, labels, progress=0.5, key=("speed",))),
        ("whole round", lambda: play_round(agent, task, observation)),
    ):
        times = alternate(repeats * 3, ours=ours)
        floor = flops(ours) / rate
        rows.append({"stage": name, **times, "floor": floor, "over_floor": times["ours"] / floor if floor else None})
    return rows, {
        "task": "Synthetic",
        "M": m,
        "N": n,
        "K": k,
        "E": 20,
        "rate": rate,
        "ensemble_rate": shaped_rate(20, 256, 128, 128),
    }


def show(rows: list[dict], facts: dict) -> None:
    """One table as text."""
    shape = ", ".join(f"{name} {value:,}" for name, value in facts.items() if not (name == "task" or "rate" in name))
    print(f"\n{facts['task']} ({shape}); float32 matmul {facts['rate'] / 1e9:.0f} GFLOP/s, ", end="")
    print(f"20 products of 256 x 128 x 128 (a hidden layer of the ensemble) {facts['ensemble_rate'] / 1e9:.0f}")
    print(f"{'stage':<20}{'seconds':>10}{'floor':>10}{'x floor':>9}{'plain':>10}{'x faster':>10}{'limit':>8}")
    for row in rows:
        over = f"{row['ours'] / row['floor']:.1f}" if row["floor"] else "-"
        plain = f"{row['plain']:.4f}" if "plain" in row else "-"
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else "-"
        limit = f"{row['plain'] / row['floor']:.1f}" if "plain" in row and row["floor"] else "-"
        print(f"{row['stage']:<20}{row['ours']:>10.4f}{row['floor']:>10.4f}{over:>9}{plain:>10}{ratio:>10}{limit:>8}")
        if "tokens_per_second" in row:
            ours, theirs = row["tokens_per_second"], row["plain_tokens_per_second"]
            print(f"{'':<20}{ours:,.0f} tokens/s; plain {theirs:,.0f} tokens/s")


def main() -> None:
    """Measures both worlds, prints the tables, and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each stage and side (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes, by operator")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}; Python {platform.python_version()}, {versions}")
    print("seconds are medians; floor: floating-point operations of the matrix products / float32 matmul rate;")
    print("limit: plain / floor, how much faster the same arithmetic could be at that rate and with nothing beside it")
    worlds = [world(arguments.repeats, arguments.profile) for world in (tiny_tldr, synthetic)]
    for rows, facts in worlds:
        show(rows, facts)
    if arguments.json:
        arguments.json.write_text(json.dumps([{**facts, "rows": rows} for rows, facts in worlds], indent=1))


if __name__ == "__main__":
    main()
