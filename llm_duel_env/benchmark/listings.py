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
        table.add_row(name, _short(agent.paper), agent.provenance, ", ".join(sorted(agent.needs)) or "–")
    return table


def envs() -> Table:
    """Environments, with the task behind each."""
    table = Table("environment", "task", title="environments", title_justify="left")
    for name in list_envs():
        table.add_row(name, str(env_spec(name).kwargs.get("task", "")))
    return table


def losses() -> Table:
    """Direct optimizers: paper, provenance, what they look at beyond the policy's log-probabilities, and under that
    their options (``loss_options.NAME``) with defaults."""
    table = Table("loss", "paper", "provenance", "needs, options", title="direct optimizers", title_justify="left")
    table.columns[1].overflow = "fold"
    for name, loss in list_losses().items():
        needs = ", ".join(sorted(loss.needs)) or "–"
        options = [f"{option}={str(default).lower()}" for option, default in loss.options.items()]
        table.add_row(name, _short(loss.paper), loss.provenance, "\n".join([needs, *options]))
    return table


def _short(paper: str) -> str:
    """An arXiv address by the number that everybody knows the paper by; other addresses without their scheme."""
    return paper.replace("https://arxiv.org/abs/", "arXiv ").removeprefix("https://") or "–"


def suites() -> Table:
    """Suites of the package: how many runs and queries each is."""
    table = Table("suite", "runs", "queries", title="suites", title_justify="left")
    for name in list_suites():
        runs = load_suite(name, "runs")
        table.add_row(name, str(len(runs)), str(sum(run.budget for run in runs)))
    return table


LISTINGS: dict[str, Callable[[], Table]] = {"agents": agents, "envs": envs, "losses": losses, "suites": suites}
"""What can be listed, by name."""
