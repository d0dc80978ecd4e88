"""The command ``llm-duel``: play one run, play a suite, make the leaderboard, list what there is."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from llm_duel_env.benchmark.settings import nested, settings

if TYPE_CHECKING:
    from llm_duel_env.benchmark.run_config import RunConfig

DESCRIPTION = """Alignment of language models from preferences, as contextual dueling bandits.

An agent shows two responses to a prompt, an oracle says which is better, and every answer costs one query.

  llm-duel demo                                   minutes: a table, learning curves, TensorBoard logs
  llm-duel list agents                            who can play
  llm-duel run --agent sea --env duel/Synthetic-v0 --seed 3 --budget 2000
  llm-duel run --resume runs/...                  goes on with an interrupted run, exactly
  llm-duel bench demo --jobs 2                    all runs of a suite; the same command goes on with it
  llm-duel leaderboard runs/demo --out report     tables and figures from finished runs
  llm-duel board --out benchmark.md               every agent, from the results that are kept beside the code
  llm-duel export runs/... --out pairs.jsonl      the labels bought: prompt, chosen, rejected
"""


@dataclass
class Run:
    """Plays one run: one agent, one environment, one seed, one budget of oracle queries.

    Settings come from the paper's defaults, then the recipe of the task (what differs is printed), then --set.
    The run stops cleanly on Ctrl-C and goes on with --resume; no label is bought twice.

    Example: llm-duel run --agent sea --env duel/TinyTLDR-v0 --seed 3 --budget 5000 --set policy.learning_rate=1e-4
    """

    agent: str | None = None
    """Name of the agent: see `llm-duel list agents`."""
    env: str | None = None
    """Environment: see `llm-duel list envs`."""
    seed: int | None = None
    """Seeds prompts, labels and agent (default 0)."""
    budget: int | None = None
    """Oracle queries that may be bought (default 1000)."""
    batch: int | None = None
    """Prompts per round (default 32)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Settings of the agent, e.g. policy.learning_rate=1e-4 candidates=10."""
    env_set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Settings of the environment, e.g. flip_rate=0.1 task_kwargs.candidates=16."""
    recipe: bool = True
    """Start from the recipe of (task, agent); --no-recipe starts from the paper's defaults."""
    eval_every: float | None = None
    """Share of the budget between evaluations (default 0.02)."""
    eval_prompts: int | None = None
    """Held-out prompts per evaluation (default 512)."""
    checkpoint_every: float | None = None
    """Seconds between checkpoints (default 60)."""
    folder: Path | None = None
    """Where the run goes (default runs/ENV/AGENT/seed-N)."""
    resume: Path | None = None
    """Folder of a run to go on with; other options, where given, must agree with it."""


@dataclass
class Bench:
    """Plays all runs of a suite in parallel processes. Finished runs are skipped, begun ones resumed.

    Example: llm-duel bench demo --out runs/demo --jobs 2
    """

    suite: tyro.conf.Positional[str]
    """A suite of the package (`llm-duel list suites`) or a YAML file."""
    out: Path | None = None
    """Where the runs go (default runs/SUITE)."""
    jobs: int | None = None
    """Processes, each with one thread (default: as many as there are cores)."""
    results: Path | None = None
    """A folder of kept results, e.g. benchmark/results: runs that it has are not played, and the results of those that
    are go there, small."""


@dataclass
class Board:
    """The board of every agent, in Markdown, from kept results (see `bench --results`).

    Example: llm-duel board --results benchmark/results --out benchmark.md
    """

    results: Path = Path("benchmark/results")
    """Folder of kept results."""
    out: Path = Path("benchmark.md")
    """File to write."""
    suites: tuple[str, ...] = ()
    """Suites that it is made of (default: the package's board suites)."""
    notes: Path | None = None
    """A Markdown file to add at its end."""


@dataclass
class Leaderboard:
    """Tables and learning curves from finished runs, searched for below the folders given.

    Example: llm-duel leaderboard runs/demo --out report
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders."""
    out: Path | None = None
    """Also write Markdown, CSV, JSON and figures into this folder."""


