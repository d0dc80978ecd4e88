"""What there is, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from llm_duel_env.benchmark.registry import list_agents, list_losses, load_agent
from llm_duel_env.benchmark.run_config import env_spec, list_envs
from llm_duel_env.benchmark.suite import list_suites, planned


def agents() -> Table:
    """Agents of all installed packages: paper, provenance, the kinds of task they play (finite, text), and under that
    what they are told beyond duels."""
    table = _table("agents", "agent", "paper", "provenance", "plays, told beyond duels")
    for name in list_agents():
        agent = load_agent(name)
        plays = [", ".join(sorted(agent.kinds)), *([", ".join(sorted(agent.needs))] if agent.needs else [])]
        table.add_row(name, _short(agent.paper), agent.provenance, "\n".join(plays))
    return table


def envs() -> Table:
    """Environments, with the task behind each."""
    table = _table("environments", "environment", "task")
    for name in list_envs():
        table.add_row(name, str(env_spec(name).kwargs.get("task", "")))
    return table


def losses() -> Table:
    """Direct optimizers: paper, provenance, what they look at beyond the policy's log-probabilities, and under that
    their options (``loss_options.NAME``) with defaults. All of them run on both kinds of task."""
    table = _table("direct optimizers", "loss", "paper", "provenance", "needs, options")
    for name, loss in list_losses().items():
        needs = ", ".join(sorted(loss.needs)) or "–"
        options = [f"{option}={str(default).lower()}" for option, default in loss.options.items()]
        table.add_row(name, _short(loss.paper), loss.provenance, "\n".join([needs, *options]))
    table.caption = "All run on finite tasks and on text; one that needs tokens takes a finite task's response for one."
    table.caption_justify = "left"
    return table


def _short(paper: str) -> str:
    """An arXiv address by the number that everybody knows the paper by; other addresses without their scheme."""
    return paper.replace("https://arxiv.org/abs/", "arXiv ").removeprefix("https://") or "–"


def suites() -> Table:
    """Suites of the package: how many runs and queries each is."""
    table = _table("suites", "suite", "runs", "queries")
    for name in list_suites():
        runs = planned(name, "runs")  # to look their agents up takes many seconds
        table.add_row(name, str(len(runs)), str(sum(run.budget for run in runs)))
    return table


def _table(title: str, *columns: str) -> Table:
    """An empty table whose first column, the names that one types, is never cut or broken."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    return table


LISTINGS: dict[str, Callable[[], Table]] = {"agents": agents, "envs": envs, "losses": losses, "suites": suites}
"""What can be listed, by name."""
