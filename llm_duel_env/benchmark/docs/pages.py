"""Pages from what the code says of itself, what recipes change, what was measured, and what people wrote beside it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_duel_env.benchmark.docs.explanations import explain
from llm_duel_env.benchmark.docs.fields import fields_of, value_of, written
from llm_duel_env.benchmark.docs.logged import KINDS, envs_of
from llm_duel_env.benchmark.leaderboard import Row
from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import list_agents, list_losses, load_agent
from llm_duel_env.benchmark.report.board import Part
from llm_duel_env.benchmark.report.table import markdown_table

MADE = "<!-- Made by `make docs`; what people wrote stands in {notes}. -->"
PROVENANCE = {
    "paper": "it follows the paper's text, or the library that it wraps, as far as the differences below say",
    "reconstructed": "it was rebuilt from notes, abstracts or released code, not from the paper's text; no table "
    "ranks it as the paper's method",
    "ours": "it is this project's own control, published nowhere",
}
POLICY = "policy."
PLAYS = {"finite": "finite tasks", "text": "tasks of text"}
COMMANDS = {"finite": "--seed 0 --budget 1000", "text": "--seed 0 --budget 2000 --eval-prompts 256"}
TOLD = {
    "scores": "the oracle's scores of the responses shown",
    "reward": "the environment's reward",
    "editor": "the task's editor",
    "degrader": "the task's degrader",
    "contrast_prompts": "the task's good and bad instructions",
    "goal_prompts": "the task's goals in prompts",
    "offline_pairs": "the task's given pairs",
    "ranking": "rankings",
}


def our_agents() -> list[str]:
    """The agents of this package, in alphabetical order; those of others have pages of their own."""
    return [name for name in list_agents() if load_agent(name).__module__.startswith("llm_duel_env.")]


def agent_page(name: str, metrics: Iterable[str], parts: Sequence[Part], notes: str) -> str:
    """The page of an agent.

    Args:
        name: as it is registered.
        metrics: names of all that it logs.
        parts: of the board; where it has no row it is not measured yet.
        notes: differences from paper and releases, in Markdown.
    """
    agent = load_agent(name)
    module = (sys.modules[agent.__module__].__doc__ or "").strip()
    envs = envs_of(name)
    told = "; ".join(TOLD.get(need, need) for need in sorted(agent.needs)) or "nothing: labels of duels alone"
    lines = [
        MADE.format(notes=f"`docs/agents/notes/{name}.md`"),
        "",
        f"# `{name}`",
        "",
        *prose(module),
        "",
        f"**`{agent.__name__}`** (`{source_of(agent)}`):",
        "",
        *prose(inspect.getdoc(agent) or ""),
        "",
        f"- Paper: {f'<{agent.paper}>' if agent.paper else 'none'}",
        f"- Provenance: **{agent.provenance}**: {PROVENANCE[agent.provenance]}.",
        f"- Told beyond duels: {told}.",
        f"- Plays {' and '.join(PLAYS[kind] for kind in sorted(agent.kinds))}: {', '.join(map('`{}`'.format, envs))}.",
        "",
        "## Command",
        "",
        "```bash",
        *(command(name, env) for env in envs),
        "```",
        "",
        "## Settings",
        "",
        *prose(inspect.getdoc(agent.Config) or ""),
        "",
        *settings_table(name, envs),
        "",
        "## What it logs",
        "",
        *markdown_table(["metric", "what it is"], [[f"`{m}`", explain(m)] for m in sorted(metrics)], numbers=False),
        "",
        "## Measured",
        "",
        *measured(name, [part for part in parts if part.table is None or part.table.env in envs]),
        "",
        "## Differences from the paper and from known releases",
        "",
        notes.strip(),
        "",
    ]
    return "\n".join(lines)


def command(name: str, env: str) -> str:
    """The command that plays an agent as the board does."""
    few = " --env-set task_kwargs.candidates=32" if "reward" in load_agent(name).needs else ""  # a library's limit
    return f"llm-duel run --agent {name} --env {env} {COMMANDS[KINDS[env]]}{few}"


def settings_table(name: str, envs: Sequence[str]) -> list[str]:
    """All settings with the default, the recipe's value per task where it differs, and what the code says of them; and
    which of the policy's play no part or are refused."""
    agent = load_agent(name)
    default = agent.configure({})
    tuned = {env: agent.configure(recipe_of(env, name, {})) for env in envs}
    rows = []
    for field in fields_of(default):
        if field.name.startswith(POLICY) and not agent.policy_plays:
            continue
        values = [value_of(config, field.name) for config in tuned.values()]
        changed = ["" if value == field.default else f"`{written(value)}`" for value in values]
        rows.append([f"`{field.name}`", f"`{written(field.default)}`", *changed, field.told])
    recipes = [f"recipe of {env.rsplit('/', 1)[-1].rsplit('-v', 1)[0]}" for env in envs]
    table = markdown_table(["setting", "default", *recipes, "what it is"], rows, numbers=False)
    if not agent.policy_plays:
        return [
            *table,
            "",
            f"The settings of `{POLICY}` play no part: another model than the policy chooses and answers.",
        ]
    if agent.policy_fixed:
        names = ", ".join(f"`{POLICY}{name}`" for name in agent.policy_fixed)
        return [*table, "", f"Refused where they are not the default: {names}."]
    return table


