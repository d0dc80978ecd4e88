"""What there is, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from llm_duel_env.benchmark.registry import list_agents, list_losses, load_agent
from llm_duel_env.benchmark.run_config import env_spec, list_envs
from llm_duel_env.benchmark.suite import list_suites, load_suite


def agents() -> Table:
    """Agents of all installed packages: paper, provenance, and what they are told beyond duels."""
    table = Table("agent", "paper", "provenance", "told beyond duels", title="agents", title_justify="left")
    for name in list_agents():
        agent = load_agent(name)
        # An arXiv address ends in the number that everybody knows the paper by.
        paper = agent.paper.replace("https://arxiv.org/abs/", "arXiv ")
        table.add_row(name, paper or "–", agent.provenance, ", ".join(sorted(agent.needs)) or "–")
    return table


def envs() -> Table:
    """Environments, with the task behind each."""
    table = Table("environment", "task", title="environments", title_justify="left")
    for name in list_envs():
        table.add_row(name, str(env_spec(name).kwargs.get("task", "")))
    return table


def losses() -> Table:
    """Direct optimizers."""
    table = Table("loss", "what it is", title="direct optimizers", title_justify="left")
    for name, says in list_losses().items():
        table.add_row(name, says)
    return table


def suites() -> Table:
    """Suites of the package: how many runs and queries each is."""
    table = Table("suite", "runs", "queries", title="suites", title_justify="left")
    for name in list_suites():
        runs = load_suite(name, "runs")
        table.add_row(name, str(len(runs)), str(sum(run.budget for run in runs)))
    return table


LISTINGS: dict[str, Callable[[], Table]] = {"agents": agents, "envs": envs, "losses": losses, "suites": suites}
"""What can be listed, by name."""
