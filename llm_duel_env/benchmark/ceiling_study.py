"""How far a policy could get that is told everything: `python -m llm_duel_env.benchmark.ceiling_study duel/Pool-v0`.

On a finite task the policy of the agents is trained on the utility of every candidate of every training prompt, which
no agent sees, and its greedy responses are measured as theirs are. Where agents end near that, what holds them is the
features and the number of prompts, and not the labels they bought. Two losses: a candidate's expected win rate against
the prompt's others, by its exact gradient; and Bradley-Terry's likelihood of all pairs. The best figure is over passes
and learning rates, chosen on the held-out prompts themselves: an upper bound of what this training finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.report.table import markdown_table
from llm_duel_env.benchmark.run_config import task_of
from llm_duel_env.metrics import beats_reference, hard
from llm_duel_env.randomness import generator
from llm_duel_env.types import Observation

AGENT = "online_dpo"
"""Whose policy is taught; on a finite task all agents have the same."""
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
BATCH = 64
MOST_PROMPTS = 2048
"""Training prompts and held-out prompts that are looked at, at most."""


def gaps(utility: Tensor) -> Tensor:
    """u_i - u_j of each prompt's candidates: (M, K) -> (M, K, K)."""
    assert utility.ndim == 2
    return utility[:, :, None] - utility[:, None, :]


def expected_wins(scores: Tensor, utility: Tensor) -> Tensor:
    """One less the mean win rate of a response drawn from softmax(scores) against the prompt's candidates; both (M, K).

    Ties are half a win.
    """
    wins = ((gaps(utility).sign() + 1) / 2).mean(dim=2)  # (M, K)
    return 1 - (scores.softmax(dim=1) * wins).sum(dim=1).mean()


def all_pairs(scores: Tensor, utility: Tensor) -> Tensor:
    """The negative log-likelihood of the oracle's preferences between all pairs under the scores, both (M, K)."""
    return -(gaps(utility).sigmoid() * logsigmoid(gaps(scores))).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"expected wins": expected_wins, "all pairs": all_pairs}


def taught(task: Any, loss: Callable[[Tensor, Tensor], Tensor], learning_rate: float, passes: int) -> np.ndarray:
    """The held-out offline win rate after each pass over the training prompts: (passes,)."""
    agent = load_agent(AGENT)
    policy: Any = agent(task.view(), agent.configure({}), seed=0, budget=1).policy
    optimizer = torch.optim.AdamW(policy.scorer.parameters(), lr=learning_rate, weight_decay=0.0)
    train = np.arange(min(task.train_prompts, MOST_PROMPTS))
    heldout = task.observe(task.heldout_ids[:MOST_PROMPTS])
    found = []
    for number in range(passes):
        order = generator(0, "ceiling study", number).permutation(train)
        for ids in np.split(order, range(BATCH, len(order), BATCH)):
            observation = task.observe(ids)
            context, candidates = (torch.from_numpy(observation[name]) for name in ("context", "candidates"))
            optimizer.zero_grad()
            loss(policy.scorer(context, candidates), utilities(task, observation)).backward()
            optimizer.step()
        greedy = policy.greedy(heldout).responses[:, 0]
        found.append(float(hard(beats_reference(task, heldout, greedy)).mean()))
    return np.array(found)


def utilities(task: Any, observation: Observation) -> Tensor:
    """The utility of every candidate, in the logits of the oracle: (M, K) float32."""
    rows = len(observation["prompt_id"])
    columns = [task.utility(observation, np.full(rows, k)) for k in range(observation["candidates"].shape[1])]
    return torch.from_numpy(task.oracle_scale * np.column_stack(columns)).float()


def report(tasks: Sequence[Any], passes: int) -> list[str]:
    """Lines of Markdown: for each loss the means over the tasks (folds, or worlds)."""
    rows = []
    for name, loss in LOSSES.items():
        curves = np.array([[taught(task, loss, rate, passes) for rate in LEARNING_RATES] for task in tasks])
        last = curves[:, :, -1].mean(axis=0)  # (rates,)
        best = curves.max(axis=(1, 2))  # (tasks,)
        rows.append([name, *(f"{value:.3f}" for value in last), f"{best.mean():.3f}", _each(best)])
    headings = ["trained on", *(f"end at {rate:g}" for rate in LEARNING_RATES), "best", "best of each"]
    about = f"{passes} passes over {min(tasks[0].train_prompts, MOST_PROMPTS)} training prompts; {len(tasks)} task(s)."
    return [*markdown_table(headings, rows), "", about]


def _each(values: np.ndarray) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def main(env: tyro.conf.Positional[str], env_kwargs: str = "{}", seeds: int = 5, passes: int = 60) -> None:
    """Prints the table.

    Args:
        env: a finite environment; duel/Pool-v0 takes the pool that LLM_DUEL_POOL names, one fold for each seed.
        env_kwargs: its settings as JSON; by default, on a pool, a fold for each seed.
        seeds: how many runs' tasks are looked at, from seed 0.
        passes: passes over the training prompts.
    """
    told = json.loads(env_kwargs) or ({"task_kwargs": {"fold": "by_seed"}} if env == "duel/Pool-v0" else {})
    print("\n".join(report([task_of(env, told, seed) for seed in range(seeds)], passes)))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