def measured(name: str, parts: Sequence[Part]) -> list[str]:
    """A table of the agent's rows of the board, or that there are none yet."""
    rows = []
    for part in parts:
        for row in part.rows(name):
            assert part.table is not None
            rows.append([row.label, f"`{part.table.env}`", *_figures(row, part.table.budget)])
    if not rows:
        return ["Not measured yet."]
    headings = ["label", "environment", "budget", "queries bought", "offline win rate", "online win rate"]
    headings += ["queries to target", "cumulative regret", "gradient steps", "seconds", "seeds"]
    told = "From the results in `benchmark/results`; `benchmark.md` has all agents, targets and intervals explained."
    if any(row.stalled for part in parts for row in part.rows(name)):
        told += " Stalled: ended without spending the budget."
    return [told, "", *markdown_table(headings, rows)]


def losses_page(metrics: Mapping[str, Iterable[str]], notes: str) -> str:
    """The page of the direct optimizers; `metrics` holds the names of what each logs, by loss."""
    lines = [
        MADE.format(notes="`docs/losses.notes.md`"),
        "",
        "# Losses",
        "",
        "Direct optimizers: pure functions of the log-probabilities of ranked responses, `(loss, metrics)`. "
        "Each agent with a setting `loss` takes any that needs no scores: `--set loss=ipo beta=0.3`; a loss's own "
        "options are set by `loss_options.NAME`.",
        "",
        "Delta = log pi - log ref of a response, summed over its tokens; h = Delta(winner) - Delta(loser); each loss "
        "is the mean over pairs.",
        "",
    ]
    for name, loss in list_losses().items():
        options = ", ".join(f"`{option}={written(default)}`" for option, default in loss.options.items()) or "none"
        beta = "" if "beta" in loss.settings else " It knows no beta."
        logs = "; ".join(f"`{m}`: {explain(m)}" for m in sorted(metrics[name]))
        lines += [
            f"## `{name}`",
            "",
            *prose(inspect.getdoc(loss.function) or ""),
            "",
            f"- Paper: <{loss.paper}>",
            f"- Provenance: **{loss.provenance}**: {PROVENANCE[loss.provenance]}.",
            f"- Looks at, beyond the policy's log-probabilities: {', '.join(sorted(loss.needs)) or 'nothing'}.",
            f"- Options: {options}.{beta}",
            f"- Logs {logs}",
            "",
        ]
    return "\n".join([*lines, notes.strip(), ""])


def agents_table() -> list[str]:
    """The table of `docs/agents.md`: every agent with its rule in one line."""
    rows = []
    for name in our_agents():
        agent = load_agent(name)
        rule = " ".join((inspect.getdoc(agent) or "").split("\n\n")[0].split())
        number = re.search(r"arxiv\.org/abs/([\d.]+)", agent.paper)
        paper = f"[{number[1] if number else 'paper'}]({agent.paper})" if agent.paper else "none"
        mark = "*" if agent.provenance == "reconstructed" else ""
        told = ", ".join(sorted(agent.needs)) or "–"
        rows.append([f"[`{name}`](agents/{name}.md){mark}", rule, paper, told, f"`{source_of(agent)}`"])
    return markdown_table(["agent", "rule", "paper", "told beyond duels", "file"], rows, numbers=False)


def agents_line() -> list[str]:
    """The README's list: the name of every agent, which leads to its page."""
    return [", ".join(f"[`{name}`](docs/agents/{name}.md)" for name in our_agents()) + "."]


def source_of(agent: Any) -> str:
    """An agent's file, as it is seen from the top of the repository."""
    return agent.__module__.removeprefix("llm_duel_env.").replace(".", "/") + ".py"


def prose(text: str) -> list[str]:
    """A docstring as Markdown: what is indented in it (formulas, field lists) is kept as it is."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        indented, before = line.startswith("    "), bool(lines) and lines[-1].startswith("    ")
        if lines and lines[-1] and line and indented != before:
            lines.append("")
        lines.append(line)
    return lines


def _figures(row: Row, budget: int) -> list[str]:
    interval = f" [{row.win_interval[0]:.3f}, {row.win_interval[1]:.3f}]" if row.win_interval else ""
    reached = "–" if row.queries_to_target is None else f"{'>' if row.censored else ''}{row.queries_to_target:.0f}"

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else f"{value:{form}}"

    return [
        str(budget),
        f"{row.queries:.0f}",
        f"{row.win_rate:.3f}{interval}",
        shown(row.online_win_rate, ".3f"),
        reached,
        shown(row.cumulative_regret, ".1f"),
        shown(row.gradient_steps, ".0f"),
        f"{row.seconds:.1f}",
        str(row.seeds) + (f" ({row.stalled} stalled)" if row.stalled else ""),
    ]
