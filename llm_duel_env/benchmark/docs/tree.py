"""The generated files of a checkout: where they lie, and what belongs into each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llm_duel_env.benchmark.docs.logged import FINITE, TEXT, envs_of, logged
from llm_duel_env.benchmark.docs.options import MARK, with_options
from llm_duel_env.benchmark.docs.pages import agent_page, agents_line, agents_table, losses_page, our_agents
from llm_duel_env.benchmark.registry import list_losses
from llm_duel_env.benchmark.report.board import SUITES, Part, part
from llm_duel_env.benchmark.stored import Kept
from llm_duel_env.extras import MissingExtraError

BEGIN, END = "<!-- agents: made by `make docs` -->", "<!-- end of agents -->"
ROW = re.compile(r"^\| `([\w/]+)` \|")


def generated(root: Path, *, play_text: bool = True) -> dict[Path, str]:
    """Path -> content of every generated file of the checkout at `root`.

    Args:
        root: of the repository.
        play_text: False takes the metrics of agents that play text alone from their present pages; to play them takes
            seconds each. The same is done for agents whose package is not installed.
    """
    parts = [part(suite, Kept(root / "benchmark" / "results")) for suite in SUITES]
    files = {agent_path(root, name): _agent(root, name, parts, play_text) for name in our_agents()}
    files[root / "docs" / "losses.md"] = _losses(root, play_text)
    for name, lines in {"README.md": agents_line(), "docs/agents.md": agents_table()}.items():
        files[root / name] = with_agents((root / name).read_text(), lines, name)
    for path in sorted((root / "docs").rglob("*.md")):
        if path not in files and MARK in (text := path.read_text()):
            files[path] = with_options(text)
    return files


def write(root: Path) -> list[Path]:
    """Writes the generated files; returns their paths."""
    files = generated(root)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(files)


def agent_path(root: Path, name: str) -> Path:
    """An agent's page."""
    return root / "docs" / "agents" / f"{name}.md"


def with_agents(document: str, lines: list[str], name: str) -> str:
    """The document of that name with `lines` about the agents between its two marks.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{name}: expected the marks {BEGIN} and {END}")
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def metrics_of(name: str, page: Path, *, play_text: bool = True) -> set[str]:
    """The names of all that an agent logs; the finite task tells them where the agent plays it, and takes no time."""
    envs = envs_of(name)
    if FINITE not in envs and not play_text:
        return _on_page(page)
    try:
        found = logged(name, FINITE if FINITE in envs else TEXT)
    except MissingExtraError:
        return _on_page(page)
    return found | {"length"} if TEXT in envs else found  # what a policy on text measures besides


def _agent(root: Path, name: str, parts: list[Part], play_text: bool) -> str:
    notes = root / "docs" / "agents" / "notes" / f"{name}.md"
    if not notes.exists():
        raise ValueError(f"{notes} is missing: write how {name} differs from its paper and from known releases")
    metrics = metrics_of(name, agent_path(root, name), play_text=play_text)
    return agent_page(name, metrics, parts, notes.read_text())


def _losses(root: Path, play_text: bool) -> str:
    """Losses that look at labels alone are played by online DPO; the others have an agent of their own name."""
    told: Callable[[str], set[str]] = lambda loss: metrics_of(loss, agent_path(root, loss), play_text=play_text)  # noqa: E731
    plain = metrics_of("uniform", agent_path(root, "uniform"))
    policy = {"loss", "grad_norm", "learning_rate", "gradient_steps", "pairs"} | plain
    metrics = {}
    for name, loss in list_losses().items():
        found = told(name) if loss.needs & {"scores", "ranking"} else logged("online_dpo", FINITE, loss=name)
        metrics[name] = found - policy - OF_AGENTS
    return losses_page(metrics, (root / "docs" / "losses.notes.md").read_text())


OF_AGENTS = {"regenerated_share", "known_prompts", "score_gap"}
"""What the agents of that name log, and not their losses."""


def _on_page(page: Path) -> set[str]:
    """The metrics that a page explains.

    Raises:
        ValueError: there is no page yet.
    """
    if not page.exists():
        raise ValueError(f"{page} is missing, and its agent cannot be played here to know what it logs")
    section = page.read_text().partition("## What it logs")[2].partition("\n## ")[0]
    return {match[1] for line in section.splitlines() if (match := ROW.match(line))}
