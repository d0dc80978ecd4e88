"""The command ``llm-duel``: play one run, play a suite, make the leaderboard, list what there is."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from llm_duel_env.options import Bench, Board, Demo, Enter, Export, Leaderboard, List, Pool, Run, ServeOracle, Submit

if TYPE_CHECKING:
    from llm_duel_env.benchmark.run_config import RunConfig

DESCRIPTION = """Alignment of language models from preferences, as contextual dueling bandits.

An agent shows two responses to a prompt, an oracle says which is better, and every answer costs one query.

  llm-duel demo                                   minutes: a table, learning curves, TensorBoard logs
  llm-duel list agents                            who can play
  llm-duel run --agent sea --env duel/Synthetic-v0 --seed 3 --budget 2000
  llm-duel run --config FILE.yaml --dry-run       what it would need, and whether all parts fit together
  llm-duel run --resume runs/...                  goes on with an interrupted run, exactly
  llm-duel bench demo --jobs 2                    all runs of a suite; the same command goes on with it
  llm-duel leaderboard runs/demo --out report     tables and figures from finished runs
  llm-duel board --out benchmark.md               every agent, from the results that are kept beside the code
  llm-duel enter my_agent.py:MyAgent              an agent of yours beside online DPO, ten seeds, and the table
  llm-duel submit runs/mine --out mine.zip ...    finished runs as one archive that others can check
  llm-duel serve-oracle MODEL                     a reward model for runs to ask, batched
  llm-duel export runs/... --out pairs.jsonl      the labels bought: prompt, chosen, rejected
  llm-duel pool build DATA --out pool             a finite task of any scored responses, for duel/Pool-v0
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a run broke, 2 the command cannot be carried out as given, 130 interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads spin while they wait, and starve other work
    told = tyro.cli(
        Run | Bench | Board | Leaderboard | Enter | Submit | Export | Pool | List | Demo | ServeOracle,
        prog="llm-duel",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    sys.exit(carry_out(told))


def carry_out(told: Any) -> int:
    """Carries a command out and returns its exit code; what the user can mend is said without a traceback."""
    from llm_duel_env.benchmark.launcher import speaks
    from llm_duel_env.benchmark.runner import RunInterrupted
    from llm_duel_env.extras import MissingExtraError
    from llm_duel_env.ledger import LedgerError
    from llm_duel_env.oracles.base import OracleError

    verbs: dict[type, Any] = {
        Run: _run, Bench: _bench, Board: _board, Leaderboard: _leaderboard, Export: _export, Pool: _pool, List: _list,
        Demo: _demo, ServeOracle: _serve_oracle, Enter: _enter, Submit: _submit,
    }  # fmt: skip
    try:
        return verbs[type(told)](told)
    except RunInterrupted as stop:
        if speaks():
            print(f"\n{stop}\nresume with: llm-duel run --resume {stop.folder}", flush=True)
        return 130
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (OracleError, LedgerError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(told: Run) -> int:
    from llm_duel_env.benchmark.launcher import launch, launched, speaks
    from llm_duel_env.benchmark.run_command import fresh, resumed, words
    from llm_duel_env.benchmark.runner import run

    if told.ranks < 1:
        raise ValueError(f"--ranks: expected at least 1, got {told.ranks}")
    if told.dry_run:
        return _dry_run(told)
    if told.ranks > 1 and not launched():
        return launch([sys.executable, "-m", "llm_duel_env.cli", *words(told)], told.ranks)
    config, resume = resumed(told) if told.resume else fresh(told), told.resume is not None
    result = run(config, resume=resume)
    if not speaks():
        return 0
    wins = result["curve"].get("offline_win_rate")  # a task without reference responses knows none
    print(
        f"{result['status']}: {result['queries']} queries, "
        f"{f'offline win rate {wins[-1]:.3f}, ' if wins else ''}{result['seconds']:.0f} s\n"
        f"result: {Path(config.folder) / 'result.json'}\n"
        f"curves: tensorboard --logdir {config.folder}"
    )
    return 0


def _dry_run(told: Run) -> int:
    from llm_duel_env.benchmark.dry_run import dry_run
    from llm_duel_env.benchmark.launcher import launched
    from llm_duel_env.benchmark.run_command import file_of, fresh

    if told.resume is not None or launched():
        raise ValueError("--dry-run: expected a run that is not begun, in one process; say how many with --ranks")
    file = file_of(told)
    dry_run(fresh(told), told.ranks, file.shapes, file.gpu_memory)
    return 0


def _bench(told: Bench) -> int:
    from llm_duel_env.benchmark.bench_command import selected, table, tasks_of

    if told.ray_gpus and told.ray is None:
        raise ValueError("--ray-gpus: expected --ray with it; processes of this machine share what GPUs it has")
    name = Path(told.suite).stem
    out = told.out or Path("runs") / name
    runs, whole = selected(told, out)
    on = (told.ray, told.ray_gpus) if told.ray is not None else None
    if told.results is None:
        return _tell(table(runs, None)) if told.dry_run else _sweep(runs, told.jobs, f"llm-duel leaderboard {out}", on)
    from llm_duel_env.benchmark.result_fields import is_result
    from llm_duel_env.benchmark.run_folder import RunFolder
    from llm_duel_env.benchmark.stored import Kept, keep

    kept = Kept(told.results)
    if told.dry_run:
        return _tell(table(runs, kept))
    missing = [run for run in runs if kept.result(run) is None]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are kept in {told.results}")
    try:
        return _sweep(missing, told.jobs, f"llm-duel board --results {told.results}", on) if missing else 0
    finally:
        folder = told.results / name
        over = [run for run in missing if is_result(RunFolder(run.folder).result)]  # a damaged one was told as broken
        print(f"{len(keep(over, folder, by_task=len(tasks_of(whole)) > 1))} results kept in {folder}")


def _tell(table: Any) -> int:
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)  # a file or a pipe does not wrap
    return 0


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


def _sweep(runs: list[RunConfig], jobs: int | None, then: str, on: tuple[str, float] | None = None) -> int:
    """Plays runs in processes, or `on` a Ray cluster (its address, and the GPUs of a run)."""
    if on is not None:
        from llm_duel_env.benchmark import sweep_ray

        outcome = sweep_ray.sweep(runs, address=on[0], jobs=jobs, gpus=on[1])
    else:
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

    from llm_duel_env.benchmark.leaderboard import tables
    from llm_duel_env.benchmark.report import html, outputs, table
    from llm_duel_env.benchmark.result_fields import incomplete
    from llm_duel_env.benchmark.results import find_results, has_win_rate

    if not told.runs:
        raise ValueError("leaderboard: expected at least one folder of runs")
    outputs.check(told.out, told.parquet)
    results, unfinished = find_results(told.runs)
    if said := incomplete(results):
        raise ValueError(said)
    for archive, by in sorted({(result["archive"], result["by"]) for result in results if "archive" in result}):
        print(f"{archive}: runs by {by}; hashes, ledgers, labels and figures fit together")
    if told.suite is not None:
        from llm_duel_env.benchmark.stored import of_suite

        results, missing = of_suite(told.suite, results)
        if missing:
            of = missing + len(results)
            print(f"{told.suite}: {missing} of {of} runs are not among the results", file=sys.stderr)
        unfinished = []
    if told.rerun is not None:
        from llm_duel_env.benchmark.rerun import rerun, rounds_of

        results = rerun(results, rounds_of("--rerun", told.rerun), told.rerun_seeds)
    skipped = [result for result in results if not has_win_rate(result)]
    if skipped:
        where = f"{len(skipped)} runs know no offline win rate and are left out, e.g. {skipped[0]['folder']}"
        print(where, file=sys.stderr)
    made = tables(results, told.against)
    if not made:
        raise ValueError("leaderboard: no run knows an offline win rate: their tasks have no reference responses")
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)  # a file or a pipe does not wrap
    for one in made:
        table.show(one, console)
        console.print()
    if unfinished:
        print(f"{len(unfinished)} runs have no result yet, e.g. {unfinished[0]}", file=sys.stderr)
    if told.out is not None:
        for path in outputs.write(made, told.out, parquet=told.parquet):
            print(path)
    for path in filter(None, [told.html, told.out and told.out / "leaderboard.html"]):
        print(html.write(made, path, _leaderboard_command(told)))
    return 0


