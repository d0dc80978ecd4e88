"""The leaderboard as one HTML file: no network, no script but its own, everything that runs say escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import llm_duel_env
from llm_duel_env.benchmark.leaderboard import Table
from llm_duel_env.benchmark.report import html_runs
from llm_duel_env.benchmark.report.details import Block, blocks
from llm_duel_env.benchmark.report.html_bars import Bars, difference_bars, target_bars
from llm_duel_env.benchmark.report.html_charts import Chart
from llm_duel_env.benchmark.report.html_curves import charts
from llm_duel_env.benchmark.report.html_runs import FIGURES, AgentSection
from llm_duel_env.benchmark.report.html_styles import Look, Style, looks_of, styles
from llm_duel_env.benchmark.report.html_table import Column, Line, lines
from llm_duel_env.benchmark.report.table import notes

STATIC = Path(__file__).parent / "static"
FEEDBACK = {
    "bernoulli": "a label is drawn with the oracle's probability, so that labels are noisy",
    "threshold": "a label is whatever the oracle finds likelier, always",
}


@dataclass(frozen=True)
class Section:
    """One table with all that belongs to it."""

    id: str
    table: Table
    compared: list[str]
    """What is compared, in sentences."""
    notes: list[str]
    columns: list[Column]
    lines: list[Line]
    blocks: list[Block]
    """The tables below the main one."""
    charts: list[Chart]
    bars: list[Bars]
    agents: list[AgentSection]
    styles: dict[str, Style]


def write(tables: Sequence[Table], path: Path, command: str) -> Path:
    """Writes the report of `tables`, made by `command`, to `path`; returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page(tables, command).encode("utf-8", errors="replace"))  # a text may hold half a surrogate pair
    return path


def page(tables: Sequence[Table], command: str) -> str:
    """The report as one page of HTML.

    Args:
        tables: at least one.
        command: what made it.

    Raises:
        ValueError: a sample file that is none.
    """
    environment = Environment(
        loader=FileSystemLoader(STATIC),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": html_runs.shown_text, "code": code, "breakable": breakable}
    environment.globals |= {"verdict": html_runs.verdict, "percent": html_runs.percent, "figures": FIGURES}
    script = (STATIC / "report.js").read_text(encoding="utf-8")
    # Agents that are told of duels alone come first, and the largest comparison.
    ordered = sorted(tables, key=lambda table: (bool(table.asks), -len(table.rows)))
    looks = looks_of([[row.label for row in table.rows] for table in ordered])
    return environment.get_template("report.html.j2").render(
        sections=[section(table, id, looks) for table, id in zip(ordered, ids([table.env for table in ordered]))],
        command=command,
        version=llm_duel_env.__version__,
        style=Markup((STATIC / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def ids(envs: Sequence[str]) -> list[str]:
    """What the parts of the page are called in links, by their environments.

    >>> ids(["duel/Synthetic-v0", "duel/TinyTLDR-v0", "duel/Synthetic-v0"])
    ['synthetic-v0', 'tinytldr-v0', 'synthetic-v0-2']
    """
    found: list[str] = []
    for env in envs:
        name = re.sub(r"[^a-z0-9]+", "-", env.rpartition("/")[2].lower())
        again = 1 + sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(name if again == 1 else f"{name}-{again}")
    return found


def section(table: Table, id: str, looks: Mapping[str, Look]) -> Section:
    """All that the report says of one table, in a part of the page that is called `id`."""
    columns, rows = lines(table)
    bars = [found for make in (target_bars, difference_bars) if (found := make(table)) is not None]
    return Section(
        id=id,
        table=table,
        compared=compared(table),
        notes=notes(table),
        columns=columns,
        lines=rows,
        blocks=blocks(table),
        charts=charts(table),
        bars=bars,
        agents=html_runs.sections(table),
        styles=styles([row.label for row in table.rows], looks),
    )


def compared(table: Table) -> list[str]:
    """What is compared, under which feedback and budget, in sentences."""
    agents = len(table.rows)
    told = f", and is told {', '.join(table.asks)} besides" if table.asks else ", and nothing else"
    settings = f" with {json.dumps(table.env_kwargs, sort_keys=True)}" if table.env_kwargs else ""
    seeds = sorted({row.seeds for row in table.rows})
    each = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return [
        f"{agents} agent{'s' if agents > 1 else ''} on {table.env}{settings}. In each round an agent sees "
        f"{table.batch} prompts and shows two responses to each; it learns which of the two the oracle prefers{told}. "
        f"Each label costs one query, and everybody's budget is {table.budget:,} queries.",
        f"{table.feedback.capitalize()} feedback: "
        f"{FEEDBACK.get(table.feedback, 'a label is made as the environment says')}.",
        f"What is measured: the deployed policy answers {table.eval_prompts} held-out prompts, and its offline win "
        "rate is the share of them on which the oracle prefers its response to a stored one of the reference policy.",
        f"Each agent played {each} seed{'s' if seeds[-1] > 1 else ''}; runs of one seed meet the same prompts.",
    ]


def code(told: str) -> Markup:
    """A sentence whose parts between backticks are code.

    >>> str(code("run `a < b`"))
    'run <code>a &lt; b</code>'
    """
    parts = [
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(told.split("`"))
    ]
    return Markup("").join(parts)


def breakable(label: str) -> Markup:
    """A name that a line may end in, after an underscore.

    >>> str(breakable("online_dpo"))
    'online_<wbr>dpo'
    """
    return Markup("_<wbr>").join(label.split("_"))