@dataclass
class Export:
    """The labels that a run bought, as a preference data set: JSON lines of prompt, chosen and rejected; ties left out.

    Example: llm-duel export runs/TinyTLDR-v0/sea/seed-3 --out preferences.jsonl
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """File to write."""


@dataclass
class List:
    """What there is: agents, environments, direct optimizers (losses), suites.

    Example: llm-duel list agents
    """

    what: tyro.conf.Positional[Literal["agents", "envs", "losses", "suites", "all"]] = "all"
    """Which list."""


@dataclass
class Demo:
    """The demo suite, then its leaderboard: agents against one another in minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Where runs, tables and figures go."""
    jobs: int | None = None
    """Processes, each with one thread (default: as many as there are cores)."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a run broke, 2 the command cannot be carried out as given, 130 interrupted."""
    told = tyro.cli(
        Run | Bench | Board | Leaderboard | Export | List | Demo,  # type: ignore[arg-type]
        prog="llm-duel",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    sys.exit(carry_out(told))


def carry_out(told: Any) -> int:
    """Carries a command out and returns its exit code; what the user can mend is said without a traceback."""
    from llm_duel_env.benchmark.runner import RunInterrupted
    from llm_duel_env.extras import MissingExtraError
    from llm_duel_env.ledger import LedgerError
    from llm_duel_env.oracles.base import OracleError

    verbs: dict[type, Any] = {
        Run: _run, Bench: _bench, Board: _board, Leaderboard: _leaderboard, Export: _export, List: _list, Demo: _demo,
    }  # fmt: skip
    try:
        return verbs[type(told)](told)
    except RunInterrupted as stop:
        print(f"\n{stop}\nresume with: llm-duel run --resume {stop.folder}", flush=True)
        return 130
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (OracleError, LedgerError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(told: Run) -> int:
    from llm_duel_env.benchmark.runner import run

    config, resume = _resumed(told) if told.resume else _fresh(told), told.resume is not None
    result = run(config, resume=resume)
    wins = result["curve"].get("offline_win_rate")  # a task without reference responses knows none
    print(
        f"{result['status']}: {result['queries']} queries, "
        f"{f'offline win rate {wins[-1]:.3f}, ' if wins else ''}{result['seconds']:.0f} s\n"
        f"result: {Path(config.folder) / 'result.json'}\n"
        f"curves: tensorboard --logdir {config.folder}"
    )
    return 0


def _fresh(told: Run) -> RunConfig:
    from llm_duel_env.benchmark.recipes import difference, recipe_of
    from llm_duel_env.benchmark.registry import load_agent
    from llm_duel_env.benchmark.run_config import RunConfig, check, env_spec

    if not told.agent or not told.env:
        raise ValueError("run: expected --agent and --env (or --resume FOLDER); see llm-duel list")
    agent_class = load_agent(told.agent)
    env_spec(told.env)
    env_kwargs = nested(settings(told.env_set))
    recipe = recipe_of(told.env, told.agent, env_kwargs) if told.recipe else {}
    folder = told.folder or Path("runs") / told.env.rsplit("/", 1)[-1] / told.agent / f"seed-{told.seed or 0}"
    config = RunConfig(
        agent=told.agent,
        env=told.env,
        folder=str(folder),
        overrides={**recipe, **settings(told.set)},
        env_kwargs=env_kwargs,
        **_given(told),
    )
    check(config)
    changed = difference(agent_class.configure(config.overrides), agent_class.configure({}))
    for name, (was, now) in changed.items():
        print(f"{name} = {now} (paper's default: {was})")
    return config


def _resumed(told: Run) -> RunConfig:
    from llm_duel_env.benchmark.run_config import RunConfig

    assert told.resume is not None
    if told.folder is not None:
        raise ValueError("run: --resume names the folder; leave --folder out")
    stored = RunConfig.read(told.resume)
    given: dict[str, Any] = {name: value for name in ("agent", "env") if (value := getattr(told, name)) is not None}
    if told.set:
        given["overrides"] = {**stored.overrides, **settings(told.set)}
    if told.env_set:
        given["env_kwargs"] = {**stored.env_kwargs, **nested(settings(told.env_set))}
    return dataclasses.replace(stored, **given, **_given(told))


def _given(told: Run) -> dict[str, Any]:
    names = ("seed", "budget", "batch", "eval_every", "eval_prompts", "checkpoint_every")
    return {name: value for name in names if (value := getattr(told, name)) is not None}


def _bench(told: Bench) -> int:
    from llm_duel_env.benchmark.suite import load_suite

    name = Path(told.suite).stem
    out = told.out or Path("runs") / name
    runs = load_suite(told.suite, out)
    if told.results is None:
        return _sweep(runs, told.jobs, f"llm-duel leaderboard {out}")
    from llm_duel_env.benchmark.stored import Kept, keep

    kept = Kept(told.results)
    missing = [run for run in runs if kept.result(run) is None]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are kept in {told.results}")
    try:
        return _sweep(missing, told.jobs, f"llm-duel board --results {told.results}") if missing else 0
    finally:
        print(f"{len(keep(missing, told.results / name))} results kept in {told.results / name}")


def _board(told: Board) -> int:
    from llm_duel_env.benchmark.report import board
    from llm_duel_env.benchmark.stored import Kept

    command = f"llm-duel board --results {told.results} --out {told.out}"
    command += f" --suites {' '.join(told.suites)}" if told.suites else ""
    command += f" --notes {told.notes}" if told.notes else ""
    extra = told.notes.read_text() if told.notes else ""
    parts = board.write(Kept(told.results), told.out, command, told.suites or board.SUITES, extra)
    for part in parts:
        print(f"{part.suite}: {sum(part.missing.values())} runs not measured yet")
    print(told.out)
    return 0


def _sweep(runs: list[RunConfig], jobs: int | None, then: str) -> int:
    from llm_duel_env.benchmark.sweep import default_jobs, sweep

    outcome = sweep(runs, jobs=default_jobs() if jobs is None else jobs)
    print(f"{len(outcome.finished)} of {len(runs)} runs are over" + (f"; next: {then}" if outcome.finished else ""))
    for folder, error in outcome.broken.items():
        print(f"broken: {folder}: {error}", file=sys.stderr)
    if outcome.stopped:
        print("stopped; the same command goes on where it was")
        return 130
    return 1 if outcome.broken else 0


def _leaderboard(told: Leaderboard) -> int:
    from rich.console import Console

    from llm_duel_env.benchmark.leaderboard import find_results, has_win_rate, tables
    from llm_duel_env.benchmark.report import plots, table

    if not told.runs:
        raise ValueError("leaderboard: expected at least one folder of runs")
    results, unfinished = find_results(told.runs)
    skipped = [result for result in results if not has_win_rate(result)]
    if skipped:
        where = f"{len(skipped)} runs know no offline win rate and are left out, e.g. {skipped[0]['folder']}"
        print(where, file=sys.stderr)
    made = tables(results)
    if not made:
        raise ValueError("leaderboard: no run knows an offline win rate: their tasks have no reference responses")
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a file or a pipe does not wrap
    for one in made:
        table.show(one, console)
        console.print()
    if unfinished:
        print(f"{len(unfinished)} runs have no result yet, e.g. {unfinished[0]}", file=sys.stderr)
    if told.out is not None:
        for path in [*table.write(made, told.out), *plots.write(made, told.out)]:
            print(path)
    return 0


def _export(told: Export) -> int:
    from llm_duel_env.benchmark.run_folder import RunFolder
    from llm_duel_env.ledger import Ledger

    path = RunFolder(told.run).ledger
    if not path.exists():
        raise ValueError(f"export: there is no run in {told.run} ({path} is missing)")
    told.out.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(path) as ledger:
        print(f"{ledger.export_preferences(told.out)} preferences of {len(ledger)} labels: {told.out}")
    return 0


def _demo(told: Demo) -> int:
    from llm_duel_env.benchmark.suite import load_suite

    code = _sweep(load_suite("demo", told.out), told.jobs, f"llm-duel leaderboard {told.out}")
    if code != 130:
        code = _leaderboard(Leaderboard((told.out,), told.out / "report")) or code
        print(f"TensorBoard: tensorboard --logdir {told.out}")
    return code


def _list(told: List) -> int:
    from rich.console import Console

    from llm_duel_env.benchmark.listings import LISTINGS

    for name in LISTINGS if told.what == "all" else [told.what]:
        Console().print(LISTINGS[name]())
    return 0


if __name__ == "__main__":
    main()