def _leaderboard_command(told: Leaderboard) -> str:
    words = ["llm-duel", "leaderboard", *map(str, told.runs)]
    words += ["--suite", told.suite] if told.suite else []
    words += ["--against", *told.against] if told.against else []
    words += ["--rerun", *map(str, told.rerun)] if told.rerun is not None else []
    words += ["--out", str(told.out)] if told.out else []
    return shlex.join(words + (["--html", str(told.html)] if told.html else []))


def _submit(told: Submit) -> int:
    from llm_duel_env.benchmark.registry import in_file
    from llm_duel_env.benchmark.rerun import check, rounds_of
    from llm_duel_env.benchmark.result_fields import incomplete
    from llm_duel_env.benchmark.results import find_results
    from llm_duel_env.benchmark.run_folder import sha256
    from llm_duel_env.benchmark.submission import pack

    if told.check is not None:
        results = find_results(told.runs)[0]
        if said := incomplete(results):
            raise ValueError(said)
        check(results, rounds_of("--check", told.check))
    made = pack(told.runs, told.out, by=told.by, description=told.description, seeds=told.seeds)
    for entry in made["entries"]:
        print(f"{entry['label']} on {entry['env']}: {entry['budget']} queries, seeds {entry['seeds']}")
        if in_file(entry["agent"]):
            print(f"{entry['agent']} is a file: others cannot replay it unless it is a package", file=sys.stderr)
    print(f"{len(made['runs'])} runs: {told.out} ({told.out.stat().st_size} bytes, sha256 {sha256(told.out)})")
    return 0


def _enter(told: Enter) -> int:
    from llm_duel_env.benchmark.entering import Entry, entry_of

    entry: Entry = entry_of(told)
    code = _sweep(entry.runs, told.jobs, f"llm-duel leaderboard {entry.out}")
    return code or _leaderboard(Leaderboard((entry.out, *entry.kept), entry.out / "report"))


def _export(told: Export) -> int:
    from llm_duel_env.benchmark.run_folder import RunFolder
    from llm_duel_env.ledger import Ledger

    path = RunFolder(told.run).ledger
    if not path.exists():
        raise ValueError(f"export: there is no run in {told.run} ({path} is missing)")
    if told.what == "policy":
        from llm_duel_env.benchmark.policy_export import export_policy

        print(f"a model for AutoModelForCausalLM.from_pretrained: {export_policy(told.run, told.out)}")
        return 0
    told.out.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(path) as ledger:
        print(f"{ledger.export_preferences(told.out)} preferences of {len(ledger)} labels: {told.out}")
    return 0


def _pool(told: Pool) -> int:
    from llm_duel_env.pools import build_pool
    from llm_duel_env.tasks.pool_files import PRESETS, Columns

    columns = PRESETS[told.preset] if told.preset else Columns()
    given = {name: value for name in ("prompt", "responses", "scores", "sources", "scale", "logits")
             if (value := getattr(told, name)) is not None}  # fmt: skip
    facts = build_pool(
        told.source,
        told.out,
        dataclasses.replace(columns, **given),
        encoder=told.encoder,
        embeddings=told.embeddings,
        candidates=told.candidates,
        max_tokens=told.max_tokens,
        split=told.split,
        seed=told.seed,
    )
    print(f"{facts['ties']:.1%} of pairs are ties\npool: {told.out}")
    print(f"play it: llm-duel run --agent sea --env duel/Pool-v0 --env-set task_kwargs.folder={told.out}")
    return 0


def _demo(told: Demo) -> int:
    from llm_duel_env.benchmark.suite import load_suite

    begun = time.monotonic()
    code = _sweep(load_suite("demo", told.out), told.jobs, f"llm-duel leaderboard {told.out}")
    if code != 130:
        code = _leaderboard(Leaderboard((told.out,), told.out / "report")) or code
        print(f"TensorBoard: tensorboard --logdir {told.out}")
        print(f"{time.monotonic() - begun:.0f} s{_peak_memory()}")
    return code


def _peak_memory() -> str:
    """What the largest process held, as ", ..." to print; nothing where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f", at most {most * unit / 1e9:.2f} GB resident in one process"


def _serve_oracle(told: ServeOracle) -> int:
    from llm_duel_env.oracles.serve import ServerSettings, serve

    serve(ServerSettings(**{**vars(told), "devices": told.devices or "auto"}))
    return 0


def _list(told: List) -> int:
    from rich.console import Console

    from llm_duel_env.benchmark.listings import LISTINGS

    for name in LISTINGS if told.what == "all" else [told.what]:
        Console().print(LISTINGS[name]())
    return 0


if __name__ == "__main__":
    main()
